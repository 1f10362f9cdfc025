"""CIFAR-10: a reference network with its base head and with summary heads: accuracies, and time of a training step.

AskExplain/Interpretable-Neural-Net (D. Banh, 2022) forms b by sending an identity matrix through nn.Linear(d, k). So
b = Wᵀ + 1 cᵀ, with W and c drawn uniformly from ±1 / √d as nn.Linear draws, and both trained. Its networks are scored with
dropout, as in training. Here they are scored in evaluation mode and with dropout. Its small CNN is compared with ReLU in the
base network and without in the summary network, so that its accuracies differ in more than the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.experiments import common, datasets, images, units
from benchmarks.experiments.images import Budget
from benchmarks.experiments.training import Recipe, accuracy
from benchmarks.records.rows import Row
from benchmarks.timing import clocks
from benchmarks.timing.reference_networks import NETWORKS, MLPNetwork, Network, SummaryNetwork
from interp_nn.nn import SummaryHead

PUBLISHED_BUDGET = (
    "15 epochs at batch 32 on all 50,000 training images, on a GPU; accuracies of one training, with dropout on"
)
TIMED = 10.0  # seconds, of steps


class Published(NamedTuple):
    """Accuracies after epochs 1 and 15 and the best of all, and the seconds of training and scoring 15 times."""

    first: float
    last: float
    best: float
    seconds: float


class Variant(NamedTuple):
    """A head ("mlp" or "summary") on the body, with or without its ReLU, and the reference's results.

    `reconstruction` is the weight of the summary head's reconstruction loss.
    """

    head: str
    reference_init: bool = False
    relu: bool = True
    published: Published | None = None
    reconstruction: float = 0.0


class Study(NamedTuple):
    """Heads on one of `reference_networks.ARCHITECTURES`; the first is the base.

    With `bfloat16` a CPU that has instructions for it computes convolutions and products in it; weights and Adam's state are
    float32.

    `ours` has to hold two aims at the full budget: its accuracy is at most `off_base` from the base's, or below it unless
    `either_way`, and its training step takes at most `step_over_base` steps of the base.
    """

    architecture: str
    learning_rate: float
    variants: dict[str, Variant]
    ours: str
    off_base: float
    either_way: bool
    step_over_base: float
    cpu: Budget
    gpu: Budget
    quick: Budget
    bfloat16: bool = False


BASE = "base head"
# A CPU gets fewer epochs than the published 15, or of vgg11 fewer images; a GPU gets them all. Nothing is extrapolated.
STUDIES = {
    "summary_vgg": Study(
        "vgg11", 1e-4,
        {
            BASE: Variant("mlp", published=Published(0.4926, 0.7677, 0.7677, 393.2)),
            "summary head, orthogonal": Variant("summary"),
            "summary head, reference's init": Variant("summary", True, published=Published(0.1834, 0.7649, 0.7692, 392.3)),
        },
        ours="summary head, orthogonal", off_base=0.015, either_way=True, step_over_base=1.02,
        cpu=Budget(32_000, 2000, 1), gpu=Budget(None, None, 15), quick=Budget(8, 8, 1, batch=4), bfloat16=True,
    ),
    "summary_cnn": Study(
        "cnn", 1e-3,
        {
            BASE: Variant("mlp", published=Published(0.5658, 0.7041, 0.7120, 252.4)),
            "summary, orthogonal": Variant("summary"),
            "summary, orthogonal, reconstruction": Variant("summary", reconstruction=1.0),
            "summary, reference's init": Variant("summary", True),
            "no ReLU: summary, orthogonal": Variant("summary", relu=False),
            "no ReLU: summary, reference's init": Variant(
                "summary", True, False, Published(0.3934, 0.6456, 0.6520, 258.0)
            ),
        },
        ours="summary, orthogonal", off_base=0.01, either_way=False, step_over_base=1.0,
        cpu=Budget(None, None, 4), gpu=Budget(None, None, 15), quick=Budget(32, 20, 1, batch=16),
    ),
}  # fmt: skip


class Shift(nn.Module):
    """The reference's parametrization of b (d, k): Wᵀ + 1 cᵀ."""

    def __init__(self, c: Tensor) -> None:
        super().__init__()
        self.c = nn.Parameter(c)

    def forward(self, columns: Tensor) -> Tensor:
        """Return b of Wᵀ."""
        return columns + self.c


