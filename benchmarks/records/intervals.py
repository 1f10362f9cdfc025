"""Intervals of ratios: a bootstrap over the rounds in which both were timed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ENOUGH = 5  # samples, of which a ratio is made
_DRAWS = 1000
_LEVEL = 0.95


@functools.lru_cache(64)
def _draws(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (_DRAWS, count))


def resampled(over: Sequence[float], under: Sequence[float]) -> NDArray[np.float64]:
    """Return ratios of medians, each of rounds drawn with replacement.

    Args:
        over: Milliseconds by round.
        under: The same for another provider. Where it has as many rounds they are the same ones, and are drawn together.

    Returns:
        Array of 1000 ratios.
    """
    paired = len(over) == len(under)
    above = np.median(np.asarray(over)[_draws(len(over), 0)], axis=1)
    below = np.median(np.asarray(under)[_draws(len(under), 0 if paired else 1)], axis=1)
    return above / below


def interval(ratios: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the middle 95 % of resampled ratios."""
    low, high = np.quantile(ratios, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)).tolist()
    return low, high
