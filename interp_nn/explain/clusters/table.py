"""The table of a network's clusters, which prints: coverage first, then the largest clusters, then all of them as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from interp_nn.explain.clusters.importance import GlobalImportance

_COVERAGE_AT = (1, 2, 5, 10, 20, 50, 100, 1000)
_FEATURES = 8  # columns that are printed


@dataclass(frozen=True, eq=False)
class ClusterTable:
    """The largest clusters, m of `clusters`, a row each; `str` of it is the table.

    samples: all that were fitted. coverage (clusters,): the share of them in the i + 1 largest clusters. count (m,): samples
    of the cluster. mean, std (m,): of their response; std is NaN for one sample. rank (m,): of the design matrix with an
    intercept. coefficients (m, d) of `features`, d names. importance: shares (d,) over all clusters. check: the largest error
    of the maps, relative to the network's largest output.

    score: "AUC", "R²" or None where nothing was observed. local (m,): the score of a cluster's map on its own samples, NaN
    where their response is constant; overall (m,): the score of that same map on all samples.
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
        """Those that are printed: the most important ones, in the order of the inputs."""
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
    """How predictions of a response (n,) are scored, and what that is called: AUC where it is binary, of 0 and 1, else R²."""
    binary = response.dtype == torch.bool or response.unique().tolist() == [0, 1]
    return (auc, "AUC") if binary else (r2, "R²")


def auc(prediction: Tensor, response: Tensor) -> float:
    """Area under the ROC curve: how often a sample with response 1 is predicted higher than one with 0, ties counting half; NaN
    where there is one kind only.
    """
    low, high = prediction[response == 0].sort().values, prediction[response == 1]
    pairs = len(low) * len(high)
    below = torch.searchsorted(low, high).sum() + torch.searchsorted(low, high, right=True).sum()
    return float(below) / 2 / pairs if pairs else torch.nan


def r2(prediction: Tensor, response: Tensor) -> float:
    """1 - sum (response - prediction)² / sum (response - mean)², over samples and outputs of (n, ...); NaN for a constant."""
    if bool((response == response[:1]).all()):
        return torch.nan
    prediction, response = prediction.double(), response.double()
    return float(1 - (response - prediction).square().sum() / (response - response.mean(0)).square().sum())
