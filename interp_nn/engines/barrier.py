"""Workspaces of kernels, and the counters of their barriers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor

_WORDS, _LINE = 1024, 32  # each counter in a 128-byte line of its own, which also gives all the same alignment


def workspace(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, stride: tuple[int, ...] | None = None
) -> Tensor:
    """Return memory that a kernel writes before anything reads it: results, and values that pass between phases."""
    if stride is None:
        if len(shape) != 2:
            return torch.empty(shape, dtype=dtype, device=device)
        stride = (shape[1], 1)  # torch.empty takes half as long again
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


@functools.cache
def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """Return a function of size, strides and dtype that allocates as the code that Inductor writes does.

    It takes less time than torch.empty, because it passes the dispatcher by. It allocates on the current device of that type.
    """
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    found: Any = getattr(guards, f"_empty_strided_{device.type}", None)
    with contextlib.suppress(Exception):  # of another PyTorch
        tried = found((1, 2), (4, 2), torch.float16)
        if (tried.shape, tried.stride(), tried.dtype, tried.device.type) == (
            (1, 2),
            (4, 2),
            torch.float16,
            device.type,
        ):
            return cast(Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor], found)
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


_in_use: dict[tuple[torch.device, int], Tensor] = {}
_free: dict[torch.device, list[Tensor]] = {}
_blocks: list[Tensor] = []  # kept alive: a captured graph knows its counters by their addresses alone


def counter(device: torch.device) -> Tensor:
    """Return the counter of arrivals for a launch on the current stream.

    Every launch leaves its counter ready for the next one. There is one for each device and stream, and a fresh one for each
    launch that a CUDA graph captures: two graphs captured on one stream may be replayed on two.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        free = _free.get(device)
        # Without a spare one: a counter of the graph's own, which every replay sets to zero first.
        return free.pop() if free else torch.zeros(_LINE, dtype=torch.int32, device=device)
    free = spare_counters(device)
    stream = _current_stream(device.index)
    found = _in_use.get((device, stream))
    if found is None:
        found = _in_use[device, stream] = free.pop()
    return found


# The handle of a device's current stream, without the object that torch.cuda.current_stream makes.
_current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)


def spare_counters(device: torch.device, least: int = _WORDS // 2) -> list[Tensor]:
    """Return at least so many counters for later streams and captures. Not to be called while capturing."""
    free = _free.setdefault(device, [])
    while len(free) < least:
        # In another thread: a memory pool in use in this one (of Inductor's CUDA graphs) would own the block.
        with ThreadPoolExecutor(1) as elsewhere:
            block = elsewhere.submit(_zeroed_block, device).result()
        _blocks.append(block)
        free.extend(block.split(_LINE))
    return free


def _zeroed_block(device: torch.device) -> Tensor:
    block = torch.zeros(_WORDS * _LINE, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # whatever stream uses it next
    return block
