"""Table of a network's clusters: coverage, the largest clusters, and the mean over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp_nn.display import html_table
from interp_nn.explain.clusters.importance import GlobalImportance

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COVERAGE_AT = (1, 2, 5, 10, 20, 50, 100, 1000)
_FEATURES = 8  # printed columns


@dataclass(frozen=True, eq=False, repr=False)
class ClusterTable:
    """The m largest of the clusters, one row each, and the most important features first.

    `str` gives the table with an explanation of its columns; notebooks show it as HTML. `to_pandas` has all features.

    Attributes:
        samples: Number of fitted samples.
        clusters: Number of clusters.
        coverage: Share of the samples in the i + 1 largest clusters, (clusters,).
        count: Number of samples in each cluster, (m,).
        mean: Mean response (m,).
        std: Standard deviation of the response (m,); NaN for one sample.
        rank: Rank of the design matrix with an intercept, (m,).
        score: "AUC", "R²", or None without an observed response.
        local: Score of each cluster's map on its own samples (m,); NaN where their response is constant.
        overall: Score of each cluster's map on all samples (m,).
        coefficients: (m, d).
        features: The d names of the inputs.
        importance: Shares (d,) over all clusters.
        check: Largest error of the maps, relative to the network's largest output.
        output: Index of the explained output.
        outputs: Number of the network's outputs.
        centred: True if the mean of several outputs was subtracted from it.
    """

    samples: int
    clusters: int
    coverage: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor
    rank: Tensor
    score: str | None
    local: Tensor
    overall: Tensor
    coefficients: Tensor
    features: tuple[str, ...]
    importance: GlobalImportance
    check: float
    output: int
    outputs: int
    centred: bool

    def __str__(self) -> str:
        header, rows = self._cells()
        rows = [header, *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*self._facts(), *table, *self._legend()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._cells(), above=self._facts(), below=self._legend())

    def to_pandas(self) -> Any:
        """Return the clusters as a data frame of pandas: a row for each, and all features, the most important one first.

        Raises ImportError where pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        columns = {"samples": self.count, "share": self.count / self.samples, "response": self.mean, "std": self.std}
        if self.score:
            columns |= {f"{self.score} here": self.local, f"{self.score} on all": self.overall}
        columns["rank"] = self.rank
        frame = DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
        for j in self._order():  # a feature may have the name of a column
            frame.insert(
                len(frame.columns), self.features[j], self.coefficients[:, j].cpu().numpy(), allow_duplicates=True
            )
        frame.index.name = "cluster"
        return frame

    def plot(self, **options: Any) -> Axes:
        """Draw the coefficients of the most important features, by `plots.cluster_coefficients`, and return the axes.

        Args:
            options: Of `plots.cluster_coefficients`, such as `axes`.
        """
        from interp_nn.explain.plots.clusters import cluster_coefficients

        shown = self._order()[:_FEATURES]
        axes = cluster_coefficients(
            self.coefficients[:, shown], self.count, features=[self.features[j] for j in shown],
            responses=self.mean, total=self.samples, **options,
        )  # fmt: skip
        return axes

    def _order(self) -> list[int]:
        """Return the indices of the features, the most important one first."""
        return self.importance.mean.argsort(descending=True, stable=True).tolist()

    def _facts(self) -> list[str]:
        output = f"output {self.output} of {self.outputs}: " if self.outputs > 1 else ""
        marks = [m for m in _COVERAGE_AT if m < self.clusters] + [self.clusters]
        return [
            f"{output}{self.samples} samples in {self.clusters} clusters, max |W x + c - F| / max |F| = {self.check:.1e}",
            "  ".join(f"largest {m}: {100 * self.coverage[m - 1].item():.1f} %" for m in marks),
        ]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows."""
        shown = self._order()[:_FEATURES]
        scores = [f"{self.score} here", f"{self.score} on all"] if self.score else []
        header = ["cluster", "samples", "response", "std", *scores, "rank", *(self.features[j] for j in shown)]
        rows = [self._row(i, shown) for i in range(len(self.count))]
        blank = [""] * (len(header) - len(shown) - 1)
        for name, values in zip(("share", "  ±"), self.importance, strict=True):
            rows.append([name, *blank, *(f"{values[j].item():.3f}" for j in shown)])
        return header, rows

    def _legend(self) -> list[str]:
        """Return what is not shown, and what the columns are."""
        lines = []
        if left := self.clusters - len(self.count):
            lines.append(f"and {left} smaller clusters")
        if (left := len(self.features) - _FEATURES) > 0:
            lines.append(f"and {left} features of less importance")
        less = f", less the mean of the {self.outputs} outputs" if self.centred else ""
        lines.append(
            f"response, std: mean and standard deviation in the cluster, of y or else of the network's output{less}"
        )
        if self.score:
            lines.append(
                f"{self.score} here, on all: of the cluster's map against y, on its own samples and on all samples"
            )
        full = len(self.features) + 1
        lines.append(f"rank: below {full}, the cluster's samples alone do not determine its map")
        lines.append(
            f"features: output{less}{',' * self.centred} per unit of the feature; share: part of |coefficient| x std, ± its "
            "spread over clusters"
        )
        return lines

    def _row(self, i: int, shown: list[int]) -> list[str]:
        scores = [_number(column[i]) for column in (self.local, self.overall)] if self.score else []
        response = [_number(self.mean[i]), _number(self.std[i])]
        rank = f"{int(self.rank[i])}/{len(self.features) + 1}"
        return [
            str(i),
            str(int(self.count[i])),
            *response,
            *scores,
            rank,
            *(_number(self.coefficients[i, j]) for j in shown),
        ]


def _number(value: Tensor) -> str:
    return "-" if torch.isnan(value) else f"{value.item():.3f}"


def scorer(response: Tensor) -> tuple[Callable[[Tensor, Tensor], float], str]:
    """Return a score of predictions and its name: AUC for a binary response (n,) of 0 and 1, else R²."""
    binary = response.dtype == torch.bool or response.unique().tolist() == [0, 1]
    return (auc, "AUC") if binary else (r2, "R²")


def auc(prediction: Tensor, response: Tensor) -> float:
    """Compute the area under the ROC curve; NaN if all responses are equal.

    It is the share of pairs in which the sample with response 1 has the higher prediction; a tie counts half.
    """
    low, high = prediction[response == 0].sort().values, prediction[response == 1]
    pairs = len(low) * len(high)
    below = torch.searchsorted(low, high).sum() + torch.searchsorted(low, high, right=True).sum()
    return float(below) / 2 / pairs if pairs else torch.nan


def r2(prediction: Tensor, response: Tensor) -> float:
    """Compute 1 - sum (response - prediction)² / sum (response - mean)² over all of (n, ...); NaN for a constant response."""
    if bool((response == response[:1]).all()):
        return torch.nan
    prediction, response = prediction.double(), response.double()
    return float(1 - (response - prediction).square().sum() / (response - response.mean(0)).square().sum())
