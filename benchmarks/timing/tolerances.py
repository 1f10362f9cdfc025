"""Tolerances: a result may be twice as far from fp64 as PyTorch's expression at the same precision, plus some ulps.

The tests, the suites and the GPU job use them. The formulas in plain PyTorch, with which results are compared, are here too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interp_nn.engines.accuracy import FLOOR_ULPS as FLOOR_ULPS
from interp_nn.engines.accuracy import SPLIT_ULPS as SPLIT_ULPS
from interp_nn.engines.accuracy import errors as errors
from interp_nn.engines.accuracy import exceeds as exceeds
from interp_nn.engines.accuracy import floor as floor

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
