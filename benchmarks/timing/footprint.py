"""Footprint of a call: its peak memory besides the inputs, the memory kept for a backward, and its kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


def peak_bytes(call: Callable[[], _Result], device: torch.device) -> tuple[int, _Result]:
    """Return (the peak memory of a call beyond what was held before, its result), counted by the allocator's events.

    Memory that CPU libraries allocate for themselves is not counted.
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
    """Return the bytes that the graph of a call's result holds for its backward, without the leaves' own storages."""
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
    del result  # kept until here, so that no storage reused another's address
    return total


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Return how many kernels a call launches on a GPU, None elsewhere."""
    _, names = profiled(call, device)
    return None if names is None else sum(not name.startswith("Mem") for name in names)


def profiled(call: Callable[[], _Result], device: torch.device) -> tuple[_Result, list[str] | None]:
    """Return (the result of a call, the names of what ran on the GPU meanwhile; None on a CPU).

    Ranges that a program marks, such as an optimizer's step, are copied among the GPU's events. They are left out.
    """
    if device.type != "cuda":
        return call(), None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        out = call()
        torch.cuda.synchronize()
    events: Any = profile.events() or []
    return out, [e.name for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
