"""Operations that are exactly piecewise linear: activations with kinks, clamps, comparisons, choices by index, max-pooling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.following.calls import Call, Replay, Rule, Treatment, frozen, stepped
from interp_nn.explain.following.maxima import Contest, Contested, adaptive_windows, on_ties, sliding_windows, whole

_STEP = (0, 1)


@dataclass(frozen=True)
class Pieces:
    """A piecewise linear function of z: the kinks in ascending order, and slope and offset of the pieces between them.

    A kink is part of the piece below it, but the first one where `first_above`.
    """

    kinks: tuple[Any, ...]
    slopes: tuple[Any, ...]
    offsets: tuple[Any, ...]
    first_above: bool = False

    def preactivations(self, z: Tensor) -> Tensor:
        """z less each kink: (n, ...) for one kink, (n, kinks, ...) for several."""
        shifted = [z if isinstance(kink, (int, float)) and kink == 0 else z - kink for kink in self.kinks]
        if self.first_above:
            shifted[0] = on_ties(shifted[0])
        return shifted[0] if len(shifted) == 1 else torch.stack(shifted, 1)

    def at(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Slope and offset for each entry of z."""
        gates = [z > kink for kink in self.kinks]
        if self.first_above:
            gates[0] = z >= self.kinks[0]

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


def gated(pieces: Callable[[Call], Pieces], factor: bool = False) -> Rule:
    """An activation made of pieces."""

    def rule(call: Call) -> Treatment:
        shape = pieces(call)
        slope, offset = shape.at(call.input)
        return Treatment(
            "gate", sloped(slope, offset), factor=factor, preactivations=lambda now: shape.preactivations(now.input)
        )

    return rule


def sloped(slope: Tensor, offset: Tensor | float | None) -> Replay:
    """z becomes slope z + offset, in place where the call is."""

    def replay(call: Call) -> Tensor:
        z = call.input
        out = z.mul_(slope) if call.inplace else z * slope
        return out if offset is None else out.add_(offset)

    return replay


def clamped(call: Call) -> Treatment:
    """clamp, clip, clamp_min, clamp_max."""
    low = call.argument(1, "min") if call.name != "clamp_max" else None
    high = call.argument(1, "max") if call.name == "clamp_max" else call.argument(2, "max")
    if call.kind(low) is not None or call.kind(high) is not None:
        return frozen(call, call.here("its bounds depend on the input"))
    return gated(lambda _: _clipped(low, high), factor=low is not None and high is not None)(call)


def larger(sign: int) -> Rule:
    """maximum (1) and minimum (-1) of two: the first where it is the larger, the second on a tie."""

    def difference(call: Call) -> Tensor:
        return sign * (call.input - call.argument(1, "other"))

    def rule(call: Call) -> Treatment:
        a, b = call.input, call.argument(1, "other")
        if (source := call.source(a) or call.source(b)) is not None:
            return frozen(call, source)
        gate = difference(call) > 0
        return Treatment(
            "gate", lambda now: torch.where(gate, now.input, now.argument(1, "other")), preactivations=difference
        )

    return rule


def compared(call: Call) -> Treatment:
    """gt, ge, lt, le: the result is a gate, on where the difference is positive, or zero where that makes it true."""
    sign = 1 if call.name in ("gt", "ge", "greater", "greater_equal") else -1
    if any(call.source(t) is not None for t in call.tensors()):
        return stepped(call)

    def difference(now: Call) -> Tensor:
        lead = sign * (now.input - now.argument(1, "other"))
        return on_ties(lead) if call.name in ("ge", "le", "greater_equal", "less_equal") else lead

    return Treatment("gate", source=call.here(), step=True, preactivations=difference)


def pooled(dimensions: int) -> Rule:
    """Max-pooling, by the index of the largest, the first one on a tie."""

    def rule(call: Call) -> Treatment:
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

        def contest() -> Contest:
            windows = (adaptive_windows if adaptive else sliding_windows)(call, indices.shape[-dimensions:])
            return Contest(flat(call), windows, indices.flatten(-dimensions))

        return Treatment("gate", replay, preactivations=Contested(contest, flat))

    return rule


def selected(call: Call) -> Treatment:
    """max, min, topk, sort, median, kthvalue along a dimension: by index."""
    other = call.argument(1, "other")
    if call.name in ("max", "min") and isinstance(other, Tensor):
        return larger(1 if call.name == "max" else -1)(call)
    result = call.run()
    if isinstance(result, Tensor):
        return frozen(call, call.here("without a dimension it couples the samples of the batch"))
    indices = result[1]
    dim = call.argument(2 if call.name in ("topk", "kthvalue") else 1, "dim", default=-1)

    def replay(now: Call) -> Any:
        kept = indices.dim() == now.input.dim()
        values = now.input.gather(dim, indices if kept else indices.unsqueeze(dim))
        return type(result)((values if kept else values.squeeze(dim), indices))

    if call.name not in ("max", "min"):
        return Treatment("gate", replay)
    sign, winner = (
        1 if call.name == "max" else -1,
        indices if indices.dim() == call.input.dim() else indices.unsqueeze(dim),
    )
    return Treatment(
        "gate",
        replay,
        preactivations=_ranked(lambda now: sign * now.input.movedim(dim, -1), call, winner.movedim(dim, -1)),
    )


def largest(call: Call) -> Treatment:
    """amax, amin: by the index of the first."""
    dim = call.argument(1, "dim", default=())
    dims = [d % call.input.dim() for d in ((dim,) if isinstance(dim, int) else dim)]
    if not dims or 0 in dims:
        return frozen(call, call.here("over the first dimension it couples the samples of the batch"))
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
    return Treatment("gate", replay, preactivations=_ranked(lambda now: sign * flat(now.input), call, index))


def _ranked(values: Callable[[Call], Tensor], call: Call, winner: Tensor) -> Contested:
    """Gates of a choice of the largest along the last dimension."""

    def contest() -> Contest:
        z = values(call)
        return Contest(z, whole(z), winner)

    return Contested(contest, values)
