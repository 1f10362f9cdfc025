"""The shared parts of the experiments: command lines, trained networks, figures and records."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from cycler import cycler
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.command_line import Parser, at_least, device, not_negative, seed, users_input
from benchmarks.experiments import COMMANDS, training
from benchmarks.records import environment, files, rows
from interp_nn.explain.plots.canvas import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Network = TypeVar("Network", bound=nn.Module)


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of an experiment with one seed."""
    options = _parser(name, description)
    options.add_argument("--seed", type=seed, default=0)
    return options


def training_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of an experiment that trains networks from several seeds, within a budget."""
    options = _parser(name, description)
    options.add_argument("--seeds", type=at_least(1), metavar="N", help="seeds that each network is trained from")
    options.add_argument("--epochs", type=at_least(1), metavar="N", help="of each network (default: the experiment's)")
    options.add_argument("--minutes", type=not_negative, metavar="M", help="for all trainings, which share them evenly")
    options.add_argument("--checkpoints", type=Path, metavar="DIR", help="written after each epoch, and continued")
    options.add_argument("--device", type=device, default="cpu")
    return options


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    options = Parser(prog=f"python -m benchmarks experiments {name}", description=description)
    folders = "for figures and the record (default: benchmarks/results/DEVICE/experiments; with --quick, results)"
    options.add_argument("--output", type=Path, metavar="DIR", help=folders)
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    return options


class Trainer:
    """Trains the networks of an experiment within the budget of its command line, and keeps a row for each training.

    A row has the network's name, its seed, the epochs reached, training seconds, the accuracy after the last epoch and the best
    after any (optimistic, because test images chose it), the measures before training, the history, and the environments that
    made the epochs: with a checkpoint there may be several.
    """

    def __init__(
        self, experiment: str, given: argparse.Namespace, trainings: int, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._experiment, self._given, self._settings = experiment, given, settings
        self._allowance = training.Allowance(given.minutes, trainings)
        self.rows: list[dict[str, Any]] = []

    def __call__(
        self, name: str, seed: int, build: Callable[[], Network], x: Tensor, y: Tensor, recipe: training.Recipe,
        measure: Callable[[nn.Module], dict[str, float]],
        loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = training.cross_entropy, source: str | None = None,
    ) -> Network:  # fmt: skip
        """Build a network from the seed and train it; one of the measures has to be "accuracy".

        `source` is an earlier network that `build` uses. If it has more epochs than at a checkpoint, training begins again.
        """
        torch.manual_seed(seed)
        network = build().to(x.device).eval()
        before = measure(network)
        origin = "" if source is None else f" from {source} {self.of(source, 'epochs')[-1]}"
        file = "".join(c if c.isalnum() else "-" for c in f"{self._experiment} {name}{origin} {seed}") + ".pt"
        history, made = training.train(
            network, x, y, recipe, label=f"{name}, seed {seed}", seed=seed, loss=loss, measure=measure, settings=self._settings,
            seconds=self._allowance.seconds(),
            checkpoint=None if self._given.checkpoints is None else self._given.checkpoints / file,
        )  # fmt: skip
        self.rows.append(
            {
                "network": name,
                "seed": seed,
                "epochs": len(history["loss"]),
                "seconds": sum(history["seconds"]),
                "last_accuracy": history["accuracy"][-1],
                "best_accuracy": max(history["accuracy"]),
                "before": before,
                "history": history,
                "made": made,
            }
        )
        return network

    def record(self) -> list[dict[str, Any]]:
        """Return the rows, with histories rounded to five digits."""
        return [row | {"history": rows.plain(row["history"])} for row in self.rows]

    def of(self, name: str, key: str) -> list[Any]:
        """Return a column of the rows of one network, by seed."""
        return [row[key] for row in self.rows if row["network"] == name]

    def table(self) -> dict[str, Any]:
        """Return mean and spread over seeds of accuracies, epochs and seconds, by network."""
        names = dict.fromkeys(row["network"] for row in self.rows)
        keys = ("last_accuracy", "best_accuracy", "epochs", "seconds")
        return {name: {key: spread(self.of(name, key)) for key in keys} for name in names}

    def compared(self) -> tuple[int, dict[str, dict[str, float]]]:
        """Return the last epoch that every training reached, and mean and spread of each network's accuracy after it."""
        epoch = min(row["epochs"] for row in self.rows)
        names = dict.fromkeys(row["network"] for row in self.rows)
        return epoch, {name: spread([h["accuracy"][epoch - 1] for h in self.of(name, "history")]) for name in names}


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation, 0 for a single value."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def as_text(results: dict[str, Any], indent: str = "  ") -> Iterator[str]:
    """Yield lines that show the results of a record, without its trainings and its longer lists."""
    for name, value in results.items():
        if name == "trainings":
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(i): one for i, one in enumerate(value)}
        if isinstance(value, dict) and set(value) == {"mean", "std"}:
            value = f"{value['mean']:.4g} ± {value['std']:.2g}"
        if isinstance(value, dict):
            yield f"{indent}{name}"
            yield from as_text(value, indent + "  ")
        elif not isinstance(value, (list, tuple)) or len(value) <= 8:
            yield f"{indent}{name}: {rows.plain(value, digits=4)}"


