"""A network with its gates held, between its layers of weights: gates, pooling, sums and concatenation alone.

They take a layer's output to the next layer's input channel by channel, by a map of positions that is linear and known for each
sample. What depends on the weights is left out: it is the same for all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """Which positions of a layer's output go to which positions here: inputs (T,) to outputs (T,), int64."""

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Term:
    """What one layer's output u adds to a value z of several channels c and positions q, at each sample n:

    z(n, c, q) = sum over the taps t with output q of profile(t, n, c) scale(c) u(n, c - shift, input(t)).

    profile: (T, n, channels). norms: the batch norms on the way; their scales are weights as well, whose product is scale.
    """

    layer: int
    taps: Taps
    profile: Tensor
    shift: int
    scale: Tensor
    norms: tuple[str, ...] = ()

    def adds_to(self, other: Term) -> bool:
        """Whether two terms hold the same paths; others have none in common."""
        mine, others = (self.layer, self.shift, self.norms), (other.layer, other.shift, other.norms)
        return (
            mine == others
            and self.profile.shape == other.profile.shape
            and all(torch.equal(a, b) for a, b in zip(self.taps, other.taps, strict=True))
        )


@dataclass
class Layer:
    """A layer of weights: u(o, q) = sum over k and c of weight(o, c, k) z(c, window(k, q)), plus biases(o), with z the sum of its
    terms; with groups, c runs over the inputs of o's own.

    weight: (outputs, inputs / groups, K). window: (K, positions) int64, -1 beyond the edge. biases: any number of (outputs,).
    What the input is, and what a batch norm adds to a value, are layers without terms and of one position.
    """

    name: str
    terms: list[Term]
    weight: Tensor
    window: Tensor
    groups: int
    biases: list[Tensor]

    @property
    def positions(self) -> int:
        return self.window.shape[1]
