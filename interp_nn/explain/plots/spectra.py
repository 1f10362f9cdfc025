"""Descrambled weights, the spectra that descrambling pairs, its loss against chance and nulls, and what of it is arbitrary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from interp_nn.explain.descramble.fourier import fft_view
from interp_nn.explain.plots.canvas import SIGNED, array, new_axes, pyplot, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from interp_nn.explain.descramble.descrambler import Nulls
    from interp_nn.explain.descramble.optimum import Ambiguity, Spectrum

_NULLS = {
    "fitted": ("the data", "tab:blue"),
    "held_out": ("held-out data", "tab:cyan"),
    "shuffled": ("shuffled data", "tab:orange"),
    "random_net": ("untrained network", "0.6"),
}


def descrambled_weights(
    before: Tensor, after: Tensor, *, rows: str = "feature", columns: str = "input", figure: Figure | None = None
) -> Figure:
    """A weight before and after descrambling, as images with one scale, and below them their Fourier amplitudes.

    before, after: (n, d), as W and P W. rows, columns: what these are. Raises ValueError for shapes that are not one matrix's.
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
        bottom.set(xlabel=f"turns along {columns}s", ylabel=f"turns along {rows}s")
    figure.colorbar(shown, ax=images, label="weight", extend=extend)
    figure.colorbar(bright, ax=waves, label="Fourier amplitude")
    return figure


def spectrum_curves(
    spectrum: Spectrum, *, others: Mapping[str, Tensor] | None = None, axes: Axes | None = None
) -> Axes:
    """The share of the energy in each principal component, largest first, and what the mode that it is sent to costs.

    spectrum: as `Descrambler.spectrum_`; costs are drawn on a scale of their own, as shares of the largest. others: energies
    (n,) by name, such as a null's, in the same order. Zeros are off the logarithmic scale.
    """
    axes = new_axes(axes, (5.4, 3.8))
    curves = {"energy of the components": spectrum.energies, **(others or {})}
    for index, (name, energies) in enumerate(curves.items()):
        shares = array(energies)
        if shares.ndim != 1 or not len(shares):
            raise ValueError(f"{name}: got shape {shares.shape}, want (n,)")
        shares = shares / (shares.sum() or 1.0)
        axes.plot(
            np.arange(len(shares)), np.where(shares > 0, shares, np.nan), color=f"C{index}", marker=".", label=name
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
    axes.legend(handles=[*axes.lines, line], fontsize=8, loc="lower center")
    axes.set(xlabel="mode and component", ylabel="share of the energy", title="What descrambling pairs")
    twin.set_ylabel("share of the dearest mode's cost")
    return axes


def null_bars(nulls: Mapping[str, Nulls], *, axes: Axes | None = None) -> Axes:
    """The loss in units of chance for each of some layers: of the data, held out, shuffled, and of the untrained network.

    nulls: `Descrambler.nulls_` by name. What is NaN is left out. Only a first bar below its neighbours is a finding.
    """
    if not nulls:
        raise ValueError("nulls: got none, want at least one layer's")
    axes = new_axes(axes, (1.6 + 1.5 * len(nulls), 3.8))
    width = 0.8 / len(_NULLS)
    for place, (field, (label, colour)) in enumerate(_NULLS.items()):
        heights = np.array([getattr(one, field) for one in nulls.values()], dtype=float)
        if np.isnan(heights).all():
            continue
        bars = axes.bar(np.arange(len(nulls)) + (place - 1.5) * width, heights, 0.95 * width, color=colour, label=label)
        axes.bar_label(bars, ["" if np.isnan(h) else f"{h:.2g}" for h in heights], padding=2, fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--", label="a random P")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(nulls)), list(nulls))
    axes.set(ylabel="loss over that of a random P", title="Descrambling against its nulls")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    return axes


def ambiguity_strips(ambiguity: Ambiguity, *, axes: Axes | None = None) -> Axes:
    """Which modes of the operator, and which components of the data, an optimal P may rotate into each other at no cost.

    ambiguity: as `Descrambler.ambiguity_`. Grey is determined but for its sign; each run of equal values has a colour, and
    components without energy are black, whatever their values.
    """
    n = ambiguity.features
    strips = np.zeros((2, n), dtype=int)
    for strip, blocks in zip(strips, (ambiguity.operator_blocks, ambiguity.data_blocks), strict=True):
        for index, (start, stop) in enumerate(blocks):
            strip[start:stop] = 1 + index % 2
    strips[1, ambiguity.rank :] = 3
    from matplotlib.colors import ListedColormap

    axes = new_axes(axes, (6.4, 1.9))
    colours = ListedColormap(["0.88", "tab:blue", "tab:cyan", "black"])
    axes.imshow(strips, cmap=colours, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
    axes.set_yticks([0, 1], ["modes of D", "components of H"])
    axes.tick_params(left=False)
    axes.axhline(0.5, color="white", linewidth=4)
    free = strips.astype(bool).sum(1)
    axes.set(
        xlabel="mode and component",
        title=f"Arbitrary beyond signs: {free[0]} of {n} modes, {free[1]} of {n} components",
    )
    return axes
