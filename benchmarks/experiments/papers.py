"""`papers`: what the papers published beside what the records of the experiments say, as Markdown.

Every cell is read from a record; what has none has no line. Shares are in per cent, those published to the digits published.
What several seeds gave is their mean and standard deviation, and of errors the largest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiments import common, gated_images, mnist_tsne, summary_cnn, summary_vgg
from benchmarks.experiments.head_comparison import Study
from benchmarks.experiments.images import Budget
from benchmarks.records import environment

Record = dict[str, Any]


class Line(NamedTuple):
    """A line of the table, to which the experiment's name, its budget and its device are added.

    published: "" where nothing is. brief: whether the line is in the brief table too.
    """

    what: str
    published: str
    ours: str
    epochs: float | None = None
    brief: bool = True


class Full(NamedTuple):
    """The budget of an experiment on a GPU: on how many images, and of which networks; what its record has to have reached.

    batch: the usual one, which is the published one where anything is. more: how the budget differs from what was published.
    """

    budget: Budget
    images: int
    networks: tuple[str, ...]
    batch: int = 32
    more: str = ""


def _gated(images: int, epochs: int) -> Full:
    more = f" at batch {gated_images.GPU.batch}, where {epochs} at batch 32 are published"
    return Full(gated_images.GPU, images, gated_images.REGIMES, more=more)


def _heads_of(study: Study, *networks: str) -> Full:
    return Full(study.gpu, 50_000, networks or tuple(study.variants))


FULL = {
    "summary_vgg": _heads_of(summary_vgg.STUDY),
    "summary_cnn": _heads_of(summary_cnn.STUDY),
    "gated_images-mnist": _gated(60_000, 300),
    "gated_images-cifar10": _gated(50_000, 200),
    "gated_images-cifar100": _gated(50_000, 200),
    "linearize_cifar10": _heads_of(summary_vgg.STUDY, summary_vgg.BASE),
    "descramble_cifar10": _heads_of(summary_vgg.STUDY, summary_vgg.BASE),
    "mnist_tsne": Full(mnist_tsne.GPU, 60_000, (mnist_tsne.EXAGGERATION, mnist_tsne.TSNE), batch=500),
}
TEST_IMAGES = 10_000  # of each of these datasets


def read(root: Path = environment.ROOT / "benchmarks" / "results") -> list[Record]:
    """The records of the experiments that have a place in the table, in its order, a device after the other."""
    folders = sorted(root.glob("*/experiments"))
    files = [folder / f"{name}.json" for name in _READERS for folder in folders]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def markdown(records: list[Record], brief: bool = False) -> str:
    """The table, and which experiments have not had the budget of a GPU."""
    rows = ["| experiment | what | published | ours | budget | device |", "|---|---|--:|--:|---|---|"]
    for one in records:
        for line in _READERS[one["experiment"]](one):
            if line.brief or not brief:
                cells = (line.what, line.published or "-", line.ours, _budget(one, line.epochs), one["device"])
                rows.append(f"| `{one['experiment']}` | {' | '.join(cells)} |")
    missing = [f"`{name}` ({_words(full)})" for name, full in FULL.items() if not any(_whole(r, name) for r in records)]
    return "\n".join(rows) + (f"\n\nBudget of a GPU not yet run: {', '.join(missing)}." if missing else "")


def _words(full: Full) -> str:
    return f"{full.budget.epochs} epochs of {full.images:,} images{full.more}"


def _whole(one: Record, name: str) -> bool:
    """Whether a record is of an experiment's budget on a GPU: all images, epochs, networks and seeds, the published network."""
    full, budget = FULL[name], one["budget"]
    if one["experiment"] != name:
        return False
    trained = {(row["network"], row["seed"]) for row in one["results"]["trainings"]}
    return (
        not one["quick"]
        and trained >= {(network, seed) for network in full.networks for seed in one["seeds"]}
        and budget["train_images"] >= full.images
        and budget["test_images"] >= TEST_IMAGES
        and _reached(one) >= full.budget.epochs
        and "stride=(2, 2)" not in budget.get("network", "")
    )


def _reached(one: Record) -> int:
    """Epochs of the training that had least, with all its phases."""
    epochs: dict[tuple[str, int], int] = {}
    phases = one["budget"].get("phases", ())
    for row in one["results"]["trainings"]:
        key = ("phases" if phases else row["network"], row["seed"])
        epochs[key] = epochs.get(key, 0) + row["epochs"]
    return min(epochs.values())


def _budget(one: Record, epochs: float | None) -> str:
    seeds = len(one["seeds"])
    parts = [f"{epochs:g} epochs" if epochs != 1 else "1 epoch"] if epochs is not None else []
    if "train_images" in one["budget"]:
        parts.append(f"{one['budget']['train_images']:,} images")
    if one["experiment"] in FULL and one["budget"]["batch"] != FULL[one["experiment"]].batch:
        parts.append(f"batch {one['budget']['batch']}")
    return ", ".join([*parts, f"{seeds} seed{'s' * (seeds > 1)}"])


def _published(share: float) -> str:
    """A share as published, to a hundredth of a per cent at most, which .1f would round by what a float makes of a half."""
    return f"{100 * share:.4g}"


def _percent(values: dict[str, float]) -> str:
    return _number({name: 100 * value for name, value in values.items()}, ".1f")


def _number(values: dict[str, float], form: str) -> str:
    """A mean over seeds with its spread, if any."""
    return f"{values['mean']:{form}}" + (f" ± {values['std']:{form}}" if values["std"] else "")


