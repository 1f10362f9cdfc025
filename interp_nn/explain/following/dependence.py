"""Which tensors of a model depend on its input, by the memory that they lie in."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from interp_nn.explain.following.calls import Dependence, NonAffineCall, tensors


class DependencyMap:
    """The dependence of each tensor on the input.

    Tensors that share memory are known to each other, so that a write through one is seen in all. The map keeps the tensors
    alive, because it finds them by their id.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, Dependence]] = {}
        self._sharing: dict[int, list[int]] = {}  # ids of tensors by their storage

    def get(self, t: Tensor) -> Dependence | None:
        """Return how a tensor depends on the input, or None if it does not."""
        entry = self._entries.get(id(t))
        if entry is not None:
            return entry[1]
        found = None  # a view that no call returned here, or an earlier view of memory that was written to
        for other, dependence in self.sharing(t):
            if overlap(other, t) != "none":
                found = dependence if found is None else _both(found, dependence)
        if found is not None:
            self.set(t, found)
        return found

    def set(self, value: Any, dependence: Dependence) -> None:
        """Set the dependence of all tensors in a nested value."""
        for t in tensors(value):
            if id(t) not in self._entries and (storage := storage_of(t)) is not None:
                self._sharing.setdefault(storage, []).append(id(t))
            self._entries[id(t)] = (t, dependence)

    def write(self, t: Tensor, dependence: Dependence) -> None:
        """Set the dependence of a tensor that was written to, and add it to those of the tensors that share its memory."""
        for other, old in self.sharing(t):
            if other is t or old == dependence or (covered := overlap(t, other)) == "none":
                continue
            self._entries[id(other)] = (other, dependence if covered == "all" else _both(old, dependence))
        self.set(t, dependence)

    def sharing(self, t: Tensor) -> list[tuple[Tensor, Dependence]]:
        """Return the tensors in the map that share a tensor's storage, with their dependences."""
        if not self._sharing or (storage := storage_of(t)) is None:
            return []
        return [self._entries[i] for i in self._sharing.get(storage, ())]

    def of_arguments(self, args: Any, kwargs: Any) -> dict[int, Dependence]:
        """Return by id the dependences of those arguments that depend on the input."""
        found = {}
        for value in (*args, *kwargs.values()):
            for t in tensors(value):
                if (dependence := self.get(t)) is not None:
                    found[id(t)] = dependence
        return found


def _both(one: Dependence, other: Dependence) -> Dependence:
    """Return the dependence of memory of which one part has one and another part the other."""
    return Dependence(
        one.non_affine or other.non_affine,
        min(one.factor, other.factor),
        one.piecewise_constant and other.piecewise_constant,
        one.unseen or other.unseen,
        one.mixed or other.mixed or (one.non_affine is None) != (other.non_affine is None),
    )


def _unwrapped(t: Tensor) -> Tensor:
    """Return the tensor in the memory of a tensor of torch.func's transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def storage_of(t: Tensor) -> int | None:
    """Return the address of the storage of a tensor; None if it has none."""
    try:
        storage = _unwrapped(t).untyped_storage()
    except (NotImplementedError, RuntimeError):  # a sparse tensor
        return None
    return storage._cdata if storage.nbytes() else None


def overlap(a: Tensor, b: Tensor) -> Literal["none", "some", "all"]:
    """Return how many of b's elements are elements of a, for tensors of one storage."""
    a, b = _unwrapped(a), _unwrapped(b)
    if a.numel() == 0 or b.numel() == 0:
        return "none"
    (start, end), (other_start, other_end) = _extent(a), _extent(b)
    if end <= other_start or other_end <= start:
        return "none"
    if a.is_contiguous() and start <= other_start and other_end <= end:
        return "all"
    if b.is_contiguous() and other_start <= start and end <= other_end and a.numel() < b.numel():
        return "some"
    if a.dtype.itemsize != b.dtype.itemsize:
        return "some"
    place = torch.zeros(a.untyped_storage().nbytes() // a.dtype.itemsize, dtype=torch.bool)
    place.as_strided(a.size(), a.stride(), a.storage_offset()).fill_(True)
    shared = place.as_strided(b.size(), b.stride(), b.storage_offset())
    return "all" if bool(shared.all()) else "some" if bool(shared.any()) else "none"


def _extent(t: Tensor) -> tuple[int, int]:
    """Return the first byte of a tensor in its storage, and the byte behind the last."""
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(t.size(), t.stride(), strict=True))
    start = int(t.storage_offset()) * t.dtype.itemsize
    return start, start + (last + 1) * t.dtype.itemsize


AFFINE = Dependence()
UNSEEN = Dependence(NonAffineCall("", "", ""), unseen=True)
NOT_AFFINE = Dependence(NonAffineCall("", "", ""))
