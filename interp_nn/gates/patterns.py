"""Activation patterns: which units of a network are on, a bit each, for many samples at once.

The pattern of a sample is the concatenation of its gates over all units (Picchiotti & Gori, arXiv 2110.06593); samples that
share one share the network's affine map.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_BITS = tuple(1 << i for i in range(8))
_AT_ONCE = 1 << 24  # bits that are unpacked at a time


def as_index(value: Any) -> Any:
    """An integer of any kind (numpy's, a tensor without dimensions) as an int; anything else as it is."""
    single = hasattr(value, "__index__") and getattr(value, "shape", ()) == ()
    return operator.index(value) if single else value


class PatternGroups(NamedTuple):
    """Samples by pattern. labels (n,) int64, numbered as patterns first appear; counts and first (groups,) int64: how many
    samples have the pattern, and the index of the first one; patterns: each group's.
    """

    labels: Tensor
    counts: Tensor
    first: Tensor
    patterns: ActivationPatterns


class ActivationPatterns:
    """The patterns of n samples over `width` units, eight units a byte.

    packed: (n, ceil(width / 8)) uint8; bit i of byte j is unit 8 j + i, and bits beyond the width are zero. Built by
    `from_gates` or `from_preactivations`; indexing selects samples, and patterns compare and hash by their bits alone.
    """

    def __init__(self, packed: Tensor, width: int) -> None:
        """Raises TypeError where packed is not uint8, ValueError where it does not have the bytes of the width."""
        if packed.dtype != torch.uint8:
            raise TypeError(f"packed: got {packed.dtype}, want torch.uint8")
        if packed.dim() != 2 or packed.shape[1] != -(-width // 8):
            raise ValueError(f"packed: got shape {tuple(packed.shape)}, want (n, {-(-width // 8)}) for {width} units")
        self.packed, self.width = packed, width

    @classmethod
    def from_gates(cls, gates: Tensor | Iterable[Tensor]) -> ActivationPatterns:
        """Patterns of gates (n, ...) bool, or of several layers' gates, one after another.

        Raises TypeError for gates that are not bool, ValueError for layers with different numbers of samples or for none.
        """
        layers = [gates] if isinstance(gates, Tensor) else list(gates)
        if not layers:
            raise ValueError("gates: got no layers, want at least one tensor of shape (n, ...)")
        for layer in layers:
            if layer.dtype != torch.bool:
                raise TypeError(f"gates: got {layer.dtype}, want torch.bool (preactivations: from_preactivations)")
            if layer.dim() < 1 or layer.shape[0] != layers[0].shape[0]:
                raise ValueError(f"gates: got shapes {[tuple(t.shape) for t in layers]}, want the same n first in all")
        flat = torch.cat([layer.reshape(layer.shape[0], layer.shape[1:].numel()) for layer in layers], 1)
        n, width = flat.shape
        bytes_ = torch.nn.functional.pad(flat, (0, -width % 8)).view(n, -(-width // 8), 8)
        return cls(
            (bytes_.to(torch.uint8) * bytes_.new_tensor(_BITS, dtype=torch.uint8)).sum(2, dtype=torch.uint8), width
        )

    @classmethod
    def from_preactivations(cls, preactivations: Tensor | Iterable[Tensor]) -> ActivationPatterns:
        """Patterns of ReLU's inputs (n, ...) of one or more layers: a unit is on where its input is positive, as PyTorch's
        gradient has it.
        """
        layers = [preactivations] if isinstance(preactivations, Tensor) else preactivations
        return cls.from_gates([layer > 0 for layer in layers])

    def unpack(self) -> Tensor:
        """The gates (n, width), bool."""
        bits = self.packed.unsqueeze(2).bitwise_and(self.packed.new_tensor(_BITS)) != 0
        return bits.view(len(self), 8 * self.packed.shape[1])[:, : self.width]

    def active(self) -> Tensor:
        """How many units are on in each sample: (n,) int64."""
        return torch.cat([part.sum(1) for part in self._parts()]) if len(self) else self._counts(0)

    def overlap(self, other: ActivationPatterns | None = None) -> Tensor:
        """How many units are on in both of two samples, (n, m) int64; of all pairs of these samples without `other`.

        Raises ValueError for patterns of another width.
        """
        other = self if other is None else other
        if other.width != self.width:
            raise ValueError(f"other: got patterns of {other.width} units, want {self.width}")
        # Counts below 2^24 are exact in fp32.
        dtype = torch.float32 if self.width < 2**24 else torch.float64
        counts = self._counts(len(self), len(other))
        row = 0
        for part in self._parts():
            left, column = part.to(dtype), 0
            for right in other._parts():
                counts[row : row + len(left), column : column + len(right)] = left @ right.to(dtype).T
                column += len(right)
            row += len(left)
        return counts

    def hamming(self, other: ActivationPatterns | None = None) -> Tensor:
        """How many units differ between two samples, (n, m) int64: |a| + |b| - 2 overlap(a, b)."""
        other = self if other is None else other
        return self.overlap(other).mul_(-2).add_(self.active().unsqueeze(1)).add_(other.active())

    def groups(self) -> PatternGroups:
        """Samples that share a pattern."""
        bytes_ = np.ascontiguousarray(self.packed.cpu().numpy())
        if bytes_.shape[1] == 0:  # no units: all samples are alike
            bytes_ = np.zeros((len(self), 1), dtype=np.uint8)
        words = bytes_.view(np.dtype((np.void, bytes_.shape[1]))).ravel()
        _, first, labels, counts = np.unique(words, return_index=True, return_inverse=True, return_counts=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values.astype(np.int64)).to(self.packed.device)

        firsts = tensor(first[order])
        return PatternGroups(tensor(rank[labels.reshape(-1)]), tensor(counts[order]), firsts, self[firsts])

    def __len__(self) -> int:
        return self.packed.shape[0]

    def __getitem__(self, samples: int | slice | Tensor) -> ActivationPatterns:
        samples = as_index(samples)
        if isinstance(samples, int):
            if not -len(self) <= samples < len(self):
                raise IndexError(f"sample: got {samples}, want one of {len(self)}")
            samples = slice(samples, samples + 1 or None)
        return ActivationPatterns(self.packed[samples], self.width)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActivationPatterns):
            return NotImplemented
        return self.width == other.width and torch.equal(self.packed, other.packed)

    def __hash__(self) -> int:
        return hash((self.width, self.packed.shape[0], self.packed.cpu().numpy().tobytes()))

    def __repr__(self) -> str:
        return f"ActivationPatterns({len(self)} samples, {self.width} units)"

    def _parts(self) -> Iterator[Tensor]:
        """The gates of some samples at a time: of all of them they would take eight times the memory."""
        size = max(1, _AT_ONCE // max(1, self.width))
        return (self[start : start + size].unpack() for start in range(0, len(self), size))

    def _counts(self, *shape: int) -> Tensor:
        return self.packed.new_zeros(shape, dtype=torch.int64)
