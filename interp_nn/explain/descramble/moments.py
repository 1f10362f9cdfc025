"""Second moments of data that arrive in batches, in O(n²) memory: of all, of two halves, and of data shuffled as a null."""

from __future__ import annotations

import torch
from torch import Tensor

from interp_nn.linalg import GramAccumulator

_ENTRIES_AT_ONCE = 1 << 22  # that are shuffled


class Samples:
    """Gram matrices of values (features, n, positions): of every sample, of every other one, and of the features shuffled each by
    itself over the samples and positions of a batch, which keeps what a feature is and loses what it has to do with others.
    precision: eps of the coarsest dtype seen.
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
        for part in values.flatten(1).split(max(1, _ENTRIES_AT_ONCE // max(1, len(values))), dim=1):
            self.shuffled.update(shuffled(part, self._generator))

    @property
    def features(self) -> int:
        return len(self.shuffled.mean)

    @property
    def all(self) -> GramAccumulator:
        """Of every sample."""
        return self.halves[0].merge(self.halves[1])


def shuffled(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Values (features, n) with each row's in an order of its own; by default the same orders at every call."""
    generator = generator or torch.Generator(values.device).manual_seed(0)
    order = torch.rand(values.shape, generator=generator, device=values.device).argsort(1)
    return values.gather(1, order)
