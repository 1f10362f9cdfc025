"""Gram matrices of data that arrive in batches, in O(n²) memory, and of data with each feature shuffled by itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.linalg import GramAccumulator

_KEPT_ENTRIES = 1 << 21  # of the data, for shuffles: 16 MiB in float64


class Samples:
    """Gram matrices of values (features, n, positions).

    halves: of the samples with even and with odd numbers. all: of all samples. precision: eps of the coarsest dtype of the
    values. kept: copies of the values for shuffles, up to 2^21 entries or 4 samples a feature; of a larger batch, every second
    sample or fewer.
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self.halves = (GramAccumulator(features, device), GramAccumulator(features, device))
        self.precision = 0.0
        self.kept: list[Tensor] = []
        self._room = max(_KEPT_ENTRIES, 4 * features**2)
        self._seen = 0

    def update(self, values: Tensor) -> None:
        """Add samples (features, n, positions)."""
        self.precision = max(self.precision, torch.finfo(values.dtype).eps)
        for parity, half in enumerate(self.halves):
            half.update(values[:, (self._seen + parity) % 2 :: 2].flatten(1))
        self._seen += values.shape[1]
        if self._room > 0:
            kept = values[:, :: -(-values.numel() // self._room)].flatten(1).clone()
            self.kept.append(kept)
            self._room -= kept.numel()

    @property
    def features(self) -> int:
        """The number of features."""
        return len(self.halves[0].mean)

    @property
    def all(self) -> GramAccumulator:
        """The Gram matrix of all samples."""
        return self.halves[0].merge(self.halves[1])

    def kept_and_shuffled(self, shuffles: int, seed: int, center: bool) -> Iterator[Tensor]:
        """Yield the Gram matrix of the kept values, then one for each shuffle."""
        values = torch.cat(self.kept, 1).double()
        mean = values.mean(1)
        values -= mean.unsqueeze(1)
        constant = 0.0 if center else values.shape[1] * torch.outer(mean, mean)
        yield linalg.gram(values.mT) + constant
        generator = torch.Generator(values.device).manual_seed(seed)
        for _ in range(shuffles):
            yield linalg.gram(shuffled(values, generator).mT) + constant


def shuffled(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Shuffle each row of values (features, n) by itself. Without a generator, every call draws the same orders.

    This keeps the distribution of each feature and removes its relation to the others.
    """
    generator = generator or torch.Generator(values.device).manual_seed(0)
    orders = (torch.randperm(values.shape[1], generator=generator, device=values.device) for _ in values)
    return torch.stack([row[order] for row, order in zip(values, orders, strict=True)])
