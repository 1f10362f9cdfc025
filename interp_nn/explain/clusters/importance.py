"""Importance of inputs, from the coefficients of affine maps, and the rank of each cluster's design matrix.

A coefficient says how an output changes with an input within the cluster; it is a property of the network. The data of a
cluster determine it only along directions in which its samples differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class GlobalImportance(NamedTuple):
    """Each input's share over all clusters, weighted by size.

    Attributes:
        mean: Mean share (*input).
        dispersion: Standard deviation of the share (*input). It is large for an input that matters in some clusters only.
    """

    mean: Tensor
    dispersion: Tensor


class Designs(NamedTuple):
    """Singular value decompositions u diag(values) vh of the centred inputs of m clusters with s samples each, in fp64.

    Attributes:
        clusters: Numbers of the clusters (m,).
        rows: Indices of their samples (m, s).
        mean: Mean inputs (m, d).
        u: (m, s, r), with r = min(s, d).
        values: Singular values (m, r); those below rounding are 0.
        vh: (m, r, d).
    """

    clusters: Tensor
    rows: Tensor
    mean: Tensor
    u: Tensor
    values: Tensor
    vh: Tensor


def designs(x: Tensor, labels: Tensor, clusters: int) -> Iterator[Designs]:
    """Yield the design matrices of the clusters, those of one size at a time.

    Args:
        x: Samples (n, d).
        labels: Cluster of each sample (n,), negative for none. Every cluster has a sample.
        clusters: Number of clusters.
    """
    order = labels.argsort(stable=True)[int((labels < 0).sum()) :]
    counts = labels[order].bincount(minlength=clusters)
    starts = counts.cumsum(0) - counts
    for size in counts.unique().tolist():
        members = (counts == size).nonzero().squeeze(1)
        rows = order[starts[members].unsqueeze(1) + torch.arange(size, device=order.device)]
        design = x[rows].double()
        # Rounding of the inputs and of their mean, relative to the inputs, so that equal samples have rank 0.
        noise = torch.finfo(x.dtype).eps * max(design.shape[1:]) * design.flatten(1).norm(dim=1)
        mean = design.mean(1, keepdim=True)
        u, values, vh = torch.linalg.svd(design - mean, full_matrices=False)
        values = torch.where(values > noise.unsqueeze(1), values, 0)
        yield Designs(members, rows, mean.squeeze(1), u, values, vh)


def ranks(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Compute the rank of each cluster's design matrix [1, x], (clusters,) int64; d + 1 determines an affine map."""
    rank = labels.new_zeros(clusters)
    for design in designs(x, labels, clusters):
        rank[design.clusters] = 1 + (design.values > 0).sum(1)
    return rank


def row_space_part(coefficients: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Project coefficients (clusters, d) on the row space of each cluster's centred design matrix.

    This removes the part along directions in which the cluster's samples do not differ.
    """
    projected = torch.zeros_like(coefficients)
    for design in designs(x, labels, len(coefficients)):
        basis = design.vh * (design.values > 0).unsqueeze(2)
        own = coefficients[design.clusters].double().unsqueeze(2)
        projected[design.clusters] = (basis.mT @ (basis @ own)).squeeze(2).to(projected.dtype)
    return projected


def shares(scaled: Tensor) -> Tensor:
    """Divide each row of scaled (clusters, d) >= 0 by its sum; a row of zeros stays zero."""
    total = scaled.sum(1, keepdim=True)
    return scaled / torch.where(total > 0, total, 1)


def over_clusters(shares: Tensor, counts: Tensor) -> GlobalImportance:
    """Average shares (clusters, *input) over clusters, weighted by counts (clusters,)."""
    weight = (counts / counts.sum()).to(shares.dtype).view(-1, *[1] * (shares.dim() - 1))
    mean = (weight * shares).sum(0)
    return GlobalImportance(mean, (weight * (shares - mean).square()).sum(0).sqrt())
