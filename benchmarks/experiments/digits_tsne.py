"""Handwritten digits on a plane: a parametric t-SNE, and for each digit the two images that say how its pixels move it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.experiments import common
from interp_nn.explain import plots
from interp_nn.explain.tsne import ParametricTSNE

NAME = "digits_tsne"
NEIGHBOURS = 5


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    images = data.digits()
    x_train, x = (images.x_train.double() + 1) / 2, (images.x_test.double() + 1) / 2  # ink is 0 to 1
    if given.quick:
        x_train, x = x_train[:200], x[:60]
    y_train, y = images.y_train[: len(x_train)], images.y_test[: len(x)]

    epochs = 3 if given.quick else 100
    tsne = ParametricTSNE(epochs=epochs, exaggeration_epochs=epochs // 5, seed=given.seed, progress=True)
    placed_train, placed = tsne.fit_transform(x_train.float()), tsne.transform(x.float())
    tsne.encoder.double()
    linear = tsne.linearize(x)
    with_64_bits = tsne.transform(x)

    def ratio(size: float) -> float:
        step = size * torch.randn(x.shape, generator=torch.Generator().manual_seed(given.seed), dtype=x.dtype)
        moved = tsne.transform(x + step) - with_64_bits
        error = (moved - torch.einsum("nkchw,nchw->nk", linear.weight, step)).norm(dim=1)
        return (error / moved.norm(dim=1)).median().item()

    mapped = torch.einsum("nkchw,nchw->nk", linear.weight, x) + linear.bias
    results: dict[str, Any] = {
        "points": {"fitted": len(x_train), "new": len(x)},
        "divergence": tsne.kl_,
        "neighbour_accuracy": {
            "fitted points": _accuracy(placed_train, y_train, placed_train, y_train, itself=True),
            "new points": _accuracy(placed_train, y_train, placed, y),
            "new points, in pixels": _accuracy(x_train.flatten(1), y_train, x.flatten(1), y),
        },
        "trustworthiness_of_new_points": _trustworthiness(x, placed),
        "exactness_float64": {
            "at_x": common.relative_error(mapped, with_64_bits),
            "step_1e-6_error_over_change": ratio(1e-6),
            "step_1e-1_error_over_change": ratio(1e-1),
        },
    }
    _print(results)
    _draw(run, tsne, (placed_train, y_train), (placed, y), x, linear.weight)
    run.finish({"epochs": epochs, "batch": tsne.batch_size, "learning_rate": tsne.learning_rate}, results)
    return 0


def _accuracy(points: Tensor, labels: Tensor, new: Tensor, truth: Tensor, itself: bool = False) -> float:
    """How often the majority of the nearest neighbours has the right class; a point is not its own neighbour."""
    distances = torch.cdist(new, points)
    if itself:
        distances.fill_diagonal_(torch.inf)
    votes = labels[distances.topk(NEIGHBOURS, largest=False).indices]
    return (votes.mode(1).values == truth).double().mean().item()


def _trustworthiness(x: Tensor, placed: Tensor) -> float:
    from sklearn.manifold import trustworthiness

    return float(trustworthiness(x.flatten(1).numpy(), placed.numpy(), n_neighbors=NEIGHBOURS))


def _print(results: dict[str, Any]) -> None:
    divergence = results["divergence"]
    print(f"\ndivergence {divergence[0]:.3f} in the first epoch, {divergence[-1]:.3f} in the last of {len(divergence)}")
    print(f"accuracy of {NEIGHBOURS} nearest neighbours")
    for name, value in results["neighbour_accuracy"].items():
        print(f"  {name:24} {value:.3f}")
    print(f"trustworthiness of new points {results['trustworthiness_of_new_points']:.3f}")
    print("W x + b against the encoder, in fp64")
    for name, value in results["exactness_float64"].items():
        print(f"  {name.replace('_', ' '):28} {value:.1e}")


def _draw(
    run: common.Run,
    tsne: ParametricTSNE,
    fitted: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor,
) -> None:
    from matplotlib import pyplot as plt

    figure, (plane, curve) = plt.subplots(1, 2, figsize=(11.5, 6), layout="constrained", width_ratios=(5, 2))
    for digit in range(10):
        colour = f"C{digit}"
        for (points, labels), style in ((fitted, {"s": 8, "alpha": 0.25}), (new, {"s": 16, "edgecolors": "black"})):
            chosen = points[labels == digit]
            plane.scatter(chosen[:, 0], chosen[:, 1], color=colour, linewidths=0.4, **style)
        centre = fitted[0][fitted[1] == digit].median(0).values
        box = {"boxstyle": "circle", "facecolor": "white", "edgecolor": colour}
        plane.text(*centre.tolist(), str(digit), ha="center", va="center", fontweight="bold", bbox=box)
    plane.set(title="Parametric t-SNE of digits: fitted points, and new ones with a rim", xticks=[], yticks=[])
    plane.set(xlabel="first axis", ylabel="second axis")
    curve.plot(range(1, len(tsne.kl_) + 1), tsne.kl_, marker="" if len(tsne.kl_) > 5 else ".")
    curve.set(xlabel="epoch", ylabel="KL(P || Q), mean of batches", title="Divergence")
    run.figure(figure, "plane")

    shown = [int((new[1] == digit).nonzero()[0]) for digit in (0, 1, 4, 7, 9)]
    figure = plots.attribution_maps(
        weight[shown],
        x[shown],
        rows=[f"a {int(new[1][i])}" for i in shown],
        columns=["first axis", "second axis"],
        label="movement per unit of ink",
    )
    figure.suptitle("How each pixel moves a digit")
    run.figure(figure, "movement")


if __name__ == "__main__":
    sys.exit(main())
