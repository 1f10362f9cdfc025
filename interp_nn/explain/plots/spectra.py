"""Figures of descrambling: weights, spectra, loss against null models, and the ambiguity of the optimum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from interp_nn.explain.descramble.fourier import fft_view
from interp_nn.explain.plots.canvas import PALETTE, SIGNED, array, new_axes, pyplot, scale, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from interp_nn.explain.descramble.descrambler import Nulls
    from interp_nn.explain.descramble.optimum import Ambiguity, Spectrum

_NULLS = {
    "fitted": ("the data", PALETTE[0]),
    "held_out": ("held-out data", PALETTE[4]),
    "shuffled": ("shuffled data", PALETTE[1]),
    "random_net": ("untrained network", "0.6"),
}


def descrambled_weights(
    before: Tensor, after: Tensor, *, rows: str = "feature", columns: str = "input", figure: Figure | None = None
) -> Figure:
    """Draw a weight before and after descrambling with one colour scale, and below them their Fourier amplitudes.

    Descrambling puts rows that are alike next to each other, so that its amplitudes are bright near 0 cycles along the rows. The
    lower titles have the share of the squared amplitudes in the lowest quarter of these cycles. It is about a quarter for rows in
    no order.

    Args:
        before: W (n, d).
        after: P W (n, d).
        rows: Label of the rows.
        columns: Label of the columns.
        figure: Figure to draw on; by default a new one.

    Returns:
        The figure.

    Raises:
        ValueError: Shapes that are not two of one matrix.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = descrambled_weights(torch.eye(3), torch.eye(3).flip(0))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['before', 'after']
    """
    plt = pyplot()
    if before.dim() != 2 or before.shape != after.shape or not before.numel():
        raise ValueError(
            f"before, after: got shapes {tuple(before.shape)} and {tuple(after.shape)}, want (n, d) with entries, twice"
        )
    if figure is None:
        figure = plt.figure(figsize=(7.4, 6.2), layout="constrained")
    images, waves = figure.subplots(2, 2)
    limit, extend = scale(np.stack((array(before), array(after))))
    views = [fft_view(weight) for weight in (before, after)]
    brightest = max(float(view.amplitudes.max()) for view in views) or 1.0
    for top, bottom, weight, view, title in zip(
        images, waves, (before, after), views, ("before", "after"), strict=True
    ):
        shown = top.imshow(array(weight), cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        x, y = view.column_waves.tolist(), view.row_waves.tolist()
        bright = bottom.imshow(
            array(view.amplitudes),
            cmap="magma",
            vmin=0,
            vmax=brightest,
            origin="lower",
            extent=(x[0] - 0.5, x[-1] + 0.5, y[0] - 0.5, y[-1] + 0.5),
            aspect="auto",
            interpolation="nearest",
        )
        top.set(title=title, xlabel=columns, ylabel=rows)
        share = _slow_share(array(view.amplitudes), np.asarray(y))
        bottom.set(xlabel=f"cycles over all {columns}s", ylabel=f"cycles over all {rows}s")
        set_title(bottom, f"{share:.0%} of the energy is slow")
    figure.colorbar(shown, ax=images, label="weight", extend=extend)
    figure.colorbar(bright, ax=waves, label="Fourier amplitude")
    return figure


def _slow_share(amplitudes: np.ndarray[Any, Any], waves: np.ndarray[Any, Any]) -> float:
    """Return the share of the energy in the quarter of the rows' cycles that is nearest to 0."""
    energy = (amplitudes.astype(np.float64) ** 2).sum(1)
    slow = np.abs(waves) <= np.abs(waves).max() / 4
    return float(energy[slow].sum() / (energy.sum() or 1.0))


def spectrum_curves(
    spectrum: Spectrum, *, others: Mapping[str, Tensor] | None = None, axes: Axes | None = None
) -> Axes:
    """Draw the share of the energy in each principal component, largest first, and the cost of the mode it becomes.

    The costs have a second axis, as shares of the largest cost. Zeros are not visible on the logarithmic scales. The title has
    the loss that the pairing leaves, relative to the mean over random P: far below 100 % where few components hold the energy.

    Args:
        spectrum: As `Descrambler.spectrum_`.
        others: By name, further energies (n,) in the same order, for example of shuffled data.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes of the energies.

    Raises:
        ValueError: Energies of another shape.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from interp_nn.explain import Spectrum
        >>> spectrum_curves(Spectrum(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0]))).lines[0].get_ydata()
        array([0.75, 0.25], dtype=float32)
    """
    axes = new_axes(axes, (5.4, 3.8))
    curves = {"energy of the components": spectrum.energies, **(others or {})}
    for index, (name, energies) in enumerate(curves.items()):
        shares = array(energies)
        if shares.ndim != 1 or not len(shares):
            raise ValueError(f"{name}: got shape {shares.shape}, want (n,)")
        shares = shares / (shares.sum() or 1.0)
        axes.plot(
            np.arange(len(shares)),
            np.where(shares > 0, shares, np.nan),
            color=PALETTE[index % len(PALETTE)],
            marker=".",
            label=name,
        )
    costs = array(spectrum.mode_costs)
    costs = costs / (costs.max() or 1.0)
    twin = axes.twinx()
    (line,) = twin.plot(
        np.arange(len(costs)),
        np.where(costs > 0, costs, np.nan),
        color="0.4",
        linestyle="--",
        label="cost of the modes",
    )
    for each in (axes, twin):
        if any((np.asarray(drawn.get_ydata()) > 0).any() for drawn in each.lines):
            each.set_yscale("log")
    shown = [*axes.lines, line]
    axes.legend(handles=shown, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), borderaxespad=5, ncols=2)
    energies, mode_costs = (values.double() for values in (spectrum.energies, spectrum.mode_costs))
    chance = float(mode_costs.mean() * energies.sum())
    left = f": {float(mode_costs @ energies) / chance:.2g} of a random P's loss is left" if chance else ""
    axes.set(xlabel="mode and component, in the order of the pairing", ylabel="share of the energy")
    set_title(axes, f"Energetic components get cheap modes{left}")
    twin.set_ylabel("cost of the mode / largest cost")
    return axes


