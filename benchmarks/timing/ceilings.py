"""The speed of light of a device, measured: bytes a second of a large copy, operations a second of a large matrix product."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from benchmarks.timing.clocks import on_events, on_wall, rounds, summary
from benchmarks.timing.problems import DTYPES, Problem, least_bytes, useful_flops

_WARM = 3  # samples left out


class Ceiling(NamedTuple):
    """Bytes a second, read and written, and operations a second."""

    bandwidth: float
    flops: float

    def seconds(self, problem: Problem, mode: str) -> float:
        """The least time that a problem needs."""
        return max(least_bytes(problem, mode) / self.bandwidth, useful_flops(problem, mode) / self.flops)


def measure(device: torch.device, dtype: str, seconds: float = 1.0) -> Ceiling:
    """The rates in a dtype of DTYPES, as medians."""
    on_gpu = device.type == "cuda"
    count, size = (2**28, 8192) if on_gpu else (2**26, 2048)
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(left)
    clock = on_events if on_gpu else on_wall
    samplers = {
        "copy": clock(functools.partial(target.copy_, source), 1),
        "product": clock(functools.partial(torch.mm, left, right, out=out), 1),
    }
    taken = rounds(samplers, seconds, least=_WARM + 5, most=100)
    copied, multiplied = (summary(taken[name][_WARM:]).p50 / 1e3 for name in ("copy", "product"))
    return Ceiling(2 * source.nbytes / copied, 2 * size**3 / multiplied)
