"""Descrambling where the answer is known: isotropic data, a linear network that learns a tree, and circular convolutions."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import common, signals
from interp_nn.explain import plots
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.explain.descramble.descrambler import Descrambler

NAME = "descramble_linear"
OUT, IN = 32, 64  # of the weight that isotropic data go through
DEPTH, HIDDEN = 3, 16  # of the tree, and units of the network that learns it
LENGTH = 33  # of the signals that are convolved: an odd one, where every frequency but 0 is a pair


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    samples = [500, 5000] if given.quick else [1000, 10_000, 100_000]
    steps = 2000 if given.quick else 20_000
    signals_of_convolution = 200 if given.quick else 1000
    results = {
        "isotropic": _isotropic(run, samples, given.seed),
        "tree": _tree(run, steps, given.seed),
        "convolution": _convolution(run, signals_of_convolution, given.seed),
    }
    budget = {"isotropic_samples": samples, "tree_steps": steps, "convolved_signals": signals_of_convolution}
    run.finish(budget, results)
    return 0


def _isotropic(run: common.Run, samples: list[int], seed: int) -> dict[str, Any]:
    """Descramble H = W X with X isotropic: P W should be T S Vᵀ, singular vectors on the modes of D, the largest first."""
    generator = torch.Generator().manual_seed(seed)
    u, v = signals.orthogonal(OUT, generator), signals.orthogonal(IN, generator)[:OUT]
    s = 0.9 ** torch.arange(OUT, dtype=torch.float64)
    W, T = u * s @ v, derivative_operator(OUT, "fourier2").eigenvectors()
    found: dict[str, Any] = {"samples": samples, "error_of_weights": [], "least_cosine": [], "nulls": {}}
    figure, axes = plt.subplots(figsize=(5.4, 3.8), layout="constrained")
    for count in samples:
        fitted = Descrambler().fit((W @ torch.randn(IN, count, generator=generator, dtype=torch.float64)).mT)
        modes = T.mT @ fitted.weights(W).weight
        cosines = (modes * v).sum(1) / modes.norm(dim=1)
        signed = cosines.sign().unsqueeze(1) * s.unsqueeze(1) * v
        found["error_of_weights"].append(((modes - signed).norm() / W.norm()).item())
        found["least_cosine"].append(cosines.abs().min().item())
        found["nulls"][str(count)] = fitted.nulls_._asdict()
        axes.plot(cosines.abs().tolist(), marker=".", label=f"{count:,} samples")
    axes.set(xlabel="mode of D, cheapest first", ylabel="|cos| to W's singular vector")
    axes.set_title(
        f"Modes of P W are W's singular vectors: |cos| ≥ {found['least_cosine'][-1]:.4f} at {samples[-1]:,} samples",
        fontsize=10, wrap=True,
    )  # fmt: skip
    axes.legend(fontsize=8)
    run.figure(figure, "isotropic")
    return found


def _tree(run: common.Run, steps: int, seed: int) -> dict[str, Any]:
    """Descramble a two-layer linear network from small weights: P W₁ should be T sqrt(S) Vᵀ, a level of the tree in turn."""
    tree = signals.tree(DEPTH)
    items, properties = tree.shape[1], len(tree)
    torch.manual_seed(seed)
    first = nn.Linear(items, HIDDEN, bias=False, dtype=torch.float64)
    network = nn.Sequential(first, nn.Linear(HIDDEN, properties, bias=False, dtype=torch.float64))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.01)
    untrained = first.weight.detach().clone()
    descent = torch.optim.SGD(network.parameters(), 0.05)
    x = torch.eye(items, dtype=torch.float64)
    for _ in range(steps):
        descent.zero_grad()
        loss = 0.5 * (network(x) - tree.mT).square().sum() / items
        loss.backward()
        descent.step()
    learned = first.weight.detach()

    haar = torch.linalg.svd(tree, full_matrices=False).Vh
    levels = [slice(0, 1), *(slice(2**level, 2 ** (level + 1)) for level in range(DEPTH))]
    found: dict[str, Any] = {"mse": 2 * loss.item() / properties, "share_in_its_level": {}, "nulls": {}}
    fits = {}
    for name, weight in (("trained", learned), ("untrained", untrained)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the rank, which is 8 and in the record
            fits[name] = Descrambler().fit((weight @ x).mT)
        modes = derivative_operator(HIDDEN, "fourier2").eigenvectors().mT @ fits[name].weights(weight).weight
        energy = (modes[:items] @ haar.mT).square()
        found["share_in_its_level"][name] = [(energy[at, at].sum() / energy[at].sum()).item() for at in levels]
        found["nulls"][name] = fits[name].nulls_._asdict()
    ambiguity = fits["trained"].ambiguity_
    found["singular_values"] = torch.linalg.svdvals(learned).tolist()
    found["singular_values_of_theory"] = torch.linalg.svdvals(tree).sqrt().tolist()
    found["ambiguity"] = ambiguity._asdict()

    modes = derivative_operator(HIDDEN, "fourier2").eigenvectors().mT @ fits["trained"].P_ @ learned
    shown = {"W₁": learned, "P W₁": fits["trained"].P_ @ learned, "P W₁ by modes of D": modes, "Vᵀ of the tree": haar}
    figure, panels = plt.subplot_mosaic(
        [list(shown), ["ambiguity"] * len(shown)], figsize=(11, 5), height_ratios=(3, 0.8), layout="constrained"
    )
    for title, values in shown.items():
        limit = float(values.abs().max())
        panels[title].imshow(
            values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        panels[title].set(title=title, xlabel="item")
    for title, rows in zip(shown, ("hidden unit", "row of P W₁", "mode of D", "right singular vector"), strict=True):
        panels[title].set_ylabel(rows)
    plots.ambiguity_strips(ambiguity, axes=panels["ambiguity"])
    least, untrained = (min(found["share_in_its_level"][name]) for name in ("trained", "untrained"))
    figure.suptitle(
        f"Energy of P W₁'s modes in their level of the tree: at least {least:.0%}, untrained {untrained:.0%}"
    )
    run.figure(figure, "tree")
    return found


def _convolution(run: common.Run, count: int, seed: int) -> dict[str, Any]:
    """Descramble circular convolutions, with a ReLU between, of stationary signals: P should permute frequencies, T Pi Tᵀ.

    "all shifts": every signal in each of its shifts, where H Hᵀ is circulant exactly, after a ReLU too. "as many drawn": as many
    signals, each once. "places mixed": these, their places in another order, so that nothing is stationary.
    """
    generator = torch.Generator().manual_seed(seed)
    kernels = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    drawn = signals.stationary(LENGTH, count * LENGTH, seed=seed)
    inputs = {
        "all shifts": signals.all_shifts(drawn[:count]),
        "as many drawn": drawn,
        "places mixed": drawn[:, torch.randperm(LENGTH, generator=generator)],
    }
    found: dict[str, Any] = {}
    figure, panels = plt.subplots(2, len(inputs), figsize=(11, 7), layout="constrained")
    for column, (name, values) in enumerate(inputs.items()):
        for layer, kernel in enumerate(kernels):
            values = _convolved(values, kernel)
            fitted = Descrambler().fit(values)
            shares = _by_frequency(fitted.P_)
            found[f"{name}, layer {layer + 1}"] = {
                "largest_share": {"least": shares.amax(1).min().item(), "mean": shares.amax(1).mean().item()},
                "frequencies": shares.argmax(1).tolist(), "frequencies_by_power": _by_power(values),
                "equal_components": len(fitted.ambiguity_.data_blocks), "nulls": fitted.nulls_._asdict(),
            }  # fmt: skip
            axes = panels[layer, column]
            image = axes.imshow(shares.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axes.set_title(f"{name}, layer {layer + 1}: largest share {shares.amax(1).mean():.2f}", fontsize=10)
            axes.set(xlabel="frequency along H, cycles", ylabel="mode of D", xticks=range(0, shares.shape[1], 4))
            values = values.relu()
    figure.colorbar(image, ax=panels, label="share of the mode's energy", aspect=40)
    figure.suptitle("Frequencies in each mode of D; titles have the mean of the modes' largest shares")
    run.figure(figure, "convolution")
    return found


def _convolved(values: Tensor, kernel: Tensor) -> Tensor:
    """Convolve signals (N, n), each around its circle."""
    side = len(kernel) // 2
    padded = nn.functional.pad(values.unsqueeze(1), (side, side), mode="circular")
    return nn.functional.conv1d(padded, kernel.view(1, 1, -1)).squeeze(1)


def _by_frequency(P: Tensor) -> Tensor:
    """Return the share of each frequency, cosine and sine together, in each mode of D: (n, n // 2 + 1)."""
    modes = derivative_operator(len(P), "fourier2").transform(P)
    shares = torch.fft.rfft(modes, norm="ortho").abs().square()
    shares[:, 1:] *= 2  # n is odd
    return shares


def _by_power(values: Tensor) -> list[int]:
    """Return the frequencies of signals (N, n) by power, each as often as it has components."""
    power = torch.fft.rfft(values).abs().square().mean(0)
    return [f for f in power.argsort(descending=True).tolist() for _ in range(1 if f == 0 else 2)]
