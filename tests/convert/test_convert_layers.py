"""The layers of a model that are converted, and those that are skipped, by name and with the reason."""

import copy
import warnings

import pytest
import torch
from convertible import GPT, ResNet, classes, error
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryConv2d, SummaryHead, SummaryLinear

# Selected layers


NAMES = ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "fc"]


@pytest.mark.parametrize(
    ("select", "wanted"),
    [
        (None, NAMES),
        ("*", NAMES),
        ("fc", ["fc"]),
        ("blocks.*", NAMES[1:5]),
        ("blocks.?.conv1", ["blocks.0.conv1", "blocks.1.conv1"]),
        (["fc", "stem"], ["stem", "fc"]),
        (("*.conv1", "*.0.*"), ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1"]),
        (lambda name, m: isinstance(m, nn.Conv2d) and m.groups == 2, ["blocks.0.conv2", "blocks.1.conv2"]),
        (lambda name, m: name.endswith("0.conv1"), ["blocks.0.conv1"]),
    ],
)
def test_selection(select, wanted):
    model = ResNet()
    report = summarize(model, select=select)
    assert [row.name for row in report.converted] == wanted and not report.skipped
    assert [name for name, m in model.named_modules() if isinstance(m, (SummaryLinear, SummaryConv2d))] == wanted


@pytest.mark.parametrize(
    ("select", "kind", "message"),
    [
        ("fcc", ValueError, r"select: 'fcc' is no layer of the model; near it: fc"),
        ("blocks.0.conv3", ValueError, r"near it: blocks\.0\.conv\d"),
        (
            "zzz*",
            ValueError,
            r"'zzz\*' is no layer of the model; it has stem, blocks\.0\.conv1, .*, blocks\.1\.conv2, fc$",
        ),
        (
            ["fc", "blocks.0"],
            ValueError,
            r"'blocks.0' is a Block, not a layer to convert \(those in it are 'blocks.0.\*'\)",
        ),
        (lambda name, m: False, ValueError, "select: chooses none of the model's layers"),
        ([3], TypeError, "select: got int, want a path or a pattern of paths"),
        (3, TypeError, "^select: got int, want a path, several, or a function"),
        ([], ValueError, "^select: got no path, want at least one"),
    ],
)
def test_a_selection_of_nothing_is_refused(select, kind, message):
    model = ResNet()
    kinds = classes(model)
    with pytest.raises(kind, match=message):
        summarize(model, select=select)
    assert classes(model) == kinds


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"^model: got Tensor, want a torch.nn.Module"):
        summarize(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"^model: got dict"):
        fold({})
    with pytest.raises(ValueError, match=r"^preserve: got 'outputs', want 'function' or 'weight'"):
        summarize(ResNet(), preserve="outputs")
    for rows in (-1, 2.5):
        with pytest.raises(ValueError, match=f"^rows: got {rows}, want an integer >= 0"):
            summarize(ResNet(), rows=rows)


def test_nothing_to_convert_is_an_empty_report():
    assert summarize(nn.ReLU()).converted == () and fold(ResNet()).converted == ()
    model = ResNet()
    summarize(model)
    assert summarize(model) == summarize(nn.ReLU())


# Shared and tied


def test_a_shared_module_is_converted_once():
    layer = nn.Linear(6, 6, dtype=torch.float64)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    report = summarize(model, select="2")  # by its second path
    assert [row.name for row in report.converted] == ["0"]
    assert model[0] is model[2] is layer and error(model(x), before) <= 1e-12
    assert len(fold(model).converted) == 1 and error(model(x), before) <= 1e-12


@pytest.mark.parametrize("how", ["parameter", "data", "transposed"])
def test_tied_layers_are_converted_together(how):
    outputs = 4 if how == "transposed" else 6
    model = nn.Sequential(nn.Linear(6, outputs), nn.Tanh(), nn.Linear(outputs, 6)).double()
    x = torch.randn(3, 6).double()
    if how == "parameter":
        model[2].weight = model[0].weight
    elif how == "data":
        model[2].weight.data = model[0].weight.data
    else:
        model[2].weight = nn.Parameter(model[0].weight.data.t())
    before = model(x)
    report = summarize(model)
    assert [row.error for row in report.converted] == [report.error] * 2 and report.error < 1e-14
    assert error(model(x), before) <= 1e-12
    assert model[2].b.data_ptr() == model[0].b.data_ptr()
    assert (model[2].b is model[0].b) is (how == "parameter")
    assert torch.equal(model[2].b, model[0].b.t() if how == "transposed" else model[0].b)
    assert len(fold(model).converted) == 2 and error(model(x), before) <= 1e-12


BUFFER = torch.randn(120, dtype=torch.float64)
PARTS = {
    "rows of another": (BUFFER[:64].view(8, 8), BUFFER[:32].view(4, 8)),
    "rows from within": (BUFFER[:64].view(8, 8), BUFFER[32:96].view(8, 8)),
    "the same entries in another shape": (BUFFER[:64].view(8, 8), BUFFER[:64].view(4, 16)),
    "the same start and shape": (BUFFER[:64].view(8, 8), BUFFER.as_strided((8, 8), (9, 1))),
}


