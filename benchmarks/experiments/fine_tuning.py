"""Handwritten digits: pretrained networks, converted with their outputs kept, and fine-tuned on rotated images.

An MLP and a small ResNet learn upright digits. Each is converted in each way and fine-tuned on a few images that are turned by
90 degrees, at each rate of two optimizers.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.command_line import users_input
from benchmarks.experiments import common, datasets, recipes
from benchmarks.experiments.recipes import Way
from benchmarks.experiments.training import accuracy
from benchmarks.records import report
from interp_nn import convert
from interp_nn.nn.polynomial_layer import PolynomialLayer

NAME = "fine_tuning"
PRETRAINING, IMAGES, EPOCHS, SEEDS = 15, 400, 15, 3
MOVED = ("step", "share_of_the_first_direction")
PLAIN = "nn.Linear, nn.Conv2d"
CONVERSIONS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "head, summary": {"select": "head"},
    "whole, newton-schulz": {"polynomial": "newton-schulz"},
    "whole, slope 0.5 at 1": {"polynomial": (1.25, -0.25), "normalize": True, "gain": True},
}
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "AdamW": (torch.optim.AdamW, (1e-3, 3e-3, 1e-2, 3e-2)),
    "SGD": (functools.partial(torch.optim.SGD, momentum=0.9), (3e-3, 1e-2, 3e-2, 1e-1)),
}


class Block(nn.Module):
    """A residual block of two convolutions, each with a batch norm."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, out, h / stride, w / stride) for (n, channels, h, w)."""
        return torch.relu(self.body(x) + self.shortcut(x))


class Network(nn.Sequential):
    """A body and a head of ten classes."""

    def __init__(self, body: nn.Sequential, features: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, 10)


def mlp() -> Network:
    """Build layers of 64, 128, 64 and 10 units."""
    return Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()), 64)