def build(study: Study, name: str, classes: int = 10) -> Network:
    """Build a variant with new weights, for images 3 x 32 x 32."""
    variant = study.variants[name]
    network = NETWORKS[variant.head](3, 32, study.architecture, classes)
    if not variant.relu:
        network.body = nn.Sequential(*(layer for layer in network.body if not isinstance(layer, nn.ReLU)))
    if isinstance(network, SummaryNetwork):
        network.reconstruction = variant.reconstruction
        if variant.reference_init:
            as_reference_(network.head)
    return network


def as_reference_(head: SummaryHead) -> None:
    """Draw and train b as the reference does: as Wᵀ + 1 cᵀ."""
    linear = nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        head.b.copy_(linear.weight.t())
    parametrize.register_parametrization(head, "b", Shift(linear.bias.detach().clone()))


def train(
    study: Study, trainer: common.Trainer, variant: str, seed: int, chosen: datasets.Images, recipe: Recipe
) -> Network:
    """Train a variant."""
    device = chosen.x_test.device.type
    computing = partial(images.computing, device, compute_dtype(study, device))

    def loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        assert isinstance(network, (MLPNetwork, SummaryNetwork))
        with computing():
            return network.loss(x, y)

    def measure(network: nn.Module) -> dict[str, float]:
        with computing():
            return measures(chosen, network)

    start = partial(build, study, variant)
    return trainer(variant, seed, start, chosen.x_train, chosen.y_train, recipe, measure, loss)


def compute_dtype(study: Study, device: str) -> torch.dtype:
    """Return the dtype of a study's convolutions and products."""
    return images.compute_dtype(device) if study.bfloat16 else torch.float32


def measures(chosen: datasets.Images, network: nn.Module) -> dict[str, float]:
    """Return test accuracies in evaluation mode and with dropout.

    Of a summary head also its orthogonality defect, and the share of the test features' variance that its codes explain.
    """
    found = images.accuracy_on(chosen)(network)
    found["accuracy_as_scored"] = found["accuracy"]
    if any(isinstance(module, nn.Dropout) for module in network.modules()):
        network.train()
        found["accuracy_as_scored"] = accuracy(network, chosen.x_test, chosen.y_test, batch=250)
        network.eval()
    if isinstance(network, SummaryNetwork):
        found["defect"] = network.head.orthogonality_defect()
        with torch.no_grad():
            features = torch.cat([network.body(x) for x in chosen.x_test.split(250)]).float()
        found["explained_variance"] = network.head.explained_variance(features)
    return found


def main(arguments: list[str]) -> int:
    """Run a study's command line, whose first argument is its name, and return the exit status, 2 without the data."""
    name, *rest = arguments
    study = STUDIES[name]
    options = images.parser(name, __doc__)
    units.add_options(options, "--variant", study.variants)
    given = options.parse_args(rest)
    found = images.load(given, "cifar10")
    chosen, recipe = images.within(found, given, study.cpu, study.gpu, study.quick, study.learning_rate)
    run = common.Run(name, given)
    if units.asked_for(given):
        _units(study, run, chosen, recipe)
        return 0
    trainer = common.Trainer(name, given, given.seeds * len(study.variants), images.settings(chosen))
    for seed in range(given.seeds):
        for variant in study.variants:
            train(study, trainer, variant, seed, chosen, recipe)
    times = step_times(study, chosen, recipe, given.quick)
    results = _results(study, trainer, times)
    _draw(study, run, trainer.rows, "heads")
    bodies = "He normal by fan-out" if study.architecture == "vgg11" else "PyTorch's own"
    budget = {
        **images.budget(chosen, recipe, given),
        "dtype": str(compute_dtype(study, chosen.x_test.device.type)).removeprefix("torch."),
        "initialisation": f"{bodies} in the convolutions; b orthonormal, or the reference's Wᵀ + 1 cᵀ, uniform in ±1 / √d",
        "published": PUBLISHED_BUDGET,
    }
    run.finish(budget, results, recipe.epochs)
    return 0


