"""Every way to compute the summary that is timed: ours, the eager associations, the inverse baseline, and nn.Linear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from interp_nn import functional

Provider = Callable[[Tensor, Tensor], Tensor]

NAIVE = "eager A"

PROVIDERS: dict[str, Provider] = {
    "interp_nn": functional.summary,
    NAIVE: lambda x, b: x @ b @ (b.T @ b),
    "eager B": lambda x, b: x @ (b @ (b.T @ b)),
    "eager C": lambda x, b: ((x @ b) @ b.T) @ b,
    "eager D": lambda x, b: (x @ (b @ b.T)) @ b,
    "eager E": lambda x, b: x @ ((b @ b.T) @ b),
    "inverse": functional.inverse_summary,
    "nn.Linear": lambda x, w: torch.nn.functional.linear(x, w),
}


def applicable(d: int, k: int) -> list[str]:
    """The providers worth timing: associations D and E only where k > d, the inverse only where bᵀb has one (k <= d)."""
    left_out = {"inverse"} if k > d else {"eager D", "eager E"}
    return [name for name in PROVIDERS if name not in left_out]


def truth(name: str) -> Provider:
    """What a provider should compute, to be called in fp64."""
    if name in ("inverse", "nn.Linear"):
        return PROVIDERS[name]
    return PROVIDERS[NAIVE]
