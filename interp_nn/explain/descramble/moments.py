"""Gram matrices of data that arrive in batches, in O(n²) memory: of all samples, of two halves, and of shuffled data."""

from __future__ import annotations

import torch
from torch import Tensor

from interp_nn.linalg import GramAccumulator

_CHUNK_ENTRIES = 1 << 22  # entries that are shuffled at a time


class Samples:
    """Gram matrices of values (features, n, positions).

    halves: of the samples with even and with odd numbers. all: of all samples. shuffled: of data with each feature shuffled by
    itself, over the samples and positions of a batch. This keeps the distribution of each feature and removes its relation to
    the others. precision: eps of the coarsest dtype of the values.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.halves = (GramAccumulator(features, device), GramAccumulator(features, device))
        self.shuffled = GramAccumulator(features, device)
        self.precision = 0.0
        self._generator = torch.Generator(device).manual_seed(0)
        self._seen = 0

    def update(self, values: Tensor) -> None:
        """Add samples (features, n, positions)."""
        self.precision = max(self.precision, torch.finfo(values.dtype).eps)
        for parity, half in enumerate(self.halves):
            half.update(values[:, (self._seen + parity) % 2 :: 2].flatten(1))
        self._seen += values.shape[1]
        for part in values.flatten(1).split(max(1, _CHUNK_ENTRIES // max(1, len(values))), dim=1):
            self.shuffled.update(shuffled(part, self._generator))

    @property
    def features(self) -> int:
        """The number of features."""
        return len(self.shuffled.mean)

    @property
    def all(self) -> GramAccumulator:
        """The Gram matrix of all samples."""
        return self.halves[0].merge(self.halves[1])


def shuffled(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shuffle each row of values (features, n) by itself. Without a generator, every call draws the same orders."""
    generator = generator or torch.Generator(values.device).manual_seed(0)
    order = torch.rand(values.shape, generator=generator, device=values.device).argsort(1)
    return values.gather(1, order)
