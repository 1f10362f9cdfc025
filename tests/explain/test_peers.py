"""Against captum: the same contributions where it works, and networks whose outputs its methods do not add up to.

Largest error of completeness (contributions and bias against the output; for DeepLift and LRP their own convergence delta),
as asserted below; "raises" is an exception. LRP leaves out what biases contribute, by design, so its delta is no error where
it runs; its entries say only where it does not.

    network                              DeepLift   LRP      linearize
    F.relu, Tensor.relu, torch.maximum   > 0.01     runs     < 1e-12
    clamp, Hardtanh, PReLU               > 0.01     -        < 1e-12
    GELU, layer norm, group norm         > 0.01     raises   < 1e-12
    a ReLU called twice                  raises     raises   < 1e-12
    a max-pooling called twice           raises     raises   < 1e-12
    ResNet18 with in-place ReLU          raises     runs     < 1e-12
    a pre-norm transformer block         > 0.01     raises   < 1e-12
"""

import pytest
import torch
from explain.networks import functional, mlp, resnet, transformer
from torch import nn
from torch.nn import functional as F

from interp_nn.explain.affine import linearize

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
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.second = nn.Conv1d(1, 4, 3, padding=1), layer, nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(F.pad(self.first(x.unsqueeze(1)), (1, 1)))
        return self.second(self.layer(h + 0.1).mean(2))


def seeded(make):
    torch.manual_seed(0)
    return make().to(DTYPE).eval()


PIECEWISE_LINEAR = {
    "mlp": (lambda: mlp(6, 12, 8, 3), (6,)),
    "functional": (functional, (6,)),
    "resnet": (resnet, (3, 32, 32)),
    "max-pooling": (lambda: Twice(nn.MaxPool1d(2)), (6,)),
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


@pytest.mark.parametrize("name", MISSED)
def test_networks_on_which_deep_lift_does_not_add_up(name):
    block = name == "transformer"
    model = seeded(transformer) if block else MISSED[name].to(DTYPE).eval()
    x = torch.randn(4, *((5, 8) if block else (6,)), dtype=DTYPE)
    _, delta = attr.DeepLift(model).attribute(x.clone(), target=(0, 0) if block else 0, return_convergence_delta=True)
    assert delta.abs().max() > 0.01
    assert completeness(model, x, (lambda out: out[:, 0, 0]) if block else 0) <= 1e-12


@pytest.mark.parametrize(
    ("method", "make", "shape"),
    [
        ("DeepLift", functional, (6,)),
        ("LRP", functional, (6,)),
        ("DeepLift", lambda: Twice(nn.MaxPool1d(2)), (6,)),
        ("LRP", lambda: Twice(nn.MaxPool1d(2)), (6,)),
        ("DeepLift", resnet, (3, 32, 32)),
        ("LRP", lambda: Between(nn.GELU()), (6,)),
        ("LRP", lambda: Between(nn.LayerNorm(8)), (6,)),
        ("LRP", lambda: Between(nn.GroupNorm(2, 8)), (6,)),
    ],
)
def test_networks_on_which_captum_raises(method, make, shape):
    model, x = seeded(make), torch.randn(4, *shape, dtype=DTYPE)
    with pytest.raises((RuntimeError, TypeError)):
        getattr(attr, method)(seeded(make)).attribute(x.clone(), target=0)
    assert completeness(model, x, 0) <= 1e-12