def resnet() -> Network:
    """Build a convolution and two residual blocks with 16 and 32 channels."""
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, 16, 1), Block(16, 32, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return Network(body, 32)


NETWORKS: dict[str, Callable[[], Network]] = {"MLP": mlp, "ResNet": resnet}


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the (effective) weight of each linear layer and convolution as a matrix (out, ...), by path."""
    found = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | PolynomialLayer)}
    return {name: torch.Tensor(m.weight.detach()).flatten(1).clone() for name, m in found.items()}


def moved(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return the relative step of a weight, and the share of its square along the first pair of singular vectors before."""
    u, _, vt = torch.linalg.svd(before, full_matrices=False)
    step = after - before
    size = float(step.norm())
    return dict(zip(MOVED, (size / float(before.norm()), float((u[:, 0] @ step @ vt[0] / size) ** 2)), strict=True))


def fine_tune(
    pretrained: Network, conversion: str, optimizer: str, rate: float, seed: int, epochs: int, images: datasets.Images,
) -> dict[str, Any]:  # fmt: skip
    """Convert a copy of a network, fine-tune it, and return its row."""
    network, options = copy.deepcopy(pretrained).eval(), CONVERSIONS[conversion]
    if options is not None:
        convert.summarize(network, **options)
    x = images.x_test
    with torch.no_grad():
        error = common.relative_error(network.eval()(x), pretrained.eval()(x))
    first = weights(network)
    gains = _gains(network)
    way = Way(rate=rate)
    shares, _ = recipes.fit(network, images.x_train, images.y_train, way, epochs, seed, OPTIMIZERS[optimizer][0])
    finite = math.isfinite(shares["loss"])
    steps = [moved(first[name], w) for name, w in weights(network).items()] if finite else []
    return {
        "conversion": conversion, "optimizer": optimizer, "rate": rate, "seed": seed, "finite": finite,
        "accuracy": accuracy(network, x, images.y_test), "error_of_the_conversion": error,
        **{key: statistics.fmean(one[key] for one in steps) if finite else None for key in MOVED},
        "change_of_gains": {name: gain / gains[name] - 1 for name, gain in _gains(network).items()},
    }  # fmt: skip


def _gains(network: nn.Module) -> dict[str, float]:
    """Return the gain of each layer that has one."""
    return {
        name.removesuffix(".gain"): float(p.detach()) for name, p in network.named_parameters() if name.endswith("gain")
    }


def rotated(images: datasets.Images, number: int) -> datasets.Images:
    """Turn the images by 90 degrees and keep the first ones, `number`, for training."""
    x, y = images.x_train[:number], images.y_train[:number]
    return images._replace(x_train=x.rot90(1, (2, 3)), y_train=y, x_test=images.x_test.rot90(1, (2, 3)))


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    options.add_argument("--page", type=Path, metavar="FILE", help="write the table between the marks of this file")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    run = common.Run(NAME, given)
    upright = datasets.digits()
    turned = rotated(upright, 2 * recipes.BATCH if given.quick else IMAGES)
    if given.quick:
        upright = upright._replace(x_train=upright.x_train[: recipes.QUICK], y_train=upright.y_train[: recipes.QUICK])
    given.seeds = 1 if given.quick else SEEDS
    pretraining, epochs = (1, 1) if given.quick else (PRETRAINING, EPOCHS)
    trainings, before = [], []
    for name, build in NETWORKS.items():
        for seed in range(given.seed, given.seed + given.seeds):
            torch.manual_seed(seed)
            pretrained = build()
            recipes.fit(pretrained, upright.x_train, upright.y_train, Way(), pretraining, seed)
            before.append({
                "network": name, "seed": seed, "accuracy": accuracy(pretrained, upright.x_test, upright.y_test),
                "accuracy_when_turned": accuracy(pretrained, turned.x_test, turned.y_test),
            })  # fmt: skip
            cells = [(a, o, r) for o, (_, rates) in OPTIMIZERS.items() for r in rates for a in CONVERSIONS]
            if given.quick:
                cells = [cell for cell in cells if cell[1:] in (("AdamW", 3e-3), ("SGD", 0.1))]
            for conversion, optimizer, rate in tqdm(cells, f"{name}, seed {seed}", mininterval=10):
                row = fine_tune(pretrained, conversion, optimizer, rate, seed, epochs, turned)
                trainings.append({"network": name, **row})
    results = {
        "pretrained": before,
        "networks": {name: summary(trainings, name) for name in NETWORKS},
        "trainings": trainings,
    }
    budget = {"images": IMAGES, "pretraining_epochs": pretraining, "batch": recipes.BATCH, "conversions": CONVERSIONS}
    run.finish(budget, results, epochs)
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", markdown(results))
    return 0


def summary(trainings: list[dict[str, Any]], network: str) -> dict[str, Any]:
    """Return, for each optimizer and conversion, the means over seeds by rate, and the plain network's best rate."""
    out: dict[str, Any] = {}
    for optimizer in OPTIMIZERS:
        own = [row for row in trainings if (row["network"], row["optimizer"]) == (network, optimizer)]
        rates = list(dict.fromkeys(row["rate"] for row in own))
        found = {
            a: {str(rate): _means([r for r in own if (r["conversion"], r["rate"]) == (a, rate)]) for rate in rates}
            for a in CONVERSIONS
        }
        best = max(found[PLAIN], key=lambda rate: found[PLAIN][rate]["accuracy"]["mean"])
        below = {
            a: found[PLAIN][best]["accuracy"]["mean"] - rows[best]["accuracy"]["mean"] for a, rows in found.items()
        }
        out[optimizer] = {"best_rate_of_plain": best, "below_plain_there": below, "conversions": found}
    return out


def _means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    gains = [row["change_of_gains"] for row in rows]
    return {
        "accuracy": common.spread([row["accuracy"] for row in rows]),
        "not_finite": sum(not row["finite"] for row in rows),
        "error_of_the_conversion": max(row["error_of_the_conversion"] for row in rows),
        **{
            key: statistics.fmean(row[key] for row in rows) if all(row["finite"] for row in rows) else None
            for key in MOVED
        },
        "change_of_gains": {name: statistics.fmean(abs(one[name]) for one in gains) for name in gains[0]},
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the table of the guide: mean accuracies by optimizer and rate, the plain network's best one in bold."""
    networks = results["networks"]
    first = next(iter(networks.values()))
    columns = [(o, rate) for o, found in first.items() for rate in found["conversions"][PLAIN]]
    lines = [
        "| network | layers | " + " | ".join(f"{o} {rate}" for o, rate in columns) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]
    for name, found in networks.items():
        for conversion in CONVERSIONS:
            cells = []
            for o, rate in columns:
                text = f"{100 * found[o]['conversions'][conversion][rate]['accuracy']['mean']:.1f}"
                cells.append(f"**{text}**" if rate == found[o]["best_rate_of_plain"] else text)
            lines.append(f"| {name} | {conversion} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
