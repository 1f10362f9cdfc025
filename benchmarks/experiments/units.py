"""Trainings as units, a network and a seed each: a row is appended to a file when a unit is done, and it is not trained again."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from benchmarks.command_line import seed, users_input
from benchmarks.records import environment, files, rows


def add_options(options: argparse.ArgumentParser, flag: str, networks: Collection[str]) -> None:
    """Add the options that choose a unit; `flag` is the network's."""
    options.add_argument(flag, dest="network", choices=list(networks), help="train this one alone (default: all)")
    about = "train from this seed alone (default: from --seeds of them)"
    options.add_argument("--seed", type=seed, metavar="N", default=argparse.SUPPRESS, help=about)


def asked_for(given: argparse.Namespace) -> bool:
    """Say if the command line chooses units."""
    return given.network is not None or "seed" in given


def of(given: argparse.Namespace, networks: Collection[str], several: Collection[str]) -> Iterator[tuple[str, int]]:
    """Yield the units of the command line, by seed; networks that are not in `several` have the first seed alone."""
    for number in (given.seed,) if "seed" in given else range(given.seeds):
        for network in networks if given.network is None else (given.network,):
            if number == 0 or "seed" in given or network in several:
                yield network, number


class Units:
    """The file of an experiment's units, NAME.jsonl in the folder of its record.

    Args:
        name: The name of the experiment.
        given: Its command line.
        budget: What a row has to equal to be of the same training, besides network and seed.
        more: What the rows have besides.
    """

    def __init__(self, name: str, given: argparse.Namespace, budget: Mapping[str, Any], **more: Any) -> None:
        self._budget = dict(budget)
        file = given.output / f"{name}.jsonl"
        with users_input():
            files.check_writable(file)
            found = rows.lines(file) if file.exists() else []
        self._rows = [{"shuffle": True, **row} for row in found]  # the first rows are older than the choice
        facts = environment.facts(given.device)
        shared = {name: facts[name] for name in ("utc", "git_sha", "dirty", "device", "torch", "python")}
        self._writer = rows.Writer(file, shared | self._budget | more)

    def row(self, network: str, number: int) -> rows.Row | None:
        """Return the row of a unit, None if it was not trained with this budget."""
        wanted = {**self._budget, "network": network, "seed": number}
        return next((row for row in self._rows if wanted.items() <= row.items()), None)

    def rows(self) -> list[rows.Row]:
        """Return the rows of this budget."""
        return [row for row in self._rows if self._budget.items() <= row.items()]

    def write(self, row: Mapping[str, Any], **more: Any) -> None:
        """Append a row of `common.Trainer`, unless the unit has one or was stopped before its last epoch."""
        if row["epochs"] == self._budget["epochs"] and self.row(row["network"], row["seed"]) is None:
            self._writer.write(**row, **more)
            self._rows.append(self._writer.rows[-1])

    def line(self, network: str, number: int) -> str:
        """Return a unit's accuracies in words."""
        row = self.row(network, number)
        if row is None:
            return f"{network}, seed {number}: stopped before its last epoch; with --checkpoints it goes on"
        last, best = (f"{row[name]:.2%}" for name in ("last_accuracy", "best_accuracy"))
        return f"{network}, seed {number}: {last} after the last epoch, {best} after the best"
