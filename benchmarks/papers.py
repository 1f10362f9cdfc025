"""`papers`: what the papers published beside what the records of the experiments say, as Markdown.

Every cell is read from a record; an experiment without one has no line. Shares are in per cent, and with several seeds have
their standard deviation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.experiments import gated_images, mnist_tsne, summary_cnn, summary_vgg
from benchmarks.experiments.images import Budget

MARK = "python -m benchmarks papers"
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
    """The budget of an experiment on a GPU, and on how many images: what its record has to have reached to be called full."""

    budget: Budget
    images: int


FULL = {
    "summary_vgg": Full(summary_vgg.STUDY.gpu, 50_000),
    "summary_cnn": Full(summary_cnn.STUDY.gpu, 50_000),
    "gated_images-mnist": Full(gated_images.GPU, 60_000),
    "gated_images-cifar10": Full(gated_images.GPU, 50_000),
    "gated_images-cifar100": Full(gated_images.GPU, 50_000),
    "linearize_cifar10": Full(summary_vgg.STUDY.gpu, 50_000),
    "descramble_cifar10": Full(summary_vgg.STUDY.gpu, 50_000),
    "mnist_tsne": Full(mnist_tsne.GPU, 60_000),
}


def read(root: Path = record.ROOT / "benchmarks" / "results") -> list[Record]:
    """The records of the experiments that have a place in the table, in its order, a device after the other."""
    folders = sorted(root.glob("*/experiments"))
    files = [folder / f"{name}.json" for name in _READERS for folder in folders]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def markdown(records: list[Record], brief: bool = False) -> str:
    """The table, and which experiments have not had their whole budget."""
    rows = ["| experiment | what | published | ours | budget | device |", "|---|---|--:|--:|---|---|"]
    for one in records:
        for line in _READERS[one["experiment"]](one):
            if line.brief or not brief:
                cells = (line.what, line.published or "-", line.ours, _budget(one, line.epochs), one["device"])
                rows.append(f"| `{one['experiment']}` | {' | '.join(cells)} |")
    missing = [f"`{name}` ({_words(full)})" for name, full in FULL.items() if not any(_whole(r, name) for r in records)]
    return "\n".join(rows) + (f"\n\nFull budget not yet run: {', '.join(missing)}." if missing else "")


def _words(full: Full) -> str:
    return f"{full.budget.epochs} epochs of {full.images:,} images"


def _whole(one: Record, name: str) -> bool:
    """Whether a record is of an experiment's full budget: all images, all epochs, the published network."""
    full, budget = FULL[name], one["budget"]
    return (
        one["experiment"] == name
        and budget["train_images"] >= full.images
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
    return ", ".join([*parts, f"{seeds} seed{'s' * (seeds > 1)}"])


def _percent(values: dict[str, float]) -> str:
    spread = f" ± {100 * values['std']:.1f}" if values["std"] else ""
    return f"{100 * values['mean']:.1f}{spread}"


def _heads(one: Record) -> Iterator[Line]:
    networks = one["results"]["networks"]
    base = next(iter(networks.values()))
    for name, row in networks.items():
        known, published, ours = row["published"], "", _percent(row["last_accuracy_as_scored"])
        if known:
            published = f"{100 * known['last']:.1f} ({100 * known['first']:.1f} after 1 epoch)"
        if row["last_accuracy"] != row["last_accuracy_as_scored"]:
            ours += f", without dropout {_percent(row['last_accuracy'])}"
        if row is not base:
            ours += f"; time x {row['step_over_base']:.2f}"
            published += f"; time x {known['seconds'] / base['published']['seconds']:.2f}" if known else ""
        yield Line(f"{name}, %", published, ours, row["epochs"]["mean"])


def _regimes(one: Record) -> Iterator[Line]:
    for name, row in one["results"]["regimes"].items():
        known = row["published_best_accuracy"]
        published = "" if known is None else f"{100 * known:.1f}"
        yield Line(f"{name}, best epoch, %", published, _percent(row["best_accuracy"]), row["epochs"]["mean"])
    more = one["results"].get("published_dlgn_over_relu_more_than")
    for name, ratio in one["results"]["dlgn_over_relu"].items():
        published = "" if more is None else f"> {100 * more:.1f}"
        epochs = one["results"]["compared_after_epoch"]
        yield Line(f"{name} of ReLU, last epoch, %", published, f"{100 * ratio:.1f}", epochs)


def _trees(one: Record) -> Iterator[Line]:
    for tree in ("SDI", "SDII", "SDIII"):
        for name, row in one["results"][tree].items():
            known = row.get("published_accuracy")
            published = "" if known is None else f"{100 * known:.1f}"
            ours = _percent(row["last_accuracy"])
            yield Line(f"{tree}, {name}, %", published, ours, row["epochs"]["mean"], known is not None)


def _passengers(one: Record) -> Iterator[Line]:
    found = one["results"]["passengers"]
    for name, scores in found["splits"].items():
        ours = f"{_percent(scores['accuracy'])}; AUC {_percent(scores['auc'])}"
        yield Line(f"{name}, held out, %", "", ours)
    name, share = max(found["importance"].items(), key=lambda pair: pair[1])
    ours = f"{found['clusters']}; {name} has {100 * share:.0f} % of their importance"
    yield Line(f"exact clusters of {found['passengers']['fitted']} passengers", "", ours, brief=False)


def _attributions(one: Record) -> Iterator[Line]:
    network, epochs = one["results"]["networks"][0], one["results"]["trainings"][0]["epochs"]
    errors = ", ".join(f"{max(found.values()):.1e} in {name}" for name, found in network["exactness"].items())
    yield Line("\\|F - (W x + b)\\| / \\|F\\|", "", errors, epochs)
    share = network["bias"]["median_share_of_its_constant"]
    yield Line("the constant of the predicted logit, median, %", "", f"{100 * share:.1f}", epochs)
    for kind in ("deletion", "insertion"):
        areas = {name: curves[kind] for name, curves in network["curves"].items()}
        ours = ", ".join(f"{name} {area['area']:.3f} ± {area['standard_error']:.3f}" for name, area in areas.items())
        yield Line(f"area under the {kind} curve", "", ours, epochs, False)


def _layers(one: Record) -> Iterator[Line]:
    network, epochs = one["results"]["networks"][0], one["results"]["trainings"][0]["epochs"]
    for name, row in network["layers"].items():
        losses = row["loss_over_that_of_a_random_P"]
        ours = ", ".join(f"{kind.replace('_', ' ')} {value:.3g}" for kind, value in losses.items())
        yield Line(f"{name}, loss over a random P's", "", ours, epochs, False)


def _plane(one: Record) -> Iterator[Line]:
    plane, epochs = one["results"]["planes"][0], _reached(one)
    for name, share in plane["neighbour_accuracy"].items():
        yield Line(f"nearest neighbours, {name}, %", "", f"{100 * share:.1f}", epochs, name == "new points")
    yield Line("trustworthiness of new points", "", f"{plane['trustworthiness_of_new_points']:.3f}", epochs, False)
    error = plane["exactness_float64"]["at_x"]
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
