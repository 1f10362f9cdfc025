"""What the experiments share: their command lines, the networks they train, their figures and their record."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.experiments import training
from benchmarks.records import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Network = TypeVar("Network", bound=nn.Module)


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every experiment of one seed has."""
    options = _parser(name, description)
    options.add_argument("--seed", type=int, default=0)
    return options


def training_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options of an experiment that trains networks from several seeds, within a budget."""
    options = _parser(name, description)
    options.add_argument("--seeds", type=at_least(1), metavar="N", help="from how many seeds each network is trained")
    options.add_argument(
        "--epochs", type=at_least(1), metavar="N", help="of each network, instead of the experiment's own number"
    )
    options.add_argument(
        "--minutes", type=float, metavar="M", help="for all trainings, shared evenly; the record has the epochs reached"
    )
    options.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="write one after each epoch, and go on from those that are there",
    )
    options.add_argument("--device", default="cpu")
    return options


def at_least(low: int) -> Callable[[str], int]:
    """What an option of whole numbers from `low` on is read by."""

    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"got {text}, want at least {low}")
        return int(text)

    return number


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.experiments.{name}", description=description)
    options.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="for figures and the record (default: benchmarks/results/DEVICE/experiments; with --quick, results)",
    )
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    return options


class Trainer:
    """Trains the networks of an experiment from each seed within the budget of its command line, and keeps what came of each.

    rows: by training, the network's name, its seed, the epochs reached, training seconds, accuracy after the last epoch and
    the best after any (optimistic, as tests chose it), the measures before training, the history, and where the epochs were
    made, which may be elsewhere than the record where they come from a checkpoint.

    settings: what losses and measures depend on beside the batches, as `training.train` takes them.
    """

    def __init__(
        self, experiment: str, given: argparse.Namespace, trainings: int, settings: Mapping[str, Any] | None = None
    ) -> None:
        self._experiment, self._given, self._settings = experiment, given, settings
        self._allowance = training.Allowance(given.minutes, trainings)
        self.rows: list[dict[str, Any]] = []

    def __call__(
        self,
        name: str,
        seed: int,
        build: Callable[[], Network],
        x: Tensor,
        y: Tensor,
        recipe: training.Recipe,
        measure: Callable[[nn.Module], dict[str, float]],
        loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = training.cross_entropy,
        source: str | None = None,
    ) -> Network:
        """The network that `build` makes from the seed, trained; one of the measures has to be "accuracy".

        source: the network, trained before, that `build` takes something of. One that has had more epochs since a checkpoint
        was written begins the training anew.
        """
        torch.manual_seed(seed)
        network = build().to(x.device).eval()
        before = measure(network)
        origin = "" if source is None else f" from {source} {self.of(source, 'epochs')[-1]}"
        file = "".join(c if c.isalnum() else "-" for c in f"{self._experiment} {name}{origin} {seed}") + ".pt"
        history, made = training.train(
            network,
            x,
            y,
            recipe,
            label=f"{name}, seed {seed}",
            seed=seed,
            loss=loss,
            measure=measure,
            seconds=self._allowance.seconds(),
            checkpoint=None if self._given.checkpoints is None else self._given.checkpoints / file,
            settings=self._settings,
        )
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
        """The rows, the numbers of their histories to five digits."""
        return [
            row | {"history": {name: [float(f"{v:.5g}") for v in values] for name, values in row["history"].items()}}
            for row in self.rows
        ]

    def of(self, name: str, key: str) -> list[Any]:
        """A column of the rows of one network, by seed."""
        return [row[key] for row in self.rows if row["network"] == name]

    def table(self) -> dict[str, Any]:
        """By network: mean and spread over seeds of the accuracies, epochs and seconds."""
        names = dict.fromkeys(row["network"] for row in self.rows)
        keys = ("last_accuracy", "best_accuracy", "epochs", "seconds")
        return {name: {key: spread(self.of(name, key)) for key in keys} for name in names}

    def compared(self) -> tuple[int, dict[str, dict[str, float]]]:
        """The last epoch that every training reached, and each network's accuracy after it: mean and spread over seeds."""
        epoch = min(row["epochs"] for row in self.rows)
        names = dict.fromkeys(row["network"] for row in self.rows)
        return epoch, {name: spread([h["accuracy"][epoch - 1] for h in self.of(name, "history")]) for name in names}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation, 0 of a single value."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def percent(values: dict[str, float]) -> str:
    """A `spread` of shares, as text."""
    return f"{100 * values['mean']:.2f} ± {100 * values['std']:.2f}"


class Run:
    """One run of an experiment: its clock, its figures and its record."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        from matplotlib import pyplot as plt

        plt.switch_backend("Agg")
        self.name, self.given, self.start = name, given, time.perf_counter()
        self.device: str = getattr(given, "device", "cpu")
        self.figures: list[str] = []
        if given.output is None:
            device = environment.ROOT / "benchmarks" / "results" / environment.device_slug(self.device)
            given.output = Path("results") if given.quick else device / "experiments"

    def figure(self, figure: Figure, suffix: str) -> None:
        """Save a figure as a PNG beside the record, and close it."""
        from matplotlib import pyplot as plt

        file = f"{self.name}-{suffix}.png"
        self.given.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.given.output / file, dpi=100)
        plt.close(figure)
        self.figures.append(file)

    def finish(
        self, budget: dict[str, Any], results: dict[str, Any], epochs: int | dict[str, int] | None = None
    ) -> None:
        """Write the record, and say where everything is. epochs: how many were asked for; None where there are none."""
        seconds = round(time.perf_counter() - self.start, 1)
        file = self.given.output / f"{self.name}.json"
        seed = {"seed": self.given.seed} if "seed" in self.given else {}
        first = seed.get("seed", 0)
        environment.write(
            file,
            {
                "experiment": self.name,
                **environment.facts(self.device),
                **seed,
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


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted| / max |wanted|."""
    return float((found - wanted).abs().max() / wanted.abs().max())
