"""`papers`: the published results beside the experiments' records, as Markdown: the headlines, and a table of all.

Every cell comes from a record; an experiment without a record has no line. Shares are in per cent, published ones to the
published digits. Results of several seeds are their mean and standard deviation; of errors, the largest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.experiments import common
from benchmarks.experiments.gated_images import RECOVERED
from benchmarks.experiments.head_comparison import STUDIES
from benchmarks.records import environment, rows

Record = dict[str, Any]


class Line(NamedTuple):
    """A line of the table, without the experiment's name, its budget and its device."""

    what: str
    published: str
    ours: str
    epochs: float | None = None


class Full(NamedTuple):
    """The full budget of an experiment on a GPU, the usual batch, and the difference to the published budget in words."""

    epochs: int
    images: int
    batch: int = 32
    more: str = ""


_BATCH = " at batch 128, where {} at batch 32 are published"
FULL = {
    "summary_vgg": Full(15, 50_000), "summary_cnn": Full(15, 50_000),
    "gated_images-mnist": Full(30, 60_000, more=_BATCH.format(300)),
    "gated_images-cifar10": Full(30, 50_000, more=_BATCH.format(200)),
    "gated_images-cifar100": Full(30, 50_000, more=_BATCH.format(200)), "linearize_cifar10": Full(15, 50_000),
    "descramble_cifar10": Full(15, 50_000), "mnist_tsne": Full(100, 60_000, batch=500),
}  # fmt: skip

_LEAST = "{} of ReLU, last epoch, %"  # of regimes that are said to recover a share of the ReLU network's accuracy
# The lines that answer a published claim with a budget that means something.
HEADLINES = {
    "summary_vgg": (
        "base head, last epoch, %",
        "summary head, orthogonal, last epoch, %",
        "summary head, reference's init, last epoch, %",
    ),
    "summary_cnn": (
        "base head, last epoch, %",
        "summary, orthogonal, last epoch, %",
        "summary, orthogonal, reconstruction, last epoch, %",
        "no ReLU: summary, reference's init, %",
    ),
    "dlgn_recovery-cifar10": (_LEAST.format("DLGN(x)"), _LEAST.format("DLGN(1)")),
    "dlgn_recovery-cifar100": (_LEAST.format("DLGN(x)"), _LEAST.format("DLGN(1)")),
    "oblique_trees": ("SDI, DLGN-SF, %", "SDI, DLGN, %", "SDII, DLGN-SF, %", "SDII, DLGN, %"),
}


def read(root: Path = environment.ROOT / "benchmarks" / "results") -> list[Record]:
    """Read the records that have lines in the table, in its order, each device in turn.

    Raises ValueError, which names the file and the key, for a record that the table cannot be made of.
    """
    folders = sorted(root.glob("*/experiments"))
    files = [folder / f"{name}.json" for name in _READERS for folder in folders]
    return [record for file in files for record in _records(file)]


def _records(file: Path) -> list[Record]:
    """Read the record of a file, and make one for each network of the units beside it."""
    units = file.with_suffix(".jsonl")
    return [*([_record(file)] if file.exists() else []), *(_units(units) if units.exists() else [])]


def _units(file: Path) -> list[Record]:
    """Return a record of the seeds of each network, of the newest training's budget, with the ReLU network's accuracies."""
    try:
        found = rows.lines(file)
        dataset = ("dataset",) if file.stem.startswith("dlgn_recovery") else ()
        same = {key: found[-1][key] for key in (*dataset, "epochs", "batch", "train_images", "test_images", "device")}
        trained = [row for row in found if same.items() <= row.items()]
        relu = {row["seed"]: row["last_accuracy"] for row in trained if row["network"] == "ReLU"}
        return [
            {
                "experiment": file.stem, "device": same["device"], "budget": same, "network": network, "relu": relu,
                "seeds": {row["seed"]: row["last_accuracy"] for row in trained if row["network"] == network},
                "results": {"trainings": [row for row in trained if row["network"] == network]}, "quick": False,
            }
            for network in dict.fromkeys(row["network"] for row in trained)
        ]  # fmt: skip
    except (KeyError, IndexError) as error:
        raise ValueError(f"{file}: has no key or row {error}") from error


