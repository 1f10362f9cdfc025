"""What a call holds in memory besides its inputs: at most, and for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


def peak_bytes(call: Callable[[], _Result], device: torch.device) -> tuple[int, _Result]:
    """(the most that a call holds beyond what was held before it, counted in the allocator's own events; what it returns).

    What libraries of the CPU allocate for themselves is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = profile.profiler.kineto_results if profile.profiler is not None else None
    assert events is not None
    held = most = 0
    changes = [(event.start_ns(), event.nbytes()) for event in events.events() if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most, result


def saved_bytes(call: Callable[[], Tensor], leaves: Iterable[Tensor]) -> int:
    """What the graph of a call's result holds for its backward, storages that are the leaves' own not counted."""
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    total = sum(sizes.values())
    del result  # until here it kept the storages, so that none took another's place
    return total
