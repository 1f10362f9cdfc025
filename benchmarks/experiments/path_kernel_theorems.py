"""Theorems on the neural path kernel, measured: shifts under pooling, ensembles of skips, alignment by training, and its cost.

The theorems are those of Lakshminarayanan & Singh (2020), arXiv 2006.10529. The images are scikit-learn's digits.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.command_line import users_input
from benchmarks.experiments import common, datasets, training
from benchmarks.records import report
from interp_nn.explain.paths.kernel_machine import kernel_alignment
from interp_nn.explain.paths.path_kernel import npk, npk_from_gates
from interp_nn.gates.graph import apply_gates
from interp_nn.nn.gated.gates import HardGate
from interp_nn.nn.gated.networks import GatedNetwork

NAME = "path_kernel_theorems"
CHANNELS = 16
Padding = Literal["circular", "zeros"]
RECIPE = training.Recipe(epochs=15, batch=32, learning_rate=3e-3, decay=True)
SEEDS, ALIGNED = 8, 120  # trainings, test digits
SHIFTED = 10  # digits, each at all 64 shifts
SKIPS, SKIPPED = 6, 50  # blocks of the dense network, digits
SIZE, IMAGES, CHECKED = 16, 2000, 8
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # Okabe & Ito's, which colour-blind people tell apart


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    about = "folder with MNIST, for the 16 x 16 images (default: digits, enlarged; the environment's INTERP_NN_DATA)"
    datasets.add_folder(options, about)
    options.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the marks of this file")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    run = common.Run(NAME, given)
    digits = datasets.digits()
    if given.quick:
        digits = digits._replace(x_train=digits.x_train[:160], y_train=digits.y_train[:160])
    with users_input():
        large = digits if given.data is None else datasets.load("mnist", given.data)
    # The cost comes first: memory is counted as the process's peak.
    cost = measured_cost(large, 16 if given.quick else IMAGES, given.seed)
    seeds = range(given.seed, given.seed + (2 if given.quick else SEEDS))
    recipe = RECIPE._replace(epochs=1) if given.quick else RECIPE
    aligned, network = alignments(digits, seeds, recipe, 30 if given.quick else ALIGNED)
    x = digits.x_test.double()
    shifts = shifted(network, x[: 1 if given.quick else SHIFTED])
    blocks, samples = (2, 10) if given.quick else (SKIPS, SKIPPED)
    skips = {
        "dense": ensemble(dense_blocks(given.seed, blocks), x[:samples].flatten(1)),
        "convolutions": ensemble(conv_blocks(given.seed, blocks // 2), x[: samples // 5]),
    }
    _draw_shifts(run, shifts)
    _draw_skips(run, skips["dense"])
    _draw_alignment(run, aligned)
    given.seeds = len(seeds)
    budget = {
        **recipe._asdict(), "network": str(pooled_cnn()), "train_images": len(digits.y_train), "shifted": SHIFTED,
        "aligned": ALIGNED, "skips": SKIPS,
    }  # fmt: skip
    results = {"shifts": shifts, "skips": skips, "alignment": aligned, "cost": cost}
    run.finish(budget, results, recipe.epochs)
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", markdown(results))
    return 0


# Shifts


def pooled_cnn(padding: Padding = "circular", pooled: bool = True) -> nn.Sequential:
    """Build three convolutions for 8 x 8 images and a linear layer, with a mean over the positions before it or without."""
    body: list[nn.Module] = []
    for channels in (1, CHANNELS, CHANNELS):
        body += [nn.Conv2d(channels, CHANNELS, 3, padding=1, padding_mode=padding), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(1)] if pooled else []
    return nn.Sequential(*body, *pool, nn.Flatten(), nn.Linear(CHANNELS * (1 if pooled else 64), 10))


def shifted(trained: nn.Sequential, x: Tensor) -> dict[str, Any]:
    """Return, by network, how far cyclic shifts of x (n, 1, 8, 8) move its kernel H with x itself.

    The change is |H(shifted x, x') - H(x, x')| / sqrt(H(x, x) H(x', x')), over all pairs. All networks have the convolutions of
    the trained one; the kernel does not depend on the weights of the last layer.
    """
    places = [(down, right) for down in range(8) for right in range(8)]
    distance = torch.tensor([max(min(step, 8 - step) for step in place) for place in places])
    moved = torch.cat([x.roll(place, (2, 3)) for place in places])
    networks: dict[str, tuple[Padding, bool]] = {
        "circular padding, mean over positions": ("circular", True),
        "zero padding, mean over positions": ("zeros", True),
        "circular padding, no mean": ("circular", False),
    }
    found = {}
    for name, (padding, pooled) in networks.items():
        network = pooled_cnn(padding, pooled)
        kept = {key: value for key, value in trained.state_dict().items() if key.startswith(("0.", "2.", "4."))}
        network.load_state_dict(kept, strict=False)
        network = network.double().eval()
        own, other = npk(network, x), npk(network, moved, x).unflatten(0, (len(places), len(x)))
        size = own.diagonal().sqrt()
        change = ((other - own) / torch.outer(size, size)).abs()
        steps = range(1, 5)
        found[name] = {
            "largest": float(change.max()),
            "mean_by_pixels": [float(change[distance == step].mean()) for step in steps],
            "largest_by_pixels": [float(change[distance == step].max()) for step in steps],
        }
    return found


# Skips


class Residual(nn.Module):
    """Compute x -> head(h_m) with h_0 = relu(stem(x)) and h_j = h_{j-1} + relu(block_j(h_{j-1}))."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.ModuleList(blocks), head

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output."""
        h = torch.relu(self.stem(x))
        for block in self.blocks:
            h = h + torch.relu(block(h))
        return self.head(h)

    def preactivations(self, x: Tensor) -> list[Tensor]:
        """Return the stem's output and each block's, whose signs are the gates."""
        seen = [self.stem(x)]
        h = seen[0].relu()
        for block in self.blocks:
            seen.append(block(h))
            h = h + seen[-1].relu()
        return seen


class Gating(nn.Module):
    """The gates of a residual network at some of its blocks, for a `GatedNetwork`."""

    def __init__(self, network: Residual, blocks: Sequence[int]) -> None:
        super().__init__()
        self.network, self.kept = network, (0, *(block + 1 for block in blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the preactivations."""
        seen = self.network.preactivations(x)
        return [seen[i] for i in self.kept]


