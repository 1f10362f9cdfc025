"""Gated networks read back as oblique trees, beside CART, logistic regression and a ReLU network.

On three small tables, each seed makes another split, 70 % for training. SDI is the published oblique tree of `oblique_trees`;
the network has DLGN-SF's published layers and gates, and each seed draws another tree. Trees grow on the training rows and are
pruned. No setting is tuned here.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from benchmarks.command_line import at_least
from benchmarks.experiments import common, oblique_trees
from benchmarks.experiments.tabular import titanic
from interp_nn.explain import DLGNClassifier, plots
from interp_nn.nn import ObliqueTree

NAME = "gated_tables"
HIDDEN = (16, 16, 16)
TABLES = ("breast cancer", "wine", "titanic")


class Settings(NamedTuple):
    """Those of the gated network, the ReLU network beside it, and the trees."""

    hidden: tuple[int, ...]
    beta: float
    epochs: int
    batch: int
    learning_rate: float
    min_samples: int
    leaves: int


SETTINGS = {
    **dict.fromkeys(TABLES, Settings(HIDDEN, 4.0, 100, 64, 0.01, min_samples=5, leaves=8)),
    "SDI": Settings((10,) * 4, 30.0, 100, 1000, 0.02, min_samples=20, leaves=16),
}


class Split(NamedTuple):
    """Rows (n, d) and classes (n,) for training and testing."""

    x_train: Any
    x_test: Any
    y_train: Any
    y_test: Any


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    options.add_argument("--seeds", type=at_least(1), metavar="N", help="splits of each table, and trees of SDI")
    given = options.parse_args(arguments)
    given.seeds = given.seeds or (1 if given.quick else 5)
    run = common.Run(NAME, given)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in SETTINGS:
        settings = SETTINGS[name]._replace(epochs=5) if given.quick else SETTINGS[name]
        rows = [_of_seed(name, settings, seed, given.quick) for seed in range(given.seed, given.seed + given.seeds)]
        results[name] = {
            method: {key: common.spread([row[method][key] for row in rows]) for key in rows[0][method]}
            for method in rows[0]
        }
    _draw(run, SETTINGS["titanic"]._replace(epochs=5) if given.quick else SETTINGS["titanic"], given.seed)
    run.finish({name: settings._asdict() for name, settings in SETTINGS.items()}, results)
    return 0


def _of_seed(name: str, settings: Settings, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    if name != "SDI":
        x, y = _table(name)
        split = Split(*train_test_split(x, y, test_size=0.3, random_state=seed, stratify=y))
        return _measure(split, settings, seed)[0]
    data = oblique_trees.load("SDI", points=1000 if quick else None, seed=oblique_trees.SEED + seed)
    rows = (part.numpy() for part in (data.x_train, data.x_test, data.y_train.long(), data.y_test.long()))
    results, pruned = _measure(Split(*rows), settings, seed)
    best = oblique_trees.best_cosines(pruned.weight.double(), data.normals)
    found = {"hyperplanes": float((best >= oblique_trees.LEVEL).sum())}
    root = torch.cosine_similarity(pruned.weight[0].double(), data.normals[0], dim=0)
    results["pruned tree"] |= found | {"cosine_of_the_root": float(root.abs())}
    return results


def _table(name: str) -> tuple[Any, Any]:
    if name == "titanic":
        people = titanic()
        return people.x.numpy(), people.y.long().numpy()
    return (load_wine if name == "wine" else load_breast_cancer)(return_X_y=True)


def _network(settings: Settings, seed: int) -> DLGNClassifier:
    return DLGNClassifier(
        settings.hidden, beta=settings.beta, epochs=settings.epochs, batch_size=settings.batch,
        learning_rate=settings.learning_rate, seed=seed,
    )  # fmt: skip


def _measure(split: Split, settings: Settings, seed: int) -> tuple[dict[str, dict[str, float]], ObliqueTree]:
    """Train each method on one split; return test accuracies, sizes and fidelities of the trees, and the pruned tree."""
    network = _network(settings, seed).fit(split.x_train, split.y_train)
    results: dict[str, dict[str, float]] = {"DLGN": {"accuracy": network.score(split.x_test, split.y_test)}}
    full = network.to_tree(split.x_train, min_samples=settings.min_samples)
    pruned, rows = full.prune(settings.leaves), torch.from_numpy(split.x_test)
    for name, tree in (("tree", full), ("pruned tree", pruned)):
        results[name] = {
            "accuracy": float((tree.predict(rows).numpy() == split.y_test).mean()),
            "fidelity": tree.fidelity(rows),
            "leaves": tree.leaves,
        }
    peers = {
        "CART": DecisionTreeClassifier(max_leaf_nodes=settings.leaves, random_state=seed),
        "logistic regression": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "ReLU network": make_pipeline(
            StandardScaler(),
            MLPClassifier(
                HIDDEN, max_iter=settings.epochs, batch_size=min(settings.batch, len(rows)),
                learning_rate_init=settings.learning_rate, random_state=seed,
            ),
        ),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations
        for name, peer in peers.items():
            found = peer.fit(split.x_train, split.y_train).predict(split.x_test)
            results[name] = {"accuracy": float(np.mean(found == split.y_test))}
    return results, pruned


def _draw(run: common.Run, settings: Settings, seed: int) -> None:
    """Draw the pruned tree of a network that is trained on all people of the Titanic."""
    people = titanic()
    network = _network(settings, seed).fit(people.x, people.y.long())
    tree = network.to_tree(people.x).prune(settings.leaves)
    axes = plots.tree_diagram(tree, people.features, ("died", "survived"), terms=3)
    accuracy = float((tree.predict(people.x) == people.y.long()).double().mean())
    agreement = tree.fidelity(people.x)
    axes.set_title(
        f"Titanic: {tree.leaves} leaves agree with the DLGN on {100 * agreement:.1f} % of {len(people.x):,} people, "
        f"and with the outcome on {100 * accuracy:.1f} %", fontsize=10,
    )  # fmt: skip
    figure = axes.figure
    assert isinstance(figure, Figure)
    run.figure(figure, "titanic")
