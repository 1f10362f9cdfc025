"""Figures that only a report draws, each as wide as a phone can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from interp_nn.explain.plots.canvas import PALETTE, array, new_axes, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.7  # inches
MOST = 12  # classes, latents or columns of pixels that a figure or a table shows
_LETTERS = 24  # of a line of a label


def in_two_lines(name: str) -> str:
    """Return a name in lines of 24 letters; of more than two, the first and the last."""
    lines = wrap(name.replace("= ", "=\N{NO-BREAK SPACE}"), _LETTERS)
    return "\n".join(lines if len(lines) < 3 else [f"{lines[0]} …", lines[-1]])


def whole(axes: Axes) -> Figure:
    """Return the figure of axes."""
    figure: Any = axes.figure
    return figure


def narrow(axes: Axes) -> Figure:
    """Return the figure of axes, as wide as a phone can show; long labels get two lines."""
    figure = whole(axes)
    axes.xaxis.label.set_wrap(True)
    for axis in (axes.xaxis, axes.yaxis):
        if any(len(label.get_text()) > _LETTERS for label in axis.get_ticklabels()):
            axis.set_ticks(axis.get_ticklocs(), [in_two_lines(label.get_text()) for label in axis.get_ticklabels()])
    figure.set_size_inches(WIDTH, figure.get_size_inches()[1])
    return figure


def confusion(counts: Tensor, names: Sequence[str], title: str) -> Figure:
    """Draw how often each class (rows) gets each answer (columns); errors are coloured."""
    values = array(counts)
    long = max(map(len, names)) > _LETTERS
    axes = new_axes(None, (WIDTH, (0.5 if long else 0.3) * len(names) + (2.2 if long else 1.5)))
    errors = np.where(np.eye(len(names), dtype=bool), 0, values)
    axes.imshow(errors, cmap="Oranges", vmin=0, vmax=max(1, errors.max()) * 1.5, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if value:
            axes.text(j, i, f"{value:,}", ha="center", va="center", fontsize=8, color="0.45" if i == j else "black")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if sum(map(len, names)) > 40:
        axes.tick_params(axis="x", rotation=30)
    axes.set(xlabel="answer of the network", ylabel="true class")
    set_title(axes, title)
    return narrow(axes)


def against(truth: Tensor, predicted: Tensor, title: str) -> Figure:
    """Draw predictions against true values, and the line where they are equal."""
    x, y = array(truth), array(predicted)
    axes = new_axes(None, (WIDTH, 3.6))
    axes.scatter(x, y, s=9, color=PALETTE[0])
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set(xlabel="true value", ylabel="prediction")
    set_title(axes, title)
    return narrow(axes)


def distances(names: Sequence[str], gate: Sequence[float], nearest: Sequence[float], title: str) -> Figure:
    """Draw for each sample the distance to its nearest gate and to the nearest other sample, on a logarithmic scale."""
    axes = new_axes(None, (WIDTH, 0.22 * len(names) + 1.4))
    places = range(len(names))
    inside = [place for place in places if gate[place] > 0]  # a distance of 0 has no place on this scale
    axes.hlines(inside, [gate[i] for i in inside], [nearest[i] for i in inside], color="0.8", zorder=1)
    axes.scatter([gate[i] for i in inside], inside, s=22, color=PALETTE[0], label="nearest gate", zorder=2)
    axes.scatter(nearest, places, s=22, color=PALETTE[1], marker="s", label="nearest other sample", zorder=2)
    axes.set_xscale("log")
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="distance, in the inputs' units", ylabel="sample")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    set_title(axes, title)
    return narrow(axes)


def pixels(sizes: Tensor, title: str) -> Figure:
    """Draw the mean |contribution| of each pixel (h, w)."""
    axes = new_axes(None, (WIDTH, 3.6))
    shown = axes.imshow(array(sizes), cmap="cividis", vmin=0)
    axes.figure.colorbar(shown, ax=axes, label="mean |contribution|")
    axes.set(xlabel="column", ylabel="row")
    set_title(axes, title)
    return narrow(axes)


def shares(on: Tensor, title: str) -> Figure:
    """Draw how many units pass for which share of the samples; those that pass for none or for all have bars of their own."""
    from matplotlib.ticker import MaxNLocator

    axes = new_axes(None, (WIDTH, 2.6))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    percent = 100 * array(on)
    axes.hist(percent[(percent > 0) & (percent < 100)], bins=20, range=(0, 100), color=PALETTE[0])
    ends = axes.bar([-8, 108], [(percent == 0).sum(), (percent == 100).sum()], width=8, color=PALETTE[1])
    axes.bar_label(ends, fontsize=8)
    axes.set_xticks([-8, 0, 20, 40, 60, 80, 100, 108], ["never", "", "20", "40", "60", "80", "", "all"])
    axes.set(xlabel="samples for which a unit is on, %", ylabel="units")
    axes.margins(y=0.12)
    set_title(axes, title)
    return narrow(axes)


def spectra(values: Mapping[str, Tensor], title: str) -> Figure:
    """Draw the singular values of each layer's b, the largest first."""
    axes = new_axes(None, (WIDTH, 2.8))
    for i, (name, found) in enumerate(values.items()):
        axes.plot(
            range(1, len(found) + 1), array(found), ".-", color=PALETTE[i % len(PALETTE)], linewidth=0.8, label=name
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="place of the singular value, the largest first", ylabel="singular value")
    if len(values) > 1:
        axes.legend(fontsize=8, title="layer", title_fontsize=8)
    set_title(axes, title)
    return narrow(axes)
