"""Figure of a head's latents and classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp_nn.explain.plots.canvas import array, heat_map, new_axes, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from interp_nn.explain.heads.head_reading import HeadReading


def head_contributions(reading: HeadReading, *, most: int = 12, axes: Axes | None = None) -> Axes:
    """Draw what the most important latents (rows) add to each output (columns): the contribution of one standard deviation.

    Args:
        reading: As `read_head` returns it.
        most: Largest number of latents.
        axes: Axes to draw on; by default new ones.

    Returns:
        The axes.

    Raises:
        ValueError: Fewer than two outputs.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from interp_nn.explain import read_head
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> axes = head_contributions(read_head(model, "0", torch.randn(9, 4), output="1"))
        >>> len(axes.get_yticklabels()), [label.get_text() for label in axes.get_xticklabels()]
        (3, ['0', '1'])
    """
    kept = reading.kept_latents()
    order = kept.latents[:most]
    values = array((reading.weight * reading.codes.std(0, correction=0)).mT[order])
    rows = [f"latent {i}: {100 * float(reading.importance[i]):.0f} %" for i in order.tolist()]
    axes = new_axes(axes, (max(5.0, 0.62 * len(reading.class_names) + 3.2), max(2.6, 0.34 * len(rows) + 1.5)))
    heat_map(axes, values, rows, reading.class_names, "output per standard deviation")
    alone = 100 * float(kept.agreement[len(rows)])
    axes.set(xlabel="output")
    set_title(axes, f"{len(rows)} latents alone predict as the network in {alone:.0f} % of samples")
    return axes
