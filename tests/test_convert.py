"""Whole models converted in place and back: what changes, what must not, and what is refused by name."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from interp_nn import linalg
from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear, linear_form

FLOATS = [(torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """A residual block of two convolutions with batch norm, the second of them grouped."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding="same", padding_mode="circular", groups=2)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn(self.conv1(x))))


class ResNet(nn.Module):
    def __init__(self, classes=7):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.blocks = nn.ModuleList([Block(4), Block(4)])
        self.fc = nn.Linear(4, classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class GPT(nn.Module):
    """Attention by PyTorch's module, an MLP, a norm, and an output layer tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        x = x + self.attention(x, x, x)[0]
        return self.head(x + self.mlp(x))


def error(actual, wanted):
    actual, wanted = actual.detach().double(), wanted.detach().double()
    return float((actual - wanted).norm() / wanted.norm())


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


# Outputs, and the way back


@pytest.mark.parametrize(("dtype", "bound"), FLOATS)
def test_outputs_are_kept_and_fold_goes_back(dtype, bound):
    model, x = ResNet().eval().to(dtype), torch.randn(2, 3, 12, 12, dtype=dtype)
    before, kinds, state = model(x), classes(model), copy.deepcopy(model.state_dict())
    report = summarize(model)
    assert error(model(x), before) <= bound and report.error <= bound
    kinds_now = classes(model)
    assert {n for n in kinds if kinds[n] is not kinds_now[n]} == {row.name for row in report.converted}
    assert {kinds_now[row.name] for row in report.converted} == {SummaryLinear, SummaryConv2d}
    assert list(model.state_dict()) == list(state)
    assert error(model.fc.weight, state["fc.weight"]) > 0.1  # it is b now, and not the effective weight
    back = fold(model)
    assert classes(model) == kinds and not back.left
    assert error(model(x), before) <= bound
    for name, value in model.state_dict().items():
        assert not value.is_floating_point() or error(value, state[name]) <= bound or not state[name].any()
    vars_of_plain = set(vars(nn.Linear(1, 1)))
    assert set(vars(model.fc)) == vars_of_plain


def test_gradients_flow_to_every_parameter():
    model = ResNet().double()
    summarize(model)
    model(torch.randn(2, 3, 12, 12, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert model.stem.weight.grad.any() and model.fc.weight.grad.any()


def test_fold_after_training_keeps_the_trained_function():
    model, x = ResNet().double().eval(), torch.randn(3, 3, 12, 12, dtype=torch.float64)
    summarize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = model(x)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x).detach()
    assert error(trained, before) > 1e-2
    fold(model)
    assert error(model(x), trained) <= 1e-12
    model(x).sum().backward()  # and trains on, with the same optimizer
    optimizer.step()
    assert error(model(x), trained) > 1e-4


def test_preserving_weights_changes_outputs_and_the_state_dict_is_the_way_back():
    model, x = ResNet().eval(), torch.randn(2, 3, 12, 12)
    before, state = model(x), copy.deepcopy(model.state_dict())
    report = summarize(model, preserve="weight")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert error(model(x), before) > 1e-2
    wanted = linalg.effective_weight(state["fc.weight"].double().t()).t()
    (row,) = (row for row in report.converted if row.name == "fc")
    assert row.error == pytest.approx(error(wanted, state["fc.weight"]), rel=1e-6)
    plain = ResNet().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), before)


def test_a_zero_and_a_rank_deficient_weight_keep_their_outputs():
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double(), torch.randn(9, 6, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[1:] = model[0].weight[:1]
        model[1].weight.zero_()
    before = model(x)
    report = summarize(model)
    assert error(model(x), before) <= 1e-12 and report.converted[1].error == 0


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (1, 1), (7, 13)])
def test_odd_sizes(sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that it initializes nothing
        model = nn.Sequential(nn.Linear(*sizes, dtype=torch.float64))
    x = torch.randn(4, sizes[0], dtype=torch.float64)
    before = model(x)
    (row,) = summarize(model).converted
    assert row.shape == sizes
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)
    fold(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-14)


def test_the_model_itself_may_be_the_layer():
    layer, x = nn.Linear(5, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    before = layer(x)
    report = summarize(layer)
    assert type(layer) is SummaryLinear and error(layer(x), before) <= 1e-12
    assert "(model)" in str(report) and report.converted[0].name == ""
    fold(layer)
    assert type(layer) is nn.Linear


def test_nothing_random_is_drawn():
    model, state = ResNet(), torch.get_rng_state()
    summarize(model), fold(model)
    assert torch.equal(torch.get_rng_state(), state)


# A layer stays itself


def test_modules_parameters_hooks_and_flags_stay():
    model = ResNet().eval()
    model.stem.train()
    model.stem.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    model.fc.tag = "mine"
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    calls = []
    handles = [
        model.fc.register_forward_hook(lambda m, i, o: calls.append(("forward", type(m)))),
        model.fc.register_forward_pre_hook(lambda m, i: calls.append(("before", type(m)))),
        model.fc.register_full_backward_hook(lambda m, i, o: calls.append(("backward", type(m)))),
        model.fc.weight.register_hook(lambda g: calls.append(("gradient", g.shape))),
    ]
    for convert, kind in ((summarize, SummaryLinear), (fold, nn.Linear)):
        convert(model)
        assert all(modules[name] is m for name, m in model.named_modules())
        assert all(parameters[name] is p for name, p in model.named_parameters())
        assert model.stem.training and not model.fc.training and model.fc.tag == "mine"
        assert not model.stem.weight.requires_grad and not model.fc.bias.requires_grad and model.fc.weight.requires_grad
        calls.clear()
        model(torch.randn(1, 3, 12, 12, requires_grad=True)).sum().backward()
        assert calls[:2] == [("before", kind), ("forward", kind)]
        assert ("backward", kind) in calls and ("gradient", (7, 4)) in calls
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(1, 3, 12, 12))
    assert not calls


def test_an_optimizer_made_before_still_trains():
    model = nn.Sequential(nn.Linear(5, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    summarize(model)
    before = model[0].weight.clone()
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_a_compiled_model_is_compiled_again():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(x)
    summarize(model)
    assert error(compiled(x), before) <= 1e-12
    with torch.no_grad():
        model[0].weight.mul_(2)  # eight times the effective weight
    assert torch.equal(compiled(x), model(x)) and error(compiled(x), before) > 0.5


def test_a_frozen_layer_folds_into_a_plain_one():
    model, x = nn.Sequential(SummaryLinear(5, 4)).eval(), torch.randn(3, 5)
    model[0].freeze()
    before = model(x)
    fold(model)
    assert error(model(x), before) <= 1e-6 and set(vars(model[0])) == set(vars(nn.Linear(1, 1)))
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(model(x), model[0].bias.expand(3, 4))


@pytest.mark.parametrize("conversion", ["summarize", "fold"])
def test_inside_other_modes(conversion):
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(3, 64)
    before = model(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        summarize(model)
        if conversion == "fold":
            fold(model)
    assert error(model(x), before) <= 1e-5 and model[0].weight.requires_grad


# Which layers


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
    assert [row.name for row in report.converted] == wanted and not report.left
    assert [name for name, m in model.named_modules() if isinstance(m, (SummaryLinear, SummaryConv2d))] == wanted


@pytest.mark.parametrize(
    ("select", "kind", "message"),
    [
        ("fcc", ValueError, r"select: 'fcc' is no layer of the model; near it: fc"),
        ("blocks.0.conv3", ValueError, r"near it: blocks\.0\.conv\d"),
        ("zzz*", ValueError, r"select: 'zzz\*' is no layer of the model$"),
        (
            ["fc", "blocks.0"],
            ValueError,
            r"'blocks.0' is a Block, not a layer to convert \(those in it are 'blocks.0.\*'\)",
        ),
        (lambda name, m: False, ValueError, "select: takes none of the model's layers"),
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


@pytest.mark.parametrize("how", ["parameter", "data"])
def test_tied_layers_are_converted_together(how):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(), torch.randn(3, 6).double()
    if how == "parameter":
        model[2].weight = model[0].weight
    else:
        model[2].weight.data = model[0].weight.data
    before = model(x)
    report = summarize(model)
    assert [row.error for row in report.converted] == [report.error] * 2 and report.error < 1e-14
    assert error(model(x), before) <= 1e-12
    assert model[2].weight.data_ptr() == model[0].weight.data_ptr()
    assert (model[2].weight is model[0].weight) is (how == "parameter")
    assert len(fold(model).converted) == 2 and error(model(x), before) <= 1e-12


def test_a_layer_tied_to_the_transpose_of_another():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6)).double(), torch.randn(3, 6).double()
    model[2].weight = nn.Parameter(model[0].weight.data.t())
    before = model(x)
    assert len(summarize(model).converted) == 2 and error(model(x), before) <= 1e-12
    assert model[2].weight.data_ptr() == model[0].weight.data_ptr()
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
def test_layers_that_share_part_of_their_memory_are_left(weights, order):
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
    reasons = {left.name: left.reason for left in report.left}
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
    assert {left.name: left.reason for left in report.left} == {
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


# What is refused, by name


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
    (left,) = report.left
    assert left.name == "body.layer" and left.kind == kind.__name__ and type(model["body"]["layer"]) is kind
    assert f"body.layer  {kind.__name__}  {left.reason}" in str(report)


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
    """A layer that is called, one whose weight is taken in a method of forward's, one of which only facts are asked."""

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
def test_layers_whose_weight_is_taken_are_left(kind):
    model, x = nn.Sequential(nn.Identity(), kind()).double(), torch.randn(3, 4).double()
    before = model(x)
    report = summarize(model)
    assert [row.name for row in report.converted] == ["1.deep.0", "1.facts"]
    reason = f"{kind.__name__} takes its weight for itself"
    assert [(left.name, left.reason) for left in report.left] == [("1.qkv", reason), ("1.deep.inner", reason)]
    assert error(model(x), before) <= 1e-12


def test_pytorchs_encoder_layer_in_its_fast_path():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    model, x = nn.Sequential(model, nn.Linear(8, 3)).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        before = model(x)
        report = summarize(model)
        assert [row.name for row in report.converted] == ["1"] and len(report.left) == 6
        assert error(model(x), before) <= 1e-5


def test_the_output_layer_of_a_summary_head_is_left():
    head = SummaryHead(6, 4, 3)
    report = summarize(nn.Sequential(nn.Linear(6, 6), head))
    assert [row.name for row in report.converted] == ["0"]
    assert [(left.name, left.reason) for left in report.left] == [
        ("1.output", "SummaryHead takes its weight for itself")
    ]


# fold


def test_fold_leaves_what_has_no_plain_equal():
    class Mine(SummaryLinear):
        pass

    tied = SummaryLinear(6, 5)
    embedding = nn.Embedding(5, 6, _weight=tied.weight)
    embedding.weight = tied.weight
    model = nn.ModuleList([SummaryLinear(4, 3), SummaryLayer(4, 3), SummaryHead(4, 3, 2), Mine(4, 3), tied, embedding])
    model.append(SummaryClassifier(4, 3))
    report = fold(model)
    assert [type(m) for m in model][:2] == [nn.Linear, SummaryLayer] and type(model[4]) is SummaryLinear
    assert {left.name: left.reason for left in report.left} == {
        "1": "neither SummaryLinear nor SummaryConv2d",
        "2": "neither SummaryLinear nor SummaryConv2d",
        "3": "a subclass of SummaryLinear, which may compute something else",
        "4": "its weight is tied to 5.weight",
        "6": "neither SummaryLinear nor SummaryConv2d",
    }


def test_fold_leaves_a_pruned_layer():
    model = nn.Sequential(prune.l1_unstructured(SummaryLinear(6, 4), "weight", 3))
    (left,) = fold(model).left
    assert left.reason.startswith("its weight is computed from other parameters") and type(model[0]) is SummaryLinear


def test_scripted_parts_are_not_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model, x = nn.Sequential(scripted, nn.Linear(4, 3)), torch.randn(2, 4)
    before = model(x)
    report = summarize(model)
    assert [row.name for row in report.converted] == ["1"] and [left.name for left in report.left] == ["0.0"]
    assert error(model(x), before) <= 1e-6


def test_fold_ends_parametrizations():
    model = nn.Sequential(SummaryLinear(6, 4), SummaryConv2d(1, 4, 3)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    parametrizations.orthogonal(model[0], "weight")
    before = model[0](x)
    assert not fold(model).left
    assert type(model[0]) is nn.Linear and not parametrize.is_parametrized(model[0])
    assert error(model[0](x), before) <= 1e-12 and list(model[0].state_dict()) == ["bias", "weight"]


def test_fold_of_parametrized_layers_beside_others():
    model = nn.Sequential(*(SummaryLinear(4, 4) for _ in range(6)), SummaryConv2d(1, 4, 3)).double()
    for layer in model:
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight))
    for layer in [model[i] for i in (0, 2, 3, 5)]:
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    wanted = [layer.effective_weight() for layer in model]
    report = fold(model)
    assert all(error(layer.weight, w) <= 1e-12 for layer, w in zip(model, wanted, strict=True))
    assert [row.parameters for row in report.converted] == [20] * 6 + [40]
    assert {row.was for row in report.converted} == {"SummaryLinear", "SummaryConv2d"}


