"""A trained digits CNN with a summary head, descrambled at its convolution, its hidden layer and its latent.

The latent goes into a linear layer only, and both codes of the head turn with it, so that there any orthogonal P can be
written into the network; across a ReLU only an order can.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import common, datasets, training
from interp_nn.explain import plots
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.explain.descramble.descrambler import Descrambler, Nulls
from interp_nn.explain.descramble.moments import shuffled
from interp_nn.nn import SummaryHead

NAME = "descramble_digits"
CHANNELS, HIDDEN, LATENT = 32, 64, 24
LEARNING_RATE, BATCH = 2e-3, 64


class DigitsSummary(nn.Module):
    """Two convolutions, a hidden layer and a summary head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, CHANNELS, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, HIDDEN), nn.ReLU(),
        )  # fmt: skip
        self.head = SummaryHead(HIDDEN, LATENT, 10)

    def forward(self, x: Tensor) -> Any:
        """Return logits (n, 10) in evaluation mode, the head's pair of logits in training mode."""
        return self.head(self.features(x))

    def latent(self, x: Tensor) -> Tensor:
        """Return the head's projection (n, LATENT)."""
        return self.head.projection(self.features(x))


LAYERS = {"convolution": "features.3", "hidden layer": "features.7"}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    torch.manual_seed(given.seed)
    images = datasets.digits()
    epochs = 2 if given.quick else 30
    network = DigitsSummary().eval()
    untrained = copy.deepcopy(network).double()
    recipe = training.Recipe(epochs, BATCH, LEARNING_RATE)
    training.train(network, images.x_train, images.y_train, recipe, label="training", seed=given.seed, loss=_loss)
    accuracy = training.accuracy(network, images.x_test, images.y_test)
    network.double()
    x, y = images.x_test.double(), images.y_test

    fits = {layer: Descrambler().fit_layer(network, name, x) for layer, name in LAYERS.items()}
    nulls = {layer: fit.nulls_ for layer, fit in fits.items()}
    with torch.no_grad():
        latent, fresh = network.latent(x), untrained.latent(x)
    fits["latent"] = Descrambler().fit(latent)
    of_fresh = Descrambler().fit(fresh)
    nulls["latent"] = fits["latent"].nulls_._replace(random_net=of_fresh.nulls_.fitted)
    results: dict[str, Any] = {
        "test_accuracy": accuracy,
        "nulls": {layer: one._asdict() for layer, one in nulls.items()},
        "rank": {layer: fit.ambiguity_.rank for layer, fit in fits.items()},
        "function": {
            "orthogonal, latent": _turned_latent(network, fits["latent"].P_, x),
            "orthogonal, hidden layer": _turned_hidden(network, fits["hidden layer"], x, y),
            "order, hidden layer": _ordered_hidden(network, x),
        },
        "class_share": {
            "descrambled": _class_share(fits["latent"].transform(latent), y),
            "as trained": _class_share(latent, y),
            "untrained, descrambled": _class_share(of_fresh.transform(fresh), y),
            "untrained": _class_share(fresh, y),
        },
        "class_share_of_components": {
            "trained": _class_share(_components(fits["latent"], latent), y),
            "untrained": _class_share(_components(of_fresh, fresh), y),
        },
    }
    others = {
        "shuffled data": Descrambler().fit(shuffled(latent.mT).mT).spectrum_.energies,
        "untrained network": of_fresh.spectrum_.energies,
    }
    _draw(run, network, fits, nulls, others, results)
    run.finish({"epochs": epochs, "batch": BATCH, "learning_rate": LEARNING_RATE}, results)
    return 0


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    assert isinstance(network, DigitsSummary)
    return network.head.loss(network.features(x), y)


@torch.no_grad()
def _turned_latent(network: DigitsSummary, P: Tensor, x: Tensor) -> dict[str, float]:
    """Write P into the head and return how far the logits of both codes move, relative to the largest."""
    turned = copy.deepcopy(network)
    turned.head.b.copy_(network.head.b @ P.mT)
    turned.head.output.weight.copy_(network.head.output.weight @ P.mT)
    before, after = network.train()(x), turned.train()(x)
    network.eval()
    return {
        "error_of_logits_of_the_projection": common.relative_error(after[0], before[0]),
        "error_of_logits_of_the_summary": common.relative_error(after[1], before[1]),
    }


