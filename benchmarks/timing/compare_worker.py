"""The process of one revision in a comparison: it reads questions from its input and answers with samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import providers
from benchmarks.timing.clocks import on_events, on_wall, settled
from benchmarks.timing.measure import calling
from benchmarks.timing.problems import Problem, datasets

_SAMPLE_MS = 0.5  # at least


def main(device: torch.device) -> None:
    """Answer until the input ends: {"problem", "mode", "names"} prepares providers, {"sample": name} returns milliseconds."""
    held: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "sample" in asked:
            answer: Any = held[asked["sample"]]()
        else:
            held.clear()
            problem = Problem(**asked["problem"])
            sets = datasets(problem, device, 1)
            for name in asked["names"]:
                provider = providers.build(name, problem, asked["mode"], sets, "auto", None)
                held[name] = _sampler(calling(provider, asked["mode"], sets), device)
            answer = sorted(held)
        print(json.dumps(answer), flush=True)


def _sampler(call: Callable[[int], object], device: torch.device) -> Callable[[], float]:
    """Return a sampler of enough calls for the clock's resolution."""
    clock = on_events if device.type == "cuda" else on_wall
    once = clock(lambda: call(0), 1)
    once()
    settled(once)
    calls = max(1, round(_SAMPLE_MS / max(once(), 1e-4)))

    def work() -> None:
        for _ in range(calls):
            call(0)

    return clock(work, calls)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]))