class Chain(nn.Module):
    """The sub-network that passes through some blocks and skips the others: a chain of layers and gates without skips."""

    def __init__(self, network: Residual, blocks: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([network.stem, *(network.blocks[i] for i in blocks)]), network.head

    def forward(self, z: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Compute the output from the gates."""
        for i, layer in enumerate(self.layers):
            z = apply_gates(layer(z), gates[i])
        return self.head(z)


def dense_blocks(seed: int, blocks: int, width: int = 32) -> Residual:
    """Build a residual network of linear layers on the 64 pixels of a digit."""
    torch.manual_seed(seed)
    layers = [nn.Linear(width, width, bias=False) for _ in range(blocks)]
    return Residual(nn.Linear(64, width, bias=False), layers, nn.Linear(width, 10, bias=False)).double()


def conv_blocks(seed: int, blocks: int, channels: int = 8) -> Residual:
    """Build a residual network of convolutions on 8 x 8 images, which ends in a mean over the positions."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10, bias=False))
    layers = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(blocks)]
    return Residual(nn.Conv2d(1, channels, 3, padding=1, bias=False), layers, head).double()


@torch.no_grad()
def ensemble(network: Residual, x: Tensor) -> dict[str, Any]:
    """Return how far the kernel of a residual network is from the sum over its sub-networks, and their shares by length.

    A sub-network has the gates of the whole network at the blocks that it passes through. "by_gates" takes its kernel from the
    gates alone, without a network: <x, x'> times <G_l, G_l'> of its layers, over the widths; of dense networks.
    """
    blocks = len(network.blocks)
    whole = npk(network, x)
    sums = [torch.zeros_like(whole) for _ in range(blocks + 1)]
    by_gates = torch.zeros_like(whole) if x.dim() == 2 else None
    gates = [z > 0 for z in network.preactivations(x)]
    for length in range(blocks + 1):
        for kept in combinations(range(blocks), length):
            names = [f"gating.{i}" for i in range(length + 1)]
            chain = GatedNetwork(Gating(network, kept), Chain(network, kept), HardGate(), "x", names)
            sums[length] += npk(chain, x)
            if by_gates is not None:
                by_gates += npk_from_gates([gates[i] for i in (0, *(block + 1 for block in kept))], x)
    return {
        "blocks": blocks,
        "samples": len(x),
        "sub_networks": 2**blocks,
        "relative_error": common.relative_error(torch.stack(sums).sum(0), whole),
        "relative_error_by_gates": None if by_gates is None else common.relative_error(by_gates, whole),
        "without_the_longest": common.relative_error(torch.stack(sums[:-1]).sum(0), whole),
        "share_of_trace_by_length": [float(part.trace() / whole.trace()) for part in sums],
        "sub_networks_by_length": [comb(blocks, length) for length in range(blocks + 1)],
    }


# Alignment


def alignments(
    digits: datasets.Images, seeds: Sequence[int], recipe: training.Recipe, samples: int
) -> tuple[dict[str, Any], nn.Sequential]:
    """Return the alignment of the kernel with the classes of test digits before and after training, and a trained network.

    One network of each seed is trained on the labels, another from the same start on shuffled ones.
    """
    x, y = digits.x_test[:samples], digits.y_test[:samples]
    kinds = ("labels", "shuffled labels")
    before: list[float] = []
    after: dict[str, list[float]] = {kind: [] for kind in kinds}
    accuracy: dict[str, list[float]] = {kind: [] for kind in kinds}
    first: nn.Sequential | None = None
    for seed in seeds:
        for kind in kinds:
            torch.manual_seed(seed)
            network = pooled_cnn().eval()
            if kind == "labels":
                before.append(kernel_alignment(npk(network, x), y))
            shuffle = torch.randperm(len(digits.y_train), generator=torch.Generator().manual_seed(seed))
            target = digits.y_train if kind == "labels" else digits.y_train[shuffle]
            training.train(network, digits.x_train, target, recipe, label=f"{kind}, seed {seed}", seed=seed)
            after[kind].append(kernel_alignment(npk(network, x), y))
            accuracy[kind].append(training.accuracy(network, digits.x_test, digits.y_test))
            first = first or network
    assert first is not None
    gains = {kind: [b - a for a, b in zip(before, after[kind], strict=True)] for kind in kinds}
    pixels = x.flatten(1)
    return {
        "samples": len(y),
        "pixels": kernel_alignment(pixels @ pixels.mT, y),
        "before": _interval(before),
        **{
            kind: {"after": _interval(after[kind]), "gain": _interval(gains[kind]), "accuracy": common.spread(accuracy[kind])}
            for kind in kinds
        },
        "seeds": {"before": before, **after},
    }, first  # fmt: skip


def _interval(values: list[float]) -> dict[str, float]:
    """Return the mean over seeds and its 95 % interval by Student's t."""
    mean, half = sum(values) / len(values), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return {"mean": mean, "low": mean - half, "high": mean + half}


# Cost


def small_cnn() -> nn.Sequential:
    """Build a CNN of two convolutions, a max-pooling and two linear layers for 16 x 16 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(SIZE * SIZE, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def measured_cost(images: datasets.Images, count: int, seed: int) -> dict[str, Any]:
    """Return time and memory of the kernel of 16 x 16 images through the small CNN, and its error against float64."""
    torch.manual_seed(seed)
    network = small_cnn().eval()
    x = F.interpolate(
        torch.cat((images.x_test, images.x_train)), SIZE, mode="area" if images.name == "mnist" else "bilinear"
    )
    x = torch.cat((x, x.roll(1, 3)))[:count]  # the 1,797 digits are fewer than 2,000
    before, wall, cpu = _peak_mib(), time.perf_counter(), time.process_time()
    kernel = npk(network, x)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    some = torch.linspace(0, count - 1, CHECKED).long()
    wanted = npk(network.double(), x[some].double())
    return {
        "images": f"{count} of {images.name} at {SIZE} x {SIZE}",
        "network": str(small_cnn()),
        "dtype": "float32",
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_memory_mib": _peak_mib(),
        "peak_memory_before_mib": before,
        "kernel_mib": kernel.numel() * kernel.element_size() / 2**20,
        "relative_error": common.relative_error(kernel[some][:, some].double(), wanted),
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # which Linux gives in KiB


# Tables and figures


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of the guide."""
    lines = ["| change of the kernel | 1 pixel | 2 pixels | 3 pixels | 4 pixels | largest |", "|---" * 6 + "|"]
    for name, row in results["shifts"].items():
        cells = " | ".join(f"{value:.1e}" for value in (*row["mean_by_pixels"], row["largest"]))
        lines.append(f"| {name} | {cells} |")
    lines += ["", "| residual network | blocks | sub-networks | relative error | from gates alone |", "|---" * 5 + "|"]
    for name, row in results["skips"].items():
        gates = row["relative_error_by_gates"]
        cells = f"{row['sub_networks']} | {row['relative_error']:.0e} | {'-' if gates is None else f'{gates:.0e}'}"
        lines.append(f"| {name} | {row['blocks']} | {cells} |")
    aligned = results["alignment"]
    lines += [
        "",
        "| alignment with the classes | mean | 95 % interval | gain, 95 % interval | test accuracy |",
        "|---" * 5 + "|",
    ]
    lines.append(f"| before training | {_in_words(aligned['before'])} | - | - |")
    for kind in ("labels", "shuffled labels"):
        row, gain = aligned[kind], aligned[kind]["gain"]
        cells = f"{gain['low']:.3f} to {gain['high']:.3f} | {100 * row['accuracy']['mean']:.1f} %"
        lines.append(f"| trained on {kind} | {_in_words(row['after'])} | {cells} |")
    cost = results["cost"]
    lines += ["", "| kernel of | processor time | time | peak memory | before | relative error |", "|---" * 6 + "|"]
    lines.append(
        f"| {cost['images']} | {cost['cpu_seconds']:.0f} s | {cost['seconds']:.0f} s | {cost['peak_memory_mib']:.0f} MiB | "
        f"{cost['peak_memory_before_mib']:.0f} MiB | {cost['relative_error']:.0e} |"
    )
    return "\n".join(lines)


def _in_words(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} | {value['low']:.3f} to {value['high']:.3f}"


def _draw_shifts(run: common.Run, shifts: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    styles = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))
    for (name, row), (colour, marker) in zip(shifts.items(), styles, strict=True):
        pixels = range(1, 1 + len(row["mean_by_pixels"]))
        axes.plot(pixels, row["mean_by_pixels"], color=colour, marker=marker, label=f"{name}: mean")
        axes.plot(pixels, row["largest_by_pixels"], color=colour, marker=marker, linestyle="--", label="largest")
    axes.set(
        yscale="log", xlabel="cyclic shift, pixels", xticks=list(pixels), ylabel="change of the kernel, relative",
        title="With circular padding and pooling, shifts leave the path kernel as it is",
    )  # fmt: skip
    axes.legend(fontsize=8)
    run.figure(figure, "shifts")


