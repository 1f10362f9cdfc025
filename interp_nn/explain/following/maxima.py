"""Which of several values is the largest, as gates: one for each candidate of each window of a max-pooling, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp_nn.explain.following.calls import Call
from interp_nn.gates.record import smallest_positive


class Contested:
    """The preactivations of a call that is a contest, which is held when it is first asked for: it takes more memory than the
    call. values: the call's, as the contest takes them.
    """

    def __init__(self, hold: Callable[[], Contest], values: Callable[[Call], Tensor]) -> None:
        self._hold, self._values = hold, values

    def __call__(self, call: Call) -> Tensor:
        return self.contest.preactivations(self._values(call))

    @cached_property
    def contest(self) -> Contest:
        with torch.no_grad():
            return self._hold()


class Contest:
    """The candidates of each window among values (..., s): windows (p, k) holds their places, and -1 for none.

    A candidate's preactivation is its lead over the best of the others, affine in the values while that is the same one, so that
    it is positive for the winner alone: on a tie the first. -inf where there is no candidate, inf where there is no other.
    zero (..., p): whether a window's largest was 0.
    """

    def __init__(self, values: Tensor, windows: Tensor, winner: Tensor) -> None:
        """winner (..., p): the place of each window's largest, the first one on a tie."""
        self._windows, self._winner = windows.clamp_min(0), winner
        self._empty = windows < 0
        self._wins = (windows == winner.unsqueeze(-1)) & ~self._empty
        others = values[..., self._windows].masked_fill(self._empty | self._wins, -torch.inf)
        best, place = others.max(-1)
        self._alone = self._wins & best.isneginf().unsqueeze(-1)
        self._second = self._windows.expand(others.shape).gather(-1, place.unsqueeze(-1)).squeeze(-1)
        first = winner.unsqueeze(-1)
        self._wins_ties = torch.where(self._wins, first < self._second.unsqueeze(-1), self._windows < first)
        self.zero = values.gather(-1, winner) == 0

    def preactivations(self, values: Tensor) -> Tensor:
        """(..., p, k)."""
        first = values.gather(-1, self._winner).unsqueeze(-1)
        second = values.gather(-1, self._second).unsqueeze(-1)
        lead = torch.where(self._wins, first - second, values[..., self._windows] - first)
        lead = torch.where(self._wins_ties, on_ties(lead), lead)
        return lead.masked_fill(self._empty, -torch.inf).masked_fill(self._alone, torch.inf)


def on_ties(lead: Tensor) -> Tensor:
    """A difference that is positive where it was zero, and has its sign and, but for that, its value elsewhere."""
    return lead + smallest_positive(lead.dtype)


def whole(values: Tensor) -> Tensor:
    """One window, of all places of the last dimension."""
    return torch.arange(values.shape[-1], device=values.device).unsqueeze(0)


def sliding_windows(call: Call, out: Sequence[int]) -> Tensor:
    """The windows of a max-pooling call with outputs of shape `out`."""
    d, size = len(out), call.input.shape[-len(out) :]
    kernel = _each(call.argument(1, "kernel_size"), d)
    stride = _each(call.argument(2, "stride") or kernel, d)
    padding, dilation = (
        _each(call.argument(3, "padding", default=0), d),
        _each(call.argument(4, "dilation", default=1), d),
    )
    axes = []
    for i in range(d):
        place = torch.arange(out[i]).unsqueeze(1) * stride[i] - padding[i] + torch.arange(kernel[i]) * dilation[i]
        axes.append(place.masked_fill((place < 0) | (place >= size[i]), -1))
    return _crossed(axes, size).to(call.input.device)


def adaptive_windows(call: Call, out: Sequence[int]) -> Tensor:
    """The windows of an adaptive max-pooling call with outputs of shape `out`."""
    size = call.input.shape[-len(out) :]
    axes = []
    for o, s in zip(out, size, strict=True):
        start, end = torch.arange(o) * s // o, -(-(torch.arange(o) + 1) * s // o)
        place = start.unsqueeze(1) + torch.arange(int((end - start).max()))
        axes.append(place.masked_fill(place >= end.unsqueeze(1), -1))
    return _crossed(axes, size).to(call.input.device)


def _each(value: Any, d: int) -> Sequence[int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * d if len(values) == 1 else values


def _crossed(axes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Flat places (p, k) of windows given along each axis as (p_i, k_i)."""
    places = axes[0]
    for axis, length in zip(axes[1:], size[1:], strict=True):
        empty = (places < 0)[:, None, :, None] | (axis < 0)[None, :, None, :]
        places = (
            (places[:, None, :, None] * length + axis[None, :, None, :]).masked_fill(empty, -1).flatten(2).flatten(0, 1)
        )
    return places
