"""Parts of sentences that several sections of a report share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from interp_nn.explain.report.facts import MOST_SAMPLES, Facts


def which_samples(facts: Facts) -> str:
    """Say which samples are linearized, and why."""
    n, all_of_them = len(facts.some), len(facts.x)
    if n == all_of_them:
        return f"all {n} samples"
    most = min(n, MOST_SAMPLES)
    return f"{n} of {all_of_them} samples: about {most} evenly spaced ones, to save time, and those shown one by one"


def first_three(names: Sequence[str]) -> str:
    """Return the first three names as a list in a sentence, and how many there are more."""
    return listed(names if len(names) < 4 else [*names[:3], f"{len(names) - 3} more"])


def listed(names: Iterable[str]) -> str:
    """Return names as a list in a sentence."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