def _draw_skips(run: common.Run, found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lengths = np.arange(found["blocks"] + 1)
    shares = 100 * np.array(found["share_of_trace_by_length"])
    counts = 100 * np.array(found["sub_networks_by_length"]) / found["sub_networks"]
    axes.bar(lengths - 0.2, shares, 0.4, color=BLUE, label="share of the kernel's trace")
    axes.bar(lengths + 0.2, counts, 0.4, color=ORANGE, label=f"share of the {found['sub_networks']} sub-networks")
    axes.set(
        xlabel="blocks that a sub-network passes through", ylabel="share, %",
        title=f"Sub-networks of few blocks carry the kernel of {found['blocks']} residual blocks",
    )  # fmt: skip
    axes.legend()
    run.figure(figure, "skips")


def _draw_alignment(run: common.Run, found: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, colour, marker in (("labels", BLUE, "o"), ("shuffled labels", ORANGE, "s")):
        for i, pair in enumerate(zip(found["seeds"]["before"], found["seeds"][kind], strict=True)):
            label = f"trained on {kind}" if i == 0 else None
            axes.plot(("before training", "after training"), pair, color=colour, marker=marker, alpha=0.7, label=label)
    axes.axhline(found["pixels"], color="0.4", linestyle=":", label="kernel of the pixels")
    axes.set(
        ylabel="alignment with the classes (1: equal)",
        title="Training on the labels keeps the alignment, on shuffled labels it falls",
    )
    axes.legend()
    run.figure(figure, "alignment")
