"""The fp64 reference of a provider's results, and the errors of PyTorch's expression at the same precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import tolerances
from benchmarks.timing.problems import DTYPES, Data, Problem
from benchmarks.timing.providers import Provider

# A larger relative error is wrong for every provider. Those of interp_nn and of a
# user's file have `benchmarks.timing.tolerances` to keep besides.
_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

VALUE_ONLY = ("fwd", "infer", "update")  # modes without gradients


class Fp64Reference:
    """The results of one problem in fp64 and by PyTorch at the same precision, computed once for each provider family."""

    def __init__(self, problem: Problem, t: Data) -> None:
        self._problem, self._data = problem, t
        self._exact: dict[tuple[str, bool], list[Tensor]] = {}
        self._plain: dict[tuple[str, bool], list[tuple[float, float]]] = {}

    def errors(self, provider: Provider, mode: str, got: Sequence[Tensor]) -> list[tuple[float, float]]:
        """Return the (relative Frobenius, relative maximum) error of each result of a mode."""
        exact = of_mode(mode, self._results(provider, mode))
        return [tolerances.errors(g, e) for g, e in zip(_joined(got), exact, strict=True)]

    def plain_errors(self, provider: Provider, mode: str) -> list[tuple[float, float]]:
        """Return the errors of PyTorch's results at the same precision."""
        key = provider.family, mode in VALUE_ONLY
        if key not in self._plain:
            function = functools.partial(provider.plain, self._data)
            got = _evaluated(function, provider.leaves(0), self._data.dy, mode in VALUE_ONLY)
            exact = self._results(provider, mode)
            self._plain[key] = [tolerances.errors(g, e) for g, e in zip(_joined(got), exact, strict=True)]
        return of_mode(mode, self._plain[key])

    def exceeds(self, provider: Provider, mode: str, errors: Sequence[tuple[float, float]]) -> str | None:
        """Return why results with these errors are wrong, None if they are right."""
        dtype = DTYPES[self._problem.dtype]
        floor = {
            "tf32": tolerances.FLOOR_ULPS[torch.float16] * tolerances.TF32_EPS,
            "fp32": tolerances.floor(dtype, tolerances.SPLIT_ULPS if self._data.x.is_cuda else None),
        }.get(self._problem.dtype, tolerances.floor(dtype))
        plain, limit = self.plain_errors(provider, mode), _LIMIT[dtype] if self._problem.dtype != "tf32" else 1e-2
        names = of_mode(mode, ["value", *provider.gradients])
        for name, ours, theirs in zip(names, errors, plain, strict=False):
            if not ours[0] <= limit:
                return f"{name}: relative error {ours[0]:.2g} against fp64"
            if (provider.engine is not None or provider.strict) and (why := tolerances.exceeds(ours, theirs, floor)):
                return f"{name}: {why}"
        return None

    def _results(self, provider: Provider, mode: str) -> list[Tensor]:
        key = provider.family, mode in VALUE_ONLY
        if key not in self._exact:
            function, leaves = provider.exact()
            self._exact[key] = _joined(_evaluated(function, leaves, self._data.dy.double(), mode in VALUE_ONLY))
        return self._exact[key]


def _joined(results: Sequence[Tensor]) -> list[Tensor]:
    """Append the gradient of a gain, one number, to that of its weight: alone it may have no error by luck."""
    out: list[Tensor] = []
    for t in results:
        if t.shape == (1,) and out:
            out[-1] = torch.cat((out[-1].flatten(), t))
        else:
            out.append(t)
    return out


def _evaluated(
    function: Callable[[], Tensor], leaves: tuple[Tensor, ...], dy: Tensor, value_only: bool
) -> list[Tensor]:
    if not value_only:
        return value_and_gradients(function, leaves, dy)
    with torch.no_grad():
        return [function()]


def value_and_gradients(function: Callable[[], Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """Return the value of a function and its gradients; the upstream gradient of a loss is 1."""
    y = function()
    return [y.detach(), *torch.autograd.grad(y, leaves, dy if y.dim() else None)]


def of_mode(mode: str, whole: list[Any]) -> list[Any]:
    """Return the part of (value, gradients ...) that a mode computes."""
    if mode in VALUE_ONLY:
        return whole[:1]
    return whole[1:] if mode in ("bwd", "step") else whole
