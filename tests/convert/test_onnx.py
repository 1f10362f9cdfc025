"""ONNX files of these layers, run by onnxruntime: folded and frozen ones, and those unfolded ones that are plain products."""

import pytest
import torch
from torch import nn

from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear

# Exports take seconds each, and PyTorch's exporter and its libraries warn of their own future.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.hidden, self.out = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.conv(x))))
        return self.out(torch.relu(self.hidden(x.mean((2, 3)))))


def export(model, x, file):
    """The kinds of the file's nodes, and what onnxruntime makes of x, and of x twice over: the batch is free."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    batch = {0: torch.export.Dim("n", min=2)}
    program = torch.onnx.export(model.eval(), (x,), dynamo=True, dynamic_shapes=(batch,), verbose=False)
    program.save(file)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    outputs = [torch.from_numpy(session.run(None, {name: t.numpy()})[0]) for t in (x, torch.cat((x, 2 * x)))]
    return [node.op_type for node in program.model.graph], outputs


def assert_computes(model, x, outputs):
    with torch.no_grad():
        for got, wanted in zip(outputs, (model(x), model(torch.cat((x, 2 * x)))), strict=True):
            assert got.shape == wanted.shape and (got - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_folded_model(tmp_path):
    model, x = Network(), torch.randn(3, 3, 12, 12)
    summarize(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # trained a little
        wanted = model(x)
    fold(model)
    nodes, outputs = export(model, x, tmp_path / "model.onnx")
    assert nodes.count("Conv") == 2 and nodes.count("Gemm") == 2
    assert_computes(model, x, outputs)
    assert (outputs[0] - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_frozen_model(tmp_path):
    model = nn.Sequential(SummaryLinear(16, 8), nn.ReLU(), SummaryLinear(8, 20, bias=False)).eval()
    with torch.no_grad():
        model[0].b.mul_(1.3)
    for layer in (model[0], model[2]):
        layer.freeze()
    x = torch.randn(3, 16)
    nodes, outputs = export(model, x, tmp_path / "model.onnx")
    assert set(nodes) <= {"Gemm", "MatMul", "Transpose", "Relu"}
    assert_computes(model, x, outputs)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SummaryConv2d(4, 6, 3, groups=2), (3, 4, 7, 7)),
        (lambda: SummaryClassifier(16, 5), (3, 16)),
        (lambda: SummaryHead(16, 8, 5), (3, 16)),
    ],
    ids=["conv2d", "classifier", "head"],
)
def test_unfolded_layers_that_are_plain_products(make, shape, tmp_path):
    model, x = make(), torch.randn(shape)
    with torch.no_grad():
        model.b.mul_(1.3)
    _, outputs = export(model, x, tmp_path / "model.onnx")
    assert_computes(model, x, outputs)


@pytest.mark.parametrize(("make", "name"), [(SummaryLinear, "summary"), (SummaryLayer, "summary_pair")])
def test_unfolded_layers_of_an_operator_are_refused_by_its_name(make, name, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        export(make(16, 5), torch.randn(3, 16), tmp_path / "model.onnx")
    causes = []
    error = raised.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any(f"interp_nn.{name}.default" in cause for cause in causes)
