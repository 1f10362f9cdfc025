"""What the experiments share: their command line, their figures and their record."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks import record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.experiments.{name}", description=description)
    options.add_argument(
        "--output", type=Path, default=Path("results"), metavar="DIR", help="for figures and the record"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that it runs")
    return options


class Run:
    """One run of an experiment: its clock, its figures and its record."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        from matplotlib import pyplot as plt

        plt.switch_backend("Agg")
        self.name, self.given, self.start = name, given, time.perf_counter()
        self.figures: list[str] = []

    def figure(self, figure: Figure, suffix: str) -> None:
        """Save a figure as a PNG beside the record, and close it."""
        from matplotlib import pyplot as plt

        file = f"{self.name}-{suffix}.png"
        self.given.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.given.output / file, dpi=100)
        plt.close(figure)
        self.figures.append(file)

    def finish(self, budget: dict[str, Any], results: dict[str, Any]) -> None:
        """Write the record, and say where everything is."""
        seconds = round(time.perf_counter() - self.start, 1)
        file = self.given.output / f"{self.name}.json"
        record.write(
            file,
            {
                "experiment": self.name,
                **record.environment(),
                "seed": self.given.seed,
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
