import copy

import pytest
import torch
from explained_networks import BasicBlock, seasoned
from saving import reloaded
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import record
from interp_nn.nn import SummaryConv2d, SummaryLinear
from interp_nn.nn.gated.from_relu import to_dgn
from interp_nn.nn.gated.gates import HardGate, SoftGate


class ResNet(nn.Module):
    """A stem with an overlapping max-pooling, three blocks, a global average and a linear head."""

    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(
            BasicBlock(width, width, 1), BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1)
        )
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(2 * width, 5)

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class PreActivation(nn.Module):
    """A pre-activation block: ReLU's before the convolutions, the shortcut before or after the first."""

    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(6)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.shortcut = nn.Conv2d(3, 6, 1, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = self.shortcut(out)
        out = self.conv2(torch.relu_(self.bn2(self.conv1(out))))
        return self.head((out + shortcut).relu().mean((2, 3)))


class Functional(nn.Module):
    """Functions and methods: pooling, concatenation, dropout, view, in-place ReLU's, a layer and a parameter used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(2 * 4 * 4 * 4, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        a = self.again(x).relu_()
        b = self.again(a)
        F.relu(b, inplace=True)
        x = torch.cat([F.max_pool2d(a, 2), F.avg_pool2d(b, 2)], 1)
        x = F.dropout(x.view(x.size(0), -1), 0.5, self.training)
        return self.fc2(torch.relu(self.fc1(x) - 0.1)) / 2


def vgg():
    """VGG with batch norms, biases in the convolutions and dropout in the head."""
    layers, channels = [], 3
    for width in (4, "pool", 6, 6, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    head = [nn.Flatten(), nn.Linear(6 * 4 * 4, 9), nn.ReLU(True), nn.Dropout(), nn.Linear(9, 5)]
    return nn.Sequential(nn.Sequential(*layers), nn.Sequential(*head))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2), SummaryConv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), SummaryLinear(6, 7), nn.ReLU(), nn.Linear(7, 5),
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))


MODELS = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg": vgg,
    "resnet": ResNet,
    "preactivation": PreActivation,
    "functional": Functional,
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def made(make, dtype=torch.float64):
    return seasoned(make(), dtype)


def images(n=3, dtype=torch.float64):
    return torch.randn(n, 3, 16, 16, dtype=dtype)


@models
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_hard_gates_and_equal_weights_are_the_model_itself(make, dtype, bound):
    model, x = made(make, dtype), images(4, dtype)
    dual = to_dgn(model, gating="relu", value_input="x", gate=HardGate(), reset=False)
    assert (dual(x) - model(x)).abs().max() <= bound * model(x).abs().max()


@models
def test_gates_of_a_relu_gating_are_the_models_by_name(make):
    model, x = made(make), images()
    seen = to_dgn(model, gating="relu", reset=False).gates(x)
    wanted = record(model, x)
    named = [site for site in wanted.sites if site.operation == "relu"]
    assert [(site.name, site.shape) for site in seen.sites] == [(site.name, site.shape) for site in named]
    assert all(torch.equal(seen.preactivations(s.name), wanted.preactivations(s.name)) for s in named)


@models
@pytest.mark.parametrize("gating", ["relu", "linear"])
def test_the_value_network_is_linear_given_the_gates(make, gating):
    dual = to_dgn(made(make), gating=gating, value_input="x").eval()
    x, u, v = images(), images(), images()
    given = dual.value_gates(dual.gating(x))
    zero = dual.value(torch.zeros_like(x), given)
    moved = dual.value(2 * u - 3 * v, given) - zero
    wanted = 2 * (dual.value(u, given) - zero) - 3 * (dual.value(v, given) - zero)
    assert (moved - wanted).abs().max() <= 1e-12 * wanted.abs().max() and wanted.abs().max() > 1e-3


@models
def test_half_spaces_of_a_linear_gating(make):
    dual, x = to_dgn(made(make), reset=False).eval(), images(20)
    weights, seen = dual.effective_gate_weights((3, 16, 16)), dual.gates(x)
    assert len(weights) == len(seen.sites)
    for (weight, bias), site in zip(weights, seen.sites, strict=True):
        assert weight.shape == (site.shape.numel(), 768) and bias.shape == (site.shape.numel(),)
        q = x.flatten(1) @ weight.T + bias
        assert (q - seen.preactivations(site).flatten(1)).abs().max() <= 1e-12 * q.abs().max()


def test_a_linear_gating_averages_what_a_max_pooling_would_choose_from():
    model = nn.Sequential(
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)
    ).double()
    dual, x = to_dgn(model, value_input="x", reset=False), images()
    counts = F.avg_pool2d(torch.ones_like(x), 3, 2, 1)  # less than 1 where a window reaches over the edge
    q = model[1](F.avg_pool2d(x, 3, 2, 1) / counts)
    torch.testing.assert_close(dual.gating(x), [q], rtol=1e-12, atol=1e-13)
    wanted = F.avg_pool2d(q * torch.sigmoid(4 * q), 2, ceil_mode=True)
    torch.testing.assert_close(dual(x), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("gating", ["relu", "linear"])
def test_pooling_in_one_two_and_three_dimensions(gating, dimensions):
    conv, pool = getattr(nn, f"Conv{dimensions}d"), getattr(nn, f"MaxPool{dimensions}d")
    model = nn.Sequential(conv(2, 3, 3), nn.ReLU(), pool(2), conv(3, 2, 1)).double()
    dual = to_dgn(model, gating=gating, value_input="x", gate=HardGate(), reset=False)
    x = torch.randn(3, 2, *(8,) * dimensions, dtype=torch.float64)
    assert dual(x).shape == model(x).shape
    assert torch.allclose(dual(x), model(x), rtol=1e-12, atol=0) is (gating == "relu")


@models
def test_value_input_of_ones_leaves_the_input_to_the_gates(make):
    dual, x = to_dgn(made(make), value_input="ones").eval(), images()
    wanted = dual.value(torch.ones_like(x), dual.value_gates(dual.gating(x)))
    assert torch.equal(dual(x), wanted)
    assert (dual(x) - dual(x.flip(0))).abs().max() > 0


@models
def test_the_two_networks_are_independent_of_each_other_and_of_the_model(make):
    model = made(make)
    before = copy.deepcopy(model.state_dict())
    for reset in (True, False):
        dual = to_dgn(model, gating="relu", value_input="x", reset=reset)
        storages = [{p.data_ptr() for p in m.parameters()} for m in (model, dual.gating, dual.value)]
        assert not storages[0] & storages[1] and not storages[0] & storages[2] and not storages[1] & storages[2]
        assert {n for n, _ in dual.value.named_parameters()} == {n for n, _ in model.named_parameters()}
        given = dict(model.named_parameters())
        for network in (dual.gating, dual.value):
            # Norms start at one and zero, which theirs are not; so do no other weights.
            assert all(torch.equal(p, given[n]) is not reset for n, p in network.named_parameters())
        if reset:
            value = dict(dual.value.named_parameters())
            assert not any(torch.equal(p, value[n]) for n, p in dual.gating.named_parameters() if p.dim() > 1)
        with torch.no_grad():
            for p in dual.parameters():
                p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@models
def test_every_parameter_of_both_networks_is_trained(make):
    dual = to_dgn(made(make), gating="linear").train()
    dual(images(6)).square().sum().backward()
    assert all(p.grad is not None for p in dual.parameters())
    missing = {n.split(".")[0] for n, _ in dual.value.named_parameters()} - {
        n.split(".")[0] for n, _ in dual.gating.named_parameters()
    }
    assert len(missing) <= 1  # the gating network has no output layer


def test_training_modes_and_dropout_follow_the_network():
    for model in (Functional().eval(), Functional().train()):
        dual = to_dgn(model.double(), value_input="x")
        assert dual.value.training is model.training
        x = images()
        dual.eval()
        assert torch.equal(dual(x), dual(x))
        dual.train()
        assert not torch.equal(dual(x), dual(x))


def test_a_dropout_that_is_off_in_training_stays_off():
    class Off(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.second(F.dropout(F.relu(self.first(x)), 0.5, training=False))

    model, x = Off().train(), torch.randn(3, 4)
    dual = to_dgn(model, gating="relu", value_input="x", gate=HardGate(), reset=False)
    assert dual.training and torch.equal(dual(x), model(x))


def test_a_record_needs_evaluation_mode():
    dual = to_dgn(vgg()).train()
    with pytest.raises(
        ValueError, match=r"layer 'gating.0.1' \(BatchNorm2d\) is in training mode; want model.eval\(\)"
    ):
        dual.gates(images(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"layer 'gating.0.1' \(BatchNorm2d\) is in training mode"):
        dual.effective_gate_weights((3, 16, 16))
    with pytest.raises(ValueError, match=r"layer 'gating.0.1' \(BatchNorm2d\) is in training mode"):
        dual.gate_sharpness(images(dtype=torch.float32))


def test_compiled_models_are_converted_by_the_same_names():
    model, x = made(ResNet), images()
    model.layer1 = torch.compile(model.layer1, backend="eager")
    dual = to_dgn(torch.compile(model, backend="eager"), gating="relu", value_input="x", gate=HardGate(), reset=False)
    assert [site.name for site in dual.gates(x).sites] == list(to_dgn(made(ResNet)).layers)
    model.layer1 = model.layer1._orig_mod
    torch.testing.assert_close(dual(x), model(x), rtol=1e-12, atol=1e-13)


def test_a_relu_gating_has_no_half_spaces():
    with pytest.raises(ValueError, match=r"gating: is 'relu', .*; want 'linear'"):
        to_dgn(mlp(), gating="relu").effective_gate_weights((3, 16, 16))


@models
@pytest.mark.parametrize("gating", ["relu", "linear"])
def test_state_dict_deepcopy_and_pickle_round_trip(make, gating):
    model, x = made(make), images()
    dual, other = to_dgn(model, gating=gating).eval(), to_dgn(model, gating=gating).eval()
    assert not torch.equal(other(x), dual(x))
    other.load_state_dict(dual.state_dict())
    for twin in (other, copy.deepcopy(dual), reloaded(dual, weights_only=False)):
        assert torch.equal(twin(x), dual(x))


@pytest.mark.parametrize("gating", ["relu", pytest.param("linear", marks=pytest.mark.slow)])
def test_compiled_whole_it_computes_the_same(gating):
    dual, x = to_dgn(made(Functional), gating=gating, value_input="x").eval(), images()
    compiled = torch.compile(dual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), dual(x), rtol=1e-12, atol=1e-14)


@models
def test_autocast_to_bfloat16(make):
    dual, x = to_dgn(made(make, torch.float32), value_input="x", reset=False).eval(), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = dual(x)
    assert y.dtype == torch.bfloat16 and (y.float() - dual(x)).norm() <= 0.1 * dual(x).norm()


def test_gates_that_do_not_match_are_refused_by_layer():
    dual = to_dgn(made(ResNet)).eval()
    gates = dual.gate_values(images())
    gates[1] = gates[1][:, :, :1, :1]
    with pytest.raises(
        ValueError, match=r"gates: got shape \(3, 4, 1, 1\) for layer 'layer1.0.relu', want \(n, \*\(4, 4, 4\)\)"
    ):
        dual.value(images(), gates)


class Two(nn.Module):
    def forward(self, x, y):
        return torch.relu(x) + y


class Pair(nn.Module):
    def forward(self, x):
        return torch.relu(x), x


class Branch(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.relu(x * self.scale)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.ReLU()), "GELU in layer '1' is neither linear nor a ReLU"),
        (nn.Sequential(nn.ReLU(), nn.LeakyReLU()), "LeakyReLU in layer '1' is neither linear"),
        (nn.Sequential(nn.ReLU(), nn.Softmax(1)), "Softmax in layer '1' .*gives logits"),
        (nn.Sequential(nn.ReLU(), nn.Sequential(nn.LayerNorm(4))), "LayerNorm in layer '1.0'"),
        (nn.Sequential(nn.Linear(4, 4)), "model: has no ReLU, want one"),
        (nn.Sequential(Branch()), r"layer '0' \(Branch\) cannot be traced"),
        (Two(), r"model: takes inputs \['x', 'y'\], want one"),
        (Pair(), "model: returns a tuple, want one tensor"),
        (Owner(), r"layer '' has parameters of its own and no reset_parameters\(\); want reset=False"),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, dilation=2)), "MaxPool2d in layer '1' is dilated"),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, dilation=(1, 2))), "MaxPool2d in layer '1' is dilated"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_layer(model, message):
    with pytest.raises(ValueError, match=message):
        to_dgn(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"gating": "shallow"}, "gating: got 'shallow'"), ({"value_input": 1}, "value_input: got 1")],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        to_dgn(mlp(), **settings)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model: got function, want an nn.Module"):
        to_dgn(F.relu)


def test_parameters_of_a_model_itself_are_kept_where_nothing_is_reset():
    model, x = Owner().double(), torch.randn(3, 4, dtype=torch.float64)
    dual = to_dgn(model, gating="relu", value_input="x", gate=HardGate(), reset=False)
    assert torch.equal(dual(x), model(x)) and [n for n, _ in dual.named_parameters()] == ["gating.scale", "value.scale"]


def test_dead_branches_and_unused_inputs_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, mask=None):
            torch.sigmoid(self.unused(x))
            return torch.relu(self.layer(x))

    dual = to_dgn(Model(), gate=SoftGate())
    assert {n for n, _ in dual.named_parameters()} == {
        f"{part}.layer.{name}" for part in ("gating", "value") for name in ("weight", "bias")
    }
