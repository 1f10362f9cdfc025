"""Piecewise linear operations: activations such as ReLU, clamps, comparisons, selections by index and max-pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.following.argmax_gates import (
    ArgmaxGates,
    LazyArgmax,
    adaptive_windows,
    positive_on_ties,
    single_window,
    sliding_windows,
)
from interp_nn.explain.following.calls import (
    Call,
    CallFunction,
    Rule,
    RuleResult,
    piecewise_constant,
    recorded_value,
)

_STEP = (0, 1)


@dataclass(frozen=True)
class Pieces:
    """A piecewise linear function of z.

    Attributes:
        breakpoints: In ascending order. Each belongs to the piece below it.
        slopes: Slope of each piece.
        offsets: Offset of each piece.
        first_above: True if the first breakpoint belongs to the piece above it.
    """

    breakpoints: tuple[Any, ...]
    slopes: tuple[Any, ...]
    offsets: tuple[Any, ...]
    first_above: bool = False

    def preactivations(self, z: Tensor) -> Tensor:
        """Return z less each breakpoint: (n, ...) for one breakpoint, (n, breakpoints, ...) for several."""
        shifted = [z if isinstance(b, (int, float)) and b == 0 else z - b for b in self.breakpoints]
        if self.first_above:
            shifted[0] = positive_on_ties(shifted[0])
        return shifted[0] if len(shifted) == 1 else torch.stack(shifted, 1)

    def at(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return slope and offset for each entry of z; the offset is None if it is 0 everywhere."""
        gates = [z > b for b in self.breakpoints]
        if self.first_above:
            gates[0] = z >= self.breakpoints[0]

        def chosen(values: tuple[Any, ...]) -> Tensor:
            if values is _STEP:
                return gates[0].to(z.dtype)
            result = torch.zeros_like(z) + values[0]
            for gate, value in zip(gates, values[1:], strict=True):
                result = torch.where(gate, value, result)
            return result

        flat = all(isinstance(offset, (int, float)) and offset == 0 for offset in self.offsets)
        return chosen(self.slopes), None if flat else chosen(self.offsets)


def _prelu(call: Call) -> Pieces:
    z, slope = call.input, call.argument(1, "weight").detach()
    if slope.numel() > 1 and z.dim() > 1:
        slope = slope.view(-1, *[1] * (z.dim() - 2))
    return Pieces((0,), (slope, 1), (0, 0))


def _rrelu(call: Call) -> Pieces:
    slope = (call.argument(1, "lower", default=1 / 8) + call.argument(2, "upper", default=1 / 3)) / 2
    return Pieces((0,), (slope, 1), (0, 0))


def _clipped(low: Any, high: Any) -> Pieces:
    if low is None:
        return Pieces((high,), (1, 0), (0, high))
    if high is None:
        return Pieces((low,), (0, 1), (low, 0))
    crossed = low > high  # PyTorch then gives the upper bound everywhere
    low = torch.where(crossed, high, low) if isinstance(crossed, Tensor) else min(low, high)
    return Pieces((low, high), (0, 1, 0), (low, 0, high))


def _hardtanh(call: Call) -> Pieces:
    return _clipped(call.argument(1, "min_val", default=-1), call.argument(2, "max_val", default=1))


def _threshold(call: Call) -> Pieces:
    return Pieces((call.argument(1, "threshold"),), (0, 1), (call.argument(2, "value"), 0))


def _shrink(soft: bool) -> Callable[[Call], Pieces]:
    def pieces(call: Call) -> Pieces:
        width = call.argument(1, "lambd", default=0.5)
        return Pieces((-width, width), (1, 0, 1), (width, 0, -width) if soft else (0, 0, 0), first_above=True)

    return pieces


PIECES: dict[str, Callable[[Call], Pieces]] = {
    "relu": lambda call: Pieces((0,), _STEP, (0, 0)),
    "leaky_relu": lambda call: Pieces((0,), (call.argument(1, "negative_slope", default=0.01), 1), (0, 0)),
    "prelu": _prelu,
    "rrelu": _rrelu,
    "abs": lambda call: Pieces((0,), (-1, 1), (0, 0)),
    "relu6": lambda call: _clipped(0, 6),
    "hardtanh": _hardtanh,
    "hardsigmoid": lambda call: Pieces((-3, 3), (0, 1 / 6, 0), (0, 0.5, 1)),
    "threshold": _threshold,
    "hardshrink": _shrink(soft=False),
    "softshrink": _shrink(soft=True),
}


def activation(pieces: Callable[[Call], Pieces], factor: bool = False) -> Rule:
    """Return the rule of a piecewise linear activation."""

    def rule(call: Call) -> RuleResult:
        function = pieces(call)
        slope, offset = function.at(call.input)
        return RuleResult(
            "gate",
            scale_and_shift(slope, offset),
            factor=factor,
            preactivations=lambda now: function.preactivations(now.input),
        )

    return rule


def scale_and_shift(slope: Tensor, offset: Tensor | float | None) -> CallFunction:
    """Return the replay of z as slope z + offset, in place if the call is in place."""

    def replay(call: Call) -> Tensor:
        z = call.input
        out = z.mul_(slope) if call.inplace else z * slope
        return out if offset is None else out.add_(offset)

    return replay


def clamp(call: Call) -> RuleResult:
    """Rule of clamp, clip, clamp_min and clamp_max."""
    low = call.argument(1, "min") if call.name != "clamp_max" else None
    high = call.argument(1, "max") if call.name == "clamp_max" else call.argument(2, "max")
    if call.dependence(low) is not None or call.dependence(high) is not None:
        return recorded_value(call, call.as_non_affine("its bounds depend on the input"))
    return activation(lambda _: _clipped(low, high), factor=low is not None and high is not None)(call)


