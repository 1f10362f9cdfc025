"""What the coefficients of affine maps, one a cluster of samples, say about the inputs; and what the samples leave open.

A coefficient says how an output moves with an input within the cluster. It is a fact about the network; whether the data can
tell it from others is a fact about the cluster's design matrix, which has directions in which no two of its samples differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class GlobalImportance(NamedTuple):
    """Each input's share over all clusters: the mean and the standard deviation, weighted by the clusters' sizes; (*input).

    A large deviation means that the input matters in some clusters and not in others: that it interacts.
    """

    mean: Tensor
    dispersion: Tensor


class Designs(NamedTuple):
    """Clusters of the same size s and the singular value decompositions u diag(values) vh of their centred inputs, in fp64.

    clusters: (m,) their numbers. rows: (m, s) their samples. u: (m, s, r), values: (m, r), vh: (m, r, d), r = min(s, d);
    values that rounding explains are zero. mean: (m, d).
    """

    clusters: Tensor
    rows: Tensor
    mean: Tensor
    u: Tensor
    values: Tensor
    vh: Tensor


def designs(x: Tensor, labels: Tensor, clusters: int) -> Iterator[Designs]:
    """The design matrices of the clusters 0 to clusters - 1 of the samples x (n, d), those of one size at a time.

    labels: (n,), negative for samples of no cluster. Every cluster has a sample.
    """
    order = labels.argsort(stable=True)[int((labels < 0).sum()) :]
    counts = labels[order].bincount(minlength=clusters)
    starts = counts.cumsum(0) - counts
    for size in counts.unique().tolist():
        members = (counts == size).nonzero().squeeze(1)
        rows = order[starts[members].unsqueeze(1) + torch.arange(size, device=order.device)]
        design = x[rows].double()
        # Rounding of the inputs and of their mean, by the scale of the inputs themselves: equal samples have rank zero.
        noise = torch.finfo(x.dtype).eps * max(design.shape[1:]) * design.flatten(1).norm(dim=1)
        mean = design.mean(1, keepdim=True)
        u, values, vh = torch.linalg.svd(design - mean, full_matrices=False)
        values = torch.where(values > noise.unsqueeze(1), values, 0)
        yield Designs(members, rows, mean.squeeze(1), u, values, vh)


def ranks(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The rank of each cluster's design matrix [1, x], (clusters,) int64: d + 1 where its samples fix an affine map."""
    rank = labels.new_zeros(clusters)
    for design in designs(x, labels, clusters):
        rank[design.clusters] = 1 + (design.values > 0).sum(1)
    return rank


def row_space_part(coefficients: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Coefficients (clusters, d), each projected on the row space of the cluster's centred design matrix: without the part
    that no two of its samples can tell.
    """
    projected = torch.zeros_like(coefficients)
    for design in designs(x, labels, len(coefficients)):
        basis = design.vh * (design.values > 0).unsqueeze(2)
        own = coefficients[design.clusters].double().unsqueeze(2)
        projected[design.clusters] = (basis.mT @ (basis @ own)).squeeze(2).to(projected.dtype)
    return projected


def shares(scaled: Tensor) -> Tensor:
    """Each row of scaled (clusters, d) >= 0 divided by its sum; zero where all of it is zero."""
    total = scaled.sum(1, keepdim=True)
    return scaled / torch.where(total > 0, total, 1)


def over_clusters(shares: Tensor, counts: Tensor) -> GlobalImportance:
    """Shares (clusters, *input) of clusters with these counts (clusters,), as one."""
    weight = (counts / counts.sum()).to(shares.dtype).view(-1, *[1] * (shares.dim() - 1))
    mean = (weight * shares).sum(0)
    return GlobalImportance(mean, (weight * (shares - mean).square()).sum(0).sqrt())
