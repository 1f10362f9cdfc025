"""CIFAR-10 or CIFAR-100: the share of a ReLU network's accuracy that gated networks recover, one training at a time.

arXiv 2110.03403 publishes that DLGNs recover more than 83.5 % of what networks reach on both. Here every regime has the same
network, GCONV of arXiv 2006.10529 with stride 2 in two convolutions, and the same recipe. A CPU with instructions for bfloat16
computes convolutions and products in it; weights and Adam's state are float32, and the last accuracy is given in float32 too.

A unit is one regime, trained from one seed. Its row is appended to `dlgn_recovery-DATASET.jsonl` when it is done, and a unit
that has a row there is not trained again. FLNPF takes its gates from the ReLU network of the same seed: from the checkpoint of
that unit, or it trains that network first.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.command_line import UserInputError
from benchmarks.experiments import common, datasets, gating_regimes, images, training, units
from benchmarks.experiments.gated_images import RECOVERED
from benchmarks.experiments.images import Budget
from benchmarks.experiments.training import accuracy

NAME = "dlgn_recovery"
REGIMES = ("ReLU", "DLGN(x)", "DLGN(1)", "FLNPF", "FRNPF (II)")
SEVERAL = REGIMES[:3]  # trained from all seeds; the rest from the first alone
STRIDE = 2  # of the second and the fourth convolution; with the published 1 a training takes 7 times as long
LEARNING_RATE = 2e-3  # in short trainings 3e-3 was better for ReLU, 1e-3 for DLGN(x)
FULL = Budget(None, None, 12, seeds=3, batch=64)
QUICK = Budget(8, 8, 1, batch=4)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, 2 without the data."""
    options = images.parser(NAME, __doc__)
    options.add_argument("--dataset", choices=[*RECOVERED], default="cifar10")
    units.add_options(options, "--regime", REGIMES)
    given = options.parse_args(arguments)
    try:
        found = datasets.load(given.dataset, given.data)
    except FileNotFoundError as error:
        raise UserInputError(f"not run, no data: {error}") from error
    chosen, recipe = images.within(found, given, FULL, FULL, QUICK, LEARNING_RATE)
    run = common.Run(f"{NAME}-{chosen.name}", given)
    study = Study(given, chosen, recipe._replace(decay=True))
    for regime, number in units.of(given, REGIMES, SEVERAL):
        if study.units.row(regime, number) is None:
            study.train(regime, number)
        print(study.units.line(regime, number), flush=True)
    if trained := study.units.rows():
        images.draw(run, trained, {}, "units", f"{chosen.name}: last epoch")
    return 0


class Study:
    """The trainings on some images by one recipe."""

    def __init__(self, given: argparse.Namespace, chosen: datasets.Images, recipe: training.Recipe) -> None:
        self._given, self._images, self._recipe = given, chosen, recipe
        self._name, self._cpu = f"{NAME}-{chosen.name}", 0.0
        self._dtype = images.compute_dtype(given.device)
        self._settings = {
            "dataset": chosen.name, "stride": STRIDE, **recipe._asdict(), "train_images": len(chosen.y_train),
            "test_images": len(chosen.y_test),
        }  # fmt: skip
        self.units = units.Units(self._name, given, self._settings, dtype=str(self._dtype).removeprefix("torch."))

    def train(self, regime: str, number: int) -> None:
        """Train a unit and write its row, if it reached its last epoch."""
        needed = ("ReLU", regime) if regime == "FLNPF" else (regime,)
        settings = {**self._settings, "dtype": str(self._dtype)}
        trainer = common.Trainer(self._name, self._given, len(needed), settings)
        x, y = self._images.x_train, self._images.y_train
        network, source = None, None
        for name in needed:
            self._cpu = time.process_time()
            build = partial(self._build, name, network)
            network = trainer(name, number, build, x, y, self._recipe, self._measure, self._loss, source=source)
            source, row = name, trainer.record()[-1]
            exact = accuracy(network, self._images.x_test, self._images.y_test, batch=250)
            self.units.write(row, last_accuracy_float32=exact, cpu_seconds=sum(row["history"]["cpu_seconds"]))
            if row["epochs"] < self._recipe.epochs:  # no gates to learn from
                return

    def _build(self, regime: str, trained: nn.Module | None) -> nn.Module:
        backbone = partial(gating_regimes.gconv, self._images.x_test.shape[1], self._images.classes, STRIDE)
        network = gating_regimes.build(regime, backbone, trained)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network

    def _loss(self, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with images.computing(self._given.device, self._dtype):
            logits = network(x)
        return nn.functional.cross_entropy(logits.float(), y)

    def _measure(self, network: nn.Module) -> dict[str, float]:
        """Return the accuracy, and the CPU's seconds since the last call: unlike `seconds` they leave out other processes."""
        with images.computing(self._given.device, self._dtype):
            found = images.accuracy_on(self._images)(network)
        before, self._cpu = self._cpu, time.process_time()
        return {**found, "cpu_seconds": self._cpu - before}