# All or nothing


def test_an_engine_that_cannot_compute_a_layer_is_no_plan(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double(), torch.randn(3, 4).double()
    before = model(x)
    with monkeypatch.context() as patch:
        patch.setattr("interp_nn.dispatch._requested", "triton")  # which has no float64 kernels
        report = summarize(model)
    assert [row.plan for row in report.converted] == [None, None] and error(model(x), before) <= 1e-12


def test_a_conversion_that_fails_changes_nothing(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    state, root = copy.deepcopy(model.state_dict()), linear_form.root

    def failing(name, *rest):
        if name == "2":
            raise torch.linalg.LinAlgError
        return root(name, *rest)

    monkeypatch.setattr("interp_nn.convert.root", failing)
    with pytest.raises(torch.linalg.LinAlgError):
        summarize(model)
    assert all(type(layer) is nn.Linear for layer in model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_that_cannot_be_written_are_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.randn(4).expand(4, 4))
    with torch.inference_mode():
        model[2] = nn.Linear(4, 4)
    report = summarize(model)
    assert [row.name for row in report.converted] == ["0"]
    assert [left.reason.split(";")[0] for left in report.left] == [
        "its weight's entries share memory with each other (an expanded tensor?)",
        "its weight is an inference tensor",
    ]
    with torch.inference_mode():
        assert [row.name for row in summarize(model).converted] == ["2"]


# The report


def test_a_dry_run_tells_and_changes_nothing():
    model, x = ResNet().eval(), torch.randn(2, 3, 12, 12)
    before, kinds, state = model(x), classes(model), copy.deepcopy(model.state_dict())
    told = summarize(model, dry_run=True)
    assert torch.equal(model(x), before) and classes(model) == kinds
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    done = summarize(model)
    assert told.converted == done.converted and told.left == done.left
    assert "dry run" in str(told) and "dry run" not in str(done)


def test_the_report_counts_and_prints():
    model = ResNet()
    report = summarize(model, rows=64)
    rows = {row.name: row for row in report.converted}
    assert rows["blocks.0.conv2"].shape == (36, 2) and rows["blocks.0.conv2"].groups == 2
    assert rows["fc"].shape == (4, 7) and rows["stem"].shape == (27, 4)
    assert rows["fc"].plan.engine == "reference" and rows["stem"].plan is None
    wanted = sum(p.numel() for name, m in model.named_modules() if name in rows for p in m.parameters())
    assert sum(row.parameters for row in report.converted) == wanted
    lines = str(report).splitlines()
    assert lines[0] == f"summarize, function kept: 6 layers, {wanted:,} parameters"
    assert lines[1].split() == ["layer", "was", "now", "b", "parameters", "plan", "error"]
    assert lines[-1].startswith("fc ") and "Linear  SummaryLinear  4 x 7 " in lines[-1]
    assert f"reference {rows['fc'].plan.form}" in lines[-1] and "36 x 2, 2 groups" in str(report)
    assert max(row.error for row in report.converted) == report.error < 1e-6
