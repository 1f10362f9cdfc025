"""Relative errors, and the formulas of the layers in plain PyTorch."""

import torch
from torch import Tensor, nn


def error(actual: Tensor, wanted: Tensor) -> float:
    """Return the relative Frobenius error in fp64; NaN, which fails any bound, where shapes differ."""
    if actual.shape != wanted.shape:
        return float("nan")
    actual, wanted = actual.detach().double(), wanted.detach().double()
    return float((actual - wanted).norm() / wanted.norm())


def naive_linear(x: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x b (bᵀb) + bias."""
    y = x @ b @ (b.t() @ b)
    return y if bias is None else y + bias


def naive_kernel(b: Tensor, groups: int = 1) -> Tensor:
    """Compute the effective weight (out, ...) of a linear layer's or a convolution's parameter b, group by group."""
    if b.dim() == 2:
        return (b @ (b.t() @ b)).t()
    parts = [rows.flatten(1).t() for rows in b.chunk(groups)]
    return torch.cat([(m @ (m.t() @ m)).t() for m in parts]).reshape(b.shape)


def randomize(module: nn.Module, scale: float = 0.5) -> nn.Module:
    """Draw every parameter at random, so that no b is orthonormal."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * scale)
    return module
