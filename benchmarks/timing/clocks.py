"""Clocks, and interleaved timing: each round takes a sample of every candidate, in a new random order.

So noise of the machine reaches all candidates alike, and none always finds the caches as the same other one left them.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.records.intervals import ENOUGH

Sampler = Callable[[], float]  # milliseconds a call
_GROUPS = 32  # of rounds, in a record
_TRIALS, _ALIKE = 5, 1.5
_SHARE = 3  # times its equal share of a run's time, above which a sampler that has enough samples waits for the others


class Timing(NamedTuple):
    """Milliseconds: the median and the 20 % and 80 % quantiles of `samples` rounds, and the medians of groups of rounds.

    A group has consecutive rounds, because neighbours share the noise of the machine. `resampled` draws groups.
    """

    p50: float
    p20: float
    p80: float
    samples: int
    groups: tuple[float, ...]

    def fields(self) -> dict[str, Any]:
        """Return the values under their names in a record."""
        return {
            "ms_p50": self.p50, "ms_p20": self.p20, "ms_p80": self.p80, "samples": self.samples, "ms_groups": self.groups,
        }  # fmt: skip


OUT_OF_TIME = "out of time"  # how a reason begins that another run does not have


class Limit:
    """A limit of time, from now on."""

    def __init__(self, minutes: float = math.inf) -> None:
        self._minutes, self._end = minutes, time.monotonic() + 60 * minutes

    def over(self) -> str | None:
        """Return the reason to begin nothing more, None while there is time."""
        return None if time.monotonic() < self._end else f"{OUT_OF_TIME}: {self._minutes:g} minutes"


def summary(taken: Sequence[float]) -> Timing:
    """Return the quantiles of samples."""
    p50, p20, p80 = np.quantile(taken, (0.5, 0.2, 0.8)).tolist()
    groups = [float(np.median(part)) for part in np.array_split(taken, min(len(taken), _GROUPS))]
    return Timing(p50, p20, p80, len(taken), tuple(groups))


def settled(call: Callable[[], object]) -> list[float]:
    """Repeat a call, made once before, until what happens once is over: imports, compilation, autotuning, growth of memory.

    Returns:
        Seconds of the last two calls, which took about the same time; of calls four and five if none did before.
    """
    taken: list[float] = []
    while len(taken) < _TRIALS and not (len(taken) > 1 and taken[-2] <= _ALIKE * taken[-1]):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken[-2:]


def rounds(
    samplers: Mapping[str, Sampler], seconds: float, least: int, most: int, patience: float = math.inf
) -> dict[str, list[float]]:
    """Take milliseconds by name, in rounds of all samplers in a random order: for some seconds, within `least` and `most`.

    After `patience` seconds five rounds are enough. After `least` rounds a slow sampler is left out of some, so that it does not
    take the time of the others.
    """
    draw, names = random.Random(0), list(samplers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    start = time.monotonic()
    with _no_collection():
        for done in range(most):
            passed = time.monotonic() - start
            if (done >= least and passed > seconds) or (done >= ENOUGH and passed > patience):
                break
            for name in draw.sample(names, len(names)):
                if done >= max(least, ENOUGH) and spent[name] * len(names) > _SHARE * passed:
                    continue
                begun = time.monotonic()
                taken[name].append(samplers[name]())
                spent[name] += time.monotonic() - begun
    return taken


def interleave(
    candidates: Mapping[str, Callable[[], object]], seconds: float = 1.5, least: int = 7, most: int = 1000,
    clock: Callable[[Callable[[], object], int], Sampler] | None = None,
) -> dict[str, Timing]:  # fmt: skip
    """Time calls in rounds, after two warm-up rounds, by the wall clock unless another one is given."""
    samplers = {name: (clock or on_wall)(call, 1) for name, call in candidates.items()}
    rounds(samplers, 0.0, least=2, most=2)
    return {name: summary(taken) for name, taken in rounds(samplers, seconds, least, most).items()}


def on_wall(work: Callable[[], object], calls: int) -> Sampler:
    """Time `work`, which makes `calls` calls on the CPU, by the wall clock."""

    def sample() -> float:
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start) / calls

    return sample


def on_events(work: Callable[[], object], calls: int) -> Sampler:
    """Time `work`, which makes `calls` calls on an idle CUDA device, by two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls

    return sample


def on_host(work: Callable[[], object], calls: int) -> Sampler:
    """Time the host's share of `work`: how long it takes to launch its `calls` calls on an idle CUDA device."""

    def sample() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        taken = time.perf_counter() - start
        torch.cuda.synchronize()
        return 1e3 * taken / calls

    return sample


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
