"""The shared parts of experiments on images: options, data, budgets by device, accuracy, and the figure of trainings."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import nn

from benchmarks.command_line import at_least, users_input
from benchmarks.experiments import common, datasets
from benchmarks.experiments.training import Recipe, accuracy
from benchmarks.records.rows import Row
from interp_nn.explain import plots
from interp_nn.explain.plots.canvas import PALETTE


class Budget(NamedTuple):
    """The number of first training and test images (None is all), epochs of each training, seeds, and images in a batch."""

    train_size: int | None
    test_size: int | None
    epochs: int
    seeds: int = 1
    batch: int = 32


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of trainings and of their images."""
    options = common.training_parser(name, description)
    datasets.add_folder(options, "folder of the images (default: $INTERP_NN_DATA)")
    for split in ("train", "test"):
        options.add_argument(f"--{split}-size", type=at_least(0), metavar="N", help=f"first {split} images; 0 is all")
    options.add_argument("--batch", type=at_least(1), metavar="N", help="images in a batch of training")
    return options


def load(given: argparse.Namespace, dataset: str | None) -> datasets.Images:
    """Load the images of the command line."""
    with users_input():
        return datasets.load(dataset, given.data)


def within(
    images: datasets.Images, given: argparse.Namespace, cpu: Budget, gpu: Budget, quick: Budget, learning_rate: float
) -> tuple[datasets.Images, Recipe]:
    """Return the images of the budget, on the device, and the recipe; options of the command line replace the budget's.

    Puts the seeds into `given`, and prints the plan.
    """
    usual = quick if given.quick else gpu if given.device.startswith("cuda") else cpu
    given.seeds = given.seeds or usual.seeds
    train_size = usual.train_size if given.train_size is None else given.train_size
    test_size = usual.test_size if given.test_size is None else given.test_size
    recipe = Recipe(given.epochs or usual.epochs, given.batch or usual.batch, learning_rate)
    x_train, y_train = (part[: train_size or None].to(given.device) for part in (images.x_train, images.y_train))
    x, y = (part[: test_size or None].to(given.device) for part in (images.x_test, images.y_test))
    print(
        f"{images.name}: {len(y_train):,} training and {len(y):,} test images, {recipe.epochs} epochs of Adam "
        f"{recipe.learning_rate:g} at batch {recipe.batch}, {given.seeds} seeds"
    )
    return datasets.Images(images.name, x_train, y_train, x, y), recipe


def budget(images: datasets.Images, recipe: Recipe, given: argparse.Namespace) -> dict[str, Any]:
    """Return the budget of the trainings for the record."""
    return {
        **recipe._asdict(), "minutes": given.minutes, "train_images": len(images.y_train),
        "test_images": len(images.y_test),
        "tf32_in_convolutions": images.x_test.is_cuda and torch.backends.cudnn.allow_tf32,
    }  # fmt: skip


def compute_dtype(device: str) -> torch.dtype:
    """Return the dtype of convolutions and products: bfloat16 on a CPU that has instructions for it, else float32."""
    return torch.bfloat16 if device == "cpu" and torch.cpu._is_avx512_bf16_supported() else torch.float32


def computing(device: str, dtype: torch.dtype) -> torch.autocast:
    """Return the context that computes convolutions and products in a dtype."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def accuracy_on(images: datasets.Images) -> Callable[[nn.Module], dict[str, float]]:
    """Return the measure of a training: accuracy on the test images."""
    return lambda network: {"accuracy": accuracy(network, images.x_test, images.y_test, batch=250)}


def settings(images: datasets.Images) -> dict[str, Any]:
    """Return the settings that `accuracy_on` depends on, for a checkpoint."""
    return {"test_images": len(images.y_test)}


def draw(
    run: common.Run, trained: list[Row], published: dict[str, float], suffix: str, title: str,
    points: Mapping[str, Mapping[int, float]] | None = None,
) -> None:  # fmt: skip
    """Draw accuracies after the last epoch as bars, with published ones, and after each epoch as curves.

    `trained` has the rows of a `common.Trainer` or of `units.Units`; `points` published accuracies by network and epoch.
    """
    points = points or {}
    names = list(dict.fromkeys(row["network"] for row in trained))
    epochs = max(row["epochs"] for row in trained)
    figure, panels = plt.subplots(
        1, 2 if epochs > 1 else 1, figsize=(12 if epochs > 1 else 7, 4.2), layout="constrained", squeeze=False
    )
    bars = panels[0][0]
    last = {name: [row["last_accuracy"] for row in trained if row["network"] == name] for name in names}
    plots.regime_bars(last, published=published, axes=bars)
    bars.set(xlabel="test accuracy, %")
    bars.set_title(f"{bars.get_title()}\n{title}", fontsize=10)
    for i, name in enumerate(names if epochs > 1 else ()):
        own = [row["history"]["accuracy"] for row in trained if row["network"] == name]
        for seed, accuracies in enumerate(own):
            percent = [100 * share for share in accuracies]
            label = name if seed == 0 else None
            style = {"color": f"C{i}", "linestyle": "-" if i < len(PALETTE) else "--", "marker": ".", "linewidth": 1}
            panels[0][1].plot(range(1, len(percent) + 1), percent, label=label, **style)
        if name in points:
            at, shares = zip(*points[name].items(), strict=True)
            panels[0][1].plot(at, [100 * share for share in shares], f"C{i}D", mfc="none", label=f"{name}, published")
    if epochs > 1:
        curves = panels[0][1]
        curves.set(xlabel="epoch", ylabel="test accuracy, %", xlim=(0.5, epochs + 0.5), title="Accuracy over training")
        curves.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        curves.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    run.figure(figure, suffix)