def _units(study: Study, run: common.Run, chosen: datasets.Images, recipe: Recipe) -> None:
    """Train the units of the command line: a row each in NAME.jsonl, which is not trained again; and draw all rows."""
    sizes = {"train_images": len(chosen.y_train), "test_images": len(chosen.y_test)}
    dtype = str(compute_dtype(study, run.device)).removeprefix("torch.")
    kept = units.Units(run.name, run.given, {**recipe._asdict(), **sizes}, dtype=dtype)
    for variant, number in units.of(run.given, study.variants, study.variants):
        if kept.row(variant, number) is None:
            trainer = common.Trainer(run.name, run.given, 1, {**images.settings(chosen), "dtype": dtype})
            network = train(study, trainer, variant, number, chosen, recipe)
            exact = images.accuracy_on(chosen)(network)["accuracy"]
            kept.write(trainer.record()[-1], last_accuracy_float32=exact)
        print(kept.line(variant, number), flush=True)
    if trained := kept.rows():
        _draw(study, run, trained, "units")


def _draw(study: Study, run: common.Run, trained: list[Row], suffix: str) -> None:
    known = {variant: one.published for variant, one in study.variants.items() if one.published}
    last = {name: one.last for name, one in known.items()}
    points = {name: {1: one.first, 15: one.last} for name, one in known.items()}
    images.draw(run, trained, last, suffix, "CIFAR-10, last epoch; published: after 15 epochs, with dropout", points)


def step_times(study: Study, chosen: datasets.Images, recipe: Recipe, quick: bool) -> dict[str, clocks.Timing]:
    """Time a training step with each variant on the same batch, in rounds."""
    x, y = chosen.x_train[: recipe.batch], chosen.y_train[: recipe.batch]

    def stepper(name: str) -> Callable[[], object]:
        torch.manual_seed(0)
        network = build(study, name).to(x.device)
        adam = torch.optim.Adam(network.parameters(), recipe.learning_rate)

        def step() -> None:
            adam.zero_grad()
            network.loss(x, y).backward()
            adam.step()

        return step

    clock = clocks.on_events if x.is_cuda else clocks.on_wall
    steppers = {name: stepper(name) for name in study.variants}
    return clocks.interleave(steppers, 0 if quick else TIMED, least=1 if quick else 7, clock=clock)


def _results(study: Study, trainer: common.Trainer, times: dict[str, clocks.Timing]) -> dict[str, Any]:
    table = trainer.table()
    base = next(iter(study.variants))
    networks = {}
    for name, variant in study.variants.items():
        scored = [history["accuracy_as_scored"] for history in trainer.of(name, "history")]
        defects = [history["defect"][-1] for history in trainer.of(name, "history") if "defect" in history]
        networks[name] = {
            **table[name], "last_accuracy_as_scored": common.spread([one[-1] for one in scored]),
            "best_accuracy_as_scored": common.spread([max(one) for one in scored]),
            "first_accuracy_as_scored": common.spread([one[0] for one in scored]),
            "defect": common.spread(defects) if defects else None,
            "published": variant.published and variant.published._asdict(), "step": times[name].fields(),
            "step_over_base": times[name].p50 / times[base].p50,
        }  # fmt: skip
    epoch, compared = trainer.compared()
    off = compared[study.ours]["mean"] - compared[base]["mean"]
    step = networks[study.ours]["step_over_base"]
    within = abs(off) <= study.off_base if study.either_way else off >= -study.off_base
    return {
        "networks": networks,
        "compared_after_epoch": epoch,
        "accuracy_compared": compared,
        "aims": {
            f"{study.ours}: {'off' if study.either_way else 'below'} the base by at most {study.off_base:g}": {
                "accuracy_minus_base": off,
                "holds": within,
            },
            f"{study.ours}: at most {study.step_over_base:g} times the base's training step": {
                "step_over_base": step,
                "holds": step <= study.step_over_base,
            },
        },
        "trainings": trainer.record(),
    }
