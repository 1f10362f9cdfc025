"""Images: the regimes of gated networks on the papers' networks, beside the published accuracies.

--data DIR has MNIST (fully connected, 5 x 128), CIFAR-10 or CIFAR-100 (GCONV: four convolutions, global average pooling,
2 x 256; on a CPU two of the convolutions have stride 2); without it, scikit-learn's digits go through GCONV. The published
accuracies are the best of 200 epochs or more (MNIST 300) on all training images, means of 5 runs; the budget here is in the
record, and nothing is extrapolated from it. DLNPF is a DGN. Of DLGN arXiv 2110.03403 publishes that it recovers more than 83.5 %
of what networks reach on CIFAR-10 and CIFAR-100.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.command_line import at_least
from benchmarks.experiments import common, gating_regimes, images
from benchmarks.experiments.gating_regimes import gconv, relu_mlp
from benchmarks.experiments.images import Budget

NAME = "gated_images"
REGIMES = ("ReLU", "FRNPF (II)", "FRNPF (DI)", "DLNPF", "FLNPF", "DLGN(x)", "DLGN(1)")
LEARNING_RATE = 3e-4  # as published, at batches of 32
# What takes two CPU cores up to 20 minutes.
BUDGETS = {
    "digits": Budget(None, None, 10), "mnist": Budget(None, None, 6, seeds=3), "cifar10": Budget(16_000, 2000, 2),
    "cifar100": Budget(16_000, 2000, 2),
}  # fmt: skip
GPU = Budget(None, None, 30, batch=128)
QUICK = Budget(96, 50, 1)
# By Adam; GCONV's on CIFAR-10 and the fully connected network's on MNIST.
PUBLISHED = {
    "mnist": {"FRNPF (II)": 0.9602, "FRNPF (DI)": 0.9609, "DLNPF": 0.9822, "FLNPF": 0.9782, "ReLU": 0.9814},
    "cifar10": {"FRNPF (II)": 0.6709, "FRNPF (DI)": 0.6708, "DLNPF": 0.7712, "FLNPF": 0.7968, "ReLU": 0.8032},
}
RECOVERED = {"cifar10": 0.835, "cifar100": 0.835}  # of the accuracy of ReLU networks by DLGN, at least, as published


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, 2 without the data."""
    options = images.parser(NAME, __doc__)
    options.add_argument("--dataset", choices=list(BUDGETS), help="default: what the folder holds; without one, digits")
    about = "of GCONV's second and fourth convolutions (default: 1, as published, on a GPU; 2 on a CPU)"
    options.add_argument("--stride", type=at_least(1), metavar="N", help=about)
    given = options.parse_args(arguments)
    found = images.load(given, given.dataset)
    run = common.Run(f"{NAME}-{found.name}", given)
    chosen, recipe = images.within(found, given, BUDGETS[found.name], GPU, QUICK, LEARNING_RATE)
    channels, height, width = chosen.x_test.shape[1:]
    fully_connected = chosen.name == "mnist"
    stride = given.stride or (1 if given.device.startswith("cuda") else 2)
    convolutional = partial(gconv, channels, chosen.classes, stride)
    backbone = partial(_fully_connected, height * width) if fully_connected else convolutional
    measure = images.accuracy_on(chosen)
    called = run.name if fully_connected else f"{run.name} stride {stride}"  # the strides are not in a checkpoint
    trainer = common.Trainer(called, given, given.seeds * len(REGIMES), images.settings(chosen))
    for seed in range(given.seeds):
        trained: dict[str, nn.Module] = {}
        for regime in REGIMES:
            build = partial(gating_regimes.build, regime, backbone, trained.get("ReLU"))
            source = "ReLU" if regime == "FLNPF" else None
            x, y = chosen.x_train, chosen.y_train
            trained[regime] = trainer(regime, seed, build, x, y, recipe, measure, source=source)
    published = PUBLISHED.get(chosen.name, {})
    results = _results(trainer, published)
    results["published_dlgn_over_relu_more_than"] = RECOVERED.get(chosen.name)
    images.draw(run, trainer.rows, published, "regimes", f"{chosen.name}: last epoch; published: best epoch")
    budget = {
        **images.budget(chosen, recipe, given), "initialisation": "He normal", "network": str(backbone()),
        "published": "the best of 200 epochs (MNIST 300) on all training images, means of 5 runs",
    }  # fmt: skip
    run.finish(budget, results, recipe.epochs)
    return 0


def _fully_connected(inputs: int) -> nn.Sequential:
    """Build the papers' network for MNIST, of depth 6 and width 128."""
    return nn.Sequential(nn.Flatten(), *relu_mlp(inputs, *[128] * 5, 10))


def _results(trainer: common.Trainer, published: dict[str, float]) -> dict[str, Any]:
    """Return accuracies and published ones by regime, and the comparison after the last epoch that all trainings reached."""
    table = trainer.table()
    epoch, compared = trainer.compared()
    mean = {name: row["mean"] for name, row in compared.items()}
    order = [max(mean["FRNPF (II)"], mean["FRNPF (DI)"]), mean["DLNPF"], mean["FLNPF"], mean["ReLU"]]
    return {
        "regimes": {
            name: {"meaning": gating_regimes.MEANINGS[name], **row, "published_best_accuracy": published.get(name)}
            for name, row in table.items()
        },
        "compared_after_epoch": epoch,
        "accuracy_compared": compared,
        "dlgn_over_relu": {name: mean[name] / mean["ReLU"] for name in ("DLGN(x)", "DLGN(1)") if mean["ReLU"]},
        "ordered_frnpf_dlnpf_flnpf_relu": order == sorted(order),
        "trainings": trainer.record(),
    }
