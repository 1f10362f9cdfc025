"""Gates of an argmax, one for each candidate of each window, and of an order, one for each pair of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from interp_nn.explain.following.calls import Call
from interp_nn.gates.record import smallest_positive

LONGEST_ORDER = 64  # entries whose pairs are gates of the pattern


class LazyGates:
    """Preactivations of a call that chooses; its gates are built at first use, as they need more memory than the call.

    Args:
        build: Builds the gates.
        values: Returns the call's values in the layout that the gates expect.
    """

    def __init__(self, build: Callable[[], ArgmaxGates | OrderGates], values: Callable[[Call], Tensor]) -> None:
        self._build, self._values = build, values

    def __call__(self, call: Call) -> Tensor:
        """Return the preactivations (..., p, k) of a call's gates."""
        return self.gates.preactivations(self._values(call))

    @cached_property
    def gates(self) -> ArgmaxGates | OrderGates:
        """The gates, built once."""
        with torch.no_grad():
            return self._build()


class ArgmaxGates:
    """One gate for each candidate of each window among values (..., s).

    A candidate's preactivation is its value less the best of the others. It is affine in the values while the best of the
    others is the same candidate. It is positive for the winner alone; on a tie the first candidate wins. It is -inf for an
    empty place, and inf for a candidate without a rival.

    Args:
        values: (..., s) at the recorded input.
        windows: (p, k) int64, the index of each candidate in the last dimension of values; -1 for an empty place.
        winner: (..., p) int64, the index of each window's largest value, the first one on a tie.

    Attributes:
        zero: (..., p) bool, True where a window's largest value is 0.
    """

    def __init__(self, values: Tensor, windows: Tensor, winner: Tensor) -> None:
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
        """Return the preactivations (..., p, k) of the gates for values (..., s)."""
        first = values.gather(-1, self._winner).unsqueeze(-1)
        second = values.gather(-1, self._second).unsqueeze(-1)
        lead = torch.where(self._wins, first - second, values[..., self._windows] - first)
        lead = torch.where(self._wins_ties, positive_on_ties(lead), lead)
        return lead.masked_fill(self._empty, -torch.inf).masked_fill(self._alone, torch.inf)


class OrderGates:
    """The gates of a choice by order among values (..., s): one for each pair of entries whose order matters.

    A pair's gate is on if the entry of the lower index comes first. Its preactivation is the difference of the two values; on
    a tie the recorded order holds. It is -inf for a pair whose order does not matter: two entries that are not chosen, or, for
    a single choice such as the median, two others. A single choice also has a gate of ±inf for each entry, which is on for
    the chosen one.

    Args:
        values: (..., s) at the recorded input; the largest come first.
        chosen: (..., k) int64, the chosen entries in the order of the result.
        single: One entry is chosen, by its rank.

    Attributes:
        zero: None; ties of zeros count.
    """

    zero = None

    def __init__(self, values: Tensor, chosen: Tensor, single: bool) -> None:
        s = values.shape[-1]
        self._i, self._j = torch.triu_indices(s, s, 1, device=values.device)
        picked = torch.zeros_like(values, dtype=torch.bool).scatter(-1, chosen, True)
        self._indicator: Tensor | None = None
        if single:
            first = values[..., self._i] > values[..., self._j]
            self._indicator = torch.where(picked, torch.inf, -torch.inf).to(values.dtype)
        else:
            order = torch.arange(chosen.shape[-1], device=values.device).expand(chosen.shape)
            rank = torch.full(values.shape, s, device=values.device).scatter(-1, chosen, order)
            first = rank[..., self._i] < rank[..., self._j]
        self._first, self._matters = first, picked[..., self._i] | picked[..., self._j]

    def preactivations(self, values: Tensor) -> Tensor:
        """Return the preactivations of the gates for values (..., s)."""
        lead = values[..., self._i] - values[..., self._j]
        lead = torch.where(self._first, positive_on_ties(lead), lead).masked_fill(~self._matters, -torch.inf)
        return lead if self._indicator is None else torch.cat([lead, self._indicator.expand(values.shape)], -1)


def positive_on_ties(lead: Tensor) -> Tensor:
    """Return the difference with each 0 replaced by the smallest positive number; other signs do not change."""
    return lead + smallest_positive(lead.dtype)


def single_window(values: Tensor) -> Tensor:
    """Return one window (1, s) of all indices of the last dimension."""
    return torch.arange(values.shape[-1], device=values.device).unsqueeze(0)


def sliding_windows(call: Call, out: Sequence[int]) -> Tensor:
    """Return the windows (p, k) of a max-pooling call with outputs of shape `out`."""
    d, size = len(out), call.input.shape[-len(out) :]
    kernel = _per_axis(call.argument("kernel_size"), d)
    stride = _per_axis(call.argument("stride") or kernel, d)
    padding, dilation = _per_axis(call.argument("padding"), d), _per_axis(call.argument("dilation"), d)
    axes = []
    for i in range(d):
        place = torch.arange(out[i]).unsqueeze(1) * stride[i] - padding[i] + torch.arange(kernel[i]) * dilation[i]
        axes.append(place.masked_fill((place < 0) | (place >= size[i]), -1))
    return _flat_windows(axes, size).to(call.input.device)


def adaptive_windows(call: Call, out: Sequence[int]) -> Tensor:
    """Return the windows (p, k) of an adaptive max-pooling call with outputs of shape `out`."""
    size = call.input.shape[-len(out) :]
    axes = []
    for o, s in zip(out, size, strict=True):
        start, end = torch.arange(o) * s // o, -(-(torch.arange(o) + 1) * s // o)
        place = start.unsqueeze(1) + torch.arange(int((end - start).max()))
        axes.append(place.masked_fill(place >= end.unsqueeze(1), -1))
    return _flat_windows(axes, size).to(call.input.device)


def _per_axis(value: Any, d: int) -> Sequence[int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * d if len(values) == 1 else values


def _flat_windows(axes: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Return flat indices (p, k) of windows that are given along each axis as (p_i, k_i)."""
    places = axes[0]
    for axis, length in zip(axes[1:], size[1:], strict=True):
        empty = (places < 0)[:, None, :, None] | (axis < 0)[None, :, None, :]
        places = (
            (places[:, None, :, None] * length + axis[None, :, None, :]).masked_fill(empty, -1).flatten(2).flatten(0, 1)
        )
    return places
