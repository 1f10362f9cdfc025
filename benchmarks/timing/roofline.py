"""`roofline`: what the device can do, measured, and what that leaves of each problem: the least time, and by what it is bound."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.timing.ceilings import Ceiling
from benchmarks.timing.problems import MODES, Problem, least_bytes, useful_flops


def table(rates: dict[str, Ceiling], problems: Sequence[Problem]) -> str:
    """Markdown: the rates, then operations, bytes, intensity and least time of every problem and mode."""
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
