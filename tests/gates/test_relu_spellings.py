"""Spellings of a ReLU that `record`, `npk` and `to_dgn` treat alike, and calls that look like one and are not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import UnsupportedOperation, linearize, npk, record
from interp_nn.nn import HardGate, to_dgn

ZERO = torch.zeros(())
SPELLINGS = {
    "F.relu": F.relu,
    "F.relu in place": lambda z: F.relu(z, inplace=True),
    "torch.relu": torch.relu,
    "relu_": lambda z: z.relu_(),
    "nn.Threshold": nn.Threshold(0, 0),
    "F.threshold": lambda z: F.threshold(z, 0.0, 0.0),
    "clamp(min=0)": lambda z: z.clamp(min=0),
    "clamp(0)": lambda z: torch.clamp(z, 0.0),
    "clamp_": lambda z: z.clamp_(min=0),
    "clamp of a tensor": lambda z: torch.clamp(z, min=torch.zeros(1), max=None),
    "clamp_min": lambda z: z.clamp_min(0),
    "torch.clamp_min": lambda z: torch.clamp_min(z, min=0),
    "clip": lambda z: torch.clip(z, 0),
    "maximum, zeros_like": lambda z: torch.maximum(z, torch.zeros_like(z)),
    "maximum, tensor": lambda z: torch.maximum(z, ZERO),
    "maximum, commuted": lambda z: torch.maximum(torch.zeros(1), z),
    "maximum, new_zeros": lambda z: z.maximum(other=z.new_zeros(z.shape)),
    "maximum, scalar new_zeros": lambda z: torch.maximum(z.new_zeros(()), z),
    "max, zeros": lambda z: torch.max(z, torch.zeros_like(z)),
    "max, method": lambda z: z.max(z.new_zeros(z.size())),
    "where": lambda z: torch.where(z > 0, z, 0),
    "where, tensor": lambda z: torch.where(z > 0, z, ZERO),
    "where, zeros_like": lambda z: torch.where(z.gt(0), z, torch.zeros_like(z)),
    "where, >=": lambda z: torch.where(z >= 0, z, 0.0),
    "where, reflected": lambda z: torch.where(torch.zeros(()) < z, z, 0),
    "where, method": lambda z: z.where(torch.ge(z, torch.zeros_like(z)), 0),
    "where, off": lambda z: torch.where(z < 0, 0, z),
    "where, off, <=": lambda z: torch.where(z.le(0), torch.zeros_like(z), z),
    "masked_fill": lambda z: z.masked_fill(z < 0, 0.0),
    "product": lambda z: z * (z > 0),
    "product, commuted": lambda z: (z > 0) * z,
    "product, torch.mul": lambda z: torch.mul(z, torch.gt(z, 0)),
    "product, to(dtype)": lambda z: z * (z > 0).to(z.dtype),
    "product, double": lambda z: (z >= 0).double() * z,
    "product, float": lambda z: z.mul((z > 0).float()),
    "product, type_as": lambda z: z * torch.lt(torch.zeros_like(z), z).type_as(z),
}
# Known to `record` alone.
RECORDED = {
    "clamp(0, inf)": lambda z: z.clamp(0, torch.inf),
    "hardtanh": lambda z: F.hardtanh(z, 0.0, torch.inf),
    "prelu": lambda z: F.prelu(z, z.new_zeros(1)),
    "masked_fill, not": lambda z: z.masked_fill(~(z > 0), 0),
    "masked_fill, logical_not": lambda z: z.masked_fill((z > 0).logical_not(), 0),
    "masked_fill, reflected": lambda z: z.masked_fill(torch.gt(ZERO, z), 0),
    "where, aten": lambda z: torch.ops.aten.where(z < 0, ZERO.double(), z),
    "product, not": lambda z: ~(z <= 0) * z,
    "product, 1 -": lambda z: z * (1 - (z < 0).float()),
    "product, another shape": lambda z: ((z < 0).unsqueeze(2).logical_not().double() * z.unsqueeze(2)).squeeze(2),
    "write": lambda z: written(z, z < 0),
    "masked_fill_": lambda z: z.clone().masked_fill_(z < 0, 0),
    "product in place": lambda z: z.clone().mul_((z < 0).logical_not_()),
}
# Other functions, in spellings whose gates are alike.
ALIKE = {
    "minimum": {
        "-relu": lambda z: -F.relu(-z),
        "-threshold": lambda z: -F.threshold(-z, 0, 0),
        "minimum": lambda z: torch.minimum(z, ZERO),
        "minimum, commuted": lambda z: torch.min(torch.zeros_like(z), z),
        "clamp": lambda z: z.clamp(max=0),
        "clamp_max": lambda z: z.clamp_max(0),
        "where, <": lambda z: torch.where(z < 0, z, 0),
        "where, >=": lambda z: torch.where(z >= 0, 0, z),
        "where, method": lambda z: z.where(z < 0, 0),
        "where, by name": lambda z: torch.where(condition=z > 0, input=ZERO.double(), other=z),
        "masked_fill": lambda z: z.masked_fill(z > 0, 0),
        "masked_fill, by name": lambda z: z.masked_fill(value=0, mask=z > 0),
        "product": lambda z: z * (z < 0),
        "product, 1 -": lambda z: torch.mul(torch.rsub((z > 0).double(), 1), z),
        "write": lambda z: written(z, z > 0),
    },
    "leaky_relu": {
        "leaky_relu": lambda z: F.leaky_relu(z, 0.1),
        "where": lambda z: torch.where(z > 0, z, 0.1 * z),
        "where, off": lambda z: torch.where(z < 0, 0.1 * z, z),
        "maximum": lambda z: torch.maximum(z, 0.1 * z),
    },
    "abs": {"abs": torch.abs, "where": lambda z: torch.where(z < 0, -z, z), "maximum": lambda z: torch.maximum(z, -z)},
    "relu6": {
        "relu6": F.relu6,
        "clamp": lambda z: z.clamp(0, 6),
        "hardtanh": lambda z: F.hardtanh(z, 0, 6),
        "clamps": lambda z: z.clamp(min=0).clamp(max=6),
        "minimum": lambda z: torch.minimum(torch.tensor(6.0), F.relu(z)),
        "where": lambda z: torch.where((y := F.relu(z)) > 6, 6, y),
    },
}
OTHERS = {
    "threshold": (lambda z, y: F.threshold(z, 0.1, 0.0), "threshold"),
    "threshold, value 1": (lambda z, y: F.threshold(z, 0.0, 1.0), "threshold"),
    "clamp(min=0.1)": (lambda z, y: z.clamp(min=0.1), "clamp"),
    "clamp(max=0)": (lambda z, y: z.clamp(max=0), "clamp"),
    "clamp(0, 6)": (lambda z, y: torch.clamp(z, 0, 6), "clamp"),
    "relu6": (lambda z, y: F.relu6(z), "relu6"),
    "maximum of two": (lambda z, y: torch.maximum(z, y), "maximum"),
    "maximum, ones": (lambda z, y: torch.maximum(z, torch.ones(1)), "maximum"),
    "maximum, zeros that broadcast": (lambda z, y: torch.maximum(z, torch.zeros(4)), "maximum"),
    "max along a dimension": (lambda z, y: torch.max(z, 1, keepdim=True)[0].expand(-1, 4), "max"),
    "minimum": (lambda z, y: torch.minimum(z, ZERO), "minimum"),
    "where, threshold 1": (lambda z, y: torch.where(z > 1, z, 0), "gt"),
    "where, other": (lambda z, y: torch.where(z > 0, y, 0), "gt"),
    "where, nonzero": (lambda z, y: torch.where(z > 0, z, 1), "gt"),
    "where, off where positive": (lambda z, y: torch.where(z > 0, 0, z), "gt"),
    "where, <": (lambda z, y: torch.where(z < 0, z, 0), "lt"),
    "masked_fill, >": (lambda z, y: z.masked_fill(z > 0, 0), "gt"),
    "product, other": (lambda z, y: z * (y > 0), "gt"),
    "product, threshold": (lambda z, y: z * (z > 0.5), "gt"),
    "product, <": (lambda z, y: z * (z < 0).to(z.dtype), "lt"),
    "product, !=": (lambda z, y: z * (z != 0), "ne"),
    "square": (lambda z, y: z * z, "mul"),
}


def written(z, mask):
    z = z.clone()
    z[mask] = 0
    return z


class Activated(nn.Module):
    """Two hidden layers with an activation of two arguments: a layer's output, and that of a layer beside it."""

    def __init__(self, activation):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(i, o).double() for i, o in ((3, 4), (4, 4), (4, 2)))
        self.beside = nn.ModuleList(nn.Linear(i, o).double() for i, o in ((3, 4), (4, 4)))
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)
        self.activation = activation

    def forward(self, x):
        for layer, beside in zip(self.layers, self.beside, strict=False):
            x = self.activation(layer(x), beside(x))
        return self.layers[-1](x)


