"""Figures of the contributions of named features: bars and a waterfall of one sample, and a beeswarm of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from interp_nn.explain.plots.canvas import NEUTRAL, array, new_axes, number, set_title, signed_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 80  # of a beeswarm's row: dots in one bin are drawn above and below each other


class _Parts(NamedTuple):
    """What adds up to an output: names, values and colours of the bars, and the output."""

    names: list[str]
    values: np.ndarray[Any, Any]
    colours: list[str]
    output: float


def contribution_bars(
    contributions: Tensor,
    constant: float | Tensor,
    *,
    x: Tensor | None = None,
    features: Sequence[str] | None = None,
    most: int = 10,
    output: str = "output",
    axes: Axes | None = None,
) -> Axes:
    """Draw what each feature and the constant add to one output of one sample, and the sum, as bars.

    The largest contributions are first. Those beyond `most` are one bar, so that the bars always add up to the output.

    Args:
        contributions: (d,), in the output's units, as `AffineMap.contributions` returns them for one output of one sample.
        constant: The constant c of that output, a number.
        x: The sample's features (d,), shown beside their names.
        features: d names of the features; by default x0, x1, ...
        most: Largest number of features with a bar of their own.
        output: Name of the output, for the axis.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Other shapes or numbers of names, or a `most` below 1.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> axes = contribution_bars(torch.tensor([1.0, -3.0]), 0.5, features=["age", "fare"])
        >>> [label.get_text() for label in axes.get_yticklabels()], [float(bar.get_width()) for bar in axes.patches]
        (['fare', 'age', 'constant', 'sum'], [-3.0, 1.0, 0.5, -1.5])
    """
    parts = _parts(contributions, constant, x, features, most)
    names, values = [*parts.names, "constant", "sum"], [*parts.values, number(constant, "constant"), parts.output]
    axes = new_axes(axes, (6.0, 0.32 * len(names) + 1.4))
    bars = axes.barh(range(len(names)), values, color=[*parts.colours, NEUTRAL, NEUTRAL])
    axes.bar_label(bars, [f"{value:+.3g}" for value in values], padding=3, fontsize=8)
    _finish(
        axes, names, f"contribution to {output}", f"{parts.names[0]} contributes most to {output} {parts.output:.3g}"
    )
    return axes


def contribution_waterfall(
    contributions: Tensor,
    constant: float | Tensor,
    *,
    x: Tensor | None = None,
    features: Sequence[str] | None = None,
    most: int = 10,
    output: str = "output",
    axes: Axes | None = None,
) -> Axes:
    """Draw how one output of one sample adds up: from the constant, feature by feature, to the output.

    The largest contributions are first, and those beyond `most` are one step.

    Args:
        contributions: (d,), in the output's units, as `AffineMap.contributions` returns them for one output of one sample.
        constant: The constant c of that output, a number.
        x: The sample's features (d,), shown beside their names.
        features: d names of the features; by default x0, x1, ...
        most: Largest number of features with a step of their own.
        output: Name of the output, for the axis.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Other shapes or numbers of names, or a `most` below 1.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> axes = contribution_waterfall(torch.tensor([1.0, -3.0]), 0.5, features=["age", "fare"])
        >>> axes.get_title()
        'output -1.5 = constant 0.5 + contributions -2'
    """
    parts = _parts(contributions, constant, x, features, most)
    constant = number(constant, "constant")
    names = ["constant", *parts.names, output]
    ends = constant + np.cumsum(parts.values)
    starts = np.concatenate([[0.0, constant], ends[:-1], [0.0]])
    values = np.concatenate([[constant], parts.values, [parts.output]])
    axes = new_axes(axes, (6.4, 0.34 * len(names) + 1.4))
    bars = axes.barh(range(len(names)), values, left=starts, color=[NEUTRAL, *parts.colours, NEUTRAL])
    for bar in bars:
        bar.sticky_edges.x[:] = [0.0]  # matplotlib gives no margin beside a bar's start
    for i, end in enumerate((starts + values)[:-1]):
        axes.plot([end, end], [i - 0.4, i + 1.4], color="0.5", linewidth=0.8)
    texts = [f"{value:+.3g}" for value in values]
    for bar, text, start, value in zip(bars, texts, starts, values, strict=True):
        place = (start + value, bar.get_y() + bar.get_height() / 2)
        sign, side = (1, "left") if value >= 0 else (-1, "right")
        axes.annotate(text, place, (3 * sign, 0), textcoords="offset points", ha=side, va="center", fontsize=8)
    title = f"{output} {parts.output:.3g} = constant {constant:.3g} + contributions {parts.output - constant:.3g}"
    _finish(axes, names, output, title)
    return axes


def contribution_beeswarm(
    contributions: Tensor,
    x: Tensor,
    *,
    features: Sequence[str] | None = None,
    most: int = 10,
    output: str = "output",
    axes: Axes | None = None,
) -> Axes:
    """Draw the contributions of each feature as one dot for each sample, in the colour of the feature's value.

    The features with the largest mean |contribution| are first. Colours are the ranks of a feature's values, from its lowest to
    its highest.

    Args:
        contributions: (n, d) of one output, in the output's units.
        x: The samples (n, d).
        features: d names of the features; by default x0, x1, ...
        most: Largest number of features, one row each.
        output: Name of the output, for the axis.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Other shapes or numbers of names, or a `most` below 1.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> axes = contribution_beeswarm(x * torch.tensor([3.0, 1.0]), x, features=["age", "fare"])
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['age', 'fare']
    """
    values, inputs = array(contributions), array(x)
    if values.ndim != 2 or not values.size or inputs.shape != values.shape:
        raise ValueError(f"contributions, x: got shapes {values.shape} and {inputs.shape}, want (n, d), twice")
    _check_finite(values)
    names = feature_list(features, values.shape[1])
    _check_most(most)
    sizes = np.abs(values).mean(0)
    order = np.argsort(-sizes, kind="stable")[:most]
    axes = new_axes(axes, (7.0, 0.42 * len(order) + 1.5))
    low, high = values[:, order].min(), values[:, order].max()
    for row, j in enumerate(order):
        bins = np.floor((values[:, j] - low) / ((high - low) or 1) * (_BINS - 1)).astype(int)
        ranks = np.unique(inputs[:, j], return_inverse=True)[1].ravel()
        shown = axes.scatter(
            values[:, j], row + _spread(bins), c=ranks / (ranks.max() or 1), cmap="cividis", vmin=0, vmax=1, s=9
        )
    bar = axes.figure.colorbar(shown, ax=axes, label="value of the feature", ticks=[0, 1], aspect=30)
    bar.ax.set_yticklabels(["low", "high"])
    share = sizes[order[0]] / (sizes.sum() or 1)
    title = f"{names[order[0]]} contributes most: {share:.0%} of all |contributions|"
    if left := len(names) - len(order):
        title += f" ({left} features not shown)"
    _finish(axes, [names[j] for j in order], f"contribution to {output}", title)
    return axes


def feature_list(features: Sequence[str] | None, d: int) -> list[str]:
    """Return d names of features, by default x0, x1, ... Raises ValueError for another number."""
    names = [f"x{j}" for j in range(d)] if features is None else [str(name) for name in features]
    if len(names) != d:
        raise ValueError(f"features: got {len(names)} names, want {d}")
    return names


def _parts(
    contributions: Tensor, constant: float | Tensor, x: Tensor | None, features: Sequence[str] | None, most: int
) -> _Parts:
    values = array(contributions)
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"contributions: got shape {values.shape}, want (d,): of one output of one sample, as contributions[0, 3] is"
        )
    _check_finite(values)
    names = feature_list(features, len(values))
    _check_most(most)
    if x is not None:
        given = array(x)
        if given.shape != values.shape:
            raise ValueError(f"x: got shape {given.shape}, want {values.shape}, as contributions has")
        names = [f"{name} = {value:.4g}" for name, value in zip(names, given.tolist(), strict=True)]
    order = np.argsort(-np.abs(values), kind="stable")
    shown, rest = order[:most], order[most:]
    bars, labels = values[shown], [names[j] for j in shown]
    if len(rest):
        bars, labels = np.append(bars, values[rest].sum()), [*labels, f"{len(rest)} others"]
    return _Parts(
        labels, bars, signed_colours(bars), number(constant, "constant") + float(values.sum(dtype=np.float64))
    )


def _check_finite(values: np.ndarray[Any, Any]) -> None:
    if not np.isfinite(values).all():
        raise ValueError("contributions: has values that are not finite, want finite ones")


def _check_most(most: int) -> None:
    if most < 1:
        raise ValueError(f"most: got {most}, want at least 1")


def _spread(bins: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return heights within ± 0.4 at which the dots of one bin lie symmetrically about 0."""
    place = np.empty(len(bins))
    order = np.argsort(bins, kind="stable")
    starts = np.searchsorted(bins[order], bins[order])
    place[order] = np.arange(len(bins)) - starts
    place = np.where(place % 2, -(place + 1) / 2, place / 2)
    return place * min(0.06, 0.4 / max(1.0, np.abs(place).max()))


def _finish(axes: Axes, names: Sequence[str], xlabel: str, title: str) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.25)
    axes.set_xlabel(xlabel)
    set_title(axes, title)
