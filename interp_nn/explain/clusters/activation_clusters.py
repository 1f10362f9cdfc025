"""Samples by activation pattern: clusters within each of which a ReLU network is one affine map.

Picchiotti & Gori (arXiv 2110.06593): the units of a trained network that are on divide the data, and in each part the network
is linear regression, or logistic regression, whose coefficients are read as such.
"""

from __future__ import annotations

import warnings
from copy import copy
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.clusters.merging import (
    by_distance,
    by_functions,
    by_size,
    equal_maps,
    mean_maps,
    path_distances,
    refit,
)
from interp_nn.explain.clusters.piecewise_affine import PiecewiseAffine, Unseen, apply_maps
from interp_nn.explain.clusters.tree import ClusterTree, cluster_tree
from interp_nn.explain.estimator import Estimator, NotFittedError
from interp_nn.explain.following.gate_record import GateSite, record, supported_ops
from interp_nn.explain.linear.affine_map import AffineMap, linearize
from interp_nn.explain.linear.regions import Region, region
from interp_nn.gates.patterns import ActivationPatterns

By = Literal["affine", "coef", "hamming", "npk"]
_PAIRS_AT_ONCE = 1 << 22  # of patterns that are compared


class ActivationClusters(PiecewiseAffine, Estimator):
    """The clusters of samples in which a network's units are on and off alike, and its affine map in each, exactly.

    model: maps (n, *input) to (n, *output), and is affine where its gates do not change: linear layers, convolutions, ReLU and
    its kind. Linear outputs (logits), not probabilities, are what its maps explain. Put it in fp64 where the labels matter:
    a preactivation near zero may come out on either side of it from one batch size or device to another; see margin_.
    min_size: patterns of fewer samples are not clusters, and their samples have label -1; large networks have about as many
    patterns as there are samples. batch_size: samples that the model sees at a time; 1 for a model that puts samples in an order
    of its own (see `record`).

    After `fit`: labels_, counts_, affine_, rank_, inputs_, outputs_, response_ as in `PiecewiseAffine`, and
    patterns_: ActivationPatterns, one a cluster. first_: (clusters,) int64, the first sample of each. margin_: (n,) the
    smallest |preactivation| of each sample, over all units. sites_: the gates that make the pattern, in call order.

    Orders (sort, topk, median) are no part of the pattern, and secants (GELU, a sigmoid at the end) are no gates: with them,
    samples of one cluster may have several maps, and `check()` is then no longer rounding. `fit` warns of secants.
    """

    patterns_: ActivationPatterns
    first_: Tensor
    margin_: Tensor
    sites_: tuple[GateSite, ...]

    def __init__(self, model: nn.Module, *, min_size: int = 1, batch_size: int = 1024) -> None:
        self.model, self.min_size, self.batch_size = model, min_size, batch_size

    def fit(self, X: object, y: object = None) -> ActivationClusters:
        """Find the clusters of the samples X (n, *input), a tensor or what numpy makes an array of; returns self.

        y (n,): what was observed, which `summary` compares the maps with; classes (integers) for a model of several outputs.
        X is taken to the dtype and device of the model's parameters. Warns of secants in the model. Raises ValueError for no
        samples, for values that are not finite, for a model without gates, for another number of responses, and where min_size
        leaves no cluster.
        """
        if self.min_size < 1:
            raise ValueError(f"min_size: got {self.min_size}, want at least 1")
        x = self._samples(X)
        patterns, outputs, margin, sites = self._record(x)
        self._warn_of_secants(x[:1])
        response = None if y is None else self._response(y, x)
        groups = patterns.groups()
        size = groups.counts.argsort(descending=True, stable=True)
        size = size[groups.counts[size] >= self.min_size]
        if not len(size):
            most = int(groups.counts.max())
            raise ValueError(f"min_size: got {self.min_size}, but no pattern has more than {most} samples")
        number = torch.full_like(groups.counts, -1)
        number[size] = torch.arange(len(size), device=number.device)
        self.labels_, self.counts_, self.patterns_ = number[groups.labels], groups.counts[size], groups.patterns[size]
        self.inputs_, self.outputs_, self.response_, self.first_ = x, outputs, response, groups.first[size]
        self.margin_, self.sites_ = margin, sites
        for lazy in ("affine_", "rank_"):
            vars(self).pop(lazy, None)
        return self

    @cached_property
    def affine_(self) -> AffineMap:
        """The clusters' maps, which are those of their first samples; computed when first asked for, and kept: the model must be
        then what it was in `fit`, or `check()` is no longer rounding.
        """
        maps = [linearize(self.model, part) for part in self.inputs_[self.first_].split(self.batch_size)]
        return AffineMap.from_tensors(torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps]))

    def region(self, cluster: int) -> Region:
        """The half-spaces within which the cluster's pattern, and so its map, holds."""
        first = int(self.first_[cluster])
        return region(self.model, self.inputs_[first : first + 1])

    def layer_patterns(self, layer: int | str) -> ActivationPatterns:
        """The clusters' patterns in one layer of gates, an index or name of `sites_`."""
        names, sizes = [site.name for site in self.sites_], [site.shape.numel() for site in self.sites_]
        index = names.index(layer) if isinstance(layer, str) and layer in names else layer
        if isinstance(index, str) or not -len(names) <= index < len(names):
            raise ValueError(f"layer: got {layer!r}, want one of {', '.join(names)}, or its index")
        return ActivationPatterns.from_gates(self.patterns_.unpack().split(sizes, 1)[index])

    def merge(self, n_clusters: int | None = None, by: By | Tensor = "coef", *, refit: bool = True) -> MergedClusters:
        """Fewer clusters, whose maps are no longer the network's; `.fidelity()` of the result says how close they come.

        by: "coef" k-means, weighted by size, on the maps as functions of standardised inputs (Sudjianto et al., arXiv
        2011.04041); "hamming" agglomeration by the number of gates that differ; "npk" agglomeration by the share of active paths
        that two patterns do not have in common, the gates' part of the neural path kernel (Lakshminarayanan & Singh, arXiv
        2006.10529). They make n_clusters; the last two need memory for all pairs of clusters, and all three scikit-learn. k-means
        may spend a group on a few clusters that are steep and narrow, where another is better for few groups.
        Without n_clusters: "affine" puts together those with the same map, as where gates of dead units differ, and loses
        nothing; a tensor (clusters,) of integers is the groups themselves, such as a level of `tree` or the groups of
        `layer_patterns`.

        refit: the mean of the merged maps, weighted by size, is corrected to the model's outputs by ridge regression, with a
        penalty for each merged cluster under which samples left out are told best. Raises ValueError for another `by`, and for a
        number of clusters that cannot be made.
        """
        if isinstance(by, Tensor) or by == "affine":
            if n_clusters is not None:
                raise ValueError(f"n_clusters: got {n_clusters}, but by={by!r} itself says how many there will be")
            groups = self._checked(by) if isinstance(by, Tensor) else equal_maps(self._functions(constants=1.0))
        else:
            groups = self._grouped(by, n_clusters)
        equal = isinstance(by, str) and by == "affine"
        return MergedClusters(self, by_size(groups, self.counts_), refit and not equal)

    def tree(self, depth: int | None = None) -> ClusterTree:
        """Clusters by the gates of the first layer, within them by those of the second, and so on to `depth` layers."""
        depth = len(self.sites_) if depth is None else depth
        if not 1 <= depth <= len(self.sites_):
            raise ValueError(f"depth: got {depth}, want 1 to {len(self.sites_)}, as many as there are layers of gates")
        layers = {site.name: self.layer_patterns(i) for i, site in enumerate(self.sites_[:depth])}
        return cluster_tree(layers, self.counts_)

    def __getattr__(self, name: str) -> Any:
        # Only what was not found comes here.
        if name.endswith("_") and not name.startswith("_") and "labels_" not in vars(self):
            raise NotFittedError(f"{type(self).__name__}: {name} is known after fit(X), which was not called")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        fitted = (
            f"{len(self.labels_)} samples in {len(self.counts_)} clusters" if "labels_" in vars(self) else "not fitted"
        )
        return f"{type(self).__name__}({fitted})"

    def _samples(self, X: object) -> Tensor:
        """X as the model takes it."""
        like = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        x = _tensor(X)
        x = x.to(torch.get_default_dtype()) if like is None else x.to(like.device, like.dtype)
        if x.dim() < 2 or not len(x):
            raise ValueError(f"X: got shape {tuple(x.shape)}, want (n, ...) with n > 0")
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"X: {int((~x.isfinite().flatten(1).all(1)).sum())} of its samples have values that are not finite"
            )
        return x

    def _warn_of_secants(self, x: Tensor) -> None:
        report = supported_ops(self.model, x)
        if not report.exact:
            found = [
                f"{name} in layer {layer!r}" for name, layer, how, _ in report.rows if how not in ("affine", "gate")
            ]
            text = "is no gate, so that samples of one cluster may have several maps; see check()"
            warnings.warn(f"model: {', '.join(found)} {text}", stacklevel=3)

    def _record(self, x: Tensor) -> tuple[ActivationPatterns, Tensor, Tensor, tuple[GateSite, ...]]:
        """The samples' patterns, outputs and margins, and the gates that make the patterns."""
        packed, outputs, margins = [], [], []
        sites: tuple[GateSite, ...] = ()
        width = 0
        for part in x.split(self.batch_size):
            gates = record(self.model, part)
            if sites and gates.sites != sites:
                raise ValueError("model: samples go through different gates; its forward depends on them")
            if not gates.sites:
                raise ValueError("model: no unit of it is a gate (ReLU and its kind): use linearize")
            if not isinstance(gates.output, Tensor):
                raise TypeError(f"model: got {type(gates.output).__name__} from it, want one tensor")
            patterns, sites = gates.patterns(), gates.sites
            packed.append(patterns.packed)
            outputs.append(gates.output)
            margins.append(gates.margin())
            width = patterns.width
        return ActivationPatterns(torch.cat(packed), width), torch.cat(outputs), torch.cat(margins), sites

    def _response(self, y: object, x: Tensor) -> Tensor:
        response = _tensor(y)
        if response.shape != x.shape[:1]:
            raise ValueError(f"y: got shape {tuple(response.shape)}, want ({len(x)},)")
        return response.to(x.device)

    def _assign(self, X: object, unseen: Unseen) -> tuple[Tensor, Tensor, Tensor]:
        if unseen not in ("flag", "nearest"):
            raise ValueError(f"unseen: got {unseen!r}, want flag or nearest")
        known, x = self.patterns_, self._samples(X)
        if x.shape[1:] != self.inputs_.shape[1:]:
            raise ValueError(f"X: got shape {tuple(x.shape)}, want (n, {', '.join(map(str, self.inputs_.shape[1:]))})")
        patterns, outputs, _, _ = self._record(x)
        # Groups are numbered as they appear: those of the clusters come first, in their order.
        labels = (
            ActivationPatterns(torch.cat([known.packed, patterns.packed]), known.width).groups().labels[len(known) :]
        )
        new = (labels >= len(known)).nonzero().squeeze(1)
        labels[new] = -1
        if unseen == "nearest":
            for part in new.split(max(1, _PAIRS_AT_ONCE // len(known))):
                labels[part] = patterns[part].hamming(known).argmin(1)
        return x, outputs, labels

    def _grouped(self, by: By, n_clusters: int | None) -> Tensor:
        """The group of each cluster, (clusters,) int64, by one of the ways that are told how many to make."""
        if by not in get_args(By):
            raise ValueError(f"by: got {by!r}, want one of {', '.join(get_args(By))}, or a tensor of groups")
        if n_clusters is None or not 1 <= n_clusters <= len(self.counts_):
            raise ValueError(
                f"n_clusters: got {n_clusters}, want 1 to {len(self.counts_)}, as many as there are clusters"
            )
        if n_clusters == len(self.counts_):
            return torch.arange(n_clusters, device=self.counts_.device)
        if by == "coef":
            return by_functions(self._functions(constants=0.0), self.counts_, n_clusters)
        if by == "hamming":
            return by_distance(self.patterns_.hamming().double(), n_clusters)
        return by_distance(path_distances([self.layer_patterns(i) for i in range(len(self.sites_))]), n_clusters)

    def _functions(self, constants: float) -> Tensor:
        """The clusters' maps as vectors (clusters, outputs (d + 1)): of inputs with mean 0 and variance 1, so that the distance
        of two is that of their values. Inputs that are constant count as if they had the standard deviation `constants`.
        """
        weight, bias = self._maps()
        x = self.inputs_.flatten(1)
        std, bias = x.std(0, correction=0), bias + weight @ x.mean(0)
        return torch.cat([weight * torch.where(std > 0, std, constants), bias.unsqueeze(2)], 2).flatten(1)

    def _checked(self, groups: Tensor) -> Tensor:
        if groups.shape != self.counts_.shape or groups.is_floating_point():
            shape = tuple(self.counts_.shape)
            raise ValueError(f"by: got {groups.dtype} of shape {tuple(groups.shape)}, want integers of shape {shape}")
        return groups.to(self.counts_.device)


def _tensor(values: object) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


class MergedClusters(PiecewiseAffine):
    """Fewer clusters, made of those of `clusters`: each has one map, which stands for the network but is not it.

    members_: (clusters that were merged,) int64, the merged cluster that each is part of; the rest as in `PiecewiseAffine`.
    Made by `ActivationClusters.merge`.
    """

    def __init__(self, clusters: ActivationClusters, members: Tensor, refitted: bool) -> None:
        # A copy, as these clusters may be fitted again.
        self._clusters, self.members_, self._refitted = copy(clusters), members, refitted
        self._means = [mean_maps(part, members, clusters.counts_) for part in clusters._maps()]
        self.inputs_, self.outputs_, self.response_ = clusters.inputs_, clusters.outputs_, clusters.response_
        self.labels_ = self._merged(clusters.labels_)
        self.counts_ = clusters.counts_.new_zeros(int(members.max()) + 1).index_add_(0, members, clusters.counts_)

    @cached_property
    def affine_(self) -> AffineMap:
        """The maps of the merged clusters; computed when first asked for."""
        weight, bias = self._means
        if self._refitted:
            x, outputs, labels = self._inside()
            residual = outputs.reshape(len(x), -1) - apply_maps(weight, bias, x.flatten(1), labels)
            corrections = refit(x.flatten(1), residual, labels, len(self.counts_))
            weight, bias = weight + corrections[0], bias + corrections[1]
        inputs, outputs_ = self.inputs_.shape[1:], self.outputs_.shape[1:]
        return AffineMap.from_tensors(weight.view(-1, *outputs_, *inputs), bias.view(-1, *outputs_))

    def __repr__(self) -> str:
        return f"MergedClusters({len(self.members_)} clusters merged into {len(self.counts_)})"

    def _merged(self, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, -1, self.members_[labels])

    def _assign(self, X: object, unseen: Unseen) -> tuple[Tensor, Tensor, Tensor]:
        x, outputs, labels = self._clusters._assign(X, unseen)
        return x, outputs, self._merged(labels)
