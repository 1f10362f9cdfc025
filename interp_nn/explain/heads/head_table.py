"""Table of a head's latents: variance, importance, classes, and accuracy with the most important ones."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

_ROWS = 12  # printed latents


@dataclass(frozen=True, eq=False)
class HeadTable:
    """The latents of a head, most important first; `str` gives the table.

    Attributes:
        latents: Index of each latent, (k,) int64.
        variance: Share of the codes' variance, (k,).
        importance: Share of the outputs' change that the latent makes: standard deviation times norm of its weights, (k,).
        supports: Name of the output with the latent's largest weight; "-" for a latent that changes no output.
        opposes: Name of the output with its smallest weight; "-" likewise.
        agreement: Share of the samples whose predicted class is that of the network, with the latents up to this one alone, (k,).
        accuracy: The same with the given classes y, (k,); None without y.
        heading: One line about the head.

    Example:
        >>> from interp_nn.explain import read_head
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
        >>> table = read_head(model, "0", torch.randn(9, 3), output="1", class_names=["no", "yes"]).summary()
        >>> sorted(table.latents.tolist()), str(table).splitlines()[1].split()
        ([0, 1], ['latent', 'variance', 'importance', 'supports', 'opposes', 'agreement'])
    """

    latents: Tensor
    variance: Tensor
    importance: Tensor
    supports: tuple[str, ...]
    opposes: tuple[str, ...]
    agreement: Tensor
    accuracy: Tensor | None
    heading: str

    def __str__(self) -> str:
        columns = self._columns()
        shown = min(_ROWS, len(self.latents))
        cells = [[name, *(_cell(value) for value in values[:shown])] for name, values in columns.items()]
        widths = [max(map(len, column)) for column in cells]
        lines = [
            "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in zip(*cells, strict=True)
        ]
        left = len(self.latents) - shown
        return "\n".join([self.heading, *lines, *([f"and {left} latents of less importance"] if left else [])])

    def to_pandas(self) -> Any:
        """Return the table as a pandas.DataFrame, one row for each latent. Raises ImportError without pandas."""
        import pandas  # type: ignore[import-untyped, unused-ignore]

        return pandas.DataFrame(self._columns()).set_index("latent")

    def _repr_html_(self) -> str:
        columns = self._columns()
        head = "".join(f"<th>{escape(name)}</th>" for name in columns)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>"
            for row in zip(*columns.values(), strict=True)
        )
        return f"<p>{escape(self.heading)}</p><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _columns(self) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {
            "latent": self.latents.tolist(),
            "variance": self.variance.tolist(),
            "importance": self.importance.tolist(),
            "supports": list(self.supports),
            "opposes": list(self.opposes),
            "agreement": self.agreement.tolist(),
        }
        if self.accuracy is not None:
            columns["accuracy"] = self.accuracy.tolist()
        return columns


def _cell(value: float | int | str) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) else str(value)


def gini(values: Tensor) -> float:
    """Compute the Gini coefficient of values >= 0: 0 if all are equal, near 1 if few hold the sum; 0 for zeros."""
    ordered = values.double().flatten().sort().values
    total, n = ordered.sum(), len(ordered)
    if not total > 0:
        return 0.0
    ranks = torch.arange(1, n + 1, dtype=torch.float64)
    return float((2 * (ranks * ordered).sum() / total - (n + 1)) / n)
