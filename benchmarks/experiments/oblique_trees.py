"""Labels of an oblique decision tree: the gates of a DLGN against the tree's hyperplanes.

Data, networks, loss, batches and learning rates are those of Banerjee et al. (ICLR 2025), who train for 1,500 epochs; the ReLU
network beside them has the same budget and is not tuned.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import common
from benchmarks.experiments.gating_regimes import relu_mlp
from benchmarks.experiments.training import Recipe, accuracy
from interp_nn.explain import plots
from interp_nn.nn.gated.gates import HardGate, SoftGate
from interp_nn.nn.gated.networks import DLGN

NAME = "oblique_trees"
LEVEL = 0.99  # a hyperplane is found by a gate whose |cos| with it is no less
BATCHES = 10  # an epoch, as published
PUBLISHED_EPOCHS = 1500
EPOCHS = {"SDI": 200, "SDII": 400, "SDIII": 40}
LONGER = {("SDII", "DLGN-SF"): PUBLISHED_EPOCHS}  # after 400 it was the farthest from the published accuracy
MLP, HIDDEN = "ReLU network", (64, 64, 64)


class Gated(NamedTuple):
    """A DLGN's published hyperparameters, and its test accuracy with them."""

    beta: float
    learning_rate: float
    hidden: tuple[int, ...]
    accuracy: float


PUBLISHED = {
    "SDI": {"DLGN-SF": Gated(30, 0.02, (10,) * 4, 0.9743), "DLGN": Gated(3, 0.02, (20,) * 5, 0.9605)},
    "SDII": {"DLGN-SF": Gated(3, 0.02, (10,) * 4, 0.9029), "DLGN": Gated(10, 0.01, (20,) * 4, 0.9425)},
    "SDIII": {"DLGN-SF": Gated(3, 0.01, (20,) * 3, 0.6383), "DLGN": Gated(10, 0.001, (10,) * 3, 0.6504)},
}


DEPTH = 4
SIZES = {"SDI": (20, 40_000), "SDII": (100, 60_000), "SDIII": (500, 100_000)}
SEED = 365  # of the published data


class Oblique(NamedTuple):
    """Points (n, d) with labels 0 or 1 (n,), fp32, for training and testing, and the tree's unit normals (15, d) fp64."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    normals: Tensor


def load(name: str, *, points: int | None = None, seed: int = SEED) -> Oblique:
    """Draw SDI, SDII or SDIII: half for training, the last quarter for testing (the third is for validation, and not used).

    points: how many in all, for less than the published number. seed: of tree and points; 365 draws the published ones.
    Raises ValueError for another name or fewer than 4 points.
    """
    if name not in SIZES:
        raise ValueError(f"name: got {name!r}, want one of {', '.join(SIZES)}")
    dim, published = SIZES[name]
    n = published if points is None else points
    if n < 4:
        raise ValueError(f"points: got {n}, want at least 4")
    random = np.random.RandomState(seed)
    normals = torch.from_numpy(_on_sphere(random, 2**DEPTH - 1, dim))
    x = torch.from_numpy(_on_sphere(random, n, dim))
    y = labels(x, normals)
    x, y = x.float(), y.float()
    return Oblique(name, x[: n // 2], y[: n // 2], x[n - n // 4 :], y[n - n // 4 :], normals)


def labels(x: Tensor, normals: Tensor) -> Tensor:
    """Return the label of each point (n,) int64 from a complete tree of unit normals (2^depth - 1, d), level by level.

    A node sends the points with u·x > 0 to its second child; a leaf that is a first child has label 1, a second child 0.
    """
    right = (x @ normals.T > 0).long()
    node = x.new_zeros(len(x), dtype=torch.int64)
    while bool((node < len(normals)).any()):
        node = 2 * node + 1 + right.gather(1, node.unsqueeze(1)).squeeze(1)
    return node % 2


def _on_sphere(random: np.random.RandomState, n: int, dim: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    points = random.standard_normal((n, dim))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.training_parser(NAME, __doc__)
    options.add_argument("--datasets", nargs="+", choices=list(SIZES), default=list(SIZES))
    given = options.parse_args(arguments)
    given.seeds = given.seeds or (1 if given.quick else 3)
    run = common.Run(NAME, given)
    trainer = common.Trainer(NAME, given, given.seeds * 3 * len(given.datasets))
    for name in given.datasets:
        _train(name, trainer, run)
    results = {name: _summary(name, trainer) for name in given.datasets}
    _draw_accuracy(run, trainer)
    budget = {
        "minutes": given.minutes, "batches_an_epoch": BATCHES, "published_epochs": PUBLISHED_EPOCHS,
        "published": {name: {net: known._asdict() for net, known in PUBLISHED[name].items()} for name in results},
        "hidden_of_the_relu_network": HIDDEN,
    }  # fmt: skip
    trainings = []
    for row in trainer.rows:  # hundreds of epochs each: their whole histories would be most of the record
        history = row["history"]
        some = {"accuracy_every_100_epochs": history["accuracy"][99::100], "last_loss": history["loss"][-1]}
        trainings.append({key: value for key, value in row.items() if key != "history"} | some)
    epochs = {name: {network: _epochs(given, name, network) for network, _, _ in _networks(name)} for name in results}
    run.finish(budget, {**results, "trainings": trainings}, epochs)
    return 0


def _epochs(given: argparse.Namespace, name: str, network: str) -> int:
    """Return for how many epochs a network is trained on a data set."""
    if given.epochs or given.quick:
        return given.epochs or 10
    return LONGER.get((name, network), EPOCHS[name])


def _train(name: str, trainer: common.Trainer, run: common.Run) -> None:
    """Train networks on the published data and, from further seeds, on other such trees; compare their gates with the trees."""
    for seed in range(run.given.seeds):
        data = load(name, points=4000 if run.given.quick else None, seed=SEED + seed)
        data = data._replace(**{part: getattr(data, part).to(run.given.device) for part in data._fields[1:]})
        normals: dict[str, Tensor] = {}
        for network, build, rate in _networks(name):
            epochs = _epochs(run.given, name, network)
            recipe = Recipe(epochs, len(data.y_train) // BATCHES, rate, shuffle=False)  # as published
            measure = partial(_measure, data)
            trained = trainer(
                f"{name}: {network}", seed, build, data.x_train, data.y_train, recipe, measure=measure, loss=_loss
            )
            if isinstance(trained, DLGN):
                found = [weight for weight, _ in trained.effective_gate_weights()]
                normals[network] = torch.cat(found).detach().double()
                trainer.rows[-1]["gates"] = _gates(trained, normals[network], data)
        if seed == 0:
            _draw_hyperplanes(run, name, normals, data.normals)


def _networks(name: str) -> list[tuple[str, Callable[[], nn.Module], float]]:
    """Return names, builders and learning rates."""
    dim = SIZES[name][0]

    def gated(kind: str, known: Gated) -> nn.Module:
        gating = "shallow" if kind == "DLGN-SF" else "linear"
        return DLGN((dim, *known.hidden, 1), gating=gating, gate=SoftGate(known.beta))

    published = PUBLISHED[name]
    dlgns = [(kind, partial(gated, kind, known), known.learning_rate) for kind, known in published.items()]
    return [*dlgns, (MLP, partial(relu_mlp, dim, *HIDDEN, 1), published["DLGN"].learning_rate)]


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the published loss: the cross entropy of the logits (-f(x), f(x))."""
    return nn.functional.binary_cross_entropy_with_logits(2 * network(x).squeeze(1), y)


