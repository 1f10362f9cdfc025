"""What a provider's results are compared with: fp64, and PyTorch's own error at the same precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import tolerances
from benchmarks.timing.problems import DTYPES, Data, Problem
from benchmarks.timing.providers import Provider

# A relative error beyond which a result is wrong, whoever computes it. Ours has the law of `benchmarks.law` to keep besides.
_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

VALUE_ONLY = ("fwd", "infer")  # modes without gradients


class Truth:
    """What providers' results are compared with, each family's computed once: in fp64, and by PyTorch at the same precision."""

    def __init__(self, problem: Problem, t: Data) -> None:
        self._problem, self._data = problem, t
        self._exact: dict[tuple[str, bool], list[Tensor]] = {}
        self._plain: dict[tuple[str, bool], list[tuple[float, float]]] = {}

    def errors(self, provider: Provider, mode: str, got: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Of a mode's results: (relative Frobenius, relative maximum) of each."""
        return [tolerances.errors(g, e) for g, e in zip(got, of_mode(mode, self._results(provider, mode)), strict=True)]

    def plain_errors(self, provider: Provider, mode: str) -> list[tuple[float, float]]:
        """Of PyTorch's own results at the same precision."""
        key = provider.family, mode in VALUE_ONLY
        if key not in self._plain:
            got = _evaluated(
                functools.partial(provider.plain, self._data), provider.leaves(0), self._data.dy, mode in VALUE_ONLY
            )
            self._plain[key] = [
                tolerances.errors(g, e) for g, e in zip(got, self._results(provider, mode), strict=True)
            ]
        return of_mode(mode, self._plain[key])

    def breach(self, provider: Provider, mode: str, errors: Sequence[tuple[float, float]]) -> str | None:
        """Why results with these errors are wrong, None if they are right."""
        dtype = DTYPES[self._problem.dtype]
        floor = {
            "tf32": tolerances.FLOOR_ULPS[torch.float16] * tolerances.TF32_EPS,
            "fp32": tolerances.floor(dtype, tolerances.SPLIT_ULPS if self._data.x.is_cuda else None),
        }.get(self._problem.dtype, tolerances.floor(dtype))
        plain, limit = self.plain_errors(provider, mode), _LIMIT[dtype] if self._problem.dtype != "tf32" else 1e-2
        for name, ours, theirs in zip(of_mode(mode, _results(len(provider.leaves(0)))), errors, plain, strict=True):
            if not ours[0] <= limit:
                return f"{name}: relative error {ours[0]:.2g} against fp64"
            if provider.engine is not None and (why := tolerances.breach(ours, theirs, floor)):
                return f"{name}: {why}"
        return None

    def _results(self, provider: Provider, mode: str) -> list[Tensor]:
        key = provider.family, mode in VALUE_ONLY
        if key not in self._exact:
            function, leaves = provider.exact()
            self._exact[key] = _evaluated(function, leaves, self._data.dy.double(), mode in VALUE_ONLY)
        return self._exact[key]


def _evaluated(
    function: Callable[[], Tensor], leaves: tuple[Tensor, ...], dy: Tensor, value_only: bool
) -> list[Tensor]:
    if not value_only:
        return value_and_gradients(function, leaves, dy)
    with torch.no_grad():
        return [function()]


def value_and_gradients(function: Callable[[], Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """The value of a function and its gradients; a loss has no upstream but 1."""
    y = function()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy if y.dim() else None)]


def of_mode(mode: str, whole: list[Any]) -> list[Any]:
    """Of a value and its gradients what a mode computes."""
    if mode in VALUE_ONLY:
        return whole[:1]
    return whole[1:] if mode == "bwd" else whole


def _results(leaves: int) -> list[str]:
    return ["value", *("dx", "dw", "da", "dc")[:leaves]]
