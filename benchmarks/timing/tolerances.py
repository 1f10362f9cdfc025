"""Tolerances: a result may be twice as far from fp64 as PyTorch's expression at the same precision, plus some ulps.

The tests, the suites and the GPU job use them. The formulas in plain PyTorch, with which results are compared, are here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to twice PyTorch's error: the ulps that a chain of roundings leaves where PyTorch's roundings happen to cancel. In fp64
# the reference is itself the expression of the same precision, and its error reads as zero.
FLOOR_ULPS = {torch.float64: 32, torch.float32: 3, torch.bfloat16: 3, torch.float16: 3}
# An fp32 product of operands in two tf32 parts drops the product of the low parts, 2^-22 of it; PyTorch's may be exact there.
SPLIT_ULPS = 8
TF32_EPS = 2.0**-10


def naive(x: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the summary as a user would write it: (X b)(bᵀb) + bias."""
    y = x @ b @ (b.mT @ b)
    return y if bias is None else y + bias


def naive_pair(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (projection, summary)."""
    return x @ b, naive(x, b)


def naive_loss(
    o1: Tensor, o2: Tensor, target: Tensor, weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ignore_index: int = -100, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Compute w1 CE(o1) + w2 CE(o2) + w3 MSE(o1, o2) over the rows that are not ignored; 16-bit logits are read in fp32."""
    wide = torch.float64 if o1.dtype == torch.float64 else torch.float32
    m, kept = o1.shape[-1], (target != ignore_index).flatten()
    o1, o2 = o1.to(wide).reshape(-1, m), o2.to(wide).reshape(-1, m)
    first, second = (
        F.cross_entropy(o, target.flatten(), ignore_index=ignore_index, reduction="none") for o in (o1, o2)
    )
    mse = torch.where(kept, (o1 - o2).square().mean(1), 0.0)
    rows = weights[0] * first + weights[1] * second + weights[2] * mse
    if reduction == "none":
        return rows.view(target.shape)
    return rows.sum() / kept.sum() if reduction == "mean" else rows.sum()


def naive_cross_entropy(x: Tensor, b: Tensor, target: Tensor, *given: Any, **named: Any) -> Tensor:
    """Compute the three-term loss of a pair, with the further arguments of `naive_loss`."""
    return naive_loss(*naive_pair(x, b), target, *given, **named)


def naive_head_cross_entropy(
    x: Tensor, b: Tensor, a: Tensor, c: Tensor | None, target: Tensor, *given: Any, **named: Any
) -> Tensor:
    """Compute the three-term loss behind an output layer, with the further arguments of `naive_loss`."""
    p, y = naive_pair(x, b)
    return naive_loss(F.linear(p, a, c), F.linear(y, a, c), target, *given, **named)


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the (relative Frobenius, relative maximum) error against an fp64 reference; infinite for a NaN or Inf."""
    got, exact = got.detach().double(), exact.detach()
    assert exact.dtype == torch.float64
    assert got.shape == exact.shape
    if got.numel() == 0:
        return 0.0, 0.0
    difference = got - exact
    off, scale = ([float(torch.linalg.vector_norm(t, order)) for order in (2, math.inf)] for t in (difference, exact))
    if not math.isfinite(off[0]) or (scale[1] == 0 and off[1] > 0):
        return math.inf, math.inf
    return (off[0] / scale[0], off[1] / scale[1]) if scale[1] else (0.0, 0.0)


def floor(dtype: torch.dtype, ulps: int | None = None) -> float:
    """Return the error that is always allowed to results whose products are rounded to `dtype`."""
    return (ulps or FLOOR_ULPS[dtype]) * torch.finfo(dtype).eps


def exceeds(ours: tuple[float, float], theirs: tuple[float, float], floor: float) -> str | None:
    """Return which of our `errors` exceeds its tolerance, from the errors of PyTorch's expression; None where none does."""
    for kind, our, their in zip(("Frobenius", "maximum"), ours, theirs, strict=True):
        if not math.isfinite(their):
            return "PyTorch's own expression is not finite, which proves nothing"
        if not our <= 2 * their + floor:
            return f"{kind} error {our:.3g}, PyTorch's {their:.3g}, floor {floor:.3g}"
    return None
