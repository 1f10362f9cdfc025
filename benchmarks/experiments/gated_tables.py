"""Small tables: gated networks read back as oblique trees, beside CART, logistic regression and a ReLU network.

Each seed splits a table anew, 70 % for training. Trees grow on the training rows and are pruned to few leaves. Every setting is the
same for all tables; none is tuned on test rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from benchmarks.experiments import common
from benchmarks.experiments.tabular import titanic
from interp_nn.explain import DLGNClassifier, plots

NAME = "gated_tables"
LEAVES = 8
HIDDEN = (16, 16, 16)
MIN_SAMPLES = 5


def _tables() -> dict[str, tuple[Any, Any, list[str], list[str]]]:
    """Return by name the rows, classes, and names of columns and classes."""
    found = {}
    for name, load in (("breast cancer", load_breast_cancer), ("wine", load_wine)):
        table = load()
        found[name] = (table.data, table.target, [str(n) for n in table.feature_names], list(table.target_names))
    people = titanic()
    found["titanic"] = (people.x.numpy(), people.y.long().numpy(), list(people.features), ["died", "survived"])
    return found


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common._parser(NAME, __doc__)
    options.add_argument("--seeds", type=int, help="splits of each table, each with networks from its own seed")
    given = options.parse_args(arguments)
    given.seeds = given.seeds or (1 if given.quick else 5)
    run = common.Run(NAME, given)
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name, (x, y, columns, classes) in _tables().items():
        rows = [_measure(x, y, seed, given.quick) for seed in range(given.seeds)]
        results[name] = {
            method: {key: common.spread([row[method][key] for row in rows]) for key in rows[0][method]} for method in rows[0]
        }
        if name == "titanic":
            _draw(run, x, y, columns, classes, given.quick)
    budget = {"hidden": HIDDEN, "leaves": LEAVES, "min_samples": MIN_SAMPLES, "test_share": 0.3}
    run.finish(budget, results)
    return 0


def _peers(seed: int) -> dict[str, Callable[[], Any]]:
    """Return builders of the other methods by name."""
    return {
        "CART": lambda: DecisionTreeClassifier(max_leaf_nodes=LEAVES, random_state=seed),
        "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "ReLU network": lambda: make_pipeline(StandardScaler(), MLPClassifier(HIDDEN, max_iter=300, random_state=seed)),
    }


def _measure(x: Any, y: Any, seed: int, quick: bool) -> dict[str, dict[str, float]]:
    """Train each method on one split; return test accuracies, and sizes and fidelities of the trees."""
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.3, random_state=seed, stratify=y)
    network = _network(seed, quick).fit(x_train, y_train)
    results: dict[str, dict[str, float]] = {"DLGN": {"accuracy": network.score(x_test, y_test)}}
    full = network.to_tree(x_train, min_samples=MIN_SAMPLES)
    rows = torch.from_numpy(x_test)
    for name, tree in (("tree", full), ("pruned tree", full.prune(LEAVES))):
        results[name] = {
            "accuracy": float((tree.predict(rows).numpy() == y_test).mean()),
            "fidelity": tree.fidelity(rows),
            "leaves": tree.leaves,
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations
        for name, build in _peers(seed).items():
            results[name] = {"accuracy": float(np.mean(build().fit(x_train, y_train).predict(x_test) == y_test))}
    return results


def _network(seed: int, quick: bool) -> DLGNClassifier:
    return DLGNClassifier(HIDDEN, epochs=5 if quick else 100, seed=seed)


def _draw(run: common.Run, x: Any, y: Any, columns: list[str], classes: list[str], quick: bool) -> None:
    """Draw the pruned tree of a network that is trained on the whole table."""
    network = _network(0, quick).fit(x, y)
    tree = network.to_tree(x).prune(LEAVES)
    print(tree.to_text(columns, classes))
    axes = plots.tree_diagram(tree, columns, classes, terms=3)
    fidelity, accuracy = tree.fidelity(torch.from_numpy(x)), float((tree.predict(torch.from_numpy(x)).numpy() == y).mean())
    axes.set_title(
        f"Titanic: {tree.leaves} leaves agree with the DLGN on {100 * fidelity:.1f} % of its {len(x)} people "
        f"and with the outcome on {100 * accuracy:.1f} %", fontsize=10,
    )  # fmt: skip
    figure = axes.figure
    assert isinstance(figure, plt.Figure)
    run.figure(figure, "titanic")
