"""CUDA graphs of calls."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from interp_nn.engines import barrier


def captured(call: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, which has run on the stream before, and the tensors that every replay writes."""
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # a graph that dies while another one is captured ends the capture
    try:
        with torch.cuda.graph(graph, stream=stream):
            out = call()
    finally:
        gc.enable()
    return graph, out


def capture(call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The same on a stream of its own, after the call has run there once."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
        spare_words(device)
        found = captured(call, stream)
    torch.cuda.current_stream(device).wait_stream(stream)
    return found


def spare_words(device: torch.device) -> None:
    """Words for barriers of the launches that the next graph captures: made in it, they would be zeroed by its replays."""
    barrier.spare_words(device, 2048)
