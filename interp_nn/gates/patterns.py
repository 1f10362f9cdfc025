"""Activation patterns: one bit for each unit of a network that is on, for many samples.

The pattern of a sample is the concatenation of its gates over all units (Picchiotti & Gori, arXiv 2110.06593). Samples with
the same pattern have the same affine map of the network.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_BITS = tuple(1 << i for i in range(8))
_BITS_AT_ONCE = 1 << 24  # bits that are unpacked at a time


def as_index(value: Any) -> Any:
    """Convert an integer of any kind (numpy's, a tensor without dimensions) to int; return anything else unchanged."""
    single = hasattr(value, "__index__") and getattr(value, "shape", ()) == ()
    return operator.index(value) if single else value


class PatternGroups(NamedTuple):
    """Hold samples grouped by pattern.

    Attributes:
        labels: Group of each sample, (n,) int64. Groups are numbered as their patterns first appear.
        counts: Number of samples of each group, (groups,) int64.
        first: Index of each group's first sample, (groups,) int64.
        patterns: Pattern of each group.

    Example:
        >>> ActivationPatterns.from_gates(torch.tensor([[True], [False], [True]])).groups().labels
        tensor([0, 1, 0])
    """

    labels: Tensor
    counts: Tensor
    first: Tensor
    patterns: ActivationPatterns


class ActivationPatterns:
    """Hold the patterns of n samples over `width` units, eight units a byte.

    `from_gates` and `from_preactivations` make them. Indexing selects samples. Patterns compare and hash by their bits.

    Args:
        packed: Tensor of shape (n, ceil(width / 8)), uint8. Bit i of byte j is unit 8 j + i; bits beyond the width are zero.
        width: The number of units.

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: `packed` does not have the bytes of the width.

    Example:
        >>> patterns = ActivationPatterns.from_gates(torch.tensor([[True, False, True], [True, True, False]]))
        >>> patterns.active(), patterns.overlap()
        (tensor([2, 2]), tensor([[2, 1],
                [1, 2]]))
        >>> patterns[0] == patterns[1]
        False
    """

    def __init__(self, packed: Tensor, width: int) -> None:
        if packed.dtype != torch.uint8:
            raise TypeError(f"packed: got {packed.dtype}, want torch.uint8")
        if packed.dim() != 2 or packed.shape[1] != -(-width // 8):
            raise ValueError(f"packed: got shape {tuple(packed.shape)}, want (n, {-(-width // 8)}) for {width} units")
        self.packed, self.width = packed, width

    @classmethod
    def from_gates(cls, gates: Tensor | Iterable[Tensor]) -> ActivationPatterns:
        """Pack gates into patterns.

        Args:
            gates: Bool tensor of shape (n, ...), or one for each layer; the layers' units follow one another.

        Returns:
            The patterns of the n samples.

        Raises:
            TypeError: The gates are not bool.
            ValueError: There is no layer, or the layers have different numbers of samples.
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
        """Pack preactivations into patterns: a unit is on where its preactivation is positive, as in ReLU's gradient.

        Args:
            preactivations: Tensor of shape (n, ...), such as a ReLU's input, or one for each layer.

        Returns:
            The patterns of the n samples.

        Raises:
            ValueError: There is no layer, or the layers have different numbers of samples.
        """
        layers = [preactivations] if isinstance(preactivations, Tensor) else preactivations
        return cls.from_gates([layer > 0 for layer in layers])

    def unpack(self) -> Tensor:
        """Return the gates as a bool tensor of shape (n, width)."""
        bits = self.packed.unsqueeze(2).bitwise_and(self.packed.new_tensor(_BITS)) != 0
        return bits.view(len(self), 8 * self.packed.shape[1])[:, : self.width]

    def active(self) -> Tensor:
        """Return the number of units that are on in each sample, (n,) int64."""
        return torch.cat([part.sum(1) for part in self._parts()]) if len(self) else self._counts(0)

    def overlap(self, other: ActivationPatterns | None = None) -> Tensor:
        """Count the units that are on in both of two samples.

        Args:
            other: Patterns of m samples and the same width; None takes these samples again.

        Returns:
            Counts of all pairs, (n, m) int64.

        Raises:
            ValueError: `other` has another width.
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
        """Count the units that differ between two samples, |a| + |b| - 2 overlap(a, b).

        Args:
            other: Patterns of m samples and the same width; None takes these samples again.

        Returns:
            Counts of all pairs, (n, m) int64.

        Raises:
            ValueError: `other` has another width.
        """
        other = self if other is None else other
        return self.overlap(other).mul_(-2).add_(self.active().unsqueeze(1)).add_(other.active())

    def groups(self) -> PatternGroups:
        """Group the samples that share a pattern."""
        bytes_ = np.ascontiguousarray(self.packed.cpu().numpy())
        if bytes_.shape[1] == 0:  # without units all samples have the same pattern
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
        """Yield the gates of a part of the samples at a time: those of all take eight times the memory."""
        size = max(1, _BITS_AT_ONCE // max(1, self.width))
        return (self[start : start + size].unpack() for start in range(0, len(self), size))

    def _counts(self, *shape: int) -> Tensor:
        return self.packed.new_zeros(shape, dtype=torch.int64)