@pytest.mark.parametrize("weights", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("order", [1, -1])
def test_layers_that_share_part_of_their_memory_are_skipped(weights, order):
    model = nn.ModuleList([nn.Linear(4, 4, dtype=torch.float64), nn.Embedding(3, 4)])
    for weight in weights[::order]:
        model.append(nn.Linear(*weight.shape[::-1]))
        model[-1].weight = nn.Parameter(weight)
    model.append(nn.Linear(8, 8))
    model[-1].weight = model[2].weight  # and what is tied to one of them
    state = copy.deepcopy(model.state_dict())
    report = summarize(model)
    assert [row.name for row in report.converted] == ["0"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if name[0] != "0")
    reasons = {row.name: row.reason for row in report.skipped}
    assert reasons["2"] == "its weight overlaps 3.weight in memory" == reasons["4"].replace("2", "3")
    assert reasons["3"] == "its weight overlaps 2.weight in memory"


def test_parts_of_one_buffer_are_layers_of_their_own():
    model = nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 8)).double()
    buffer, at = torch.randn(150, dtype=torch.float64), 0
    for p in model.parameters():
        p.data = buffer[at : at + p.numel()].view(p.shape)
        at += p.numel()
    x = torch.randn(3, 8, dtype=torch.float64)
    before = model(x)
    assert len(summarize(model).converted) == 2 and error(model(x), before) <= 1e-12


def test_layers_tied_to_what_stays_are_refused():
    model = GPT().eval()
    tokens = torch.arange(8).view(2, 4)
    before = model(tokens)
    report = summarize(model)
    assert [row.name for row in report.converted] == ["mlp.0", "mlp.2"]
    assert {row.name: row.reason for row in report.skipped} == {
        "wte": "neither Linear nor Conv2d",
        "attention.out_proj": "a subclass of Linear, which may compute something else",
        "head": "its weight is tied to wte.weight",
    }
    assert error(model(tokens), before) <= 1e-5
    with pytest.raises(ValueError, match=r"^select: cannot convert head: its weight is tied to wte.weight$"):
        summarize(GPT(), select=["mlp.*", "head"])
    pair = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    pair[1].weight = pair[0].weight
    with pytest.raises(ValueError, match=r"cannot convert 1: its weight is tied to 0.weight"):
        summarize(pair, select="1")
    assert type(pair[1]) is nn.Linear


# Refused layers, by name


class Conv1D(nn.Module):
    """As in transformers: y = x weight + bias."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


def _with(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _not_finite():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[1, 2] = float("inf")
    return layer


class Sharded(torch.Tensor):
    """Stands for DTensor and quantized tensors, whose parameters keep their class."""


REFUSED = {
    "transformers' Conv1D": (lambda: Conv1D(4, 4), "neither Linear nor Conv2d"),
    "another layer": (lambda: nn.ConvTranspose2d(4, 4, 1), "neither Linear nor Conv2d"),
    "a subclass": (lambda: Scaled(4, 4), "a subclass of Linear, which may compute something else"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized; call torch.nn.utils"),
    "old weight norm": (lambda: _old_weight_norm(nn.Linear(4, 4)), "its weight is computed from other parameters"),
    "pruned": (lambda: prune.l1_unstructured(nn.Conv2d(4, 4, 1), "weight", 3), "its weight is computed from other"),
    "lazy": (lambda: nn.LazyLinear(4), "its weight is uninitialized \\(a lazy module\\); run the model once first"),
    "lazy convolution": (lambda: nn.LazyConv2d(4, 1), "its weight is uninitialized"),
    "not finite": (_not_finite, "its weight is not finite"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), "its weight is on the meta device and has no values"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.complex64), "its weight is torch.complex64, torch.strided; want"),
    "another forward": (lambda: _with(nn.Linear(4, 4), forward=lambda x: x), "its forward was replaced"),
    "sharded": (
        lambda: _with(nn.Linear(4, 4), weight=nn.Parameter(torch.ones(4, 4).as_subclass(Sharded))),
        "its weight is a Sharded \\(sharded or quantized\\?\\); convert before",
    ),
    "quantization-aware": (lambda: _qat_linear(), "a subclass of Linear"),
}


def _qat_linear():
    from torch.ao.nn.qat import Linear
    from torch.ao.quantization import default_qat_qconfig

    return Linear(4, 4, qconfig=default_qat_qconfig)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:.*torch.ao.quantization:DeprecationWarning")
@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_named(make, reason):
    model = nn.ModuleDict({"body": nn.ModuleDict({"layer": make(), "other": nn.Linear(3, 3)})})
    kind = type(model["body"]["layer"])
    with pytest.raises(ValueError, match=f"^select: cannot convert body.layer: {reason}"):
        summarize(model, select=["body.layer", "*other"])
    assert type(model["body"]["other"]) is nn.Linear  # nothing was changed
    report = summarize(model)
    assert [row.name for row in report.converted] == ["body.other"]
    (skipped,) = report.skipped
    assert skipped.name == "body.layer" and skipped.kind == kind.__name__ and type(model["body"]["layer"]) is kind
    assert f"body.layer  {kind.__name__}  {skipped.reason}" in str(report)


def test_weights_alone_are_kept_on_the_meta_device():
    model = nn.Sequential(nn.Linear(4, 3, device="meta"))
    (row,) = summarize(model, preserve="weight").converted
    assert row.error is None and model(torch.empty(2, 4, device="meta")).shape == (2, 3)


def test_a_dynamically_quantized_layer_is_refused_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.quantized.dynamic import Linear

        model = nn.Sequential(nn.Linear(4, 4), Linear(4, 4))
    with pytest.raises(ValueError, match="select: '1' is a Linear, not a layer to convert"):
        summarize(model, select="1")
    assert [row.name for row in summarize(model).converted] == ["0"]


# Weights that other code reads


class Swin(nn.Module):
    """Layers that are called, or whose weight is read in a method of forward's."""

    def __init__(self):
        super().__init__()
        self.qkv, self.deep, self.facts = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)
        self.deep.inner = nn.Linear(4, 4)
        self.initialize()

    def initialize(self):
        nn.init.normal_(self.facts.weight)

    def forward(self, x):
        x = x.to(self.facts.weight.dtype) if isinstance(self.facts.weight, torch.Tensor) else x
        return self.facts(self.mixed(x)) + self.deep[0](x)

    def mixed(self, x):
        return F.linear(x, self.qkv.weight, self.qkv.bias) @ self.deep.inner.weight


