"""Handwritten digits: ways to keep b orthonormal, with its orthogonality, the accuracy, and the time of a step.

A small CNN with two hidden summary layers, free and under each constraint, and with nn.Linear in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.experiments import common, datasets
from benchmarks.experiments.training import Recipe, accuracy, cross_entropy
from benchmarks.timing import clocks
from benchmarks.timing.reference_networks import cnn_body
from interp_nn.explain.plots.canvas import PALETTE
from interp_nn.nn import SummaryLinear
from interp_nn.nn.base import LinearForm
from interp_nn.nn.orthogonality import constrain, orthogonality_penalty, retract_

NAME = "orthogonality"
HIDDEN = (256, 120, 84)
RECIPE = Recipe(epochs=20, batch=64, learning_rate=1e-3)
PENALTY = 0.1  # times the sum of ‖bᵀb - I‖²
MEANINGS = {
    "nn.Linear": "plain layers, for comparison",
    "free": "summary layers, orthonormal at first and free afterwards",
    "penalty": f"and {PENALTY:g} times the penalty in the loss",
    "retract": "and the nearest orthonormal matrix after each step of the optimizer",
    "parametrization": "and torch.nn.utils.parametrizations.orthogonal",
}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.training_parser(NAME, __doc__).parse_args(arguments)
    given.seeds = given.seeds or (1 if given.quick else 3)
    recipe = RECIPE._replace(epochs=given.epochs or (2 if given.quick else RECIPE.epochs))
    run = common.Run(NAME, given)
    images = datasets.digits().to(given.device)

    def measure(network: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(network, images.x_test, images.y_test), **_defect(network)}

    trainer = common.Trainer(NAME, given, given.seeds * len(MEANINGS))
    for seed in range(given.seeds):
        for way in MEANINGS:
            torch.manual_seed(seed)
            _train(trainer, way, seed, _network(way), images, recipe, measure)

    times = _times(images.x_train[: recipe.batch], images.y_train[: recipe.batch], 0.5 if given.quick else 8.0)
    results: dict[str, Any] = {
        "ways": {
            way: {
                "meaning": MEANINGS[way],
                **row,
                "defect": None if way == "nn.Linear" else common.spread([h["defect"][-1] for h in trainer.of(way, "history")]),
                "step": times[way].fields(),
            }
            for way, row in trainer.table().items()
        },
        "trainings": trainer.rows,
    }  # fmt: skip
    _draw(run, trainer, times)
    budget = {**recipe._asdict(), "minutes": given.minutes, "train_images": len(images.y_train), "hidden": HIDDEN}
    run.finish({**budget, "penalty": PENALTY}, results, recipe.epochs)
    return 0


def _train(
    trainer: common.Trainer, way: str, seed: int, network: nn.Module, images: datasets.Images, recipe: Recipe,
    measure: Callable[[nn.Module], dict[str, float]],
) -> None:  # fmt: skip
    """Train a network; retraction follows each step of any optimizer, and does nothing to the other networks."""
    hook = register_optimizer_step_post_hook(lambda *_: retract_(network))
    trainer(way, seed, lambda: network, images.x_train, images.y_train, recipe, measure, _losses(way))
    hook.remove()


def _network(way: str) -> nn.Module:
    kind = nn.Linear if way == "nn.Linear" else SummaryLinear
    layers: list[nn.Module] = [cnn_body(1, 8)]
    for width, units in pairwise(HIDDEN):
        layers += [kind(width, units), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 10))
    return constrain(network, way) if way in ("penalty", "retract", "parametrization") else network


def _losses(way: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    if way != "penalty":
        return cross_entropy
    return lambda network, x, y: cross_entropy(network, x, y) + PENALTY * orthogonality_penalty(network)


def _defect(network: nn.Module) -> dict[str, float]:
    """Return max |s - 1| over the singular values of every b, nothing without a b."""
    found = [m.orthogonality_defect() for m in network.modules() if isinstance(m, LinearForm)]
    return {"defect": max(found)} if found else {}


def _times(x: Tensor, y: Tensor, seconds: float) -> dict[str, clocks.Timing]:
    """Time a training step with each network on one thread of the CPU, in rounds."""

    def stepper(way: str) -> Callable[[], object]:
        torch.manual_seed(0)
        network, loss = _network(way), _losses(way)
        adam = torch.optim.Adam(network.parameters(), RECIPE.learning_rate)
        if way == "retract":
            adam.register_step_post_hook(lambda *_: retract_(network))

        def step() -> None:
            adam.zero_grad()
            loss(network, x.cpu(), y.cpu()).backward()
            adam.step()

        return step

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return clocks.interleave({way: stepper(way) for way in MEANINGS}, seconds)
    finally:
        torch.set_num_threads(threads)


def _draw(run: common.Run, trainer: common.Trainer, times: dict[str, clocks.Timing]) -> None:
    figure, (defects, bars) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(5, 4))
    for way in MEANINGS:
        runs = zip(trainer.of(way, "before"), trainer.of(way, "history"), strict=True)
        curves = [torch.tensor([before["defect"], *h["defect"]]) for before, h in runs if "defect" in h]
        if curves:
            reached = min(map(len, curves))
            defects.plot(torch.stack([curve[:reached] for curve in curves]).mean(0), label=way)
    defects.set(yscale="log", xlabel="epoch", ylabel="max |s - 1| over the singular values of b")
    defects.xaxis.get_major_locator().set_params(integer=True)
    ends = {way: trainer.of(way, "history") for way in ("free", "retract")}
    left = {way: sum(h["defect"][-1] for h in of) / len(of) for way, of in ends.items()}
    defects.set_title(
        f"Orthogonality defect: {left['free']:.2g} free, {left['retract']:.0e} with retraction", fontsize=10
    )
    defects.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    names = list(MEANINGS)
    bars.barh(names, [times[way].p50 for way in names], color=PALETTE[0])
    for i, way in enumerate(names):
        accuracy = common.spread([100 * share for share in trainer.of(way, "last_accuracy")])
        text = f"  {times[way].p50:.1f} ms, {accuracy['mean']:.1f} ± {accuracy['std']:.1f} % right"
        bars.text(times[way].p50, i, text, va="center", fontsize=9)
    bars.invert_yaxis()
    bars.set(
        xlabel="milliseconds a training step",
        xlim=(0, 2.0 * max(one.p50 for one in times.values())),
    )
    ratio = times["parametrization"].p50 / times["nn.Linear"].p50
    bars.set_title(f"Parametrization: {ratio:.2g} times nn.Linear's step", fontsize=10)
    figure.suptitle("Two hidden summary layers of a digits CNN under each constraint")
    run.figure(figure, "constraints")
