"""The parts of a network between its layers of weights, with the gates fixed: gates, pooling, sums and concatenation.

These parts map a layer's output to the next layer's input, one channel at a time. The map of positions is linear and known for
each sample. The weights are not part of it, since they are the same for all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class PositionMap(NamedTuple):
    """Pairs of positions: entry t leads from position inputs[t] of a layer's output to position outputs[t] of a value.

    inputs, outputs: (T,) int64.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Term:
    """The contribution of one layer's output u to a value z, which has samples n, channels c and positions q.

    z(n, c, q) = sum over the entries t with outputs[t] = q of profile(t, n, c) scale(c) u(n, c - shift, inputs[t]).

    layer: the index of the layer. profile: (T, n, channels). norms: the batch norms between the two. Their scales are weights
    too; `scale` (channels,) is their product. unit: a factor of the profile, of int8. largest: max |unit profile|.
    """

    layer: int
    position_map: PositionMap
    profile: Tensor
    shift: int
    scale: Tensor
    norms: tuple[str, ...] = ()
    unit: float = 1.0
    largest: float = 0.0

    def adds_to(self, other: Term) -> bool:
        """Return True if both terms have the same paths. Terms that differ have no path in common."""
        mine, others = (self.layer, self.shift, self.norms), (other.layer, other.shift, other.norms)
        return (
            mine == others
            and self.profile.shape == other.profile.shape
            and all(torch.equal(a, b) for a, b in zip(self.position_map, other.position_map, strict=True))
        )


@dataclass
class Layer:
    """A layer of weights: u(o, q) = biases(o) + sum over k and c of weight(o, c, k) z(c, window(k, q)).

    z is the sum of the layer's terms. With several groups, c runs over the inputs of the group of o.

    weight: (outputs, inputs / groups, K). window: (K, positions) int64, -1 beyond the edge. biases: any number of (outputs,).
    The network's input and the shift of a batch norm are layers without terms and with one position. shape: the sizes of the
    output's dimensions, of a convolution. shifts: the steps along each dimension that the window takes, where its stride is 1.
    """

    name: str
    terms: list[Term]
    weight: Tensor
    window: Tensor
    groups: int
    biases: list[Tensor]
    shape: tuple[int, ...] = ()
    shifts: tuple[tuple[int, ...], ...] = ()

    @property
    def positions(self) -> int:
        """The number of positions of the output."""
        return self.window.shape[1]
