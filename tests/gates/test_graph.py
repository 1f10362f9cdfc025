import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import npk
from interp_nn.gates.graph import apply_gates, kind, routed, trace, where
from interp_nn.nn import HardGate, SummaryConv2d, SummaryLinear, to_dgn


class Calls(nn.Module):
    """One function as a model, with a layer and a parameter that it may use."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.layer = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.function(self, x)


def kinds(model):
    graph_module = trace(model)
    nodes = [node for node in graph_module.graph.nodes if node.op.startswith("call")]
    return [kind(graph_module, node) for node in nodes]


@pytest.mark.parametrize(
    ("wanted", "spellings"),
    [
        ("relu", [nn.ReLU(), nn.ReLU(True), F.relu, torch.relu, torch.relu_, lambda x: x.relu(), lambda x: x.relu_()]),
        ("linear", [nn.Linear(4, 4), SummaryLinear(4, 4), lambda x: F.linear(x, torch.ones(4, 4))]),
        (
            "conv",
            [
                nn.Conv2d(4, 4, 1),
                SummaryConv2d(4, 4, 1),
                lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1)),
                nn.Conv1d(4, 4, 1),
            ],
        ),
        ("conv_transpose", [nn.ConvTranspose2d(4, 4, 1), lambda x: F.conv_transpose2d(x, torch.ones(4, 4, 1, 1))]),
        (
            "batch_norm",
            [nn.BatchNorm1d(4), nn.BatchNorm2d(4), lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4))],
        ),
        ("max_pool", [nn.MaxPool2d(2), lambda x: F.max_pool2d(x, 2), lambda x: torch.max_pool1d(x, 2)]),
        ("avg_pool", [nn.AvgPool2d(2), lambda x: F.avg_pool2d(x, 2)]),
        ("adaptive_avg_pool", [nn.AdaptiveAvgPool2d(2), lambda x: F.adaptive_avg_pool2d(x, (1, 2))]),
        (
            "global_avg_pool",
            [nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((1, 1)), lambda x: F.adaptive_avg_pool2d(x, 1)],
        ),
        ("mean", [lambda x: x.mean((2, 3)), lambda x: torch.mean(x, 1)]),
        ("flatten", [nn.Flatten(), lambda x: torch.flatten(x, 1), lambda x: x.flatten(1, -1), lambda x: x.view(3, -1)]),
        (
            "reshape",
            [nn.Flatten(0), torch.flatten, lambda x: x.view(-1), lambda x: x.reshape(3, 2, 2), nn.Unflatten(1, (2, 2))],
        ),
        ("rearrange", [lambda x: x.permute(1, 0), lambda x: x[:, 1:], lambda x: x.unsqueeze(1), nn.PixelShuffle(2)]),
        ("pad", [nn.ZeroPad2d(1), lambda x: F.pad(x, (1, 1)), nn.CircularPad2d(1)]),
        ("upsample", [nn.Upsample(scale_factor=2), lambda x: F.interpolate(x, scale_factor=2)]),
        ("add", [lambda x: x + x, lambda x: x + 1, lambda x: 1 + x, lambda x: torch.add(x, x), lambda x: x.add_(x)]),
        ("sub", [lambda x: x - x, lambda x: 1 - x]),
        ("cat", [lambda x: torch.cat([x, x], 1), lambda x: torch.cat(tensors=[x, x])]),
        (
            "scale",
            [lambda x: 2 * x, lambda x: x * 2, lambda x: x / 2, lambda x: -x, lambda x: x.mul(2), lambda x: x.div_(2)],
        ),
        ("dropout", [nn.Dropout(), nn.Dropout2d(), F.dropout, lambda x: F.dropout(x, 0.5, False, True)]),
        ("identity", [nn.Identity(), lambda x: x.contiguous(), lambda x: x.clone()]),
        ("matmul", [lambda x: x @ torch.ones(4, 4), lambda x: x.matmul(torch.ones(4, 4))]),
        ("shape", [lambda x: x.shape, lambda x: x.size(0), lambda x: x.dtype]),
        (
            "other",
            [nn.Softmax(1), nn.LeakyReLU(), nn.GELU(), nn.ReLU6(), nn.LayerNorm(4), torch.sigmoid, lambda x: x.T],
        ),
        (
            "other",
            [
                lambda x: x * x,
                lambda x: 1 / x,
                lambda x: F.linear(x, x),
                lambda x: x @ x,
                lambda x: torch.ones(4, 4) @ x,
                lambda x: torch.div(x, 2, rounding_mode="floor"),
                lambda x: x.div(2, rounding_mode="trunc"),
            ],
        ),
    ],
)
def test_every_spelling_has_the_kind_of_its_meaning(wanted, spellings):
    for spelling in spellings:
        model = nn.Sequential(spelling) if isinstance(spelling, nn.Module) else Calls(lambda _, x, f=spelling: f(x))
        assert kinds(model) == [wanted], spelling


def _rewritten(self, x):
    """Every way of writing in place, with values that are read again afterwards."""
    y = self.layer(x)
    kept = y
    y += 1
    y.relu_()
    y *= 2
    torch.relu_(y)
    z = y - x
    z -= 0.1
    z /= 3
    F.relu(z, True)
    F.dropout(z, 0.5, False, inplace=True)
    z.add_(x, alpha=2)
    return kept * 2 + z


def test_a_traced_model_writes_nothing_in_place_and_computes_the_same():
    model, x = Calls(_rewritten).double(), torch.randn(5, 4, dtype=torch.float64)
    graph_module = trace(model)
    torch.testing.assert_close(graph_module(x.clone()), model(x.clone()), rtol=0, atol=0)
    values = torch.fx.Interpreter(graph_module)
    values.run(x.clone())  # each node's value is that of its call, after all of them have run
    again = torch.fx.Interpreter(graph_module, garbage_collect_values=False)
    again.run(x.clone())
    for node in graph_module.graph.nodes:
        if node.op.startswith("call") and node.args and node.all_input_nodes:
            args = torch.fx.node.map_arg(node.args, lambda n: again.env[n])
            kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: again.env[n])
            assert torch.equal(getattr(again, node.op)(node.target, args, kwargs), again.env[node]), node


def test_a_module_that_writes_in_place_is_used_as_it_is_and_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.first, self.second = nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            self.relu(y)
            z = self.second(y)
            self.relu(z)
            return y + z

    model, x = Twice().double(), torch.randn(5, 4, dtype=torch.float64)
    graph_module = trace(model)
    assert torch.equal(graph_module(x), model(x))
    assert model.relu.inplace and not graph_module.relu.inplace
    assert graph_module.first.weight is model.first.weight


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x if x.sum() > 0 else -x, r"layer '0' \(Calls\) cannot be traced: .*control flow"),
        (lambda m, x: [x for _ in range(x.shape[0])], r"layer '0' \(Calls\) cannot be traced"),
        (lambda m, x: x.zero_(), r"zero in layer '0' writes in place; want a call that returns a new tensor"),
        (lambda m, x: torch.add(x, x, out=x), r"add in layer '0' writes in place"),
        (
            lambda m, x: (x.view(-1).relu_(), x + 1)[1],
            r"relu in layer '0' writes in place.*since add in layer '0' reads",
        ),
        (
            lambda m, x: (y := x.flatten(1), x.relu_(), y + 1)[2],
            r"relu in layer '0' writes in place.*since add in layer",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused_by_its_layer(function, message):
    with pytest.raises(ValueError, match=message):
        trace(nn.Sequential(Calls(function)))


@pytest.mark.parametrize("model", [torch.jit.script(nn.ReLU()), F.relu, None], ids=["script", "function", "none"])
def test_what_is_no_module_of_python_is_refused(model):
    with pytest.raises(TypeError, match=r"model: got .*, want an nn.Module"):
        trace(model)


def test_compiled_models_are_traced_as_they_were():
    inner = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend="eager"))
    assert kinds(torch.compile(inner, backend="eager")) == ["linear", "linear", "relu"]


def test_constants_and_their_arithmetic_are_constants():
    model = Calls(lambda m, x: F.linear(x, m.weight * torch.ones(4, 4) + 1) + m.weight.sum())
    graph_module = trace(model)
    found = {node.name: kind(graph_module, node) for node in graph_module.graph.nodes}
    assert [k for k in found.values() if k not in ("constant",)] == ["input", "linear", "add", "output"]
    assert found["mul"] == "constant"


def test_nodes_are_named_by_layer():
    model = nn.Sequential(nn.Softmax(1), nn.Sequential(Calls(lambda m, x: m.layer(x).tanh())))
    graph_module = trace(model)
    nodes = [node for node in graph_module.graph.nodes if node.op.startswith("call")]
    assert [where(graph_module, node) for node in nodes] == [
        "Softmax in layer '0'",
        "Linear in layer '1.0.layer'",
        "tanh in layer '1.0'",
    ]


def test_gated_refuses_gates_that_would_broadcast():
    z = torch.randn(3, 4, 5)
    assert torch.equal(apply_gates(z, torch.ones(3, 4, 5)), z)
    with pytest.raises(ValueError, match=r"gates: got shape \(3, 4, 1\) for layer '1', want \(n, \*\(4, 5\)\)"):
        apply_gates(z, torch.ones(3, 4, 1), "1")


@pytest.mark.parametrize("shape", [(3, 2, 7), (3, 2, 7, 6), (0, 2, 5, 5), (1, 1, 4, 4, 4)])
def test_routed_is_max_pooling_by_given_indices(shape):
    z = torch.randn(shape)
    pool = [F.max_pool1d, F.max_pool2d, F.max_pool3d][len(shape) - 3]
    pooled, index = pool(z, 3, 2, 1, return_indices=True)
    assert torch.equal(routed(z, index), pooled)
    assert torch.equal(routed(2 * z + 1, index), 2 * pooled + 1)


def test_a_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(True), nn.Dropout(0.5, True))
    before = copy.deepcopy(model.state_dict())
    trace(model)
    assert model[1].inplace and model[2].inplace and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Defaults(nn.Module):
    """A forward whose default arguments choose among branches."""

    def __init__(self):
        super().__init__()
        self.first, self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def hidden(self, z):
        return self.last(F.relu(z))


class Flag(Defaults):
    def forward(self, x, flag=None):
        return self.hidden(self.first(x) if flag is None else self.other(x))


class Switch(Defaults):
    def forward(self, x, early=False, *, scale=2.0):
        z = self.first(x)
        return z if early else self.hidden(z * scale if scale else z)


SHIFT = torch.ones(4)


class Shift(Defaults):
    def forward(self, x, shift=SHIFT, names=("first", "other")):
        for name in names:
            x = getattr(self, name)(x) + shift
        return self.hidden(x)


class Rest(Defaults):
    def forward(self, x=None, *layers, **options):
        for layer in layers or (self.other,):
            x = layer(x)
        return self.hidden(-x if options.get("negative") else x)


@pytest.mark.parametrize("make", [Flag, Switch, Shift, Rest])
def test_default_arguments_keep_their_values(make):
    model, x = make(), torch.randn(5, 4)
    graph_module = trace(model)
    assert torch.equal(graph_module(x), model(x))
    assert [str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"] == ["x"]
    dual = to_dgn(model, gating="relu", value_input="x", gate=HardGate(), reset=False)
    torch.testing.assert_close(dual(x), model(x))


@pytest.mark.parametrize(("make", "layers"), [(Flag, ["first"]), (Rest, ["other"])])
def test_the_path_kernel_with_default_arguments(make, layers):
    model, x = make(), torch.randn(5, 4)
    plain = nn.Sequential(*(getattr(model, name) for name in layers), nn.ReLU(), model.last)
    assert torch.equal(npk(model, x), npk(plain, x))


def test_inputs_without_a_default_are_named():
    model = Calls(None)
    model.__class__ = type("Two", (Calls,), {"forward": lambda self, x, y, flag=None: F.relu(self.layer(x) + y)})
    for function in (trace, to_dgn, lambda model: npk(model, torch.randn(2, 4))):
        with pytest.raises(ValueError, match=r"model: takes inputs \['x', 'y'\], want one"):
            function(model)
