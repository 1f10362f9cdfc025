"""The shared parts of experiments on parametric t-SNE: quality of an embedding, exactness of its affine maps, figures."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import common, exactness
from interp_nn.explain import plots
from interp_nn.explain.linear.affine_map import AffineMap

NEIGHBOURS = 5
_AT_ONCE = 500  # points


def published_encoder(inputs: int) -> nn.Sequential:
    """Return the network of van der Maaten (AISTATS 2009), 500-500-2000-2, from random weights."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((inputs, 500, 500, 2000, 2)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(points: Tensor, labels: Tensor, new: Tensor, truth: Tensor, itself: bool = False) -> float:
    """Return how often the majority of the nearest neighbours has the right class; a point is not its own neighbour."""
    right = 0
    for first in range(0, len(new), _AT_ONCE):
        distances = torch.cdist(new[first : first + _AT_ONCE], points)
        if itself:
            distances.diagonal(first).fill_(torch.inf)
        votes = labels[distances.topk(NEIGHBOURS, largest=False).indices]
        right += int((votes.mode(1).values == truth[first : first + _AT_ONCE]).sum())
    return right / len(new)


def quality(fitted: Tensor, placed: Tensor, x_train: Tensor, y_train: Tensor, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return accuracies by neighbours on the plane, for fitted and for new points, and in pixels; and trustworthiness."""
    from sklearn.manifold import trustworthiness

    pixels, embedded = x.flatten(1).cpu(), placed.cpu()
    return {
        "neighbour_accuracy": {
            "fitted points": accuracy(fitted, y_train, fitted, y_train, itself=True),
            "new points": accuracy(fitted, y_train, placed, y),
            "new points, in pixels": accuracy(x_train.flatten(1), y_train, x.flatten(1), y),
        },
        "trustworthiness_of_new_points": float(
            trustworthiness(pixels.numpy(), embedded.numpy(), n_neighbors=NEIGHBOURS)
        ),
    }


@torch.no_grad()
def errors(encoder: nn.Module, linear: AffineMap, x: Tensor, seed: int) -> dict[str, float]:
    """Return the error of the affine maps of points at them and, over the change, a small and a large step away."""
    placed = encoder(x)
    weight, bias = linear.weight, linear.bias
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)

    def ratio(size: float) -> float:
        moved = encoder(x + size * step) - placed
        error = (moved - exactness.apply(weight, torch.zeros_like(bias), size * step)).norm(dim=1)
        return (error / moved.norm(dim=1)).median().item()

    return {
        "at_x": common.relative_error(exactness.apply(weight, bias, x), placed),
        "step_1e-6_error_over_change": ratio(1e-6),
        "step_1e-1_error_over_change": ratio(1e-1),
    }


def draw_plane(
    run: common.Run, title: str, fitted: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], divergence: list[float]
) -> None:
    """Draw points (n, 2) with their classes, and the divergence in each epoch."""
    figure, (plane, curve) = plt.subplots(1, 2, figsize=(11.5, 6), layout="constrained", width_ratios=(5, 2))
    for digit in range(10):
        colour = plt.get_cmap("tab10")(digit)  # the palette has fewer
        for (points, labels), style in ((fitted, {"s": 8, "alpha": 0.25}), (new, {"s": 16, "edgecolors": "black"})):
            chosen = points[labels == digit]
            plane.scatter(chosen[:, 0], chosen[:, 1], color=colour, linewidths=0.4, **style)
        centre = fitted[0][fitted[1] == digit].median(0).values
        box = {"boxstyle": "circle", "facecolor": "white", "edgecolor": colour}
        plane.text(*centre.tolist(), str(digit), ha="center", va="center", fontweight="bold", bbox=box)
    plane.set(xticks=[], yticks=[])
    plane.set_title(title, fontsize=11)
    plane.set(xlabel="first axis", ylabel="second axis")
    curve.plot(range(1, len(divergence) + 1), divergence, marker="" if len(divergence) > 5 else ".")
    curve.set(xlabel="epoch", ylabel="KL(P || Q), mean of batches")
    curve.set_title(f"The divergence falls to {divergence[-1]:.2f}", fontsize=11)
    run.figure(figure, "plane")


def draw_movement(run: common.Run, x: Tensor, y: Tensor, weight: Tensor) -> None:
    """Draw the two images of W (n, 2, 1, h, w) of some points x (n, 1, h, w)."""
    shown = [int((y == digit).nonzero()[0]) for digit in (0, 1, 4, 7, 9) if bool((y == digit).any())]
    figure = plots.attribution_maps(
        weight[shown].cpu(), x[shown].cpu(), rows=[f"a {int(y[i])}" for i in shown],
        columns=["first axis", "second axis"], label="movement per unit of ink",
    )  # fmt: skip
    figure.suptitle("How each pixel moves a digit")
    run.figure(figure, "movement")
