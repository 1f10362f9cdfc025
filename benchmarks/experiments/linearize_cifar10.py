"""CIFAR-10: the logits of a trained vgg11 as exact sums over pixels and a constant, against other attributions.

The network is the base head's of summary_vgg, by the same recipe: with the same --checkpoints it is not trained again. Where a
network is piecewise affine the exact attribution is gradient x input; what that leaves out is the constant.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import attributions, common, exactness, head_comparison, images
from interp_nn.explain import plots
from interp_nn.explain.linear.affine_map import linearize

NAME = "linearize_cifar10"
TRAINED = "summary_vgg"  # whose checkpoints are used
STUDY = head_comparison.STUDIES[TRAINED]
EXPLAINED, CHECKED = 100, 20  # test images
SHARES = [i / 16 for i in range(17)]
CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
METHODS = {
    "exact": attributions.exact,
    "gradient x input": attributions.gradient_times_input,
    "integrated gradients": attributions.integrated_gradients,
}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, 2 without the data."""
    given = images.parser(NAME, __doc__).parse_args(arguments)
    found = images.load(given, "cifar10")
    if found is None:
        return 2
    chosen, recipe = images.within(found, given, STUDY.cpu, STUDY.gpu, STUDY.quick, STUDY.learning_rate)
    run = common.Run(NAME, given)
    explained, checked = (3, 2) if given.quick else (EXPLAINED, CHECKED)
    x, y = chosen.x_test[:explained], chosen.y_test[:explained]
    trainer = common.Trainer(TRAINED, given, given.seeds, images.settings(chosen))
    networks = []
    for seed in range(given.seeds):
        network = head_comparison.train(STUDY, trainer, head_comparison.BASE, seed, chosen, recipe)
        torch.manual_seed(seed)
        networks.append(_explain(run, network, x, y, checked, seed))
    results = {"networks": networks, "trainings": trainer.record()}
    _draw(run, networks[0])
    budget = {
        **images.budget(chosen, recipe, given),
        "images_explained": len(x),
        "images_checked": checked,
        "shares_of_pixels": SHARES,
        "points_of_integrated_gradients": attributions.PATH,
    }
    run.finish(budget, results, recipe.epochs)
    return 0


def _explain(run: common.Run, network: nn.Module, x: Tensor, y: Tensor, checked: int, seed: int) -> dict[str, Any]:
    """Compute attributions and curves in fp32, the constant in fp64, and exactness in both; leave the network in fp64."""
    with torch.no_grad():
        predicted = torch.cat([network(part) for part in x.split(250)]).argmax(1)
    found = {name: method(network, x, predicted) for name, method in METHODS.items()}
    scores = {name: one.sum(1) for name, one in found.items()}
    draw = torch.Generator().manual_seed(seed)
    scores["random"] = torch.rand(scores["exact"].shape, generator=draw).to(x)
    curves = {
        name: {kind: one._asdict() for kind, one in attributions.curves(network, x, predicted, by, SHARES).items()}
        for name, by in scores.items()
    }
    in_32_bits = exactness.errors(network, x[:checked])
    network.double()
    x = x.double()
    if seed == 0:
        _draw_maps(run, network, x[:6], y, predicted)
    return {
        "test_accuracy": (predicted == y).double().mean().item(),
        "exactness": {"float32": in_32_bits, "float64": exactness.errors(network, x[:checked])},
        "error_over_change_by_step": exactness.neighbourhood(network, x[:checked]),
        "exact_minus_gradient_times_input": common.relative_error(found["exact"], found["gradient x input"]),
        "bias": exactness.constants(network, x, predicted, CHECKED),
        "curves": curves,
    }


def _draw(run: common.Run, one: dict[str, Any]) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4), sharey=True, layout="constrained")
    for axes, kind, what in zip(panels, ("deletion", "insertion"), ("set to 0", "given back"), strict=True):
        for name, curves in one["curves"].items():
            line = {"linestyle": "--", "linewidth": 2.5} if name == "gradient x input" else {"marker": "."}
            label = f"{name}: {curves[kind]['area']:.3f}"
            axes.plot([100 * s for s in SHARES], curves[kind]["probability"], label=label, **line)
        axes.set(xlabel=f"pixels {what}, %", title=kind.capitalize())
        axes.legend(fontsize=8, title="area under the curve", title_fontsize=8)
    panels[0].set_ylabel("probability of the predicted class")
    run.figure(figure, "curves")


def _draw_maps(run: common.Run, network: nn.Module, x: Tensor, y: Tensor, predicted: Tensor) -> None:
    figure = plots.attribution_maps(
        linearize(network, x).contributions(x).cpu(),
        (x.cpu() + 1) / 2,
        rows=[f"{CLASSES[int(y[i])]},\ncalled {CLASSES[int(predicted[i])]}" for i in range(len(x))],
        columns=CLASSES,
    )
    figure.suptitle("What each pixel adds to each logit")
    run.figure(figure, "maps")
