"""Small networks of the layers, and the same networks with the formulas in plain PyTorch."""

import copy

import torch
from relative_error import naive_kernel, naive_linear, randomize
from torch import nn
from torch.nn import functional as F

from interp_nn.nn import SummaryConv2d, SummaryHead, SummaryLinear


class PlainLinear(SummaryLinear):
    """`SummaryLinear` in plain PyTorch."""

    def forward(self, x):
        return naive_linear(x, self.b, self.bias)


class PlainConv2d(SummaryConv2d):
    """`SummaryConv2d` in plain PyTorch."""

    def forward(self, x):
        return F.conv2d(x, naive_kernel(self.b), self.bias, self.stride, self.padding)


def mlp(dtype=torch.float32):
    """Return two linear layers with tanh between them."""
    return randomize(nn.Sequential(SummaryLinear(12, 8), nn.Tanh(), SummaryLinear(8, 3)).to(dtype), 0.4)


def cnn(dtype=torch.float32):
    """Return a convolution, tanh and a linear layer."""
    layers = nn.Unflatten(1, (1, 3, 4)), SummaryConv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), SummaryLinear(24, 3)
    return randomize(nn.Sequential(*layers).to(dtype), 0.4)


def head(dtype=torch.float32):
    """Return a `SummaryHead`."""
    return randomize(SummaryHead(12, 5, 3, dtype=dtype), 0.4)


def plain(model):
    """Return a copy of the network whose layers compute the formulas in plain PyTorch."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is SummaryLinear:
            module.__class__ = PlainLinear
        elif type(module) is SummaryConv2d:
            module.__class__ = PlainConv2d
    return model


def batch(n=10, dtype=torch.float32):
    """Return inputs and targets for these networks."""
    return torch.randn(n, 12, dtype=dtype), torch.randint(3, (n,))