@torch.no_grad()
def _turned_hidden(network: DigitsSummary, fit: Descrambler, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return whether an orthogonal P is refused before a ReLU, and its effect on the logits and the accuracy."""
    turned = copy.deepcopy(network)
    try:
        fit.apply_(turned)
        refused = None
    except ValueError as error:
        refused = str(error)
    hidden = turned.get_submodule(LAYERS["hidden layer"])
    following = turned.head.b
    hidden.get_parameter("weight").copy_(fit.P_ @ hidden.get_parameter("weight"))
    hidden.get_parameter("bias").copy_(fit.P_ @ hidden.get_parameter("bias"))
    following.copy_(fit.P_ @ following)
    logits = turned(x)
    return {
        "refused": refused,
        "error_of_logits": common.relative_error(logits, network(x)),
        "accuracy": (logits.argmax(1) == y).double().mean().item(),
    }


@torch.no_grad()
def _ordered_hidden(network: DigitsSummary, x: Tensor) -> dict[str, float]:
    """Order the hidden layer's units so that neighbours are most alike, and compare the logits."""
    ordered = copy.deepcopy(network)
    fit = Descrambler(operator="diff1", group="permutation").fit_layer(ordered, LAYERS["hidden layer"], x)
    fit.apply_(ordered)
    return {
        "error_of_logits": common.relative_error(ordered(x), network(x)),
        "loss_over_its_lower_bound": fit.loss_ / fit.lower_bound_,
        "loss_over_that_of_a_random_order": fit.nulls_.fitted, "held_out": fit.nulls_.held_out,
        "shuffled": fit.nulls_.shuffled, "untrained": fit.nulls_.random_net,
    }  # fmt: skip


def _components(fit: Descrambler, values: Tensor) -> Tensor:
    """Return the principal components (n, k) that the fit maps to the modes of D, from features (n, k)."""
    return derivative_operator(values.shape[1], "fourier2").transform(fit.P_ @ values.mT).mT


def _class_share(values: Tensor, y: Tensor) -> list[float]:
    """Return the share of each feature's variance, of values (n, k), that lies between the classes' means."""
    centred = values - values.mean(0)
    means = torch.stack([centred[y == digit].mean(0) for digit in range(10)])
    return (means[y].square().sum(0) / centred.square().sum(0)).tolist()


def _draw(
    run: common.Run, network: DigitsSummary, fits: dict[str, Descrambler], nulls: dict[str, Nulls],
    others: dict[str, Tensor], results: dict[str, Any],
) -> None:  # fmt: skip
    before = network.head.b.detach().mT
    figure = plots.descrambled_weights(before, fits["latent"].P_ @ before, rows="latent feature", columns="hidden unit")
    figure.suptitle(f"bᵀ of the summary head, test accuracy {results['test_accuracy']:.1%}")
    run.figure(figure, "latent")

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", width_ratios=(5, 4))
    plots.null_bars(nulls, axes=left)
    for name, shares in results["class_share_of_components"].items():
        right.plot(shares, marker=".", label=f"{name}, by mode of D")
    for name in ("descrambled", "as trained"):
        right.plot(results["class_share"][name], linewidth=1, linestyle="--", label=f"{name}, by feature")
    shares = results["class_share_of_components"]["trained"]
    first, rest = (sum(part) / len(part) for part in (shares[:10], shares[10:]))
    right.set(xlabel="mode, or feature", ylabel="share of the variance between classes", ylim=(0, 1))
    title = f"Between classes: on average {first:.0%} of the variance\nof modes 0 to 9, {rest:.0%} of that of others"
    right.set_title(title, fontsize=10)
    right.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    run.figure(figure, "nulls")

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 5.8), layout="constrained", height_ratios=(3, 1))
    plots.spectrum_curves(fits["latent"].spectrum_, others=others, axes=upper)
    plots.ambiguity_strips(fits["latent"].ambiguity_, axes=lower)
    run.figure(figure, "spectrum")
