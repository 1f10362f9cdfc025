"""Interleaved timing: all candidates in one run, in a random order each round, summarised by quantiles."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np


class Timing(NamedTuple):
    """Milliseconds: the median and the 20 % and 80 % quantiles of `samples` rounds."""

    p50: float
    p20: float
    p80: float
    samples: int


def interleave(
    candidates: Mapping[str, Callable[[], object]], seconds: float = 1.5, least: int = 7, most: int = 1000
) -> dict[str, Timing]:
    """Time every candidate once a round, for about `seconds` in all but at least `least` rounds, after two warm-up rounds.

    The order is drawn anew each round, so that no candidate always finds the caches as the same other one left them.
    """
    names = list(candidates)
    draw = random.Random(0)
    for _ in range(2):
        start = time.perf_counter()
        for name in names:
            candidates[name]()
        one_round = time.perf_counter() - start
    rounds = max(least, min(most, int(seconds / one_round)))
    taken: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in draw.sample(names, len(names)):
                start = time.perf_counter()
                candidates[name]()
                taken[name].append(1e3 * (time.perf_counter() - start))
    finally:
        if collecting:
            gc.enable()
    quantiles = {name: np.quantile(t, (0.5, 0.2, 0.8)).tolist() for name, t in taken.items()}
    return {name: Timing(p50, p20, p80, rounds) for name, (p50, p20, p80) in quantiles.items()}