def _record(file: Path) -> Record:
    try:
        found: Record = json.loads(file.read_text(encoding="utf-8"))
        markdown([found])  # which reads all that the table does
    except KeyError as error:
        raise ValueError(f"{file}: has no key {error}") from error
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{file}: {error}") from error
    return found


def markdown(records: list[Record]) -> str:
    """Return the headlines, the table of all, and the experiments without a record of the full budget."""
    head = ["| experiment | what | published | ours | budget | device |", "|---|---|--:|--:|---|---|"]
    first, every = list(head), list(head)
    for one in records:
        for line in _READERS[one["experiment"]](one):
            cells = (line.what, line.published or "-", line.ours, _budget(one, line.epochs), one["device"])
            every.append(f"| `{one['experiment']}` | {' | '.join(cells)} |")
            first += every[-1:] * (line.what in HEADLINES.get(one["experiment"], ()))
    tables = "\n".join([*first, "", "All of them:", "", *every] if len(first) > len(head) else every)
    done = {one["experiment"] for one in records if _whole(one)}
    missing = [f"`{n}` ({f.epochs} epochs of {f.images:,} images{f.more})" for n, f in FULL.items() if n not in done]
    return tables + (f"\n\nBudget of a GPU not yet run: {', '.join(missing)}." if missing else "")


def _whole(one: Record) -> bool:
    """Return whether a record has the full budget: all images, epochs and seeds, and GCONV's published strides."""
    full, budget = FULL.get(one["experiment"]), one["budget"]
    return (
        full is not None
        and not one["quick"]
        and budget["train_images"] >= full.images
        and budget["test_images"] >= 10_000
        and _reached(one) >= full.epochs
        and "stride=(2, 2)" not in budget.get("network", "")
    )


def _reached(one: Record) -> int:
    """Return the epochs of the training with the fewest; phases of one training are added up."""
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


def _published(share: float | None) -> str:
    """Return a share to a hundredth of a per cent at most: .1f would round it by the float's own error."""
    return "" if share is None else f"{100 * share:.4g}"


def _percent(values: dict[str, float]) -> str:
    return _number({name: 100 * value for name, value in values.items()}, ".1f")


def _number(values: dict[str, float], form: str) -> str:
    return f"{values['mean']:{form}}" + (f" ± {values['std']:{form}}" if values["std"] else "")


def _over_seeds(rows: list[dict[str, Any]], *path: str) -> dict[str, float]:
    """Return mean and spread of the values at a path in the row of each seed."""
    values: list[Any] = rows
    for name in path:
        values = [value[name] for value in values]
    return common.spread(values)


def _epochs(one: Record) -> float:
    return _over_seeds(one["results"]["trainings"], "epochs")["mean"]


def _heads(one: Record) -> Iterator[Line]:
    if "network" in one:
        yield from _head_of_seeds(one)
        return
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


def _head_of_seeds(one: Record) -> Iterator[Line]:
    name, epochs = one["network"], one["budget"]["epochs"]
    known = STUDIES[one["experiment"]].variants[name].published
    accuracies = _percent(common.spread(list(one["seeds"].values())))
    yield Line(f"{name}, last epoch, %", _published(known and known.last), accuracies, epochs)
    explained = [row["history"].get("explained_variance") for row in one["results"]["trainings"]]
    if all(explained):
        share = _percent(common.spread([values[-1] for values in explained]))
        yield Line(f"{name}: variance of the features in its codes, %", "", share, epochs)


def _regimes(one: Record) -> Iterator[Line]:
    for name, row in one["results"]["regimes"].items():
        published = _published(row["published_best_accuracy"])
        yield Line(f"{name}, best epoch, %", published, _percent(row["best_accuracy"]), row["epochs"]["mean"])
    more = _published(one["results"].get("published_dlgn_over_relu_more_than"))
    for name, ratio in one["results"]["dlgn_over_relu"].items():
        epochs = one["results"]["compared_after_epoch"]
        yield Line(f"{name} of ReLU, last epoch, %", more and f"> {more}", f"{100 * ratio:.1f}", epochs)


