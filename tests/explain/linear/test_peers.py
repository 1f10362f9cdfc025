"""Against captum: the same contributions where it works, and networks whose outputs its methods do not add up to.

Largest error of completeness (contributions and bias against the output; for DeepLift and LRP their own convergence delta),
as asserted below; "raises" is an exception. LRP leaves out what biases contribute, by design, so its delta is no error where
it runs; its entries say only whether it does.

    network                              DeepLift   LRP      linearize
    F.relu, Tensor.relu, torch.maximum   > 0.01     runs     < 1e-12
    clamp                                > 0.01     runs     < 1e-12
    Hardtanh, PReLU                      > 0.01     raises   < 1e-12
    GELU, layer norm, group norm         > 0.01     raises   < 1e-12
    a ReLU called twice                  raises     runs     < 1e-12
    a max-pooling called twice           raises     raises   < 1e-12
    ResNet18 with in-place ReLU          raises     runs     < 1e-12
    a pre-norm transformer block         > 0.01     raises   < 1e-12
"""

import pytest
import torch
from explained_networks import functional, mlp, resnet, transformer
from torch import nn
from torch.nn import functional as F

from interp_nn.explain.linear.affine_map import linearize

attr = pytest.importorskip("captum.attr")
pytestmark = pytest.mark.filterwarnings("ignore")  # captum's own
DTYPE = torch.float64


class Between(nn.Module):
    """Two linear layers with a function between them."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Twice(nn.Module):
    """Layers of which only the one in question is called twice."""

    def __init__(self, layer, first, second, last):
        super().__init__()
        self.layer, self.first, self.second, self.last = layer, first, second, last

    def forward(self, x):
        return self.last(self.layer(self.second(self.layer(self.first(x)))).flatten(1))


def relu_twice():
    return Twice(nn.ReLU(), nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def pooling_twice():
    convolutions = (nn.Conv2d(n, 4, 3, padding=1) for n in (1, 4))
    return Twice(nn.MaxPool2d(2), *convolutions, nn.Linear(16, 3))


def seeded(make):
    torch.manual_seed(0)
    return make().to(DTYPE).eval()


PIECEWISE_LINEAR = {
    "mlp": (lambda: mlp(6, 12, 8, 3), (6,)),
    "functional": (functional, (6,)),
    "resnet": (resnet, (3, 32, 32)),
    "a ReLU twice": (relu_twice, (6,)),
    "a max-pooling twice": (pooling_twice, (1, 8, 8)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 3)), (6,)),
}


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_contributions_are_input_times_gradient_on_piecewise_linear_networks(name):
    make, shape = PIECEWISE_LINEAR[name]
    model, x = seeded(make), torch.randn(4, *shape, dtype=DTYPE)
    for target in (1, torch.tensor([0, 2, 1, 1])):
        wanted = attr.InputXGradient(model).attribute(x.clone(), target=target)
        found = linearize(model, x, target).contributions(x)
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


MISSED = {
    "F.relu": Between(F.relu),
    "Tensor.relu": Between(lambda h: h.relu()),
    "maximum": Between(lambda h: torch.maximum(h, torch.zeros(()))),
    "clamp": Between(lambda h: h.clamp(-0.5, 0.5)),
    "Hardtanh": Between(nn.Hardtanh(-0.5, 0.5)),
    "PReLU": Between(nn.PReLU()),
    "GELU": Between(nn.GELU()),
    "layer norm": Between(nn.LayerNorm(8)),
    "group norm": Between(nn.GroupNorm(2, 8)),
    "transformer": None,
}


def completeness(model, x, target):
    """Contributions and bias against the output."""
    affine = linearize(model, x, target)
    wanted = model(x)[:, 0] if isinstance(target, int) else model(x)[:, 0, 0]
    return float((affine.contributions(x).flatten(1).sum(1) + affine.bias - wanted).detach().abs().max())


def missed(name):
    """The network, an input, and captum's target."""
    if name == "transformer":
        return seeded(transformer), torch.randn(4, 5, 8, dtype=DTYPE), (0, 0)
    return seeded(lambda: MISSED[name]), torch.randn(4, 6, dtype=DTYPE), 0


@pytest.mark.parametrize("name", MISSED)
def test_networks_on_which_deep_lift_does_not_add_up(name):
    model, x, target = missed(name)
    _, delta = attr.DeepLift(model).attribute(x.clone(), target=target, return_convergence_delta=True)
    assert delta.abs().max() > 0.01
    assert completeness(model, x, target if target == 0 else lambda out: out[:, 0, 0]) <= 1e-12


TWICE = "detected that does not contain some of the input/output attributes"


@pytest.mark.parametrize(
    ("method", "make", "shape", "message"),
    [
        ("DeepLift", relu_twice, (6,), rf"Module ReLU\(\) was {TWICE}"),
        ("DeepLift", pooling_twice, (1, 8, 8), rf"Module MaxPool2d\(.*\) was {TWICE}"),
        ("DeepLift", resnet, (3, 32, 32), rf"Module ReLU\(inplace=True\) was {TWICE}"),
        ("LRP", pooling_twice, (1, 8, 8), r"Module MaxPool2d\(.*\) is being used more than once"),
    ],
)
def test_layers_called_twice_on_which_captum_raises(method, make, shape, message):
    model, x = seeded(make), torch.randn(4, *shape, dtype=DTYPE)
    with pytest.raises(RuntimeError, match=message):
        getattr(attr, method)(seeded(make)).attribute(x.clone(), target=0)
    assert completeness(model, x, 0) <= 1e-12


@pytest.mark.parametrize("name", ["Hardtanh", "PReLU", "GELU", "layer norm", "group norm", "transformer"])
def test_networks_for_which_lrp_has_no_rule(name):
    model, x, target = missed(name)
    kind = "LayerNorm" if name == "transformer" else type(model.function).__name__
    with pytest.raises(TypeError, match=rf"Module of type <class '.*\.{kind}'> has no rule defined"):
        attr.LRP(model).attribute(x.clone(), target=target)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *((lambda name=name: MISSED[name], (6,)) for name in ("F.relu", "Tensor.relu", "maximum", "clamp")),
        (relu_twice, (6,)),
        (resnet, (3, 32, 32)),
    ],
)
def test_networks_on_which_lrp_runs(make, shape):
    x = torch.randn(4, *shape, dtype=DTYPE)
    assert attr.LRP(seeded(make)).attribute(x.clone(), target=0).isfinite().all()
    assert completeness(seeded(make), x, 0) <= 1e-12
