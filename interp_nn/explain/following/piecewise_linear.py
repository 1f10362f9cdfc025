"""Piecewise linear operations: activations such as ReLU, clamps, comparisons, selections by index and max-pooling."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.following.argmax_gates import (
    LONGEST_ORDER,
    ArgmaxGates,
    LazyGates,
    OrderGates,
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
    UnsupportedCallError,
    piecewise_constant,
    recorded_value,
)

_STEP = (0, 1)


@dataclass(frozen=True)
class Pieces:
    """A piecewise linear function of z.

    A breakpoint's gate is on where z passes: on the side that is not flat, or above if neither is. It is off at the breakpoint.

    Attributes:
        breakpoints: In ascending order.
        slopes: Slope of each piece.
        offsets: Offset of each piece.
    """

    breakpoints: tuple[Any, ...]
    slopes: tuple[Any, ...]
    offsets: tuple[Any, ...]

    def preactivations(self, z: Tensor) -> Tensor:
        """Return the signed distance to each breakpoint: (n, ...) for one breakpoint, (n, breakpoints, ...) for several."""
        shifted = [z if isinstance(b, (int, float)) and b == 0 else z - b for b in self.breakpoints]
        signed = [-t if flat else t for t, flat in zip(shifted, self._flat_above(), strict=True)]
        return signed[0] if len(signed) == 1 else torch.stack(signed, 1)

    def _flat_above(self) -> list[bool]:
        return [isinstance(slope, (int, float)) and slope == 0 for slope in self.slopes[1:]]

    def at(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return slope and offset for each entry of z; the offset is None if it is 0 everywhere."""
        gates = [z >= b if flat else z > b for b, flat in zip(self.breakpoints, self._flat_above(), strict=True)]

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
    z, slope = call.input, call.argument("weight").detach()
    if slope.numel() > 1 and z.dim() > 1:
        slope = slope.view(-1, *[1] * (z.dim() - 2))
    return Pieces((0,), (slope, 1), (0, 0))


def _rrelu(call: Call) -> Pieces:
    slope = (call.argument("lower") + call.argument("upper")) / 2
    return Pieces((0,), (slope, 1), (0, 0))


def _clipped(low: Any, high: Any) -> Pieces:
    high = None if isinstance(high, float) and high == torch.inf and low is not None else high
    low = None if isinstance(low, float) and low == -torch.inf and high is not None else low
    if low is None:
        return Pieces((high,), (1, 0), (0, high))
    if high is None:
        return Pieces((low,), (0, 1), (low, 0))
    crossed = low > high  # PyTorch then gives the upper bound everywhere
    low = torch.where(crossed, high, low) if isinstance(crossed, Tensor) else min(low, high)
    return Pieces((low, high), (0, 1, 0), (low, 0, high))


def _hardtanh(call: Call) -> Pieces:
    return _clipped(call.argument("min_val"), call.argument("max_val"))


def _threshold(call: Call) -> Pieces:
    return Pieces((call.argument("threshold"),), (0, 1), (call.argument("value"), 0))


def _shrink(soft: bool) -> Callable[[Call], Pieces]:
    def pieces(call: Call) -> Pieces:
        width = call.argument("lambd")
        return Pieces((-width, width), (1, 0, 1), (width, 0, -width) if soft else (0, 0, 0))

    return pieces