def spelled(spelling):
    """A network with ReLUs in that spelling; modules are called as modules."""
    model = Activated(lambda z, y: spelling(z))
    if isinstance(spelling, nn.Module):
        model.spelling = spelling
    return model


def inputs(n=6):
    return torch.randn(n, 3, dtype=torch.float64)


others = pytest.mark.parametrize(("activation", "name"), OTHERS.values(), ids=OTHERS.keys())


@pytest.mark.parametrize(
    "group", [{"relu": nn.ReLU(), **SPELLINGS, **RECORDED}, *ALIKE.values()], ids=["relu", *ALIKE.keys()]
)
def test_the_gates_of_a_record_are_those_of_the_first_spelling(group):
    x = inputs(20)
    first, *others = (record(spelled(spelling), x) for spelling in group.values())
    wrong = [name for name, seen in zip(list(group)[1:], others, strict=True) if seen.patterns() != first.patterns()]
    assert not wrong and len(first.patterns().groups().counts) > 5


def test_a_layer_of_a_mask_that_is_turned_has_an_affine_map_of_its_gates():
    x, model = inputs(), spelled(lambda z: z.masked_fill(z < 0, 0))
    wanted = record(spelled(nn.ReLU()), x)
    for i, site in enumerate(record(model, x).sites):
        affine = linearize(model, x, layer=site.name)
        torch.testing.assert_close(affine(x), wanted.preactivations(i), rtol=1e-12, atol=1e-12)
        assert affine.check() < 1e-12