def _over_seeds(rows: list[dict[str, Any]], *path: str) -> dict[str, float]:
    """What lies at a path in the row of each seed."""
    values: list[Any] = rows
    for name in path:
        values = [value[name] for value in values]
    return common.spread(values)


def _heads(one: Record) -> Iterator[Line]:
    networks = one["results"]["networks"]
    base = next(iter(networks.values()))
    for name, row in networks.items():
        known, published, ours = row["published"], "", _percent(row["last_accuracy_as_scored"])
        if known:
            published = f"{_published(known['last'])} ({_published(known['first'])} after 1 epoch)"
        if row["last_accuracy"] != row["last_accuracy_as_scored"]:
            ours += f", without dropout {_percent(row['last_accuracy'])}"
        if row is not base:
            ours += f"; time x {row['step_over_base']:.2f}"
            published += f"; time x {known['seconds'] / base['published']['seconds']:.2f}" if known else ""
        yield Line(f"{name}, %", published, ours, row["epochs"]["mean"])


def _regimes(one: Record) -> Iterator[Line]:
    for name, row in one["results"]["regimes"].items():
        known = row["published_best_accuracy"]
        published = "" if known is None else _published(known)
        yield Line(f"{name}, best epoch, %", published, _percent(row["best_accuracy"]), row["epochs"]["mean"])
    more = one["results"].get("published_dlgn_over_relu_more_than")
    for name, ratio in one["results"]["dlgn_over_relu"].items():
        published = "" if more is None else f"> {_published(more)}"
        epochs = one["results"]["compared_after_epoch"]
        yield Line(f"{name} of ReLU, last epoch, %", published, f"{100 * ratio:.1f}", epochs)


def _trees(one: Record) -> Iterator[Line]:
    for tree in ("SDI", "SDII", "SDIII"):
        for name, row in one["results"].get(tree, {}).items():
            known = row.get("published_accuracy")
            published = "" if known is None else _published(known)
            ours = _percent(row["last_accuracy"])
            yield Line(f"{tree}, {name}, %", published, ours, row["epochs"]["mean"], known is not None)


def _passengers(one: Record) -> Iterator[Line]:
    found = one["results"].get("passengers")  # None without --data
    if found is None:
        return
    for name, scores in found["splits"].items():
        ours = f"{_percent(scores['accuracy'])}; AUC {_percent(scores['auc'])}"
        yield Line(f"{name}, held out, %", "", ours)
    name, share = max(found["importance"].items(), key=lambda pair: pair[1])
    ours = f"{found['clusters']}; {name} has {100 * share:.0f} % of their importance"
    yield Line(f"exact clusters of {found['passengers']['fitted']} passengers", "", ours, brief=False)


def _attributions(one: Record) -> Iterator[Line]:
    networks, epochs = one["results"]["networks"], _over_seeds(one["results"]["trainings"], "epochs")["mean"]
    errors = {name: max(max(net["exactness"][name].values()) for net in networks) for name in networks[0]["exactness"]}
    ours = ", ".join(f"{error:.1e} in {name}" for name, error in errors.items())
    yield Line("\\|F - (W x + b)\\| / \\|F\\|", "", ours, epochs)
    share = _percent(_over_seeds(networks, "bias", "median_share_of_its_constant"))
    yield Line("the constant of the predicted logit, median, %", "", share, epochs)
    for kind in ("deletion", "insertion"):
        areas = {name: _over_seeds(networks, "curves", name, kind, "area") for name in networks[0]["curves"]}
        ours = ", ".join(f"{name} {_number(area, '.3f')}" for name, area in areas.items())
        yield Line(f"area under the {kind} curve", "", ours, epochs, False)


def _layers(one: Record) -> Iterator[Line]:
    networks, epochs = one["results"]["networks"], _over_seeds(one["results"]["trainings"], "epochs")["mean"]
    for name, row in networks[0]["layers"].items():
        path = ("layers", name, "loss_over_that_of_a_random_P")
        losses = {kind: _over_seeds(networks, *path, kind) for kind in row[path[-1]]}
        ours = ", ".join(f"{kind.replace('_', ' ')} {_number(value, '.3g')}" for kind, value in losses.items())
        yield Line(f"{name}, loss over a random P's", "", ours, epochs, False)


def _plane(one: Record) -> Iterator[Line]:
    planes, epochs = one["results"]["planes"], _reached(one)
    for name in planes[0]["neighbour_accuracy"]:
        ours = _percent(_over_seeds(planes, "neighbour_accuracy", name))
        yield Line(f"nearest neighbours, {name}, %", "", ours, epochs, name == "new points")
    ours = _number(_over_seeds(planes, "trustworthiness_of_new_points"), ".3f")
    yield Line("trustworthiness of new points", "", ours, epochs, False)
    error = max(plane["exactness_float64"]["at_x"] for plane in planes)
    yield Line("\\|F - (W x + b)\\| / \\|F\\|, float64", "", f"{error:.1e}", epochs, False)


_READERS: dict[str, Callable[[Record], Iterator[Line]]] = {
    "summary_vgg": _heads,
    "summary_cnn": _heads,
    "gated_images-cifar10": _regimes,
    "gated_images-cifar100": _regimes,
    "gated_images-mnist": _regimes,
    "oblique_trees": _trees,
    "titanic": _passengers,
    "linearize_cifar10": _attributions,
    "descramble_cifar10": _layers,
    "mnist_tsne": _plane,
}
