"""Images: the regimes of gated networks on the papers' networks, with the published accuracies beside.

--data DIR has MNIST (fully connected, 5 x 128) or CIFAR-10 (GCONV: four convolutions, global average pooling, 2 x 256);
without it, scikit-learn's digits go through GCONV. The published accuracies are the best of 200 epochs or more (MNIST 300) on
all training images, means of 5 runs; the budget here is in the record, and nothing is extrapolated from it.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from benchmarks import data, regimes
from benchmarks.experiments import common
from benchmarks.networks import CLASSES, gconv, relu_mlp
from benchmarks.training import Recipe, accuracy
from interp_nn.explain import plots

NAME = "gated_images"
REGIMES = ("ReLU", "FRNPF (II)", "FRNPF (DI)", "DLNPF", "FLNPF", "DLGN(x)", "DLGN(1)")
LEARNING_RATE, BATCH = 3e-4, 32  # as published


class Budget(NamedTuple):
    """What takes two CPU cores up to 20 minutes: images and epochs of each training, and seeds."""

    train_size: int | None
    test_size: int | None
    epochs: int
    seeds: int


BUDGETS = {
    "digits": Budget(None, None, 10, 1),
    "mnist": Budget(None, None, 6, 3),
    "cifar10": Budget(2000, 1000, 3, 1),
}
QUICK = Budget(96, 50, 1, 1)
# By Adam; GCONV's on CIFAR-10 and the fully connected network's on MNIST.
PUBLISHED = {
    "mnist": {"FRNPF (II)": 0.9602, "FRNPF (DI)": 0.9609, "DLNPF": 0.9822, "FLNPF": 0.9782, "ReLU": 0.9814},
    "cifar10": {"FRNPF (II)": 0.6709, "FRNPF (DI)": 0.6708, "DLNPF": 0.7712, "FLNPF": 0.7968, "ReLU": 0.8032},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 where the data are not to be had."""
    options = common.training_parser(NAME, __doc__)
    options.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("INTERP_NN_DATA"),
        metavar="DIR",
        help="folder of MNIST or CIFAR-10 (default: $INTERP_NN_DATA; without, digits)",
    )
    options.add_argument("--dataset", choices=list(BUDGETS), help="default: what the folder holds")
    options.add_argument(
        "--train-size", type=common.at_least(0), metavar="N", help="how many training images, the first; 0 is all"
    )
    options.add_argument(
        "--test-size", type=common.at_least(0), metavar="N", help="how many test images, the first; 0 is all"
    )
    options.add_argument("--batch", type=common.at_least(1), default=BATCH)
    given = options.parse_args(arguments)
    try:
        images = data.load(given.dataset, None if given.data is None else Path(given.data))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    usual = QUICK if given.quick else BUDGETS[images.name]
    given.seeds = given.seeds or usual.seeds
    train_size = usual.train_size if given.train_size is None else given.train_size
    test_size = usual.test_size if given.test_size is None else given.test_size
    recipe = Recipe(given.epochs or usual.epochs, given.batch, LEARNING_RATE)
    run = common.Run(f"{NAME}-{images.name}", given)
    x_train, y_train = (part[: train_size or None].to(given.device) for part in (images.x_train, images.y_train))
    x, y = (part[: test_size or None].to(given.device) for part in (images.x_test, images.y_test))
    channels, height, width = x.shape[1:]
    backbone = partial(_fully_connected, height * width) if images.name == "mnist" else partial(gconv, channels)
    print(
        f"{images.name}: {len(y_train):,} training and {len(y):,} test images, {recipe.epochs} epochs of Adam "
        f"{recipe.learning_rate:g} at batch {recipe.batch}, {given.seeds} seeds"
    )

    def measure(network: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(network, x, y, batch=250)}

    trainer = common.Trainer(run.name, given, given.seeds * len(REGIMES))
    for seed in range(given.seeds):
        trained: dict[str, nn.Module] = {}
        for regime in REGIMES:
            build = partial(regimes.build, regime, backbone, trained.get("ReLU"))
            source = "ReLU" if regime == "FLNPF" else None
            trained[regime] = trainer(regime, seed, build, x_train, y_train, recipe, measure, source=source)
    published = PUBLISHED.get(images.name, {})
    results = _results(trainer, published)
    _print(results)
    _draw(run, images.name, trainer, published)
    budget = {
        **recipe._asdict(),
        "initialisation": "He normal",
        "minutes": given.minutes,
        "train_images": len(y_train),
        "test_images": len(y),
        "network": str(backbone()),
        "published": "the best of 200 epochs (MNIST 300) on all training images, means of 5 runs",
    }
    run.finish(budget, results, recipe.epochs)
    return 0


def _fully_connected(inputs: int) -> nn.Sequential:
    """The papers' network for MNIST, of depth 6 and width 128."""
    return nn.Sequential(nn.Flatten(), *relu_mlp(inputs, *[128] * 5, CLASSES))


def _results(trainer: common.Trainer, published: dict[str, float]) -> dict[str, Any]:
    """By regime: accuracies, what was published, and the comparison after the last epoch that all trainings reached."""
    table = trainer.table()
    epoch, compared = trainer.compared()
    mean = {name: row["mean"] for name, row in compared.items()}
    order = [max(mean["FRNPF (II)"], mean["FRNPF (DI)"]), mean["DLNPF"], mean["FLNPF"], mean["ReLU"]]
    return {
        "regimes": {
            name: {"meaning": regimes.MEANINGS[name], **row, "published_best_accuracy": published.get(name)}
            for name, row in table.items()
        },
        "compared_after_epoch": epoch,
        "accuracy_compared": compared,
        "dlgn_over_relu": {name: mean[name] / mean["ReLU"] for name in ("DLGN(x)", "DLGN(1)")},
        "ordered_frnpf_dlnpf_flnpf_relu": order == sorted(order),
        "trainings": trainer.record(),
    }


def _print(results: dict[str, Any]) -> None:
    print(
        f"\n{'test accuracy, %':16} {'last epoch':>14} {'best':>14} {'published best':>15} {'epochs':>7} {'seconds':>8}"
    )
    for name, row in results["regimes"].items():
        last, best = (common.percent(row[key]) for key in ("last_accuracy", "best_accuracy"))
        known = row["published_best_accuracy"]
        print(
            f"{name:16} {last:>14} {best:>14} {f'{100 * known:.2f}' if known else '-':>15} "
            f"{row['epochs']['mean']:>7.3g} {row['seconds']['mean']:>8.0f}"
        )
    ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in results["dlgn_over_relu"].items())
    print(f"\nover ReLU after epoch {results['compared_after_epoch']}: {ratios}")


def _draw(run: common.Run, dataset: str, trainer: common.Trainer, published: dict[str, float]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, (bars, curves) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    plots.regime_bars({name: trainer.of(name, "last_accuracy") for name in REGIMES}, published=published, axes=bars)
    bars.set(xlabel="test accuracy, %", title=f"{dataset}: last epoch; published: best epoch")
    for i, name in enumerate(REGIMES):
        for seed, history in enumerate(trainer.of(name, "history")):
            percent = [100 * share for share in history["accuracy"]]
            label = name if seed == 0 else None
            curves.plot(range(1, len(percent) + 1), percent, color=f"C{i}", marker=".", linewidth=1, label=label)
    curves.set(xlabel="epoch", ylabel="test accuracy, %")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves.legend(fontsize=8)
    run.figure(figure, "regimes")


if __name__ == "__main__":
    sys.exit(main())
