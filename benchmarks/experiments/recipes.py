"""Handwritten digits: what decay, clipping, warm-up, a GradScaler and averages do to b and to the accuracy.

An MLP with nn.Linear, with a summary as its head, and with Newton-Schulz layers, each trained by AdamW in each way.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from benchmarks.command_line import users_input
from benchmarks.experiments import common, datasets
from benchmarks.experiments.training import accuracy
from benchmarks.records import report
from interp_nn.nn import SummaryLinear, follow, parameter_groups, update_spectral_norms
from interp_nn.nn.base import LinearForm

NAME = "recipes"
WIDTHS = (64, 128, 64, 10)
EPOCHS, BATCH, SEEDS = 20, 32, 3
QUICK = 320  # images
EMA = 0.99  # of the average before, at each step


class Way(NamedTuple):
    """A way to train by AdamW. The rate falls linearly to 0, but where weights are averaged.

    Attributes:
        rate: The learning rate.
        decay: The decoupled decay.
        groups: Parameters that decay: "all", "matrices", or those of `parameter_groups`.
        clip: Largest norm of the gradient.
        warm_up: Share of the steps in which the rate rises from 0.
        half: If True, float16 with a GradScaler.
        average: "ema", or "swa" of the last quarter's epochs.
    """

    rate: float = 3e-3
    decay: float = 0.0
    groups: str = "parameter_groups"
    clip: float | None = None
    warm_up: float = 0.0
    half: bool = False
    average: str | None = None


HIGH = 3e-2
WAYS = {
    "no decay": Way(),
    "decay 1 of all parameters": Way(decay=1.0, groups="all"),
    "decay 1 of matrices": Way(decay=1.0, groups="matrices"),
    "decay 1 by `parameter_groups`": Way(decay=1.0),
    "gradient clipped at norm 0.5": Way(clip=0.5),
    f"rate {HIGH:g}": Way(rate=HIGH),
    f"rate {HIGH:g}, clipped": Way(rate=HIGH, clip=0.5),
    f"rate {HIGH:g}, warm-up of 10 %": Way(rate=HIGH, warm_up=0.1),
    "float16, GradScaler": Way(half=True),
    f"EMA {EMA:g}, constant rate": Way(average="ema"),
    "SWA of 5 epochs, constant rate": Way(average="swa"),
}


def mlp(kind: str) -> nn.Sequential:
    """Build the MLP: with "nn.Linear", with a "summary head", or with "newton-schulz" layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(WIDTHS):
        head = fan_out == WIDTHS[-1]
        if kind == "newton-schulz":
            layers.append(SummaryLinear(fan_in, fan_out, polynomial=kind))
        else:
            layers.append((SummaryLinear if head and kind == "summary head" else nn.Linear)(fan_in, fan_out))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


KINDS = ("nn.Linear", "summary head", "newton-schulz")


def grouped(network: nn.Module, way: Way) -> list[dict[str, Any]]:
    """Return the parameter groups of a way."""
    if way.groups == "parameter_groups":
        return parameter_groups(network, way.decay)
    own = list(network.parameters())
    decayed = [p for p in own if way.groups == "all" or p.dim() > 1]
    kept = [p for p in own if all(p is not q for q in decayed)]
    return [{"params": decayed, "weight_decay": way.decay}, {"params": kept, "weight_decay": 0.0}]


def schedule(step: int, steps: int, warm_up: float, falls: bool) -> float:
    """Return the factor of the rate: it rises linearly in the warm-up, and then falls linearly to 0 or stays."""
    rise = warm_up * steps
    if step < rise:
        return (step + 1) / rise
    return (steps - step) / (steps - rise) if falls else 1.0


def fit(
    network: nn.Module, x: Tensor, y: Tensor, way: Way, epochs: int, seed: int,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> tuple[dict[str, float], AveragedModel | None]:  # fmt: skip
    """Train a network; return shares of the steps that were clipped or skipped, the loss, and the average if there is one."""
    step = optimizer(grouped(network, way), lr=way.rate)
    handle = follow(step, network)
    steps = epochs * math.ceil(len(y) / BATCH)
    rates = torch.optim.lr_scheduler.LambdaLR(step, lambda i: schedule(i, steps, way.warm_up, way.average is None))
    scaler = torch.amp.GradScaler("cpu", growth_interval=100, enabled=way.half)
    average = None
    if way.average is not None:
        mean = get_ema_multi_avg_fn(EMA) if way.average == "ema" else None
        average = AveragedModel(network, multi_avg_fn=mean)
    shuffle = torch.Generator().manual_seed(seed)
    clipped, skipped, loss = 0, 0, torch.zeros(())
    network.train()
    for epoch in range(epochs):
        for index in torch.randperm(len(y), generator=shuffle).split(BATCH):
            step.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=way.half):
                loss = nn.functional.cross_entropy(network(x[index]), y[index])
            scaler.scale(loss).backward()
            if way.clip is not None:
                clipped += int(nn.utils.clip_grad_norm_(network.parameters(), way.clip) > way.clip)
            before = scaler.get_scale()
            scaler.step(step)
            scaler.update()
            skipped += scaler.get_scale() < before
            rates.step()
            if average is not None and way.average == "ema":
                average.update_parameters(network)
        if average is not None and way.average == "swa" and epoch >= epochs * 3 // 4:
            average.update_parameters(network)
    network.eval()
    handle.remove()
    return {"clipped": clipped / steps, "skipped": skipped / steps, "loss": float(loss.detach())}, average


