"""Summary layers whose b is far from orthonormal, and the ways in which b changes."""

import torch
from relative_error import randomize
from torch import nn

from interp_nn.nn import SummaryConv2d, SummaryLinear

SIZES = {"linear": (12, 5), "wide": (5, 12), "square": (7, 7)}
CONVOLUTIONS = {"conv": (6, 1), "grouped": (6, 2), "wide conv": (40, 1)}  # output channels and groups


def make(kind, dtype=torch.float64, bias=True):
    """Return a layer and an input."""
    if kind in SIZES:
        layer = SummaryLinear(*SIZES[kind], bias=bias, dtype=dtype)
        return randomize(layer, 0.3), torch.randn(9, layer.in_features, dtype=dtype)
    channels, groups = CONVOLUTIONS[kind]
    layer = SummaryConv2d(4, channels, 3, padding=1, stride=2, groups=groups, bias=bias, dtype=dtype)
    return randomize(layer, 0.3), torch.randn(2, 4, 6, 6, dtype=dtype)


def _step(layer):
    layer.b.grad = torch.randn_like(layer.b)
    torch.optim.Adam(layer.parameters(), lr=0.1).step()


# To be called without gradients.
CHANGES = {
    "step": _step,
    "write": lambda m: m.b.mul_(1.5),
    "write of a part": lambda m: m.b[0].zero_(),
    "replaced": lambda m: setattr(m, "b", nn.Parameter(torch.randn_like(m.b))),
    "initialized": lambda m: nn.init.normal_(m.b),
    "set by its weight": lambda m: m.set_weight_(torch.randn_like(m.weight)),
    "orthogonalized": lambda m: m.orthogonalize_(),
    "swapped": lambda m: torch.utils.swap_tensors(m.b, nn.Parameter(torch.randn_like(m.b))),
}
