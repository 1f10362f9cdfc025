"""What a call holds in memory besides its inputs: at most, and for its backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that a call holds beyond what was held before it, counted in the allocator's own events.

    What libraries of the CPU allocate for themselves is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    assert results is not None
    held = most = 0
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        most = max(most, held)
    return most


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
