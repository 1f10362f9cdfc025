"""Breast cancer, wine, diabetes and digits: the exact clusters of a network, and the few that `merge()` makes of them."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.command_line import at_least
from benchmarks.experiments import common, datasets, tabular
from interp_nn.explain.clusters.activation_clusters import ActivationClusters
from interp_nn.explain.clusters.piecewise_affine import PiecewiseAffine
from interp_nn.explain.clusters.table import r2

NAME = "few_clusters"
TARGETS = (0.95, 0.99)
WIDTH, CHANNELS = 32, 12
STEPS = {"table": 200, "digits": 600}
BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 3e-3, 1e-2
TABLES = ("breast cancer", "wine", "diabetes")


class Task(NamedTuple):
    """Samples x (n, *input) in fp64 with classes (n,) int64, or responses (n,) fp64, split in two, and names of features."""

    x: Tensor
    y: Tensor
    new_x: Tensor
    new_y: Tensor
    features: list[str] | None


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    options.add_argument(
        "--seeds", type=at_least(1), metavar="N", help="splits and networks from --seed on (default: 3)"
    )
    given = options.parse_args(arguments)
    given.seeds = given.seeds or (1 if given.quick else 3)
    run = common.Run(NAME, given)
    results: dict[str, Any] = {}
    for name in (*TABLES, "digits"):
        rows = []
        for seed in range(given.seed, given.seed + given.seeds):
            task = _digits(given.quick) if name == "digits" else _table(name, seed, given.quick)
            network = _trained(task, seed, 40 if given.quick else STEPS.get(name, STEPS["table"]), name)
            clusters, row = _clusters(network, task)
            rows.append(row)
            if name == "wine" and seed == given.seed:
                _draw(run, clusters, task)
        results[name] = {"rows": rows, **{key: common.spread([row[key] for row in rows]) for key in rows[0]}}
    budget = {
        "steps": STEPS, "batch": BATCH, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "width": WIDTH,
        "channels": CHANNELS, "held_out": "a quarter", "targets": TARGETS,
    }  # fmt: skip
    run.finish(budget, results)
    return 0


def _table(name: str, seed: int, quick: bool) -> Task:
    """Load a table of scikit-learn's, standardised by its fitted rows; a response is standardised too."""
    from sklearn import datasets as tables

    load = {"breast cancer": tables.load_breast_cancer, "wine": tables.load_wine, "diabetes": tables.load_diabetes}
    bunch = load[name]()
    x, y = torch.tensor(bunch.data, dtype=torch.float64), torch.tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    new, fitted = order[: len(x) // 4], order[len(x) // 4 :]
    fitted = fitted[:100] if quick else fitted
    x = (x - x[fitted].mean(0)) / x[fitted].std(0)
    if name == "diabetes":
        y = (y.double() - y[fitted].double().mean()) / y[fitted].double().std()
    return Task(x[fitted], y[fitted], x[new], y[new], [str(feature) for feature in bunch.feature_names])


def _digits(quick: bool) -> Task:
    images = datasets.digits()
    x_train, x_test = ((x.double() + 1) / 2 for x in (images.x_train, images.x_test))
    few = slice(60 if quick else None)
    return Task(x_train[few], images.y_train[few], x_test, images.y_test, None)


def _trained(task: Task, seed: int, steps: int, label: str) -> nn.Module:
    """Train by AdamW on shuffled batches; the network is in evaluation mode."""
    outputs = 1 if task.y.is_floating_point() else int(task.y.max()) + 1
    network: nn.Sequential
    if task.features is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Conv2d(1, CHANNELS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                nn.ReLU(), nn.Flatten(), nn.Linear(16 * CHANNELS, outputs),
            ).double()  # fmt: skip
    else:
        network = tabular.mlp(task.x.shape[1], WIDTH, WIDTH, outputs, seed=seed)
    adam = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    draws = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(steps), desc=f"{label}, seed {seed}", unit="step"):
        chosen = torch.randperm(len(task.x), generator=draws)[:BATCH]
        got, wanted = network(task.x[chosen]), task.y[chosen]
        regression = wanted.is_floating_point()
        loss = (
            nn.functional.mse_loss(got.squeeze(1), wanted) if regression else nn.functional.cross_entropy(got, wanted)
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    return network.eval()


def _clusters(network: nn.Module, task: Task) -> tuple[PiecewiseAffine, dict[str, float]]:
    """Return the merged clusters of the last target, and what was found of exact and merged clusters."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of single samples, and of targets out of reach: both are recorded
        exact = ActivationClusters(network, progress=False).fit(task.x)
        merged = [exact.merge(target=target) for target in TARGETS]
    with torch.no_grad():
        outputs = network(task.new_x)
    row = {
        "samples": len(task.x), "clusters": len(exact.counts_), "single": int((exact.counts_ == 1).sum()), "check": exact.check(),
        "held_out_in_a_known_cluster": (exact.predict(task.new_x) >= 0).double().mean().item(),
        "score_of_network": _score(outputs, task.new_y),
    }  # fmt: skip
    for target, found in zip(TARGETS, merged, strict=True):
        fidelity = found.fidelity(task.new_x)
        row |= {
            f"merged_{target}": len(found.counts_), f"r2_{target}": fidelity.r2, f"agreement_{target}": fidelity.agreement,
            f"score_{target}": _score(found.surrogate(task.new_x), task.new_y),
        }  # fmt: skip
    return merged[-1], row


def _score(outputs: Tensor, y: Tensor) -> float:
    """Return the accuracy for classes, R² for a response."""
    return r2(outputs.squeeze(1), y) if y.is_floating_point() else (outputs.argmax(1) == y).double().mean().item()


def _draw(run: common.Run, merged: PiecewiseAffine, task: Task) -> None:
    figure, axes = plt.subplots(figsize=(10, 3.2), layout="constrained")
    merged.table(feature_names=task.features).plot(axes=axes)
    figure.suptitle(
        f"Wine: a network's logit of the first class, less the mean logit, as {len(merged.counts_)} linear models",
        fontsize=11,
    )
    run.figure(figure, "wine")
