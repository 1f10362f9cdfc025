"""CIFAR-10: the first and the classifier layers of a trained vgg11, descrambled, against data and networks without structure.

The network is the base head's of summary_vgg, by the same recipe: with the same --checkpoints it is not trained again. Any
layer can be made smooth: what counts is the loss on the test images against that on shuffled data, on images that P was not
made for, and of the network before training.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import common, head_comparison, images
from interp_nn.explain import plots
from interp_nn.explain.descramble.descrambler import Descrambler

NAME = "descramble_cifar10"
TRAINED = "summary_vgg"  # whose checkpoints are used
STUDY = head_comparison.STUDIES[TRAINED]
LAYERS = {
    "first convolution": "body.0", "classifier, layer 1": "head.1", "classifier, layer 2": "head.4",
    "classifier, logits": "head.6",
}  # fmt: skip
ORDERED = ("first convolution", "classifier, layer 1")
AT_ONCE = 100  # images


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, 2 without the data."""
    given = images.parser(NAME, __doc__).parse_args(arguments)
    found = images.load(given, "cifar10")
    chosen, recipe = images.within(found, given, STUDY.cpu, STUDY.gpu, STUDY.quick, STUDY.learning_rate)
    run = common.Run(NAME, given)
    trainer = common.Trainer(TRAINED, given, given.seeds, images.settings(chosen))
    networks = []
    for seed in range(given.seeds):
        network = head_comparison.train(STUDY, trainer, head_comparison.BASE, seed, chosen, recipe)
        fits = {layer: _fit(network, name, chosen.x_test) for layer, name in LAYERS.items()}
        networks.append(
            {
                "test_accuracy": trainer.rows[-1]["last_accuracy"],
                "layers": {layer: _layer(fit) for layer, fit in fits.items()},
                "order": {layer: _ordered(network, LAYERS[layer], chosen.x_test) for layer in ORDERED},
            }
        )
        if seed == 0:
            _draw(run, network, fits)
    results = {"networks": networks, "trainings": trainer.record()}
    budget = {**images.budget(chosen, recipe, given), "operator": "fourier2", "untrained": "drawn anew from seed 0"}
    run.finish(budget, results, recipe.epochs)
    return 0


def _fit(network: nn.Module, name: str, x: Tensor, **parameters: Any) -> Descrambler:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="x: rank")  # which the record has
        return Descrambler(**parameters).fit_layer(network, name, x.split(AT_ONCE))


def _layer(fit: Descrambler) -> dict[str, Any]:
    """Return the loss of a fit over that of chance, with its nulls, and its rank."""
    known = fit.ambiguity_
    return {
        "features": known.features, "rank": known.rank, "error_against_the_bound": fit.check(),
        "loss_over_that_of_a_random_P": fit.nulls_._asdict(),
    }  # fmt: skip


@torch.no_grad()
def _ordered(network: nn.Module, name: str, x: Tensor) -> dict[str, float]:
    """Order the units so that neighbours are most alike, write the order into a copy of the network, and compare the logits."""
    ordered = copy.deepcopy(network)
    fit = _fit(ordered, name, x, operator="diff1", group="permutation")
    fit.apply_(ordered)
    probe = x[:AT_ONCE]
    return {
        "error_of_logits": common.relative_error(ordered(probe), network(probe)),
        "loss_over_its_lower_bound": fit.loss_ / fit.lower_bound_,
        **{f"{name} over that of a random order": value for name, value in fit.nulls_._asdict().items()},
    }


def _draw(run: common.Run, network: nn.Module, fits: dict[str, Descrambler]) -> None:
    figure, axes = plt.subplots(figsize=(9.6, 4), layout="constrained")
    plots.null_bars({name: fit.nulls_ for name, fit in fits.items()}, axes=axes)
    run.figure(figure, "nulls")

    before = network.get_submodule(LAYERS["first convolution"]).get_parameter("weight").detach().flatten(1)
    after = fits["first convolution"].P_.to(before) @ before
    figure = plots.descrambled_weights(before, after, rows="channel", columns="input")
    figure.suptitle(f"First convolution: {len(before)} channels of {before.shape[1]} inputs")
    run.figure(figure, "filters")
