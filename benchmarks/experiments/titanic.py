"""Survival on the Titanic: a network's clusters and their coefficients, from the 32 published counts of the 2,201 on board.

With --data DIR also from the 891 passengers of titanic.csv (Kaggle's, as in seaborn-data), in DIR or in DIR/titanic; there the
network is held against logistic regression on several splits.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.command_line import at_least, users_input
from benchmarks.experiments import common, datasets, tabular
from interp_nn.explain import plots
from interp_nn.explain.clusters.activation_clusters import ActivationClusters
from interp_nn.explain.clusters.piecewise_affine import PiecewiseAffine
from interp_nn.explain.clusters.table import auc

NAME = "titanic"
LEARNING_RATE, LOSS = 1e-2, nn.functional.binary_cross_entropy_with_logits
PASSENGER_STEPS = 400  # at most; validation chooses
COLUMNS = ("survived", "pclass", "sex", "age", "sibsp", "parch", "fare", "embarked")
FEATURES = (
    "1st class", "3rd class", "female", "age", "age unknown", "siblings, spouse", "parents, children", "fare", "from C",
    "from Q",
)  # fmt: skip
MEASURED = ("age", "siblings, spouse", "parents, children", "fare")  # the others are 0 or 1


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    datasets.add_folder(options, "folder with titanic.csv (default: $INTERP_NN_DATA; without, the 32 counts alone)")
    about = "seeds from --seed on, by which passengers are split and networks trained (default: 10)"
    options.add_argument("--seeds", type=at_least(1), metavar="N", help=about)
    about = f"the most steps of the passengers' networks, of which validation chooses (default: {PASSENGER_STEPS})"
    options.add_argument("--epochs", type=at_least(1), metavar="N", help=about)
    given = options.parse_args(arguments)
    given.seeds = given.seeds or (2 if given.quick else 10)
    with users_input():
        passengers = None if given.data is None else read_passengers(given.data)
    run = common.Run(NAME, given)
    steps = 60 if given.quick else 3000
    results: dict[str, Any] = {"counts": _counts(run, steps)}
    epochs = {"counts": steps}
    if passengers is not None:
        epochs["passengers"] = given.epochs or min(steps, PASSENGER_STEPS)
        results["passengers"] = _passengers(run, passengers, epochs["passengers"])
    budget = {
        "steps_an_epoch": 1,
        "learning_rate": LEARNING_RATE,
        "held_out_of_passengers": "a fifth",
        "steps_of_passengers": "where the loss of a fifth of the fitted, left out of a training on the others, is least; "
        "then all of the fitted are trained on",
        "median_and_standardisation_of_passengers": "of what is trained on",
    }
    run.finish(budget, results, epochs)
    return 0


def read_passengers(folder: Path) -> tabular.Table:
    """Read the passengers (n, 10) fp64 with survival (n,): age, log fare and counts of relatives, the rest 0 or 1.

    An unknown age is NaN, with a column that marks it; an unknown port is Southampton, the most frequent.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file lacks columns or known ages, or a row is not a passenger. The message names the line.
    """
    places = (folder / "titanic.csv", folder / "titanic" / "titanic.csv")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"titanic: not found in {folder}; looked for {' and '.join(map(str, places))}")
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{file}: has no column {', '.join(missing)}")
        rows = [_passenger(row, f"{file}, line {reader.line_num}") for row in reader]
    values = torch.tensor(rows, dtype=torch.float64).view(len(rows), 1 + len(FEATURES))
    y, x = values[:, 0], values[:, 1:]
    if bool(x[:, FEATURES.index("age")].isnan().all()):
        raise ValueError(f"{file}: has no passenger of known age")
    return tabular.Table(x, y, FEATURES)


def _passenger(row: dict[str | Any, str | Any], place: str) -> list[float]:
    """Return survival and the features of one row; an unknown age is NaN."""
    more, fields = row.pop(None, []), len(row)  # DictReader's names for what is too much, and for what is missing
    if more or None in row.values():
        got = fields + len(more) - list(row.values()).count(None)
        raise ValueError(f"{place}: got {got} columns, want {fields}")
    known = {
        "survived": ("0", "1"), "pclass": ("1", "2", "3"), "sex": ("male", "female"), "embarked": ("S", "C", "Q", ""),
    }  # fmt: skip
    for name, values in known.items():
        if row[name] not in values:
            raise ValueError(f"{place}: {name} is {row[name]!r}, want one of {values}")
    return [
        float(row["survived"]), row["pclass"] == "1", row["pclass"] == "3", row["sex"] == "female",
        _number(row, "age", place) if row["age"] else math.nan, not row["age"], _number(row, "sibsp", place),
        _number(row, "parch", place), math.log1p(_number(row, "fare", place)), row["embarked"] == "C",
        row["embarked"] == "Q",
    ]  # fmt: skip


def _number(row: dict[str, str], name: str, place: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{place}: {name} is {row[name]!r}, want a number of at least 0")
    return value


def _fit(
    network: nn.Sequential, table: tabular.Table, steps: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: tqdm(steps, desc="training"),
) -> None:  # fmt: skip
    tabular.train(network, table, loss=LOSS, steps=steps, learning_rate=LEARNING_RATE, progress=progress)
    network.eval()


@torch.no_grad()
def _scores(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    return _of_logits(network(x).squeeze(1), y)


def _of_logits(logits: Tensor, y: Tensor) -> dict[str, float]:
    return {"accuracy": ((logits > 0) == (y > 0)).double().mean().item(), "auc": auc(logits, y)}


def _counts(run: common.Run, steps: int) -> dict[str, Any]:
    table = tabular.titanic()
    network = tabular.mlp(6, 8, 4, 1, seed=run.given.seed)
    _fit(network, table, steps)
    clusters = ActivationClusters(network).fit(table.x, table.y)
    coefficients = clusters.importance(kind="coef")
    female = coefficients[:, table.features.index("female")]
    rows, which, counts = table.x.unique(dim=0, return_inverse=True, return_counts=True)
    lived = torch.zeros(len(rows), dtype=table.y.dtype).index_add_(0, which, table.y)
    results: dict[str, Any] = {
        "people": len(table.y), "distinct_rows": len(rows), **_scores(network, table.x, table.y),
        "best_accuracy_of_any_rule": (torch.maximum(lived, counts - lived).sum() / counts.sum()).item(),
        "clusters": len(clusters.counts_), "clusters_where_female_counts_for": int((female > 0).sum()),
        "female_coefficients": [female.min().item(), female.max().item()], "ranks": clusters.rank_.tolist(),
        "check": clusters.check(),
    }  # fmt: skip
    print(clusters.table(feature_names=table.features, rows=14))
    title = f"Log-odds of survival of {len(table.y):,} on board, {len(rows)} distinct rows"
    _draw(run, clusters, clusters, table, "counts", title)
    return results


def _passengers(run: common.Run, table: tabular.Table, steps: int) -> dict[str, Any]:
    seed = run.given.seed
    splits = _splits(table, steps, range(seed, seed + run.given.seeds))
    part, rest = _prepared(*_split(table, seed))
    network = _network(part, splits["network"]["steps"][0], seed)
    clusters = ActivationClusters(network).fit(part.x, part.y)
    importance = clusters.global_importance()
    merged = clusters.merge(min(4, len(clusters.counts_)), by="coef")
    results: dict[str, Any] = {
        "passengers": {"fitted": len(part.y), "held_out": len(rest.y)}, "fitted": _scores(network, part.x, part.y),
        "held_out": _scores(network, rest.x, rest.y), "splits": splits, "clusters": len(clusters.counts_),
        "held_out_in_a_known_cluster": (clusters.predict(rest.x) >= 0).double().mean().item(),
        "importance": dict(zip(table.features, importance.mean.tolist(), strict=True)),
        "dispersion": dict(zip(table.features, importance.dispersion.tolist(), strict=True)),
        "merged_into_four": merged.fidelity(rest.x)._asdict(), "check": clusters.check(),
    }  # fmt: skip
    print(clusters.table(feature_names=table.features, rows=8))
    title = f"Log-odds of survival of {len(part.y)} passengers, clusters merged"
    _draw(run, merged, clusters, part, "passengers", title)
    return results


def _split(table: tabular.Table, seed: int) -> tuple[tabular.Table, tabular.Table]:
    """Return four fifths of the rows, drawn by the seed, and the others."""
    order = torch.randperm(len(table.y), generator=torch.Generator().manual_seed(seed))
    held_out, fitted = order[: len(order) // 5], order[len(order) // 5 :]
    part, rest = (tabular.Table(table.x[rows], table.y[rows], table.features) for rows in (fitted, held_out))
    return part, rest


def _prepared(fitted: tabular.Table, *others: tabular.Table) -> list[tabular.Table]:
    """Fill unknown ages with the median of the fitted passengers, and standardise measured features by the fitted ones."""
    age, measured = FEATURES.index("age"), [FEATURES.index(name) for name in MEASURED]
    median = fitted.x[:, age].nanmedian()
    filled = [table.x.clone() for table in (fitted, *others)]
    for x in filled:
        x[:, age] = x[:, age].where(~x[:, age].isnan(), median)
    known = filled[0][:, measured]
    mean, deviation = known.mean(0), known.std(0).clamp_min(1e-9)
    for x in filled:
        x[:, measured] = (x[:, measured] - mean) / deviation
    return [table._replace(x=x) for table, x in zip((fitted, *others), filled, strict=True)]


def _chosen_steps(part: tabular.Table, most: int, seed: int) -> int:
    """Return the number of steps on four fifths of the fitted passengers after which the loss of the other fifth is least."""
    inner, validation = _prepared(*_split(part, seed))
    network = _new(inner, seed)
    losses: list[float] = []

    def watched(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            yield step
            with torch.no_grad():
                losses.append(LOSS(network(validation.x).squeeze(1), validation.y).item())

    _fit(network, inner, most, watched)
    return 1 + losses.index(min(losses))


def _new(part: tabular.Table, seed: int) -> nn.Sequential:
    return tabular.mlp(len(part.features), 16, 1, seed=seed)


def _network(part: tabular.Table, steps: int, seed: int) -> nn.Sequential:
    network = _new(part, seed)
    _fit(network, part, steps)
    return network


def _splits(table: tabular.Table, steps: int, seeds: range) -> dict[str, Any]:
    """Return held-out accuracy and AUC of the network and of logistic regression on the same splits; steps, and coefficients."""
    from sklearn.linear_model import LogisticRegression

    found: dict[str, list[dict[str, float]]] = {"network": [], "logistic regression": []}
    coefficients, chosen = [], []
    for seed in seeds:
        fitted, held_out = _split(table, seed)
        chosen.append(_chosen_steps(fitted, steps, seed))
        part, rest = _prepared(fitted, held_out)
        found["network"].append(_scores(_network(part, chosen[-1], seed), rest.x, rest.y))
        model = LogisticRegression(max_iter=2000).fit(part.x.numpy(), part.y.numpy())
        logits = torch.from_numpy(model.decision_function(rest.x.numpy()))
        found["logistic regression"].append(_of_logits(logits, rest.y))
        coefficients.append(torch.from_numpy(model.coef_[0]))
    results: dict[str, Any] = {
        name: {key: common.spread([one[key] for one in scores]) for key in scores[0]} for name, scores in found.items()
    }
    results["network"]["steps"] = chosen
    mean = torch.stack(coefficients).mean(0).tolist()
    results["logistic regression"]["coefficients"] = dict(zip(table.features, mean, strict=True))
    return results


def _draw(
    run: common.Run, shown: PiecewiseAffine, clusters: ActivationClusters, table: tabular.Table, suffix: str, title: str
) -> None:
    """Draw the coefficients of some clusters, and the coverage of the exact ones."""
    wide = len(table.features) > 6
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(14 if wide else 12, 4.8), layout="constrained", width_ratios=(2 if wide else 3, 1 if wide else 2)
    )
    means = torch.stack([table.y[shown.labels_ == c].mean() for c in range(len(shown.counts_))])
    plots.cluster_coefficients(
        shown.importance(kind="coef"), shown.counts_, features=table.features, responses=means, axes=left
    )
    plots.coverage_curve(clusters.coverage(), axes=right)
    right.set_title(
        right.get_title().replace("clusters", "exact clusters").removesuffix(" of the samples"), fontsize=10
    )
    figure.suptitle(title)
    run.figure(figure, suffix)