def measure(kind: str, name: str, seed: int, epochs: int, images: datasets.Images) -> dict[str, Any]:
    """Train one network in one way and return its row."""
    torch.manual_seed(seed)
    network, way = mlp(kind), WAYS[name]
    shares, average = fit(network, images.x_train, images.y_train, way, epochs, seed)
    row: dict[str, Any] = {"kind": kind, "way": name, "seed": seed, **shares, "accuracy": _right(network, images)}
    row["norm_of_b"] = _norms(network) if math.isfinite(row["loss"]) else None
    if average is not None:
        with warnings.catch_warnings():  # of an old norm, which is measured here
            warnings.simplefilter("ignore")
            stale, weights = _right(average, images), _weights(average)
        update_spectral_norms(average)
        row["average"] = {
            "accuracy": _right(average, images),
            "accuracy_with_the_last_norms": stale,
            "change_by_the_norms": max(map(_apart, _weights(average), weights), default=0.0),
            "norm_of_b": _norms(average),
        }  # fmt: skip
    return row


def _right(network: nn.Module, images: datasets.Images) -> float:
    return accuracy(network.eval(), images.x_test, images.y_test)


def _layers(network: nn.Module) -> list[LinearForm]:
    return [m for m in network.modules() if isinstance(m, LinearForm)]


def _weights(network: nn.Module) -> list[Tensor]:
    return [m.effective_weight().detach() for m in _layers(network)]


def _norms(network: nn.Module) -> list[float]:
    return [float(torch.linalg.matrix_norm(m.matrix().detach(), 2)) for m in _layers(network)]


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    options.add_argument("--page", type=Path, metavar="FILE", help="write the table between the marks of this file")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    run = common.Run(NAME, given)
    images, epochs = datasets.digits(), EPOCHS
    if given.quick:
        images, epochs = images._replace(x_train=images.x_train[:QUICK], y_train=images.y_train[:QUICK]), 1
    seeds = range(given.seed, given.seed + (1 if given.quick else SEEDS))
    cells = [(kind, way, seed) for way in WAYS for kind in KINDS for seed in seeds]
    trainings = [measure(kind, way, seed, epochs, images) for kind, way, seed in tqdm(cells, mininterval=10)]
    results = {
        "ways": {way: {kind: _summary(trainings, kind, way) for kind in KINDS} for way in WAYS},
        "trainings": trainings,
    }
    given.seeds = len(seeds)
    run.finish(
        {"widths": WIDTHS, "batch": BATCH, "ways": {name: way._asdict() for name, way in WAYS.items()}}, results, epochs
    )
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", markdown(results))
    return 0


def _summary(trainings: list[dict[str, Any]], kind: str, way: str) -> dict[str, Any]:
    own = [row for row in trainings if (row["kind"], row["way"]) == (kind, way)]
    out: dict[str, Any] = {key: common.spread([row[key] for row in own]) for key in ("accuracy", "clipped", "skipped")}
    norms = [value for row in own for value in row["norm_of_b"] or ()]
    out["norm_of_b"] = [min(norms), max(norms)] if norms else None
    if "average" in own[0]:
        found = [row["average"] for row in own]
        out["average"] = {key: common.spread([row[key] for row in found]) for key in found[0] if key != "norm_of_b"}
    return out


def markdown(results: dict[str, Any]) -> str:
    """Return the table of the guide."""
    lines = [
        "| AdamW, rate 0.003 | " + " | ".join(KINDS) + " | norm of b: head | norm of b: newton-schulz |",
        "|---" * 6 + "|",
    ]
    for way, kinds in results["ways"].items():
        cells = [f"{100 * k['accuracy']['mean']:.1f}" for k in kinds.values()]
        if "average" in kinds[KINDS[0]]:
            averages = (f"{100 * k['average']['accuracy']['mean']:.1f}" for k in kinds.values())
            cells = [f"{average} ({last})" for average, last in zip(averages, cells, strict=True)]
        ranges = [kinds[kind]["norm_of_b"] for kind in KINDS[1:]]
        norms = [
            " to ".join(dict.fromkeys(f"{value:.2g}" for value in found)) if found else "not finite" for found in ranges
        ]
        lines.append(f"| {way} | " + " | ".join(cells + norms) + " |")
    return "\n".join(lines)
