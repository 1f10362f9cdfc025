"""Polynomial layers in the place of nn.Linear: the accuracy at each learning rate of each optimizer.

The layers are plain PyTorch, and the recommended one also as this library's. Each cell of the sweep is one training on one
thread; its row is appended to `learning_rates.jsonl` when it is done, and a cell with a row there is not trained again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.command_line import at_least, users_input
from benchmarks.experiments import common
from benchmarks.experiments.learning_rates import cells, tables
from benchmarks.experiments.learning_rates.cells import OPTIMIZERS, Cell
from benchmarks.experiments.learning_rates.layers import CANDIDATES, LIBRARY, LINEAR, ORTHOGONAL
from benchmarks.records import environment, files, report, rows

NAME = "learning_rates"
LENGTHS = {"mlp": 40, "cnn": 20, "transformer": 20, "gpt": 600}  # epochs; steps of the GPT
SHORT = {"mlp": 1, "cnn": 1, "transformer": 1, "gpt": 2}
FEW = ("SGD, momentum 0.9", "AdamW, decay 0.01", "Muon")
LANGUAGE = ("AdamW, decay 0.1", (1e-3, 3e-3, 1e-2))


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    options.add_argument(
        "--workers", type=at_least(1), default=2, metavar="N", help="processes of one thread (default: 2)"
    )
    options.add_argument(
        "--networks", nargs="+", choices=LENGTHS, default=[*LENGTHS], help="in this order (default: all)"
    )
    options.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="write tables between the marks of this file, and its figures beside it",
    )
    given = options.parse_args(arguments)
    run = common.Run(NAME, given)
    file = given.output / f"{NAME}.jsonl"
    files.check_writable(file)
    found = rows.lines(file) if file.exists() else []
    torch.set_num_threads(1)  # as in the workers
    facts = environment.facts()
    writer = rows.Writer(file, {name: facts[name] for name in ("git_sha", "dirty", "device", "torch", "python")})
    with contextlib.ExitStack() as stack:
        train: Callable[..., Iterator[rows.Row]] = map
        if given.workers > 1:
            train = stack.enter_context(multiprocessing.get_context("spawn").Pool(given.workers)).imap_unordered
        for network in (name for name in LENGTHS if name in given.networks):
            done = {tuple(row[name] for name in Cell._fields) for row in found}
            due = [cell for cell in _cells(network, found, given.quick, given.seed) if tuple(cell) not in done]
            for row in tqdm(train(cells.train, due), network, len(due), mininterval=10):
                writer.write(**row)
                found.append(writer.rows[-1])
    results = tables.report(run, found)
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", tables.markdown(results))
            for figure in run.figures:
                if figure in given.page.read_text(encoding="utf-8"):
                    shutil.copyfile(given.output / figure, given.page.parent / figure)
    return 0


def _cells(network: str, found: list[rows.Row], quick: bool, seed: int) -> list[Cell]:
    """Return the cells of a network; the layers of all but the MLP are those that did best so far."""
    length = (SHORT if quick else LENGTHS)[network]
    if quick:
        optimizer = LANGUAGE[0] if network == "gpt" else "SGD"
        return [Cell(network, layer, optimizer, 0.01, seed, length) for layer in (LINEAR, "summary")]
    seeds = range(seed, seed + (3 if network == "mlp" else 2))
    if network == "gpt":
        layers = [LINEAR, *tables.best(found, 3)]
        return [Cell(network, a, LANGUAGE[0], rate, s, length) for rate in LANGUAGE[1] for s in seeds for a in layers]
    layers = [*CANDIDATES] if network == "mlp" else [LINEAR, ORTHOGONAL, LIBRARY, *tables.best(found, 5)]
    optimizers = OPTIMIZERS if network == "mlp" else FEW
    sizes = [(layer, length) for layer in layers] + [(LINEAR, 2 * length)]
    return [
        Cell(network, layer, optimizer, rate, s, size)
        for optimizer in optimizers
        for s in seeds
        for rate in OPTIMIZERS[optimizer][0]
        for layer, size in sizes
    ]
