"""The tables and figures of the sweep, from its rows."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from matplotlib import pyplot as plt

from benchmarks.experiments import common
from benchmarks.experiments.learning_rates import text
from benchmarks.experiments.learning_rates.layers import CANDIDATES, LIBRARY, LINEAR, ORTHOGONAL, PC
from benchmarks.records.rows import Row

NEAR = 0.03  # a cell counts if every seed of nn.Linear is so near the median of its best rate,
MOVED = 0.005  # and if twice the epochs move its median by less
WITHIN = 0.02  # of nn.Linear's median: as good
CHANCE = 0.15  # of ten classes, with some margin: nothing was learned

TITLES = {"mlp": "MLP on digits", "cnn": "CNN on digits", "transformer": "Transformer on digits"}
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
    scores = {layer: score(found, layer) for layer in CANDIDATES if layer not in (LINEAR, ORTHOGONAL, LIBRARY)}
    ranks = {a: (s["failures"], -s["near"], s["shortfall"]) for a, s in scores.items() if s["counted"]}
    return sorted(ranks, key=ranks.__getitem__)[:number]


def failures_everywhere(found: Sequence[Row], layer: str, network: str) -> int:
    """Return the number of trainings at chance or not finite at all rates, those included where nn.Linear fails too."""
    return sum(failed(r) for place, runs in places(found, layer).items() if place[0] == network for r in runs)


def results(found: Sequence[Row]) -> dict[str, Any]:
    """Return the results of the record."""
    networks = list(dict.fromkeys(r["network"] for r in found if "accuracy" in r))
    trained = [layer for layer in CANDIDATES if any(r["layer"] == layer for r in found)]
    out: dict[str, Any] = {"layers": {layer: asdict(CANDIDATES[layer]) for layer in trained}}
    for network in networks:
        own = [r for r in found if r["network"] == network]
        out[network] = {
            "counted": [[optimizer, rate] for _, optimizer, rate in counted(own)],
            "scores": {
                layer: {**score(own, layer), "failures_at_all_rates": failures_everywhere(own, layer, network)}
                for layer in trained
                if any(r["layer"] == layer for r in own)
            },
            "by_optimizer": {
                optimizer: {
                    layer: _best_rate(own, layer, optimizer) for layer in trained if _best_rate(own, layer, optimizer)
                }
                for optimizer in dict.fromkeys(r["optimizer"] for r in own)
            },
        }
    language = [r for r in found if r["network"] == "gpt"]
    if language:
        out["gpt"] = {
            "text": text.corpus().digest,
            "layers": {
                layer: {str(rate): _language(language, layer, rate) for rate in _unique(language, "rate")}
                for layer in _unique(language, "layer")
            },
        }
    out["commits"] = _unique(list(found), "git_sha")
    return out


def _unique(found: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(r[key] for r in found))


def _best_rate(found: Sequence[Row], layer: str, optimizer: str) -> dict[str, float] | None:
    """Return the best median accuracy over rates with its rate, and the number of rates with a median within 3 points of it."""
    at = {place[2]: accuracy for place, accuracy in medians(found, layer).items() if place[1] == optimizer}
    if not at:
        return None
    rate = max(at, key=at.__getitem__)
    return {"accuracy": at[rate], "rate": rate, "rates_within_3_points": sum(a >= at[rate] - NEAR for a in at.values())}


def _language(found: Sequence[Row], layer: str, rate: float) -> dict[str, list[float]]:
    runs = [r for r in found if (r["layer"], r["rate"]) == (layer, rate)]
    return {"validation_loss": [r["validation_loss"] for r in runs], "seconds": [r["seconds"] for r in runs]}


MOST, _TICKS = 0.996, (0.1, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)  # of the axis of accuracies


# Rows of the page's table beside the layers that did best; the record has all.
_NAMED = (
    ORTHOGONAL,
    "summary",
    "summary, w = 3b",
    "summary, normalised",
    "Newton-Schulz, norm never updated",
    "PC-1",
)


def markdown(found: dict[str, Any]) -> str:
    """Return the tables of the guide from the results of the record."""
    networks = [name for name in TITLES if name in found]
    scores = {name: found[name]["scores"] for name in networks}
    beyond = [layer for name in networks[1:] for layer in scores[name]]
    layers = [*dict.fromkeys([*beyond, *_NAMED])]
    layers = [layer for layer in layers if layer != LINEAR and layer in scores[networks[0]]]
    lines = ["| layer | " + " | ".join(TITLES[name] for name in networks) + " |", "|---" * (len(networks) + 1) + "|"]
    for layer in layers:
        cells = [_cell(scores[name].get(layer)) for name in networks]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    if "gpt" in found:
        lines += [
            "",
            "| layer | rate | validation loss, nats a character | time of a step, nn.Linear = 1 |",
            "|---|---|---|---|",
        ]
        layers = found["gpt"]["layers"]
        at_best = {layer: min(rates.items(), key=lambda item: _mean_loss(item[1])) for layer, rates in layers.items()}
        plain = statistics.fmean(at_best[LINEAR][1]["seconds"])
        for layer, (rate, runs) in at_best.items():
            losses = ", ".join("not finite" if loss is None else f"{loss:.3f}" for loss in runs["validation_loss"])
            lines.append(f"| {layer} | {rate} | {losses} | {statistics.fmean(runs['seconds']) / plain:.2f} |")
    return "\n".join(lines)


def _cell(scores: dict[str, float] | None) -> str:
    if scores is None:
        return ""
    text = f"{round(scores['near'] * scores['counted'])} of {scores['counted']}"
    return text + (f", {scores['failures']} failed" if scores["failures"] else "")


def _mean_loss(runs: dict[str, list[float]]) -> float:
    losses = runs["validation_loss"]
    return math.inf if None in losses else statistics.fmean(losses)


def report(run: common.Run, found: Sequence[Row]) -> dict[str, Any]:
    """Write the record and the figures, and return the results."""
    shown = {LINEAR: "black", ORTHOGONAL: "0.55", "summary": "#d55e00"}
    shown |= dict(
        zip(
            (a for a in best(found, 5) if a not in shown),
            ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
            strict=False,
        )
    )
    _draw_maps(run)
    for network in ("mlp", "cnn", "transformer"):
        own = [r for r in found if r["network"] == network]
        if own:
            _draw_rates(run, network, own, shown)
    language = [r for r in found if r["network"] == "gpt"]
    if language:
        _draw_language(run, language, shown)
    lengths = {f"{r['network']}": r["length"] for r in reversed(found) if r["layer"] == LINEAR}
    out = results(found)
    run.finish({"lengths": lengths, "trainings": len(found)}, out)
    return out


def _draw_maps(run: common.Run) -> None:
    """Draw f(s) = s q(s²), its derivative f'(s) and q(s²) over s."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    s = torch.linspace(0, 1.5, 301, dtype=torch.float64)
    maps = {
        "nn.Linear": (1.0,),
        "summary": (0.0, 1.0),
        "Newton-Schulz, PC-1": (1.5, -0.5),
        "slope 0.5 at 1": (1.25, -0.25),
    }
    maps |= {f"PC-{level}": c for level, c in enumerate(PC, 1) if level > 1}  # PC-1 lies on Newton-Schulz
    for i, (name, c) in enumerate(maps.items()):
        q = sum(a * s ** (2 * j) for j, a in enumerate(c))
        slope = sum((2 * j + 1) * a * s ** (2 * j) for j, a in enumerate(c))
        for axis, y in zip(axes, (s * q, slope, q), strict=True):
            axis.plot(s, y, label=name, color=f"C{i}", linestyle="-" if i < 4 else "--")
    titles = (
        "singular value of W: f(s) = s q(s²)",
        "step of W in symmetric directions: f'(s)",
        "and in all others: f(s) / s",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="singular value s of b", title=title, ylim=(-0.6, 3.8))
        axis.axvline(1, color="0.8", linewidth=0.8, zorder=0)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Near s = 1 the summary's weight moves three times as far as b; that of the flat tops hardly moves")
    run.figure(figure, "maps")


