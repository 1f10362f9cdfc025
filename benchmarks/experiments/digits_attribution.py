"""Handwritten digits: every logit of a CNN as an exact sum over pixels, plus a constant that no pixel accounts for."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.experiments import common, datasets, exactness
from interp_nn.explain import plots
from interp_nn.explain.linear.affine_map import linearize

NAME = "digits_attribution"
BATCH = 64
LEARNING_RATE = 2e-3
DELETED = (0, 2, 4, 8, 12, 16)


class DigitsCNN(nn.Module):
    """Two convolutions, a residual block and two linear layers: batch norm, max-pooling, in-place and functional ReLU."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * width, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        h = self.stem(x)
        return self.head(torch.relu(h + self.block(h)))


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    torch.manual_seed(given.seed)
    images = datasets.digits()
    # Ink is 0 to 1, so that empty paper contributes nothing.
    x_train, x = (images.x_train + 1) / 2, (images.x_test + 1) / 2
    y = images.y_test
    if given.quick:
        x, y = x[:60], y[:60]
    network = DigitsCNN()
    steps = 40 if given.quick else 600
    _train(network, x_train, images.y_train, steps)

    exact = {"float32": exactness.errors(network, x), "float64": exactness.errors(network.double(), x.double())}
    x = x.double()
    linear = linearize(network, x)
    with torch.no_grad():
        logits = network(x)
    predicted = logits.argmax(1)
    contributions = linear.weight * x.unsqueeze(1)
    rows = torch.arange(len(x))
    layers = {name: part.detach() for name, part in linear.bias_by_layer().items()}
    results: dict[str, Any] = {
        "test_images": len(x), "test_accuracy": (predicted == y).double().mean().item(), "exactness": exact,
        "error_over_change_by_step": exactness.neighbourhood(network, x),
        "bias": exactness.constants(network, x, predicted, len(x)),
        "deletion": _deletion(network, x, y, contributions[rows, predicted], given.seed),
    }  # fmt: skip
    _draw(run, x, y, contributions, layers, predicted)
    _draw_deletion(run, results["deletion"])
    run.finish({"steps": steps, "batch": BATCH, "learning_rate": LEARNING_RATE}, results)
    return 0


def _train(network: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Train by Adam on cross entropy and shuffled batches; leave evaluation mode."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    network.train()
    order: list[Tensor] = []
    for _ in tqdm(range(steps), desc="training", unit="step"):
        order = order or list(torch.randperm(len(x)).split(BATCH))
        chosen = order.pop()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[chosen]), y[chosen]).backward()
        optimizer.step()
    network.eval()


@torch.no_grad()
def _deletion(network: nn.Module, x: Tensor, y: Tensor, contributions: Tensor, seed: int) -> dict[str, list[float]]:
    """Return test accuracy after setting to 0 the pixels with ink that add most to the predicted logit, or least, or any."""
    ink = x.flatten(1) > 0
    scores = contributions.flatten(1)
    noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores)
    accuracy: dict[str, list[float]] = {}
    for name, order in (("most supporting", scores), ("random", noise), ("least supporting", -scores)):
        ranked = order.masked_fill(~ink, -torch.inf).argsort(1, descending=True)
        accuracy[name] = []
        for count in DELETED:
            left = x.flatten(1).scatter(1, ranked[:, :count], 0).view_as(x)
            accuracy[name].append((network(left).argmax(1) == y).double().mean().item())
    return {"pixels": list(DELETED), **accuracy}


def _draw(
    run: common.Run, x: Tensor, y: Tensor, contributions: Tensor, layers: dict[str, Tensor], predicted: Tensor
) -> None:  # fmt: skip
    shown = [int((y == digit).nonzero()[0]) for digit in (0, 3, 5, 8)]
    constants = torch.stack(list(layers.values())).sum(0)
    figure = plots.attribution_maps(
        contributions[shown], x[shown], rows=[f"a {int(y[i])}, called {int(predicted[i])}" for i in shown],
        columns=[f"logit {k}" for k in range(10)], predicted=predicted[shown], true=y[shown], constants=constants[shown],
    )  # fmt: skip
    figure.suptitle("What each pixel adds to each logit, and the constant c that no pixel adds")
    run.figure(figure, "maps")

    sample = shown[1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 4.2), layout="constrained", width_ratios=(2, 3))
    output = int(predicted[sample])
    logit = contributions[sample, output].sum() + constants[sample, output]
    plots.bias_bars(layers, sample=sample, output=output, value=logit, axes=left)
    plots.bias_map(layers, sample=sample, axes=right)
    run.figure(figure, "constants")


def _draw_deletion(run: common.Run, deletion: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for name in list(deletion)[1:]:
        axes.plot(DELETED, [100 * v for v in deletion[name]], marker=".", label=f"{name} first")
    left = [100 * deletion[name][DELETED.index(8)] for name in ("most supporting", "random")]
    title = f"Without the 8 most supporting pixels {left[0]:.0f} % are right, without 8 random ones {left[1]:.0f} %"
    axes.set(xlabel="pixels with ink deleted", ylabel="test accuracy, %")
    axes.set_title(title, fontsize=10, wrap=True)
    axes.legend()
    run.figure(figure, "deletion")