PIECES: dict[str, Callable[[Call], Pieces]] = {
    "relu": lambda call: Pieces((0,), _STEP, (0, 0)),
    "leaky_relu": lambda call: Pieces((0,), (call.argument("negative_slope"), 1), (0, 0)),
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


def activation(pieces: Callable[[Call], Pieces], factor: int = 1) -> Rule:
    """Return the rule of a piecewise linear activation."""

    def rule(call: Call) -> RuleResult:
        slope, offset = pieces(call).at(call.input)
        return RuleResult(
            "gate",
            scale_and_shift(slope, offset),
            factor=factor,
            preactivations=lambda now: pieces(now).preactivations(now.input),
            linear=offset is None,
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
    low, high = call.argument("min"), call.argument("max")
    if call.dependence(low) is not None or call.dependence(high) is not None:
        return recorded_value(call, call.as_non_affine("its bounds depend on the input"))
    both = low is not None and high is not None
    return activation(lambda now: _clipped(now.argument("min"), now.argument("max")), factor=2 if both else 1)(call)


def maximum(sign: int) -> Rule:
    """Return the rule of maximum (sign 1) or minimum (-1) of two tensors.

    The gate is on where the argument that depends on the input wins, or the first one if both do. It is off on a tie.
    """

    def rule(call: Call) -> RuleResult:
        a, b = call.input, call.argument("other")
        if (non_affine := call.non_affine(a) or call.non_affine(b)) is not None:
            return recorded_value(call, non_affine)
        first = call.dependence(a) is not None

        def pair(now: Call) -> tuple[Tensor, Tensor]:
            one, other = now.input, now.argument("other")
            return (one, other) if first else (other, one)

        def difference(now: Call) -> Tensor:
            one, other = pair(now)
            return sign * (one - other)

        gate = difference(call) > 0
        return RuleResult("gate", lambda now: torch.where(gate, *pair(now)), preactivations=difference)

    return rule


def comparison(call: Call) -> RuleResult:
    """Rule of gt, ge, lt and le, eq and ne: the result is a mask.

    The gate is on where the argument that depends on the input, or the first one if both do, is the larger one. What the mask
    is used for may turn it, see `Mask`. For eq and ne there are two gates, one for each side of equality.
    """
    operands = [call.dependence(t) for t in call.tensors()]
    if any(d is not None and d.non_affine is not None and not d.piecewise_constant for d in operands):
        return piecewise_constant(call)

    def difference(now: Call) -> Tensor:
        a, b = (_floating(value) for value in (now.input, now.argument("other")))
        return a - b

    if call.name in ("eq", "ne", "not_equal"):
        return piecewise_constant(call, lambda now: _both_sides(difference(now)), "gate")
    true_on_ties = call.name in ("ge", "le", "greater_equal", "less_equal")
    first = call.dependence(call.input) is not None
    true_above = call.name.startswith("g") == first

    def lead(now: Call) -> Tensor:
        z = difference(now) if first else -difference(now)
        return positive_on_ties(z) if true_on_ties == true_above else z

    return replace(piecewise_constant(call, lead, "gate"), true_on=true_above)


def _floating(value: Any) -> Any:
    return value.to(torch.get_default_dtype()) if isinstance(value, Tensor) and not value.is_floating_point() else value


def sign(call: Call) -> RuleResult:
    """Rule of functions of an entry's sign, such as sign, bool and nonzero: two gates for each entry."""
    if call.input.is_complex():
        raise UnsupportedCallError("it takes complex values")
    return piecewise_constant(call, lambda now: _both_sides(now.input), "gate")


def _both_sides(z: Tensor) -> Tensor:
    """Return z and -z, (n, 2, ...): the gates of z > 0 and z < 0."""
    return torch.stack([z, -z], 1) if z.dim() else torch.stack([z, -z])


def constant(call: Call) -> RuleResult:
    """Rule of isfinite and the like, which have one value for all finite inputs."""
    return piecewise_constant(call, treatment="gate")


def max_pooling(dimensions: int) -> Rule:
    """Return the rule of max-pooling over 1 to 3 dimensions; on a tie the first value wins."""

    def rule(call: Call) -> RuleResult:
        adaptive = call.name.startswith("adaptive")
        native = adaptive and not isinstance(call.function, types.FunctionType)  # torch's, not torch.nn.functional's
        both = native or call.name.endswith("_with_indices") or call.argument("return_indices", False)
        pool = getattr(F, f"{call.name.removesuffix('_with_indices')}_with_indices")
        given = {name: value for name, value in call.named.items() if name not in ("input", "return_indices")}
        _, indices = pool(call.input, **{name: value for name, value in given.items() if value != []})

        def flat(now: Call) -> Tensor:
            return now.input.flatten(-dimensions)

        def replay(now: Call) -> Tensor | tuple[Tensor, Tensor]:
            picked = flat(now).gather(-1, indices.flatten(-dimensions)).view(indices.shape)
            return (picked, indices) if both else picked

        def build() -> ArgmaxGates:
            windows = (adaptive_windows if adaptive else sliding_windows)(call, indices.shape[-dimensions:])
            return ArgmaxGates(flat(call), windows, indices.flatten(-dimensions))

        return RuleResult("gate", replay, preactivations=LazyGates(build, flat), linear=True)

    return rule


def selection(call: Call) -> RuleResult:
    """Rule of max, min, topk, sort, median and kthvalue along a dimension: the recorded indices are selected."""
    if call.name in ("max", "min") and isinstance(call.argument("other"), Tensor):
        return maximum(1 if call.name == "max" else -1)(call)
    result = call.run()
    if isinstance(result, Tensor):
        return recorded_value(call, call.as_non_affine("without a dimension it couples the samples of the batch"))
    indices, dim = result[1], call.argument("dim")

    def replay(now: Call) -> Any:
        kept = indices.dim() == now.input.dim()
        # A copy, because gather keeps its input for autograd, and a later call may overwrite it.
        values = now.input.clone().gather(dim, indices if kept else indices.unsqueeze(dim))
        return type(result)((values if kept else values.squeeze(dim), indices))

    chosen = (indices if indices.dim() == call.input.dim() else indices.unsqueeze(dim)).movedim(dim, -1)
    if call.name in ("max", "min"):
        sign = 1 if call.name == "max" else -1
        return RuleResult(
            "gate", replay, preactivations=_lazy_argmax(lambda now: sign * now.input.movedim(dim, -1), call, chosen)
        )
    gates = _lazy_order(call, dim, chosen)
    return RuleResult("piece" if gates is None else "gate", replay, preactivations=gates)


def argsort(call: Call) -> RuleResult:
    """Rule of argsort: the recorded order, with one gate for each pair of entries."""
    dim = call.argument("dim")
    gates = _lazy_order(call, dim, call.run().movedim(dim, -1))
    return piecewise_constant(call, gates, "piece" if gates is None else "gate")


def argmax(call: Call) -> RuleResult:
    """Rule of argmax and argmin: the recorded index, with one gate for each candidate."""
    dim, sign = call.argument("dim"), 1 if call.name == "argmax" else -1

    def values(now: Call) -> Tensor:
        return sign * (now.input.reshape(1, -1) if dim is None else now.input.movedim(dim, -1))

    winner = values(call).argmax(-1, keepdim=True)
    return piecewise_constant(call, _lazy_argmax(values, call, winner), "gate")


def _lazy_order(call: Call, dim: int, chosen: Tensor) -> LazyGates | None:
    """Return the gates of a choice by order, or None if the pattern does not hold them.

    Args:
        call: The call.
        dim: The dimension that is ordered.
        chosen: (..., k), the chosen indices in the order of the result, with the dimension last.
    """
    length = call.input.shape[dim] if call.input.dim() else 1
    if length > LONGEST_ORDER or call.argument("sorted", True) is False:
        return None
    ascending = call.name in ("median", "kthvalue") or not call.argument("largest", call.argument("descending", False))
    sign = -1 if ascending else 1

    def values(now: Call) -> Tensor:
        return sign * now.input.movedim(dim, -1)

    single = call.name in ("median", "kthvalue")
    return LazyGates(lambda: OrderGates(values(call), chosen, single), values)


def amax(call: Call) -> RuleResult:
    """Rule of amax and amin: the recorded index is selected, the first one on a tie."""
    dim = call.argument("dim")
    dims = [d % call.input.dim() for d in ((dim,) if isinstance(dim, int) else dim)]
    if not dims or 0 in dims:
        return recorded_value(call, call.as_non_affine("over the first dimension it couples the samples of the batch"))
    keepdim, last = call.argument("keepdim"), tuple(range(-len(dims), 0))

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


def _lazy_argmax(values: Callable[[Call], Tensor], call: Call, winner: Tensor) -> LazyGates:
    """Return the gates of an argmax over the last dimension."""

    def build() -> ArgmaxGates:
        z = values(call)
        return ArgmaxGates(z, single_window(z), winner)

    return LazyGates(build, values)
