"""Samples in clusters with an affine map for each: what exact clusters and merged ones have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from interp_nn.explain.clusters.importance import GlobalImportance, over_clusters, ranks, row_space_part, shares
from interp_nn.explain.clusters.table import ClusterTable, r2, scorer
from interp_nn.explain.linear.affine_map import AffineMap

Kind = Literal["coef", "scaled", "share", "contribution"]
Unseen = Literal["flag", "nearest"]
_AT_ONCE = 1 << 24  # coefficients that are gathered at a time


class Fidelity(NamedTuple):
    """How well affine maps stand for the network.

    r2: 1 - sum |F - (W x + b)|² / sum |F - mean F|² over samples and outputs; NaN where F is constant. agreement: the share
    of samples with the same largest output, or with the same sign where there is one output.
    """

    r2: float
    agreement: float


class PiecewiseAffine(ABC):
    """Clusters of samples x (n, *input) and an affine map for each, which stands for a network F: x -> (n, *output).

    labels_: (n,) int64, each sample's cluster; clusters are numbered by size, the largest first; -1 is none.
    counts_: (clusters,) int64. affine_: the clusters' maps, affine_[c] of c. inputs_ (n, *input), outputs_ (n, *output): the
    samples, and F of them. response_: (n,) what was observed, or None.
    """

    labels_: Tensor
    counts_: Tensor
    inputs_: Tensor
    outputs_: Tensor
    response_: Tensor | None

    @property
    @abstractmethod
    def affine_(self) -> AffineMap:
        """The clusters' maps."""

    @abstractmethod
    def _assign(self, X: object, unseen: Unseen) -> tuple[Tensor, Tensor, Tensor]:
        """New samples (n, *input), the network's outputs for them and their clusters."""

    def predict(self, X: object, *, unseen: Unseen = "flag") -> Tensor:
        """The cluster of each new sample, (n,) int64.

        unseen: what becomes of a pattern that no cluster has: "flag" it as -1 (`linearize` gives its own map), or put it in the
        "nearest" cluster, with the fewest gates that differ.
        """
        return self._assign(X, unseen)[2]

    def surrogate(self, X: object) -> Tensor:
        """W_c x + b_c with the map of each new sample's cluster, the nearest one for unseen patterns: (n, *output)."""
        x, _, labels = self._assign(X, "nearest")
        return self._apply(x, labels)

    def fidelity(self, X: object | None = None) -> Fidelity:
        """How well the maps stand for the network, on new samples, or on those of the clusters, which refitted maps flatter."""
        if X is None:
            x, wanted, labels = self._inside()
        else:
            x, wanted, labels = self._assign(X, "nearest")
        got, wanted = self._apply(x, labels).reshape(len(x), -1), wanted.reshape(len(x), -1)
        same = wanted.argmax(1) == got.argmax(1) if wanted.shape[1] > 1 else ((wanted > 0) == (got > 0)).squeeze(1)
        return Fidelity(r2(got, wanted), float(same.double().mean()))

    def check(self) -> float:
        """max |W_c x + b_c - F(x)| / max |F(x)| over the samples of the clusters: rounding, where the clusters are exact."""
        x, outputs, labels = self._inside()
        error, scale = (self._apply(x, labels) - outputs).abs().max(), outputs.abs().max()
        return float(error / torch.where(scale > 0, scale, 1))

    @cached_property
    def rank_(self) -> Tensor:
        """The rank of each cluster's design matrix with an intercept, (clusters,) int64.

        Below d + 1 the samples do not fix the cluster's map: it is the network's, and in part an extrapolation.
        """
        return ranks(self.inputs_.flatten(1), self.labels_, len(self.counts_))

    def coverage(self) -> Tensor:
        """The share of all samples that is in the m + 1 largest clusters, (clusters,) fp64."""
        return self.counts_.cumsum(0).double() / len(self.labels_)

    def importance(self, output: int = 0, kind: Kind = "coef", *, project: bool = False, centre: bool = True) -> Tensor:
        """What each input does to an output, cluster by cluster.

        output: its index, in outputs of several dimensions among all of them flattened. kind: "coef" the coefficients
        W_c[k, j] (clusters, *input), for logits the change of log-odds a unit; "scaled" |W_c[k, j]| std_j (clusters, *input);
        "share" the same divided by its sum over j (clusters, *input); "contribution" W_c[k, j] (x_j - mean_j) of each sample
        with its cluster's coefficients (n, *input), NaN for samples of no cluster. mean and std (population) are those of
        all samples.

        project: coefficients are first projected on the row space of the cluster's centred design matrix: inputs that are
        constant in the cluster get zero, inputs that move together share what they have. centre: where there are several
        outputs, their mean is taken off first, as a softmax does not see a vector that all classes share; False for outputs
        that are not logits. Raises IndexError for an output that is not there, ValueError for another kind.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind: got {kind!r}, want one of {', '.join(get_args(Kind))}")
        x = self.inputs_.flatten(1)
        coefficients, _ = self._map(output, centre)
        if project:
            coefficients = row_space_part(coefficients, x, self.labels_)
        if kind == "contribution":
            inside = (self.labels_ >= 0).unsqueeze(1)
            values = torch.where(inside, coefficients[self.labels_] * (x - x.mean(0)), torch.nan)
        elif kind == "coef":
            values = coefficients
        else:
            values = coefficients.abs() * x.std(0, correction=0)
            values = shares(values) if kind == "share" else values
        return values.view(-1, *self.inputs_.shape[1:])

    def global_importance(self, output: int = 0, *, project: bool = False, centre: bool = True) -> GlobalImportance:
        """The inputs' shares over all clusters, weighted by size: their mean and their dispersion, each (*input)."""
        return over_clusters(self.importance(output, "share", project=project, centre=centre), self.counts_)

    def summary(
        self,
        output: int = 0,
        *,
        feature_names: Sequence[str] | None = None,
        rows: int = 10,
        project: bool = False,
        centre: bool = True,
    ) -> ClusterTable:
        """A table of the largest clusters, `rows` of them: coverage, size, response, scores, rank and coefficients; it prints.

        The response is what `fit` was given as y, else the network's output. Where there is a y, each map is scored against it,
        on its own cluster and on all samples: by the area under the ROC curve where y is binary, else by R². With several
        outputs and a y of integers, which are classes, the response is whether it is `output`. project, centre: as in
        `importance`; scores are those of the map before projection. Raises ValueError for another number of names than inputs.
        """
        x = self.inputs_.flatten(1)
        names = tuple(feature_names) if feature_names is not None else tuple(f"x{j}" for j in range(x.shape[1]))
        if len(names) != x.shape[1]:
            raise ValueError(f"feature_names: got {len(names)} names, want {x.shape[1]}")
        coefficients = self.importance(output, project=project, centre=centre).flatten(1)[:rows]
        importance = self.global_importance(output, project=project, centre=centre)
        response = self._response_of(output)
        score, name = scorer(response)
        statistics = []
        for c, (weight, bias) in enumerate(zip(*(part[:rows] for part in self._map(output, centre)), strict=True)):
            fitted, own = x @ weight + bias, self.labels_ == c
            values = response[own].double()
            spread = values.std() if len(values) > 1 else values.new_full((), torch.nan)
            statistics.append((values.mean(), spread, score(fitted[own], response[own]), score(fitted, response)))
        mean, std, local, overall = torch.tensor(statistics, dtype=torch.float64).view(-1, 4).unbind(1)
        return ClusterTable(
            samples=len(x),
            clusters=len(self.counts_),
            coverage=self.coverage(),
            count=self.counts_[:rows],
            mean=mean,
            std=std,
            score=None if self.response_ is None else name,
            local=local,
            overall=overall,
            rank=self.rank_[:rows],
            coefficients=coefficients,
            features=names,
            importance=GlobalImportance(*(values.flatten() for values in importance)),
            check=self.check(),
        )

    def _response_of(self, output: int) -> Tensor:
        """What is to be explained by an output's map (n,): y, whether y is that class, or the output itself."""
        outputs = self.outputs_.reshape(len(self.outputs_), -1)
        if self.response_ is None:
            return outputs[:, output]
        if outputs.shape[1] > 1 and not self.response_.is_floating_point():
            return self.response_ == output % outputs.shape[1]
        return self.response_

    def _inside(self) -> tuple[Tensor, Tensor, Tensor]:
        """The samples that are in a cluster, the network's outputs for them and their clusters."""
        inside = self.labels_ >= 0
        return self.inputs_[inside], self.outputs_[inside], self.labels_[inside]

    def _maps(self) -> tuple[Tensor, Tensor]:
        """The clusters' weights (clusters, outputs, d) and biases (clusters, outputs), of inputs and outputs made flat."""
        clusters, d = len(self.counts_), self.inputs_[0].numel()
        return self.affine_.weight.reshape(clusters, -1, d), self.affine_.bias.reshape(clusters, -1)

    def _map(self, output: int, centre: bool) -> tuple[Tensor, Tensor]:
        """The coefficients (clusters, d) and constants (clusters,) of one output."""
        weight, bias = self._maps()
        outputs = weight.shape[1]
        if not -outputs <= output < outputs:
            raise IndexError(f"output: got {output}, want one of {outputs} outputs")
        if centre and outputs > 1:
            weight, bias = weight - weight.mean(1, keepdim=True), bias - bias.mean(1, keepdim=True)
        return weight[:, output], bias[:, output]

    def _apply(self, x: Tensor, labels: Tensor) -> Tensor:
        """The maps of these clusters at x (n, *input): (n, *output)."""
        return apply_maps(*self._maps(), x.flatten(1), labels).view(-1, *self.outputs_.shape[1:])


def apply_maps(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """W_c x + b_c (n, outputs) of x (n, d) with the maps (clusters, outputs, d), (clusters, outputs) that the labels choose."""
    size = max(1, _AT_ONCE // max(1, weight[0].numel()))
    parts = zip(x.split(size), labels.split(size), strict=True)
    return torch.cat([(weight[c] @ part.unsqueeze(2)).squeeze(2) + bias[c] for part, c in parts])
