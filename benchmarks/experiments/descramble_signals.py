"""A network from dipolar traces to distance distributions, descrambled: the frequencies of its layers.

The task, and the reading of descrambled weights as signal processing, are those of Amey et al., PNAS 118(5), 2021.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.collections import PathCollection
from torch import Tensor, nn

from benchmarks.experiments import common, signals, training
from interp_nn.explain import plots
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.explain.descramble.descrambler import Descrambler
from interp_nn.explain.descramble.moments import shuffled
from interp_nn.explain.following.layer_values import Tap, reinitialised

NAME = "descramble_signals"
POINTS, WIDTH = 256, 80
TEST = 2000
LEARNING_RATE, BATCH = 1e-3, 100
ROTATIONS = 20


class Layer(NamedTuple):
    """The place of P: the layer's name, before or after its activation, the modules up to there, and the weight that is shown."""

    name: str
    tap: Tap
    depth: int
    weight: int
    axis: str


LAYERS = {
    "first layer": Layer("0", "pre", 1, 0, "time"),  # rows of P W are filters along time
    "last layer": Layer("2", "post", 4, 4, "distance"),  # columns of W Pᵀ are functions of distance
}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    torch.manual_seed(given.seed)
    samples, epochs = (1000, 2) if given.quick else (20_000, 40)
    made = signals.dipolar(samples + TEST, POINTS, given.seed)
    x, x_test = made.traces.split((samples, TEST))
    y, y_test = made.distributions.split((samples, TEST))
    network = nn.Sequential(
        nn.Linear(POINTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, POINTS)
    )
    history = training.train(
        network, x, y, training.Recipe(epochs, BATCH, LEARNING_RATE), label="training", seed=given.seed, loss=_loss
    ).history
    with torch.no_grad():
        error = (network(x_test) - y_test).square().sum() / (y_test - y.mean(0)).square().sum()

    fits, weights, waves = {}, {}, {}
    for name, layer in LAYERS.items():
        fits[name], weights[name], waves[name] = _descrambled(network, layer, x_test, given.seed)
    results: dict[str, Any] = {
        "training_loss": history["loss"],
        "test_r2": 1 - error.item(),
        "nulls": {name: fit.nulls_._asdict() for name, fit in fits.items()},
        "spectra": {name: {k: v.tolist() for k, v in fit.spectrum_._asdict().items()} for name, fit in fits.items()},
        "waves": waves,
    }
    _draw(run, fits, weights, results)
    run.finish({"samples": samples, "epochs": epochs, "batch": BATCH, "learning_rate": LEARNING_RATE}, results)
    return 0


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(network(x), y)


def _descrambled(
    network: nn.Sequential, layer: Layer, x: Tensor, seed: int
) -> tuple[Descrambler, tuple[Tensor, Tensor], dict[str, Any]]:
    """Return the fit, the weight (n, d) before and after, and the waves of P W beside those of nulls."""
    fit = Descrambler().fit_layer(network, layer.name, x, tap=layer.tap)
    untrained = reinitialised(network)
    fit_of_untrained = Descrambler().fit_layer(untrained, layer.name, x, tap=layer.tap)
    with torch.no_grad():
        fit_of_shuffled = Descrambler().fit(shuffled(network[: layer.depth](x).mT).mT)
    W, fresh = (net.get_parameter(f"{layer.weight}.weight").detach().double() for net in (network, untrained))
    if layer.tap == "post":
        W, fresh = W.mT, fresh.mT
    generator = torch.Generator().manual_seed(seed)
    rotated = [_waves(signals.orthogonal(len(W), generator) @ W) for _ in range(ROTATIONS)]
    waves = {
        "descrambled": _waves(fit.P_ @ W),
        "untrained, descrambled": _waves(fit_of_untrained.P_ @ fresh),
        "by P of shuffled data": _waves(fit_of_shuffled.P_ @ W),
        "by random P": {key: common.spread([one[key] for one in rotated]) for key in ("concentration", "order")},
    }
    return fit, (W, fit.P_ @ W), waves


def _waves(weight: Tensor) -> dict[str, Any]:
    """Return the waves along the d columns of a weight (n, d), for each mode of D along its rows.

    frequencies: each mode's mean number of turns, by energy. energies: its share of the weight's. concentration: the share of a
    mode's energy in three neighbouring frequencies, the best for each mode, averaged by energy. order: Spearman's rank
    correlation of the frequency with the mode's place, 1 where slower modes hold slower waves.
    """
    modes = derivative_operator(len(weight), "fourier2").transform(weight)
    power = torch.fft.rfft(modes).abs().square()
    power[:, 1 : (weight.shape[1] + 1) // 2] *= 2
    energy = power.sum(1)
    frequency = power @ torch.arange(power.shape[1], dtype=power.dtype) / energy
    best = power.unfold(1, 3, 1).sum(2).amax(1)
    ranks = frequency.argsort().argsort().double()
    order = torch.corrcoef(torch.stack((ranks, torch.arange(len(ranks), dtype=torch.float64))))[0, 1]
    return {
        "concentration": (best.sum() / energy.sum()).item(), "order": order.item(), "frequencies": frequency.tolist(),
        "energies": (energy / energy.sum()).tolist(),
    }  # fmt: skip


def _draw(
    run: common.Run, fits: dict[str, Descrambler], weights: dict[str, tuple[Tensor, Tensor]], results: dict[str, Any]
) -> None:
    for name, (before, after) in weights.items():
        figure = plots.descrambled_weights(before, after, columns=f"{LAYERS[name].axis} point")
        figure.suptitle(f"{name.capitalize()}, R² {results['test_r2']:.2f}")
        run.figure(figure, name.replace(" ", "-"))

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=(5, 4, 4))
    plots.null_bars({name: fit.nulls_ for name, fit in fits.items()}, axes=panels[0])
    for axes, (layer, found) in zip(panels[1:], results["waves"].items(), strict=True):
        for name, one in found.items():
            if "frequencies" in one:
                sizes = [400 * energy for energy in one["energies"]]
                axes.scatter(range(len(sizes)), one["frequencies"], s=sizes, alpha=0.6, label=name)
        axes.set(xlabel="mode of D", ylabel=f"mean cycles along {LAYERS[layer].axis}")
        orders = [found[name]["order"] for name in ("descrambled", "untrained, descrambled", "by P of shuffled data")]
        text = "rank correlation {:.2f},\nuntrained {:.2f}, P of shuffled data {:.2f}".format(*orders)
        axes.set_title(f"{layer.capitalize()}: {text}", fontsize=9)
    # One legend for both panels, of dots of one size; areas of dots are shares of the energy.
    legend = figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower right", ncols=3, fontsize=8)
    for mark in legend.legend_handles:
        assert isinstance(mark, PathCollection)
        mark.set_sizes([30])
    run.figure(figure, "nulls")

    figure, panels = plt.subplots(1, len(fits), figsize=(6 * len(fits), 3.8), squeeze=False, layout="constrained")
    for axes, (name, fit) in zip(panels[0], fits.items(), strict=True):
        title = plots.spectrum_curves(fit.spectrum_, axes=axes).get_title()
        axes.set_title(f"{name.capitalize()}: {title}", fontsize=9)
    run.figure(figure, "spectra")