def test_the_first_use_of_a_mask_counts():
    model = Activated(lambda z, y: z.masked_fill(mask := z < 0, 0) + y * mask)
    model.layers[-1] = nn.Identity()
    seen = record(model, x := inputs())
    assert torch.equal(seen.gates(0), model.layers[0](x) > 0)
    both = record(Activated(lambda z, y: torch.where(z < 0, y, z)), x)
    assert torch.equal(both.gates(0), seen.gates(0))


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, z):
        return self.function(z)


def chain(activations):
    """A network of hidden layers, each with one of the activations; messages name its place."""
    generator, layers, width = torch.Generator().manual_seed(0), [], 3
    for activation in activations:
        layers += [nn.Linear(width, 8), activation if isinstance(activation, nn.Module) else Of(activation)]
        width = 8
    model = nn.Sequential(*layers, nn.Linear(width, 2)).double()
    for p in model.parameters():
        nn.init.normal_(p, generator=generator)
    return model


def dual_of(model, gating):
    return to_dgn(model, gating=gating, value_input="x", gate=HardGate(), reset=False)


chains = pytest.mark.parametrize("first", range(0, len(SPELLINGS), 6))


def chains_from(first):
    """A network of six spellings, and the same one of ReLU modules."""
    six = list(SPELLINGS.values())[first : first + 6]
    return chain(six), chain([nn.ReLU() for _ in six])


@chains
def test_the_path_kernel_is_that_of_relu_modules(first):
    x, y = inputs(), inputs(4)
    model, of_relus = chains_from(first)
    assert torch.equal(npk(model, x, y), npk(of_relus, x, y))


@chains
@pytest.mark.parametrize("gating", ["relu", "linear"])
def test_the_gated_network_is_that_of_relu_modules(first, gating):
    x, (model, of_relus) = inputs(), chains_from(first)
    dual = dual_of(model, gating)
    assert torch.equal(dual(x), dual_of(of_relus, gating)(x))
    if gating == "relu":
        torch.testing.assert_close(dual(x), model(x), rtol=1e-12, atol=0)
        assert list(dual.layers) == [site.name for site in record(model, x).sites]
        gates = record(of_relus, x)
        assert dual.gates(x).patterns() == gates.patterns()
        assert all(0 < gates.gates(site).float().mean() < 1 for site in gates.sites)


def test_a_mask_that_something_else_uses_too_is_refused():
    model = Activated(lambda z, y: (z * (mask := z > 0)) + y * mask)
    with pytest.raises(ValueError, match="gt in layer ''"):
        to_dgn(model)


def test_a_parameter_that_is_zero_is_no_zero():
    model = spelled(lambda z: torch.maximum(z, model.floor))
    model.floor = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="maximum in layer ''"):
        to_dgn(model)


@others
def test_what_is_no_relu_is_refused_by_name(activation, name):
    with pytest.raises(ValueError, match=f"(?i){name} in layer ''.* is neither linear"):
        to_dgn(Activated(activation))
    with pytest.raises(UnsupportedOperation, match=f"(?i){name} in layer ''"):
        npk(Activated(activation), inputs())