def null_bars(nulls: Mapping[str, Nulls], *, axes: Axes | None = None) -> Axes:
    """Draw the loss of each layer relative to a random P: of the data, held-out data, shuffled data and an untrained network.

    NaN values have no bar. A layer has structure from training if its first bar is below the others.

    Args:
        nulls: By name of the layer, `Descrambler.nulls_`.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: No layers.
        ImportError: matplotlib is not installed.

    Example:
        >>> from interp_nn.explain import Nulls
        >>> axes = null_bars({"fc1": Nulls(0.1, 0.4, 0.12, 0.2)})
        >>> axes.get_ylabel()
        'loss over that of a random P'
    """
    if not nulls:
        raise ValueError("nulls: got none, want at least one layer's")
    axes = new_axes(axes, (3.6 + 1.5 * len(nulls), 3.8))
    width = 0.8 / len(_NULLS)
    for place, (field, (label, colour)) in enumerate(_NULLS.items()):
        heights = np.array([getattr(one, field) for one in nulls.values()], dtype=float)
        if np.isnan(heights).all():
            continue
        bars = axes.bar(np.arange(len(nulls)) + (place - 1.5) * width, heights, 0.95 * width, color=colour, label=label)
        axes.bar_label(bars, ["" if np.isnan(h) else _short(h) for h in heights], padding=2, fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="a random P")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(nulls)), list(nulls))
    below = sum(
        all(one.fitted < other for other in (one.shuffled, one.random_net) if not np.isnan(other))
        for one in nulls.values()
    )
    axes.set(ylabel="loss over that of a random P", xlabel="layer")
    axes.set_title(
        f"The data's loss is below all null models in {below} of {len(nulls)} layers", fontsize=10, wrap=True
    )
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return axes


def _short(value: float) -> str:
    """Write a number so that it fits above a bar: 0.43, 4.4e-4."""
    return f"{value:.2g}" if value >= 0.001 else f"{value:.1e}".replace("e-0", "e-")


def ambiguity_strips(ambiguity: Ambiguity, *, axes: Axes | None = None) -> Axes:
    """Draw which modes and components an optimal P may rotate into each other without a change of the loss.

    Grey modes and components are determined up to their sign. Each run of equal values has a colour. Components without
    energy are black.

    Args:
        ambiguity: As `Descrambler.ambiguity_`.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> from interp_nn.explain import Ambiguity
        >>> ambiguity_strips(Ambiguity(((1, 3),), (), 4, 4)).get_title()
        'Arbitrary beyond signs: 2 of 4 modes, 0 of 4 components'
    """
    n = ambiguity.features
    strips = np.zeros((2, n), dtype=int)
    for strip, blocks in zip(strips, (ambiguity.operator_blocks, ambiguity.data_blocks), strict=True):
        for index, (start, stop) in enumerate(blocks):
            strip[start:stop] = 1 + index % 2
    strips[1, ambiguity.rank :] = 3
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axes = new_axes(axes, (7.4, 2.2))
    colours = ListedColormap(["0.88", PALETTE[0], PALETTE[4], "black"])
    axes.imshow(strips, cmap=colours, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
    axes.set_yticks([0, 1], ["modes of D", "components of H"])
    axes.tick_params(left=False)
    axes.axhline(0.5, color="white", linewidth=4)
    key = {"determined": 0, "equal values: arbitrary": 1, "no energy": 3}
    patches = [Patch(color=colours(place), label=name) for name, place in key.items()]
    axes.legend(handles=patches, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0), borderaxespad=5, ncols=3)
    free = strips.astype(bool).sum(1)
    axes.set(
        xlabel="mode and component",
        title=f"Arbitrary beyond signs: {free[0]} of {n} modes, {free[1]} of {n} components",
    )
    return axes