class Child(Swin):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [Swin, Child])
def test_code_that_reads_a_weight_reads_the_effective_weight(kind):
    model, x = nn.Sequential(nn.Identity(), kind()).double(), torch.randn(3, 4).double()
    before = model(x)
    report = summarize(model)
    assert [row.name for row in report.converted] == ["1.qkv", "1.deep.0", "1.deep.inner", "1.facts"]
    assert not report.skipped and error(model(x), before) <= 1e-12
    model(x).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith(".b"))


class Elsewhere(nn.Module):
    """Reads weights in a property, in a method whose first argument is not self, in a list and in a comprehension."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.fc, self.kept = nn.Linear(4, 4), [nn.Linear(4, 4)]
        self.other = self.kept[0]

    @property
    def kernel(self):
        return self.fc.weight

    def read(this, x):  # noqa: N805
        return F.linear(x, this.other.weight)

    def forward(self, x):
        stacked = torch.stack([layer.weight for layer in self.layers])
        biases = sum(map(lambda m: m.bias, self.layers))
        return self.read(x) @ self.kernel + (x @ stacked).sum(0) + biases + x @ sum([m.weight for m in self.kept])


def test_a_weight_is_read_wherever_it_is_read():
    model, x = Elsewhere().double(), torch.randn(3, 4).double()
    before = model(x)
    assert len(summarize(model).converted) == 5 and error(model(x), before) <= 1e-12
    model(x).square().sum().backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if name.endswith(".b"))
    fold(model)
    assert error(model(x), before) <= 1e-12


class Normalizes(nn.Module):
    """Writes its layer's weight in forward, as metric learning does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            self.fc.weight.div_(self.fc.weight.norm())
        return self.fc(x)


class Ties(Normalizes):
    """Ties its layer's weight in forward."""

    def forward(self, x):
        self.fc.weight = nn.Parameter(torch.eye(4))
        return self.fc(x)


@pytest.mark.parametrize("kind", [Normalizes, Ties])
def test_code_that_writes_a_weight_is_told(kind):
    model = kind()
    summarize(model)
    with pytest.raises(ValueError, match=r"^weight: is computed from b .*set_weight_"):
        model(torch.randn(2, 4))
    fold(model)
    model(torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_pytorchs_encoder_layer_in_its_fast_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    model, x = nn.Sequential(model, nn.Linear(8, 3)).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        before = model(x)
        report = summarize(model)
        assert len(report.converted) == 5 and {row.kind for row in report.skipped} == {
            "NonDynamicallyQuantizableLinear"
        }
        assert error(model(x), before) <= 1e-5
        assert error(torch.compile(model, backend="eager")(x), before) <= 1e-5


def test_the_output_layer_of_a_summary_head():
    head, x, target = SummaryHead(6, 4, 3).double(), torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 1, 0])
    before, logits = head.loss(x, target), head(x)
    assert [row.name for row in summarize(head).converted] == ["output"]
    loss = head.loss(x, target)
    assert error(loss, before) <= 1e-12 and error(head(x)[1], logits[1]) <= 1e-12
    loss.backward()
    assert head.output.b.grad.any()
