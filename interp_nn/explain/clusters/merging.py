"""Group clusters, and fit one affine map to each group.

Large networks have about as many clusters as there are samples. Fewer, merged clusters are approximate.

Source: Sudjianto et al. (2020), "Unwrapping the black box of deep ReLU networks": k-means on the coefficients, then refit.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from interp_nn.explain.clusters.importance import Designs, designs
from interp_nn.gates.patterns import ActivationPatterns

if TYPE_CHECKING:
    import numpy as np

# Of ridge regression, relative to the largest squared singular value. The last one does not change the slope.
_PENALTIES = (1e-9, *(10.0**k for k in range(-6, 3)), torch.inf)


def equal_maps(functions: Tensor) -> Tensor:
    """Group equal rows of functions (clusters, p): (clusters,) int64.

    Two rows are equal if they differ by at most eps ** 0.75 of the row's largest entry: 2e-12 in fp64, 6e-6 in fp32.
    """
    tolerance = torch.finfo(functions.dtype).eps ** 0.75 * functions.double().abs().amax(1, keepdim=True)
    functions = functions.double()
    direction = torch.rand(functions.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Along a random direction, equal rows are neighbours and other rows are apart.
    order = (functions @ direction.to(functions.device)).argsort(stable=True)
    new = (functions[order].diff(dim=0).abs() > tolerance[order[1:]]).any(1)
    groups = torch.zeros_like(order)
    groups[order[1:]] = new.cumsum(0)
    return groups


def by_functions(functions: Tensor, counts: Tensor, groups: int) -> Tensor:
    """Group the rows of functions (clusters, p) by k-means, each weighted by its count."""
    means = _sklearn().KMeans(groups, n_init=10, random_state=0)
    return _groups(means.fit(functions.double().cpu().numpy(), sample_weight=counts.cpu().numpy()).labels_, counts)


def by_distance(distances: Tensor, groups: int) -> Tensor:
    """Group clusters by agglomeration with average linkage on distances (clusters, clusters)."""
    linkage = _sklearn().AgglomerativeClustering(groups, metric="precomputed", linkage="average")
    return _groups(linkage.fit(distances.cpu().numpy()).labels_, distances)


def path_distances(layers: list[ActivationPatterns]) -> Tensor:
    """Compute 1 - K(c, e) / sqrt(K(c, c) K(e, e)) for all pairs of patterns, (clusters, clusters) fp64.

    K counts the paths that are active in both patterns: the product over the layers of the number of units that are on in
    both. The layers must follow one another. A layer that is off in both patterns counts as equal.

    Source: the gates' part of the neural path kernel, Lakshminarayanan & Singh (NeurIPS 2020), arXiv 2006.10529.
    """
    similarity = torch.ones((), dtype=torch.float64)
    for layer in layers:
        both, active = layer.overlap().double(), layer.active().double()
        scale = (active.unsqueeze(1) * active).sqrt()
        # A layer that is off in one pattern alone leaves no common path.
        off = (active == 0).double()
        similarity = similarity.to(both) * torch.where(scale > 0, both / scale.clamp_min(1), off.unsqueeze(1) * off)
    return (1 - similarity).clamp_min(0)


def by_size(groups: Tensor, counts: Tensor) -> Tensor:
    """Renumber groups (clusters,) by the total count of their clusters, largest first; ties keep their order."""
    distinct, groups = groups.unique(return_inverse=True)
    sizes = counts.new_zeros(len(distinct)).index_add_(0, groups, counts)
    first = groups.new_full((len(distinct),), len(groups)).scatter_reduce(
        0, groups, torch.arange(len(groups)).to(groups), "amin"
    )
    order = first.argsort()
    order = order[sizes[order].argsort(descending=True, stable=True)]
    return order.argsort()[groups]


def mean_maps(values: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Average values (clusters, ...) over each group, weighted by counts."""
    weight = counts.to(values.dtype)
    total = values.new_zeros(int(groups.max()) + 1).index_add_(0, groups, weight)
    share = (weight / total[groups]).view(-1, *[1] * (values.dim() - 1))
    return values.new_zeros(len(total), *values.shape[1:]).index_add_(0, groups, share * values)


def refit(x: Tensor, residual: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Fit the residual in each cluster by ridge regression, with the penalty of the smallest leave-one-out error.

    The penalty keeps few samples from being fitted exactly by weights that fit no others. A cluster of equal samples gets
    weight 0.

    Args:
        x: Samples (n, d).
        residual: Values to fit (n, outputs).
        labels: Cluster of each sample (n,), negative for none.
        clusters: Number of clusters.

    Returns:
        Weights (clusters, outputs, d) and biases (clusters, outputs).
    """
    weight = x.new_zeros(clusters, residual.shape[1], x.shape[1])
    bias = x.new_zeros(clusters, residual.shape[1])
    for design in designs(x, labels, clusters):
        own = residual[design.rows].double()
        mean = own.mean(1, keepdim=True)
        fits = [_ridge(design, own - mean, penalty) for penalty in _PENALTIES]
        best = torch.stack([error for _, error in fits]).argmin(0)
        slope = torch.stack([slope for slope, _ in fits])[best, torch.arange(len(best), device=best.device)]
        weight[design.clusters] = slope.to(weight.dtype)
        bias[design.clusters] = (mean.squeeze(1) - (slope @ design.mean.unsqueeze(2)).squeeze(2)).to(bias.dtype)
    return weight, bias


def _ridge(design: Designs, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit centred y (m, s, outputs) by ridge regression.

    Returns the slopes (m, outputs, d) and the sums (m,) of the squared leave-one-out errors, which follow from one fit.

    Source: Allen (1974), "The relationship between variable selection and data augmentation and a method for prediction".
    """
    energy = design.values.square()
    shrunk = energy + penalty * energy[:, :1]
    along, lost = design.u.mT @ y, energy == 0
    kept = (energy / shrunk).masked_fill(lost, 0).unsqueeze(2)
    leverage = 1 / y.shape[1] + design.u.square() @ kept
    error = (y - design.u @ (kept * along)) / (1 - leverage).clamp_min(1e-12)
    inverse = (design.values / shrunk).masked_fill(lost, 0).unsqueeze(2)
    return along.mT @ (inverse * design.vh), error.square().sum((1, 2))


def _groups(labels: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(labels).long().to(like.device)


def _sklearn() -> ModuleType:
    try:
        import sklearn.cluster
    except ImportError as error:
        raise ImportError("merging clusters needs scikit-learn: pip install scikit-learn") from error
    return sklearn.cluster