class Run:
    """A run of an experiment: its clock, its figures and its record."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        plt.switch_backend("Agg")
        plt.rcParams["axes.prop_cycle"] = cycler(color=PALETTE)
        self.name, self.given, self.start = name, given, time.perf_counter()
        self.device: str = getattr(given, "device", "cpu")
        self.figures: list[str] = []
        if given.output is None:
            device = environment.ROOT / "benchmarks" / "results" / environment.device_slug(self.device)
            given.output = Path("results") if given.quick else device / "experiments"
        with users_input():
            files.check_writable(given.output / f"{name}.json")
            if getattr(given, "checkpoints", None) is not None:
                files.check_folder(given.checkpoints)

    def figure(self, figure: Figure, suffix: str) -> None:
        """Save a figure as a PNG beside the record, and close it."""
        file = f"{self.name}-{suffix}.png"
        try:
            with files.replacing(self.given.output / file) as part:
                figure.savefig(part, dpi=100, pil_kwargs={"optimize": True})
            self.figures.append(file)
        except OSError as error:  # the results still count
            print(f"{self.given.output / file}: not written: {error}", file=sys.stderr)
        plt.close(figure)

    def finish(
        self, budget: dict[str, Any], results: dict[str, Any], epochs: int | dict[str, Any] | None = None
    ) -> None:
        """Write the record and print its place; `epochs` is the number that was asked for, if any."""
        seconds = round(time.perf_counter() - self.start, 1)
        print("\n".join(["", *as_text(results)]))  # first: writing may fail
        file = self.given.output / f"{self.name}.json"
        first = getattr(self.given, "seed", 0)
        rows.write_json(
            file,
            {
                "experiment": self.name,
                **environment.facts(self.device),
                "paths": [_source(self.name)],
                **({"seed": first} if "seed" in self.given else {}),
                "seeds": list(range(first, first + getattr(self.given, "seeds", 1))),
                "epochs": epochs,
                "quick": self.given.quick,
                "seconds": seconds,
                "budget": budget,
                "figures": self.figures,
                "results": results,
            },
        )
        print(f"\nwrote {file} and {len(self.figures)} figures; {seconds:.0f} s in all")


def _source(name: str) -> str:
    """Return the path of an experiment's module, by the name of its record."""
    module, *_ = COMMANDS.get(name.partition("-")[0], (name,))
    path = f"benchmarks/experiments/{module}"
    return path if (environment.ROOT / path).is_dir() else f"{path}.py"


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return max |found - wanted| / max |wanted|."""
    return float((found - wanted).abs().max() / wanted.abs().max())
