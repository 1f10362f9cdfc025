"""Memory that the engines with kernels of their own hand to them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_WORDS, _LINE = 1024, 32  # each counter in a 128-byte line of its own, which also gives all the same alignment


def workspace(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, stride: tuple[int, ...] | None = None
) -> Tensor:
    """Memory that a kernel writes before it, or anyone, reads it: results and what passes between phases."""
    if stride is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


_words: dict[tuple[torch.device, int], Tensor] = {}
_free: dict[torch.device, list[Tensor]] = {}
_blocks: list[Tensor] = []  # all there are: a captured graph knows its words by their addresses alone


def counter(device: torch.device) -> Tensor:
    """The word that a launch on the current stream counts arrivals on.

    Kernels with phases wait for one another on a word that every launch leaves ready for the next: one for each device and
    stream, and a fresh one for each launch that a CUDA graph captures, since two graphs captured on one stream may be
    replayed on two.
    """
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        free = _free.get(device)
        # Without a spare one: a word of the graph's own, which every replay sets to zero first.
        return free.pop() if free else torch.zeros(_LINE, dtype=torch.int32, device=device)
    free = spare_words(device)
    stream = torch.cuda.current_stream(device).cuda_stream
    word = _words.get((device, stream))
    if word is None:
        word = _words[device, stream] = free.pop()
    return word


def spare_words(device: torch.device, least: int = _WORDS // 2) -> list[Tensor]:
    """Words for streams and captures to come, at least so many. Not to be called while capturing."""
    free = _free.setdefault(device, [])
    while len(free) < least:
        # In a thread of its own: a memory pool in use in this one, of Inductor's CUDA graphs, say, would own the block.
        with ThreadPoolExecutor(1) as elsewhere:
            block = elsewhere.submit(_zeroed_block, device).result()
        _blocks.append(block)
        free.extend(block.split(_LINE))
    return free


def _zeroed_block(device: torch.device) -> Tensor:
    block = torch.zeros(_WORDS * _LINE, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()  # whatever stream uses it next
    return block