def _recovery(one: Record) -> Iterator[Line]:
    name, accuracies, relu = one["network"], one["seeds"], one["relu"]
    epochs = one["budget"]["epochs"]
    yield Line(f"{name}, last epoch, %", "", _percent(common.spread(list(accuracies.values()))), epochs)
    shares = [accuracy / relu[seed] for seed, accuracy in accuracies.items() if seed in relu]
    if name != "ReLU" and shares:
        more = _published(RECOVERED[one["budget"]["dataset"]]) if name.startswith("DLGN") else ""
        yield Line(_LEAST.format(name), more and f"> {more}", _percent(common.spread(shares)), epochs)


def _trees(one: Record) -> Iterator[Line]:
    for tree in ("SDI", "SDII", "SDIII"):
        for name, row in one["results"].get(tree, {}).items():
            known = _published(row.get("published_accuracy"))
            yield Line(f"{tree}, {name}, %", known, _percent(row["last_accuracy"]), row["epochs"]["mean"])


def _passengers(one: Record) -> Iterator[Line]:
    found = one["results"].get("passengers")  # None without --data
    if found is None:
        return
    for name, scores in found["splits"].items():
        ours = f"{_percent(scores['accuracy'])}; AUC {_percent(scores['auc'])}"
        yield Line(f"{name}, held out, %", "", ours)
    name, share = max(found["importance"].items(), key=lambda pair: pair[1])
    ours = f"{found['clusters']}; {name} has {100 * share:.0f} % of their importance"
    yield Line(f"exact clusters of {found['passengers']['fitted']} passengers", "", ours)


def _attributions(one: Record) -> Iterator[Line]:
    networks, epochs = one["results"]["networks"], _epochs(one)
    errors = {name: max(max(net["exactness"][name].values()) for net in networks) for name in networks[0]["exactness"]}
    ours = ", ".join(f"{error:.1e} in {name}" for name, error in errors.items())
    yield Line("\\|F - (W x + c)\\| / \\|F\\|", "", ours, epochs)
    share = _percent(_over_seeds(networks, "bias", "median_share_of_its_constant"))
    yield Line("the constant of the predicted logit, median, %", "", share, epochs)
    for kind in ("deletion", "insertion"):
        areas = {name: _over_seeds(networks, "curves", name, kind, "area") for name in networks[0]["curves"]}
        ours = ", ".join(f"{name} {_number(area, '.3f')}" for name, area in areas.items())
        yield Line(f"area under the {kind} curve", "", ours, epochs)


def _layers(one: Record) -> Iterator[Line]:
    networks = one["results"]["networks"]
    for name, row in networks[0]["layers"].items():
        path = ("layers", name, "loss_over_that_of_a_random_P")
        losses = {kind: _over_seeds(networks, *path, kind) for kind in row[path[-1]]}
        ours = ", ".join(f"{kind.replace('_', ' ')} {_number(value, '.3g')}" for kind, value in losses.items())
        yield Line(f"{name}, loss over a random P's", "", ours, _epochs(one))


def _plane(one: Record) -> Iterator[Line]:
    planes, epochs = one["results"]["planes"], _reached(one)
    for name in planes[0]["neighbour_accuracy"]:
        ours = _percent(_over_seeds(planes, "neighbour_accuracy", name))
        yield Line(f"nearest neighbours, {name}, %", "", ours, epochs)
    ours = _number(_over_seeds(planes, "trustworthiness_of_new_points"), ".3f")
    yield Line("trustworthiness of new points", "", ours, epochs)
    error = max(plane["exactness_float64"]["at_x"] for plane in planes)
    yield Line("\\|F - (W x + c)\\| / \\|F\\|, float64", "", f"{error:.1e}", epochs)


_READERS: dict[str, Callable[[Record], Iterator[Line]]] = {
    "summary_vgg": _heads, "summary_cnn": _heads, "gated_images-cifar10": _regimes, "gated_images-cifar100": _regimes,
    "dlgn_recovery-cifar10": _recovery, "dlgn_recovery-cifar100": _recovery,
    "gated_images-mnist": _regimes, "oblique_trees": _trees, "titanic": _passengers, "linearize_cifar10": _attributions,
    "descramble_cifar10": _layers, "mnist_tsne": _plane,
}  # fmt: skip