def maximum(sign: int) -> Rule:
    """Return the rule of maximum (sign 1) or minimum (-1) of two tensors; on a tie the second wins."""

    def difference(call: Call) -> Tensor:
        return sign * (call.input - call.argument(1, "other"))

    def rule(call: Call) -> RuleResult:
        a, b = call.input, call.argument(1, "other")
        if (non_affine := call.non_affine(a) or call.non_affine(b)) is not None:
            return recorded_value(call, non_affine)
        gate = difference(call) > 0
        return RuleResult(
            "gate", lambda now: torch.where(gate, now.input, now.argument(1, "other")), preactivations=difference
        )

    return rule


def comparison(call: Call) -> RuleResult:
    """Rule of gt, ge, lt and le: the result is a gate, which is on where the comparison is true."""
    sign = 1 if call.name in ("gt", "ge", "greater", "greater_equal") else -1
    if any(call.non_affine(t) is not None for t in call.tensors()):
        return piecewise_constant(call)

    def difference(now: Call) -> Tensor:
        lead = sign * (now.input - now.argument(1, "other"))
        return positive_on_ties(lead) if call.name in ("ge", "le", "greater_equal", "less_equal") else lead

    return RuleResult("gate", non_affine=call.as_non_affine(), piecewise_constant=True, preactivations=difference)


def max_pooling(dimensions: int) -> Rule:
    """Return the rule of max-pooling over 1 to 3 dimensions; on a tie the first value wins."""

    def rule(call: Call) -> RuleResult:
        adaptive = call.name.startswith("adaptive")
        pool = getattr(F, f"{call.name.removesuffix('_with_indices')}_with_indices")
        kwargs = {key: value for key, value in call.kwargs.items() if key != "return_indices"}
        _, indices = pool(*call.args[: 2 if adaptive else 6], **kwargs)
        both = call.name.endswith("_with_indices") or call.kwargs.get("return_indices", False)

        def flat(now: Call) -> Tensor:
            return now.input.flatten(-dimensions)

        def replay(now: Call) -> Tensor | tuple[Tensor, Tensor]:
            picked = flat(now).gather(-1, indices.flatten(-dimensions)).view(indices.shape)
            return (picked, indices) if both else picked

        def build() -> ArgmaxGates:
            windows = (adaptive_windows if adaptive else sliding_windows)(call, indices.shape[-dimensions:])
            return ArgmaxGates(flat(call), windows, indices.flatten(-dimensions))

        return RuleResult("gate", replay, preactivations=LazyArgmax(build, flat))

    return rule


def selection(call: Call) -> RuleResult:
    """Rule of max, min, topk, sort, median and kthvalue along a dimension: the recorded indices are selected."""
    other = call.argument(1, "other")
    if call.name in ("max", "min") and isinstance(other, Tensor):
        return maximum(1 if call.name == "max" else -1)(call)
    result = call.run()
    if isinstance(result, Tensor):
        return recorded_value(call, call.as_non_affine("without a dimension it couples the samples of the batch"))
    indices = result[1]
    dim = call.argument(2 if call.name in ("topk", "kthvalue") else 1, "dim", default=-1)

    def replay(now: Call) -> Any:
        kept = indices.dim() == now.input.dim()
        values = now.input.gather(dim, indices if kept else indices.unsqueeze(dim))
        return type(result)((values if kept else values.squeeze(dim), indices))

    if call.name not in ("max", "min"):
        return RuleResult("gate", replay)
    sign, winner = (
        1 if call.name == "max" else -1,
        indices if indices.dim() == call.input.dim() else indices.unsqueeze(dim),
    )
    return RuleResult(
        "gate",
        replay,
        preactivations=_lazy_argmax(lambda now: sign * now.input.movedim(dim, -1), call, winner.movedim(dim, -1)),
    )


def amax(call: Call) -> RuleResult:
    """Rule of amax and amin: the recorded index is selected, the first one on a tie."""
    dim = call.argument(1, "dim", default=())
    dims = [d % call.input.dim() for d in ((dim,) if isinstance(dim, int) else dim)]
    if not dims or 0 in dims:
        return recorded_value(call, call.as_non_affine("over the first dimension it couples the samples of the batch"))
    keepdim, last = call.argument(2, "keepdim", default=False), tuple(range(-len(dims), 0))

    def flat(z: Tensor) -> Tensor:
        return z.movedim(dims, last).flatten(-len(dims))

    ranked = flat(call.input)
    index = ranked.argmax(-1, keepdim=True) if call.name == "amax" else ranked.argmin(-1, keepdim=True)

    def replay(now: Call) -> Tensor:
        picked = flat(now.input).gather(-1, index).squeeze(-1)
        for d in sorted(dims) if keepdim else ():
            picked = picked.unsqueeze(d)
        return picked

    sign = 1 if call.name == "amax" else -1
    return RuleResult("gate", replay, preactivations=_lazy_argmax(lambda now: sign * flat(now.input), call, index))


def _lazy_argmax(values: Callable[[Call], Tensor], call: Call, winner: Tensor) -> LazyArgmax:
    """Return the gates of an argmax over the last dimension."""

    def build() -> ArgmaxGates:
        z = values(call)
        return ArgmaxGates(z, single_window(z), winner)

    return LazyArgmax(build, values)
