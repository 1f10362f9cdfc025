"""Helpers of the figures: matplotlib, axes, arrays, colours and their scales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIGNED = "RdBu_r"
POSITIVE, NEGATIVE, NEUTRAL = "#b2182b", "#2166ac", "0.35"  # the ends of SIGNED
# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is last, because it is weak on white.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
LIGHT = ("#a6cde8", "#f7d08a", "#a9dfc9", "#e3b7d2", "#f2b48c", "#dcdcdc")  # the same, as areas behind text and lines


def pyplot() -> Any:
    """Import matplotlib.pyplot. Raises an ImportError with the command that installs it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return pyplot


@contextmanager
def closing() -> Iterator[None]:
    """Close the figures that pyplot makes within, also where an error ends it, and do not warn of how many are open."""
    plt = pyplot()
    before = set(plt.get_fignums())
    try:
        with plt.rc_context({"figure.max_open_warning": 0}):
            yield
    finally:
        for made in set(plt.get_fignums()) - before:
            plt.close(made)


def new_axes(axes: Axes | None, size: tuple[float, float]) -> Axes:
    """Return the given axes, or those of a new figure of a size in inches."""
    return pyplot().figure(figsize=size, layout="constrained").subplots() if axes is None else axes


def set_title(axes: Axes, text: str) -> None:
    """Set a title that breaks its line at the edges of the figure."""
    axes.set_title(text, fontsize=10, wrap=True)


def number(value: float | Tensor, name: str) -> float:
    """Return a number, or a tensor of one, as a float. Raises ValueError for other tensors."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, want one number")
        return float(value.detach())
    return float(value)


def array(values: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Convert a tensor to numpy; 16-bit dtypes become fp32."""
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def scale(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any] | None = None) -> tuple[float, str]:
    """Compute the limit of a symmetric colour scale that holds 99 % of the values, and the ends that it does not hold.

    Args:
        values: Array with any number of rows.
        weights: Weight of each row; by default 1.

    Returns:
        The limit, and `extend` for the colour bar: 'both', 'max', 'min' or 'neither'.
    """
    sizes = np.abs(values).ravel()
    order = np.argsort(sizes)
    share = np.ones_like(sizes) if weights is None else np.repeat(weights, values.size // len(values))
    cumulated = np.cumsum(share[order])
    limit = float(sizes[order[np.searchsorted(cumulated, 0.99 * cumulated[-1])]]) or 1.0
    high, low = bool((values > limit).any()), bool((values < -limit).any())
    return limit, "both" if high and low else "max" if high else "min" if low else "neither"


def heat_map(
    axes: Axes,
    values: np.ndarray[Any, Any],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    weights: np.ndarray[Any, Any] | None = None,
) -> None:
    """Draw signed values in colour and digits, with a colour bar; `weights` are those of the rows for `scale`."""
    if len(columns) != values.shape[1]:
        raise ValueError(f"titles: got {len(columns)} titles for {values.shape[1]} columns, want one for each")
    limit, extend = scale(values, weights)
    shown = axes.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(j, i, f"{round(float(value), 2) + 0.0:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    if max(map(len, columns)) > 8:
        pyplot().setp(axes.get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
    axes.figure.colorbar(shown, ax=axes, label=label, extend=extend)


def signed_colours(values: np.ndarray[Any, Any]) -> list[str]:
    """Return the colour of each value's bar: red for positive, blue for negative."""
    return [POSITIVE if value > 0 else NEGATIVE for value in values]
