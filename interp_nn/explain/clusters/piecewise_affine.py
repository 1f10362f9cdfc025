"""Base class of exact and merged clusters: samples in clusters, with an affine map for each cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from interp_nn.explain.clusters.importance import GlobalImportance, over_clusters, ranks, row_space_part, shares
from interp_nn.explain.clusters.table import ClusterTable, r2, scorer
from interp_nn.explain.linear.affine_map import AffineMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["coef", "scaled", "share", "contribution"]
Unseen = Literal["flag", "nearest"]
_ENTRIES_PER_CHUNK = 1 << 24  # coefficients to gather


class Fidelity(NamedTuple):
    """Quality of affine maps as an approximation of the network F.

    Attributes:
        r2: 1 - sum |F - (W x + c)|² / sum |F - mean F|² over samples and outputs; NaN if F is constant.
        agreement: Share of samples with the same largest output, or with the same sign for one output.
    """

    r2: float
    agreement: float


class PiecewiseAffine(ABC):
    """Clusters of samples x (n, *input), with an affine map for each that approximates a network F.

    Attributes:
        labels_: Cluster of each sample, (n,) int64, or -1. The largest cluster is 0.
        counts_: Number of samples in each cluster, (clusters,) int64.
        inputs_: The samples (n, *input).
        outputs_: F of the samples (n, *output).
        response_: The observed response (n,), or None.
    """

    labels_: Tensor
    counts_: Tensor
    inputs_: Tensor
    outputs_: Tensor
    response_: Tensor | None

    @property
    @abstractmethod
    def affine_(self) -> AffineMap:
        """The clusters' maps: `affine_[c]` is that of cluster c."""

    @abstractmethod
    def _assign(self, x: object, unseen: Unseen) -> tuple[Tensor, Tensor, Tensor]:
        """Return new samples (n, *input), the network's outputs for them and their clusters."""

    def predict(self, x: object, *, unseen: Unseen = "flag") -> Tensor:
        """Find the cluster of each new sample.

        Args:
            x: Samples (n, *input).
            unseen: For a pattern that no cluster has: "flag" gives -1 (`linearize` gives its own map), "nearest" gives the
                cluster with the fewest gates that differ, also of merged clusters. `surrogate` and `fidelity` take the nearest.

        Returns:
            Tensor (n,) int64.

        Raises:
            ValueError: Samples that do not fit, or another `unseen`.
        """
        return self._assign(x, unseen)[2]

    def surrogate(self, x: object) -> Tensor:
        """Compute W_c x + b_c (n, *output) of new samples with the map of their cluster; unseen patterns take the nearest."""
        samples, _, labels = self._assign(x, "nearest")
        return self._apply(samples, labels)

    def fidelity(self, x: object | None = None) -> Fidelity:
        """Measure how well the maps approximate the network.

        Args:
            x: New samples (n, *input), or None for the fitted ones. On fitted samples, refitted maps look better than on new
                ones.

        Returns:
            R² and agreement of the maps with the network.
        """
        samples, wanted, labels = self._inside() if x is None else self._assign(x, "nearest")
        return fidelity_of(self._apply(samples, labels), wanted)

    def check(self) -> float:
        """Compute max |W_c x + b_c - F(x)| / max |F(x)| over the clusters' samples; it is rounding for exact clusters."""
        x, outputs, labels = self._inside()
        error, scale = (self._apply(x, labels) - outputs).abs().max(), outputs.abs().max()
        return float(error / torch.where(scale > 0, scale, 1))

    @cached_property
    def rank_(self) -> Tensor:
        """Rank of each cluster's design matrix with an intercept, (clusters,) int64.

        Below d + 1, the cluster's samples alone do not determine its map; in some directions the map extrapolates.
        """
        return ranks(self.inputs_.flatten(1), self.labels_, len(self.counts_))

    def coverage(self) -> Tensor:
        """Compute the share of all samples in the m + 1 largest clusters, (clusters,) fp64."""
        return self.counts_.cumsum(0).double() / len(self.labels_)

    def importance(self, output: int = 0, kind: Kind = "coef", *, project: bool = False, centre: bool = True) -> Tensor:
        """Compute how much each input matters to an output in each cluster.

        Mean and (population) standard deviation are those of all samples.

        Args:
            output: Index of the output, among the flattened outputs.
            kind: "coef": coefficients W_c[k, j]; for logits, the change of the log-odds per unit. "scaled":
                |W_c[k, j]| std_j. "share": "scaled" divided by its sum over j. "contribution":
                W_c[k, j] (x_j - mean_j) for each sample.
            project: First project the coefficients on the row space of the cluster's centred design matrix. Inputs that are
                constant in the cluster then get 0, and inputs that move together share their coefficients.
            centre: For several outputs, first subtract their mean, which a softmax does not depend on. Use False for outputs
                that are not logits.

        Returns:
            Tensor (clusters, *input). For "contribution" (n, *input), with NaN for samples of no cluster.

        Raises:
            IndexError: An output out of range.
            ValueError: Another kind.
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
        """Average the inputs' shares over all clusters, weighted by size; the arguments are those of `importance`."""
        return over_clusters(self.importance(output, "share", project=project, centre=centre), self.counts_)

    def table(
        self,
        output: int = 0,
        *,
        feature_names: Sequence[str] | None = None,
        rows: int = 10,
        project: bool = False,
        centre: bool = True,
    ) -> ClusterTable:
        """Make a table of the largest clusters, which prints.

        Without an observed response y, the response is the network's output, centred as the coefficients are. With y, each
        map is scored against it, on its own cluster and on all samples: by AUC for a binary response, else by R². For several
        outputs and a y of classes, the response is True for the class `output`.

        Args:
            output: Index of the output, among the flattened outputs.
            feature_names: Names of the inputs; by default those of the data frame that `fit` got, for images the row and column
                of a pixel, else x0, x1, ...
            rows: Number of clusters.
            project: As in `importance`. The scores are those of the maps before the projection.
            centre: As in `importance`.

        Returns:
            Coverage, size, response, scores, rank and coefficients of the clusters.

        Raises:
            IndexError: An output out of range.
            ValueError: Another number of names than inputs.
        """
        x = self.inputs_.flatten(1)
        if feature_names is None:
            feature_names = vars(self).get("feature_names_in_", _input_names(self.inputs_.shape[1:]))
        names = tuple(map(str, feature_names))
        if len(names) != x.shape[1]:
            raise ValueError(f"feature_names: got {len(names)} names, want {x.shape[1]}")
        coefficients = self.importance(output, project=project, centre=centre).flatten(1)[:rows]
        importance = self.global_importance(output, project=project, centre=centre)
        outputs = self.outputs_[0].numel()
        response = self._response_of(output, centre)
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
            output=output % outputs,
            outputs=outputs,
            centred=centre and outputs > 1,
        )

    def plot(self, output: int = 0, **options: Any) -> Axes:
        """Draw the largest clusters' coefficients for an output, as the plot of `table(output)` does, and return the axes.

        Args:
            output: Index of the output, among the flattened outputs.
            options: Of `plots.cluster_coefficients`, such as `axes`.
        """
        return self.table(output).plot(**options)

    def _response_of(self, output: int, centre: bool) -> Tensor:
        """Return the response (n,) for an output: y, or True where y is the class `output`, or the output, centred or not."""
        outputs = self.outputs_.reshape(len(self.outputs_), -1)
        if self.response_ is None:
            return outputs[:, output] - (outputs.mean(1) if centre and outputs.shape[1] > 1 else 0)
        if outputs.shape[1] > 1 and not self.response_.is_floating_point():
            return self.response_ == output % outputs.shape[1]
        return self.response_

    def _inside(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the samples that are in a cluster, the network's outputs for them and their clusters."""
        inside = self.labels_ >= 0
        return self.inputs_[inside], self.outputs_[inside], self.labels_[inside]

    def _maps(self) -> tuple[Tensor, Tensor]:
        """Return the weights (clusters, outputs, d) and biases (clusters, outputs) for flattened inputs and outputs."""
        clusters, d = len(self.counts_), self.inputs_[0].numel()
        return self.affine_.weight.reshape(clusters, -1, d), self.affine_.bias.reshape(clusters, -1)

    def _map(self, output: int, centre: bool) -> tuple[Tensor, Tensor]:
        """Return the coefficients (clusters, d) and constants (clusters,) of one output."""
        weight, bias = self._maps()
        outputs = weight.shape[1]
        if not -outputs <= output < outputs:
            raise IndexError(f"output: got {output}, want one of {outputs} outputs")
        if centre and outputs > 1:
            weight, bias = weight - weight.mean(1, keepdim=True), bias - bias.mean(1, keepdim=True)
        return weight[:, output], bias[:, output]

    def _apply(self, x: Tensor, labels: Tensor) -> Tensor:
        """Apply the maps of the given clusters to x (n, *input): (n, *output)."""
        return apply_maps(*self._maps(), x.flatten(1), labels).view(-1, *self.outputs_.shape[1:])


def _input_names(shape: torch.Size) -> list[str]:
    """Return the names of a sample's entries: of an image (channels, h, w) the rows and columns of its pixels."""
    if len(shape) == 1:
        return [f"x{j}" for j in range(shape[0])]
    places = product(*map(range, shape))
    if len(shape) != 3:
        return [f"x{list(place)}" for place in places]
    return [f"{f'channel {c} ' if shape[0] > 1 else ''}row {i} col {j}" for c, i, j in places]


def fidelity_of(got: Tensor, wanted: Tensor) -> Fidelity:
    """Compare values of maps with the network's outputs, (n, *output) each."""
    got, wanted = got.reshape(len(got), -1), wanted.reshape(len(wanted), -1)
    same = wanted.argmax(1) == got.argmax(1) if wanted.shape[1] > 1 else ((wanted > 0) == (got > 0)).squeeze(1)
    return Fidelity(r2(got, wanted), float(same.double().mean()))


def apply_maps(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Compute W_c x + b_c (n, outputs) for x (n, d), weights (clusters, outputs, d) and labels c (n,)."""
    size = max(1, _ENTRIES_PER_CHUNK // max(1, weight[0].numel()))
    parts = zip(x.split(size), labels.split(size), strict=True)
    return torch.cat([(weight[c] @ part.unsqueeze(2)).squeeze(2) + bias[c] for part, c in parts])