def _measure(data: Oblique, network: nn.Module) -> dict[str, float]:
    return {"accuracy": accuracy(network, data.x_test, data.y_test, batch=10_000)}


def _gates(network: DLGN, found: Tensor, data: Oblique) -> dict[str, Any]:
    """Compare the gates' hyperplanes with the tree's and with chance.

    Returns that, their sharpness, and the network's accuracy with hard gates and on the training points.
    """
    chance = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype).to(found.device)
    best = best_cosines(found, data.normals)
    hard = copy.deepcopy(network)
    hard.gate = HardGate()
    return {
        "found": int((best >= LEVEL).sum()), "best_cosines": best.tolist(),
        "mean_best_cosine_of_random_gates": best_cosines(chance, data.normals).mean().item(),
        "sharpness": network.gate_sharpness(data.x_test), "accuracy_with_hard_gates": _measure(data, hard)["accuracy"],
        "accuracy_on_training_points": accuracy(network, data.x_train, data.y_train, batch=10_000),
    }  # fmt: skip


def best_cosines(found: Tensor, truth: Tensor) -> Tensor:
    """Return for each true hyperplane the largest |cos| with any gate."""
    return (nn.functional.normalize(truth) @ nn.functional.normalize(found).T).abs().amax(1)


def _summary(name: str, trainer: common.Trainer) -> dict[str, Any]:
    """Return by network accuracies over seeds, published ones, and how many of the 15 hyperplanes each seed's gates found."""
    table = trainer.table()
    results = {}
    for network, _, _ in _networks(name):
        results[network] = table[f"{name}: {network}"]
        if network in PUBLISHED[name]:
            gates = [row["gates"] for row in trainer.rows if row["network"] == f"{name}: {network}"]
            results[network] |= {
                "published_accuracy": PUBLISHED[name][network].accuracy,
                "hyperplanes_found": [one["found"] for one in gates],
                "smallest_best_cosine": [min(one["best_cosines"]) for one in gates],
                **{
                    key: common.spread([one[key] for one in gates])
                    for key in ("accuracy_with_hard_gates", "accuracy_on_training_points")
                },
            }
    return results


def _draw_hyperplanes(run: common.Run, name: str, normals: dict[str, Tensor], truth: Tensor) -> None:
    figure, panels = plt.subplots(1, len(normals), figsize=(13, 4.4), layout="constrained")
    for axes, (network, found) in zip(panels, normals.items(), strict=True):
        plots.gate_hyperplanes(found, truth, level=LEVEL, axes=axes)
        axes.set_title(f"{network}: {axes.get_title()}", fontsize=10)
    figure.suptitle(f"{name}: hyperplanes of the tree, and of the gates of networks trained on its labels")
    run.figure(figure, f"{name}-hyperplanes")


def _draw_accuracy(run: common.Run, trainer: common.Trainer) -> None:
    figure, panels = plt.subplots(
        1, len(run.given.datasets), figsize=(4.6 * len(run.given.datasets), 2.9), layout="constrained", squeeze=False
    )
    for axes, name in zip(panels[0], run.given.datasets, strict=True):
        accuracies = {network: trainer.of(f"{name}: {network}", "last_accuracy") for network, _, _ in _networks(name)}
        published = {network: known.accuracy for network, known in PUBLISHED[name].items()}
        plots.regime_bars(accuracies, published=published, axes=axes)
        axes.set(xlabel="test accuracy, %")
        axes.set_title(f"{name}: {axes.get_title()}", fontsize=9)
    run.figure(figure, "accuracy")
