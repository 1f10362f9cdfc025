"""The accuracy that a result must have: at most twice PyTorch's own error against fp64, plus a few ulps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Added to twice PyTorch's error: the ulps that a chain of roundings leaves where PyTorch's roundings happen to cancel. In fp64
# the reference is itself the expression of the same precision, and its error reads as zero.
FLOOR_ULPS = {torch.float64: 32, torch.float32: 3, torch.bfloat16: 3, torch.float16: 3}
# An fp32 product of operands in two tf32 parts drops the product of the low parts, 2^-22 of it; PyTorch's may be exact there.
SPLIT_ULPS = 8
TF32_ULPS = 2**13  # one of tf32


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
