"""CIFAR-10: the logits of a trained vgg11 as exact sums over pixels and a constant, against other attributions.

The network is the base head's of summary_vgg, by the same recipe: with the same --checkpoints it is not trained again. If a
network is piecewise affine the exact attribution is gradient x input, without the constant. Deletion and insertion are those
of Petsiuk, Das & Saenko (BMVC 2018): the probability of the predicted class, as pixels become 0 from the one that supports it
most on, or come back from an image of zeros. A good order has a small area under the first curve and a large one under the
second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import common, exactness, head_comparison, images
from interp_nn.explain import plots
from interp_nn.explain.linear.affine_map import linearize
from interp_nn.explain.linear.instance_linearization import InstanceLinearization

NAME = "linearize_cifar10"
TRAINED = "summary_vgg"  # whose checkpoints are used
STUDY = head_comparison.STUDIES[TRAINED]
EXPLAINED, CHECKED, MAPPED = 100, 20, 4  # test images
SHARES = [i / 16 for i in range(17)]
CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PATH = 32  # points between 0 and x, of integrated gradients
AT_ONCE = 50  # images


class Curves(NamedTuple):
    """The mean probability of the predicted class at each share of the pixels, and the area under it: mean and standard error."""

    probability: list[float]
    area: float
    standard_error: float


def exact(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Return W[k] * x of the affine map of each x, for output k."""
    found = InstanceLinearization(network).attribute(x, target=target, internal_batch_size=AT_ONCE)
    assert isinstance(found, Tensor)
    return found.detach()


def gradient_times_input(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Compute gradient x input by autograd (Shrikumar et al. 2016)."""
    return torch.cat(
        [part * _gradient(network, part, k) for part, k in zip(x.split(AT_ONCE), target.split(AT_ONCE), strict=True)]
    )


def integrated_gradients(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Integrate gradients from a baseline of 0 (Sundararajan et al. 2017), by the midpoint rule."""
    total = torch.zeros_like(x)
    for step in range(PATH):
        total += gradient_times_input(_Scaled(network, (step + 0.5) / PATH), x, target)
    return total / PATH


def curves(network: nn.Module, x: Tensor, target: Tensor, scores: Tensor, shares: list[float]) -> dict[str, Curves]:
    """Compute deletion and insertion by scores (n, height, width), at shares of the pixels from 0 to 1."""
    order = scores.flatten(1).argsort(1, descending=True)
    found: dict[str, list[Tensor]] = {"deletion": [], "insertion": []}
    for share in shares:
        chosen = order[:, : round(share * order.shape[1])]
        first = torch.zeros_like(order, dtype=x.dtype).scatter(1, chosen, 1.0).view_as(scores).unsqueeze(1)
        for name, kept in (("deletion", 1 - first), ("insertion", first)):
            found[name].append(_probability(network, x * kept, target))
    widths = torch.tensor(shares, dtype=torch.float64).diff()
    results = {}
    for name, points in found.items():
        each = torch.stack(points, 1).double().cpu()  # (n, shares)
        areas = ((each[:, 1:] + each[:, :-1]) / 2) @ widths
        error = areas.std().item() / len(areas) ** 0.5 if len(areas) > 1 else 0.0
        results[name] = Curves(each.mean(0).tolist(), areas.mean().item(), error)
    return results


class _Scaled(nn.Module):
    """A network at scale * x, divided by scale, so that its gradient in x is the gradient at the point."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.scale * x) / self.scale


def _gradient(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    points = x.detach().requires_grad_()
    chosen = network(points).gather(1, target.unsqueeze(1))
    return torch.autograd.grad(chosen.sum(), points)[0]


@torch.no_grad()
def _probability(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits = torch.cat([network(part) for part in x.split(250)])
    return logits.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)


METHODS = {"exact": exact, "gradient x input": gradient_times_input, "integrated gradients": integrated_gradients}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, 2 without the data."""
    given = images.parser(NAME, __doc__).parse_args(arguments)
    found = images.load(given, "cifar10")
    chosen, recipe = images.within(found, given, STUDY.cpu, STUDY.gpu, STUDY.quick, STUDY.learning_rate)
    run = common.Run(NAME, given)
    explained, checked = (5, 2) if given.quick else (EXPLAINED, CHECKED)
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
        **images.budget(chosen, recipe, given), "images_explained": len(x), "images_checked": checked,
        "shares_of_pixels": SHARES, "points_of_integrated_gradients": PATH,
    }  # fmt: skip
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
    drawn = {
        name: {kind: one._asdict() for kind, one in curves(network, x, predicted, by, SHARES).items()}
        for name, by in scores.items()
    }
    in_32_bits = exactness.errors(network, x[:checked])
    network.double()
    x = x.double()
    if seed == 0:
        _draw_maps(run, network, x[:MAPPED], y[:MAPPED], predicted[:MAPPED])
    return {
        "test_accuracy": (predicted == y).double().mean().item(),
        "exactness": {"float32": in_32_bits, "float64": exactness.errors(network, x[:checked])},
        "error_over_change_by_step": exactness.neighbourhood(network, x[:checked]),
        "exact_minus_gradient_times_input": common.relative_error(found["exact"], found["gradient x input"]),
        "bias": exactness.constants(network, x, predicted, CHECKED),
        "curves": drawn,
    }


def _draw(run: common.Run, one: dict[str, Any]) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4), sharey=True, layout="constrained")
    for axes, kind, what in zip(panels, ("deletion", "insertion"), ("set to 0", "given back"), strict=True):
        for name, kinds in one["curves"].items():
            line = {"linestyle": "--", "linewidth": 2.5} if name == "gradient x input" else {"marker": "."}
            label = f"{name}: {kinds[kind]['area']:.3f}"
            axes.plot([100 * s for s in SHARES], kinds[kind]["probability"], label=label, **line)
        axes.set(xlabel=f"pixels {what}, %", title=kind.capitalize())
        axes.legend(fontsize=8, title="area under the curve", title_fontsize=8)
    panels[0].set_ylabel("probability of the predicted class")
    run.figure(figure, "curves")


def _draw_maps(run: common.Run, network: nn.Module, x: Tensor, y: Tensor, predicted: Tensor) -> None:
    linear = linearize(network, x)
    figure = plots.attribution_maps(
        linear.contributions(x).cpu(), (x.cpu() + 1) / 2,
        rows=[f"{CLASSES[int(y[i])]},\ncalled {CLASSES[int(predicted[i])]}" for i in range(len(x))], columns=CLASSES,
        predicted=predicted.cpu(), true=y.cpu(), constants=linear.bias.cpu(),
    )  # fmt: skip
    figure.suptitle("What each pixel adds to each logit, and the constant c that no pixel adds")
    run.figure(figure, "maps")
