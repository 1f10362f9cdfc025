"""The tables and figures of the sweep, from its rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from benchmarks.experiments import common
from benchmarks.experiments.learning_rates.layers import CANDIDATES, LINEAR, ORTHOGONAL
from benchmarks.records.rows import Row

NEAR = 0.03  # a cell counts if every seed of nn.Linear is so near the median of its best rate,
MOVED = 0.005  # and if twice the epochs move its median by less
WITHIN = 0.02  # of nn.Linear's median: as good
CHANCE = 0.15  # of ten classes, with some margin: nothing was learned

Place = tuple[str, str, float]  # network, optimizer and rate


def medians(found: Sequence[Row], layer: str, doubled: bool = False) -> dict[Place, float]:
    """Return the median accuracy over seeds of a layer, by place."""
    return {
        place: statistics.median(r["accuracy"] for r in runs) for place, runs in places(found, layer, doubled).items()
    }


def places(found: Sequence[Row], layer: str, doubled: bool = False) -> dict[Place, list[Row]]:
    """Return the rows of a layer by place, of its trainings with the usual number of epochs or with twice as many."""
    of_layer = [r for r in found if r["layer"] == layer and "accuracy" in r]
    usual = {r["network"]: min(q["length"] for q in of_layer if q["network"] == r["network"]) for r in of_layer}
    out: dict[Place, list[Row]] = defaultdict(list)
    for r in of_layer:
        if r["length"] == usual[r["network"]] * (2 if doubled else 1):
            out[r["network"], r["optimizer"], r["rate"]].append(r)
    return out


def counted(found: Sequence[Row]) -> list[Place]:
    """Return the places that count: where nn.Linear is good from every seed and trained to the end."""
    usual, twice = medians(found, LINEAR), medians(found, LINEAR, doubled=True)
    best: dict[tuple[str, str], float] = defaultdict(float)
    for (network, optimizer, _), accuracy in usual.items():
        best[network, optimizer] = max(best[network, optimizer], accuracy)
    return [
        place
        for place, runs in places(found, LINEAR).items()
        if min(r["accuracy"] for r in runs) >= best[place[:2]] - NEAR
        and place in twice
        and abs(twice[place] - usual[place]) < MOVED
    ]


def failed(row: Row) -> bool:
    """Say if a training ended at chance or not finite."""
    return not row["finite"] or row["accuracy"] <= CHANCE


def score(found: Sequence[Row], layer: str, network: str | None = None) -> dict[str, float]:
    """Compare a layer with nn.Linear where it counts.

    Returns:
        counted: Number of counted cells that the layer was trained in. near: Share of them where its median is within 2 points.
        failures: Trainings of them at chance or not finite. shortfall: Mean of nn.Linear's median minus the layer's, above 0.
    """
    linear, own, runs = medians(found, LINEAR), medians(found, layer), places(found, layer)
    where = [p for p in counted(found) if p in own and network in (None, p[0])]
    if not where:
        return {"counted": 0, "near": 0.0, "failures": 0, "shortfall": 0.0}
    below = [linear[p] - own[p] for p in where]
    return {
        "counted": len(where),
        "near": sum(d <= WITHIN + 1e-6 for d in below) / len(where),
        "failures": sum(failed(r) for p in where for r in runs[p]),
        "shortfall": statistics.fmean(max(0.0, d) for d in below),
    }


def best(found: Sequence[Row], number: int) -> list[str]:
    """Return the layers that come nearest to nn.Linear: by failures, cells within 2 points, and shortfall."""

    def rank(layer: str) -> tuple[float, ...]:
        s = score(found, layer)
        return s["failures"], -s["near"], s["shortfall"]

    return sorted((layer for layer in CANDIDATES if layer not in (LINEAR, ORTHOGONAL)), key=rank)[:number]


def report(run: common.Run, found: Sequence[Row]) -> None:
    """Write the record and the figures."""
