"""Which clusters of a network belong together, and one affine map for those that do.

A network of some size has about as many clusters as there are samples. Fewer of them are no longer exact: Sudjianto et al.
(2020), "Unwrapping the black box of deep ReLU networks", merge by k-means on the coefficients and fit again.
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

# Of ridge regression, relative to the largest squared singular value; the last one leaves the slope as it was.
_PENALTIES = (1e-9, *(10.0**k for k in range(-6, 3)), torch.inf)


def equal_maps(functions: Tensor) -> Tensor:
    """Groups of equal rows of functions (clusters, p): (clusters,) int64.

    Equal is up to rounding: eps ** 0.75 of the row's largest entry, 2e-12 in fp64 and 6e-6 in fp32.
    """
    tolerance = torch.finfo(functions.dtype).eps ** 0.75 * functions.double().abs().amax(1, keepdim=True)
    functions = functions.double()
    direction = torch.rand(functions.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Equal rows are neighbours along any direction, and others are not on a random one.
    order = (functions @ direction.to(functions.device)).argsort(stable=True)
    new = (functions[order].diff(dim=0).abs() > tolerance[order[1:]]).any(1)
    groups = torch.zeros_like(order)
    groups[order[1:]] = new.cumsum(0)
    return groups


def by_functions(functions: Tensor, counts: Tensor, groups: int) -> Tensor:
    """k-means on the rows of functions (clusters, p), each weighted by its count."""
    means = _sklearn().KMeans(groups, n_init=10, random_state=0)
    return _groups(means.fit(functions.double().cpu().numpy(), sample_weight=counts.cpu().numpy()).labels_, counts)


def by_distance(distances: Tensor, groups: int) -> Tensor:
    """Agglomeration of distances (clusters, clusters), by the mean distance between the members of two groups."""
    linkage = _sklearn().AgglomerativeClustering(groups, metric="precomputed", linkage="average")
    return _groups(linkage.fit(distances.cpu().numpy()).labels_, distances)


def path_distances(layers: list[ActivationPatterns]) -> Tensor:
    """1 - K(c, e) / sqrt(K(c, c) K(e, e)) of all pairs of patterns (clusters, clusters), fp64, where K counts the paths through
    the network that are active in both: the product over its layers of the units on in both.

    K is the neural path kernel's part that depends on the gates (Lakshminarayanan & Singh, NeurIPS 2020, arXiv 2006.10529),
    for layers that follow one another. Two patterns with a layer that is off in both are alike in it.
    """
    similarity = torch.ones((), dtype=torch.float64)
    for layer in layers:
        both, active = layer.overlap().double(), layer.active().double()
        scale = (active.unsqueeze(1) * active).sqrt()
        # One layer that is off in one pattern alone: no path in common.
        off = (active == 0).double()
        similarity = similarity.to(both) * torch.where(scale > 0, both / scale.clamp_min(1), off.unsqueeze(1) * off)
    return (1 - similarity).clamp_min(0)


def by_size(groups: Tensor, counts: Tensor) -> Tensor:
    """Groups (clusters,) of any int64 numbers, numbered anew by the size of what they hold, those of one size as they appear."""
    distinct, groups = groups.unique(return_inverse=True)
    sizes = counts.new_zeros(len(distinct)).index_add_(0, groups, counts)
    first = groups.new_full((len(distinct),), len(groups)).scatter_reduce(
        0, groups, torch.arange(len(groups)).to(groups), "amin"
    )
    order = first.argsort()
    order = order[sizes[order].argsort(descending=True, stable=True)]
    return order.argsort()[groups]


def mean_maps(values: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """The mean of values (clusters, ...) over each group, weighted by counts."""
    weight = counts.to(values.dtype)
    total = values.new_zeros(int(groups.max()) + 1).index_add_(0, groups, weight)
    share = (weight / total[groups]).view(-1, *[1] * (values.dim() - 1))
    return values.new_zeros(len(total), *values.shape[1:]).index_add_(0, groups, share * values)


def refit(x: Tensor, residual: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Weights (clusters, outputs, d) and biases (clusters, outputs) that fit residual (n, outputs) in each cluster of the samples
    x (n, d): ridge regression, with the penalty under which each sample is best told from the others of its cluster.

    Few samples can be fitted exactly, by weights that are of no use elsewhere. Where the samples of a cluster do not differ,
    nothing is added to its weights.
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
    """The slopes (m, outputs, d) of ridge regression to centred y (m, s, outputs), and the sum of the squared errors (m,) when
    each sample is told from the others: they follow from the one fit (Allen, 1974, "The relationship between variable selection
    and data augmentation and a method for prediction").
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
        raise ImportError("merging clusters needs scikit-learn: pip install interp_nn[explain]") from error
    return sklearn.cluster
