"""CUDA graphs of calls, and waiting for a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from interp_nn.engines import barrier


def captured(call: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return a graph of a call that has run on the stream before, and the tensors that every replay writes."""
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # freeing a graph during another one's capture ends that capture
    try:
        with torch.cuda.graph(graph, stream=stream):
            out = call()
    finally:
        gc.enable()
    return graph, out


def capture(call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Do the same on a new stream, after one call there."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
        spare_counters(device)
        found = captured(call, stream)
    torch.cuda.current_stream(device).wait_stream(stream)
    return found


def spare_counters(device: torch.device) -> None:
    """Allocate barrier counters for the next captured graph: counters made inside it would be zeroed by its replays."""
    barrier.spare_counters(device, 2048)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
