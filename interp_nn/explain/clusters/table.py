"""Table of a network's clusters: coverage, the largest clusters, and the mean over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_nn.explain.clusters.importance import GlobalImportance

_COVERAGE_AT = (1, 2, 5, 10, 20, 50, 100, 1000)
_FEATURES = 8  # printed columns


@dataclass(frozen=True, eq=False)
class ClusterTable:
    """The m largest of the clusters, one row each; `str` gives the table.

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

    def __str__(self) -> str:
        shown = self._features()
        lines = [f"{self.samples} samples in {self.clusters} clusters, max |W x + b - F| / max |F| = {self.check:.1e}"]
        marks = [m for m in _COVERAGE_AT if m < self.clusters] + [self.clusters]
        lines.append("  ".join(f"largest {m}: {100 * self.coverage[m - 1].item():.1f} %" for m in marks))
        scores = [f"{self.score} here", f"{self.score} on all"] if self.score else []
        header = ["cluster", "count", "response", "std", *scores, "rank", *(self.features[j] for j in shown)]
        rows = [header, *(self._row(i, shown) for i in range(len(self.count)))]
        blank = [""] * (len(header) - len(shown) - 1)
        for name, values in zip(("share", "  ±"), self.importance, strict=True):
            rows.append([name, *blank, *(f"{values[j].item():.3f}" for j in shown)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        if left := self.clusters - len(self.count):
            lines.append(f"and {left} smaller clusters")
        if left := len(self.features) - len(shown):
            lines.append(f"and {left} inputs of less importance")
        return "\n".join(lines)

    def _features(self) -> list[int]:
        """Return the indices of the most important features, in the order of the inputs."""
        return sorted(self.importance.mean.argsort(descending=True, stable=True)[:_FEATURES].tolist())

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