def _draw_rates(run: common.Run, network: str, found: Sequence[Row], shown: dict[str, str]) -> None:
    optimizers = _unique(found, "optimizer")
    columns = min(4, len(optimizers))
    height = -(-len(optimizers) // columns)
    figure, panels = plt.subplots(
        height, columns, figsize=(3.6 * columns, 3.3 * height), layout="constrained", sharey=True, squeeze=False
    )
    count = set(counted(found))
    for axis in panels.flat[len(optimizers) :]:
        axis.axis("off")
    for axis, optimizer in zip(panels.flat, optimizers, strict=False):
        for layer, colour in reversed(shown.items()):
            at = {
                p[2]: [min(r["accuracy"], MOST) for r in runs]
                for p, runs in places(found, layer).items()
                if p[1] == optimizer
            }
            if at:
                rates = sorted(at)
                axis.plot(
                    rates, [statistics.median(at[r]) for r in rates], "-o", color=colour, label=layer, markersize=3
                )
                axis.vlines(
                    rates, [min(at[r]) for r in rates], [max(at[r]) for r in rates], color=colour, linewidth=0.7
                )
        for rate in (p[2] for p in count if p[1] == optimizer):
            axis.axvspan(rate / 1.3, rate * 1.3, color="0.94", zorder=0)
        axis.set(xscale="log", xlabel="learning rate", title=optimizer, yscale="logit", ylim=(0.05, MOST))
        axis.set_yticks(_TICKS, [f"{100 * tick:g}" for tick in _TICKS])
        axis.set_yticks([], minor=True)
    for row in panels:
        row[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{TITLES[network]}: median and range over seeds; cells that count in grey")
    run.figure(figure, network)


def _draw_language(run: common.Run, found: Sequence[Row], shown: dict[str, str]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for layer in _unique(found, "layer"):
        rates = {
            rate: statistics.fmean(_language(found, layer, rate)["validation_loss"]) for rate in _unique(found, "rate")
        }
        rate = min(rates, key=lambda r: rates[r] if math.isfinite(rates[r]) else math.inf)
        runs = [r for r in found if (r["layer"], r["rate"]) == (layer, rate)]
        for i, r in enumerate(runs):
            steps, seconds, loss = zip(*r["curve"], strict=True)
            how = {"color": shown.get(layer, "C7"), "linewidth": 1.2}
            axes[0].plot(steps, loss, label=f"{layer}, rate {rate:g}" if i == 0 else "_", **how)
            axes[1].plot(seconds, loss, **how)
            for spectrum in r["spectra"].values() if i == 0 else ():
                share = [0, 10, 25, 50, 75, 90, 100]
                axes[2].plot(share, spectrum, alpha=0.3, **how)
    axes[0].set(xlabel="step", ylabel="validation loss, nats a character", title="Loss over steps")
    axes[1].set(xlabel="seconds of one thread", title="Loss over time")
    axes[2].set(
        xlabel="share of the singular values, %, from the largest", yscale="log", title="Spectra of W at the end"
    )
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("A language model of characters, each layer at its best rate, two seeds")
    run.figure(figure, "gpt")
