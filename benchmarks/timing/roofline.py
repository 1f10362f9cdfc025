"""`roofline`: the rates of a device, measured, and the least time that they leave for each problem."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.timing.clocks import on_events, on_wall, rounds, summary
from benchmarks.timing.problems import DTYPES, MODES, Problem, least_bytes, useful_flops

_WARM = 3  # samples left out


class Ceiling(NamedTuple):
    """Bytes a second, read and written, and operations a second."""

    bandwidth: float
    flops: float

    def seconds(self, problem: Problem, mode: str) -> float:
        """Return the least time that a problem needs."""
        return max(least_bytes(problem, mode) / self.bandwidth, useful_flops(problem, mode) / self.flops)


def measure(device: torch.device, dtype: str, seconds: float = 1.0) -> Ceiling:
    """Measure a large copy and a large matrix product in a dtype of DTYPES; medians."""
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


def table(rates: dict[str, Ceiling], problems: Sequence[Problem]) -> str:
    """Return Markdown: the rates, then operations, bytes, intensity, least time and bound of every problem and mode."""
    lines = ["| dtype | copy, GB/s | product, TFLOP/s | balance, FLOP/byte |", "|---|--:|--:|--:|"]
    for dtype, rate in rates.items():
        balance = rate.flops / rate.bandwidth
        lines.append(f"| {dtype} | {rate.bandwidth / 1e9:.4g} | {rate.flops / 1e12:.4g} | {balance:.3g} |")
    lines += ["", "| problem | mode | GFLOP | MB | FLOP/byte | least, ms | bound by |", "|---|---|--:|--:|--:|--:|---|"]
    for problem in problems:
        rate = rates[problem.dtype]
        for mode in MODES[problem.op]:
            flops, moved = useful_flops(problem, mode), least_bytes(problem, mode)
            bound = "memory" if moved / rate.bandwidth > flops / rate.flops else "products"
            lines.append(
                f"| {problem.name} | {mode} | {flops / 1e9:.3g} | {moved / 1e6:.3g} | {flops / moved:.3g} "
                f"| {1e3 * rate.seconds(problem, mode):.3g} | {bound} |"
            )
    return "\n".join(lines)
