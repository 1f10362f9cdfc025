"""Cluster samples by activation pattern; in each cluster a ReLU network is one affine map.

The maps read as linear regressions, or as logistic regressions for logits.

Source: Picchiotti & Gori, arXiv 2110.06593.
"""

from __future__ import annotations

import warnings
from copy import copy
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.display import track
from interp_nn.explain.clusters.merging import (
    by_distance,
    by_functions,
    by_size,
    equal_maps,
    mean_maps,
    path_distances,
    refit,
)
from interp_nn.explain.clusters.piecewise_affine import Fidelity, PiecewiseAffine, Unseen, apply_maps, fidelity_of
from interp_nn.explain.clusters.tree import ClusterTree, cluster_tree
from interp_nn.explain.estimator import (
    Estimator,
    check_count,
    check_network,
    in_parameters_dtype,
    not_fitted,
    to_tensor,
)
from interp_nn.explain.following.gate_record import record, supported_ops
from interp_nn.explain.following.scikit_learn import as_network, check_columns
from interp_nn.explain.linear.affine_map import AffineMap, linearize
from interp_nn.explain.linear.regions import Region, region
from interp_nn.gates.patterns import ActivationPatterns
from interp_nn.gates.record import GateSite

By = Literal["affine", "coef", "hamming", "npk"]
_READABLE = 12  # clusters: the most that `merge` makes unless it is asked for more
_HELD_OUT = 5  # one of so many samples is
_BITS_OF = np.array([i.bit_count() for i in range(256)], dtype=np.uint8)  # by byte


class ActivationClusters(PiecewiseAffine, Estimator):
    """Find the clusters of samples in which a network's units are on and off alike, and its exact affine map in each.

    The network's operations must be affine or piecewise linear, with gates that the pattern holds. `fit` warns of secants
    (for example a GELU or a final sigmoid) and of pieces that are not gates (for example a rounding): with them, the samples
    of a cluster may have several maps, and `check` is larger than rounding.

    Large networks have about as many patterns as there are samples. `fit` then warns, and `merge()` makes a few clusters that
    approximate the network.

    Use fp64 if the labels must be reproducible. A preactivation near 0 may change its sign with the chunk size or device; see
    `margin_`.

    Args:
        model: The network, from (n, *input) to (n, *output), in evaluation mode, or scikit-learn's, see `from_sklearn`. Explain
            logits, not probabilities.
        min_size: A pattern of fewer samples is no cluster; its samples have label -1.
        chunk_size: Number of samples that the model gets at a time. Use 1 for a model that reorders samples, see `record`.
        progress: Show progress bars. None shows them in a terminal or a notebook, where tqdm is installed.

    Attributes:
        labels_: Cluster of each sample, (n,) int64, or -1. The largest cluster is 0.
        counts_: Number of samples in each cluster, (clusters,) int64.
        inputs_: The samples (n, *input).
        outputs_: The network's outputs (n, *output).
        response_: The observed y (n,), or None.
        patterns_: One pattern for each cluster.
        first_: Index of each cluster's first sample, (clusters,) int64.
        margin_: Smallest |preactivation| of each sample over all units, (n,).
        sites_: The gates that make the pattern, in call order.
        n_features_in_: Number of entries of a sample.
        feature_names_in_: Names of the columns, where `fit` got a data frame. Other frames must have the same ones in this order.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> _ = nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
        >>> clusters = ActivationClusters(network).fit([[1.0], [2.0], [-1.0]])
        >>> clusters.labels_.tolist(), clusters.affine_.weight.flatten().tolist()
        ([0, 0, 1], [1.0, 0.0])

    Source: Picchiotti & Gori, arXiv 2110.06593.
    """

    patterns_: ActivationPatterns
    first_: Tensor
    margin_: Tensor
    sites_: tuple[GateSite, ...]
    _kind, _fitted = "clusterer", "labels_"

    def __init__(
        self, model: nn.Module, *, min_size: int = 1, chunk_size: int = 1024, progress: bool | None = None
    ) -> None:
        self.model, self.min_size, self.chunk_size, self.progress = model, min_size, chunk_size, progress

    def fit(self, x: object, y: object = None) -> ActivationClusters:
        """Find the clusters of samples.

        Args:
            x: Samples (n, *input): a tensor, a data frame of numbers, or anything that numpy converts to an array. They are
                converted to the dtype and device of the model's parameters.
            y: Observed response (n,), with which `table` compares the maps. Integers are classes for a model of several
                outputs.

        Returns:
            self.

        Raises:
            ValueError: No samples, values that are not finite, a model without gates, a y of another length, or a `min_size`
                that leaves no cluster.
            TypeError: A model that is no `nn.Module` or does not return one tensor, another parameter of another type, or samples
                that are sparse or no numbers.
        """
        check_network(self._network, "model")
        check_columns(self.model, x)
        check_count("min_size", self.min_size, 1)
        check_count("chunk_size", self.chunk_size, 1)
        x = self._samples(x, reset=True)
        patterns, outputs, margin, sites = self._record(x, check=True)
        self._warn_of_secants(x[:1])
        response = None if y is None else self._response(y, x)
        groups = patterns.groups()
        size = groups.counts.argsort(descending=True, stable=True)
        size = size[groups.counts[size] >= self.min_size]
        if not len(size):
            most = int(groups.counts.max())
            raise ValueError(
                f"min_size: got {self.min_size}, but no pattern has more than {most} samples; want at most {most}, and merge() "
                "to make larger clusters, which approximate the network"
            )
        number = torch.full_like(groups.counts, -1)
        number[size] = torch.arange(len(size), device=number.device)
        self.labels_, self.counts_, self.patterns_ = number[groups.labels], groups.counts[size], groups.patterns[size]
        self.inputs_, self.outputs_, self.response_, self.first_ = x, outputs, response, groups.first[size]
        self.margin_, self.sites_ = margin, sites
        for lazy in ("affine_", "rank_"):
            vars(self).pop(lazy, None)
        self._warn_of_single_samples()
        return self

    def fit_predict(self, x: object, y: object = None) -> Tensor:
        """Find the clusters as `fit` does, and return the cluster of each sample, (n,) int64, or -1."""
        return self.fit(x, y).labels_

    @cached_property
    def affine_(self) -> AffineMap:
        """The clusters' maps, computed at first use from the first sample of each.

        The model must not change between `fit` and the first use.
        """
        parts = track(self.inputs_[self.first_].split(self.chunk_size), "maps of clusters", self.progress, "chunk")
        maps = [linearize(self._network, part, progress=False) for part in parts]
        return AffineMap.from_tensors(torch.cat([m.weight for m in maps]), torch.cat([m.bias for m in maps]))

    def region(self, cluster: int) -> Region:
        """Return the region of a cluster's pattern, in which its map holds."""
        first = int(self.first_[cluster])
        return region(self._network, self.inputs_[first : first + 1])

    def layer_patterns(self, layer: int | str) -> ActivationPatterns:
        """Return the clusters' patterns in one layer of gates, an index or name of `sites_`. Raises ValueError for others."""
        names, sizes = [site.name for site in self.sites_], [site.shape.numel() for site in self.sites_]
        index = names.index(layer) if isinstance(layer, str) and layer in names else layer
        if isinstance(index, str) or not -len(names) <= index < len(names):
            raise ValueError(f"layer: got {layer!r}, want one of {', '.join(names)}, or its index")
        return ActivationPatterns.from_gates(self.patterns_.unpack().split(sizes, 1)[index])

    def merge(
        self,
        n_clusters: int | None = None,
        by: By | Tensor = "coef",
        *,
        refit: bool = True,
        target: float | None = None,
    ) -> MergedClusters:
        """Merge clusters; the maps of merged clusters approximate the network, see `fidelity` of the result.

        Without a number, `merge` makes the fewest clusters, at most 12, whose R² with the network reaches `target` on a fifth of
        the samples, which it holds out to choose the number. Where none does, it makes the number with the largest R² and warns.
        `held_out_` of the result has the fidelity on these samples, and `one_map_` that of a single map. As these samples chose
        the number, `held_out_` may be higher than on others: measure `fidelity` on new samples. The result is then merged
        from all samples.

        "hamming" and "npk" need memory for all pairs of clusters. k-means may give a group to a few clusters with a steep
        map; then try another method.

        Args:
            n_clusters: Number of merged clusters, for by="coef", "hamming" and "npk". None: the fewest that reach `target`.
            by: "coef": k-means on the maps as functions of standardised inputs, weighted by size. "hamming": agglomeration
                by the number of gates that differ. "npk": agglomeration by the share of active paths that two patterns do
                not share. "affine": merge equal maps, which loses nothing. A tensor (clusters,) of integers: the groups,
                such as a level of `tree` or the groups of `layer_patterns`.
            refit: Correct each merged map, the mean of its clusters' maps, to the model's outputs by ridge regression. The
                penalty of each cluster minimises the leave-one-out error.
            target: R² with the network to reach on held-out samples, in (0, 1), where `merge` chooses the number. None: 0.95.

        Returns:
            The merged clusters.

        Raises:
            ValueError: Another `by`, a `target` out of range, or a number of clusters that cannot be made.
            ImportError: scikit-learn is not installed; "coef", "hamming" and "npk" need it.

        Source: "coef": Sudjianto et al., arXiv 2011.04041. "npk": Lakshminarayanan & Singh, arXiv 2006.10529.
        """
        held_out = one_map = None
        if target is not None and (n_clusters is not None or isinstance(by, Tensor) or by == "affine"):
            raise ValueError(f"target: got {target}, but the number of clusters is given; want None")
        if isinstance(by, Tensor) or by == "affine":
            if n_clusters is not None:
                raise ValueError(f"n_clusters: got {n_clusters}, but by={by!r} determines the number; want None")
            groups = self._checked(by) if isinstance(by, Tensor) else equal_maps(self._functions(constants=1.0))
        else:
            if n_clusters is None:
                n_clusters, held_out, one_map = self._fewest(by, refit, 0.95 if target is None else target)
            groups = self._grouped(by, n_clusters)
        equal = isinstance(by, str) and by == "affine"
        return MergedClusters(self, by_size(groups, self.counts_), refit and not equal, held_out, one_map)

    def tree(self, depth: int | None = None) -> ClusterTree:
        """Nest the clusters: by the gates of the first layer, then of the second, and so on to `depth` layers.

        Raises ValueError for a depth that is not 1 to the number of layers of gates.
        """
        depth = len(self.sites_) if depth is None else depth
        if not 1 <= depth <= len(self.sites_):
            raise ValueError(f"depth: got {depth}, want 1 to {len(self.sites_)}, the number of layers of gates")
        layers = {site.name: self.layer_patterns(i) for i, site in enumerate(self.sites_[:depth])}
        return cluster_tree(layers, self.counts_)

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for attributes that it did not find.
        if name.endswith("_") and not name.startswith("_") and "labels_" not in vars(self):
            raise not_fitted(f"{type(self).__name__}: {name} is known only after fit; call fit(x) first")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        fitted = (
            f"{len(self.labels_)} samples in {len(self.counts_)} clusters" if "labels_" in vars(self) else "not fitted"
        )
        return f"{type(self).__name__}({fitted})"

    @property
    def _network(self) -> nn.Module:
        return as_network(self.model)

    def _samples(self, values: object, *, reset: bool) -> Tensor:
        """Return samples in the dtype and on the device of the model's parameters."""
        return in_parameters_dtype(self._validated(values, reset=reset), self._network)

    def _warn_of_secants(self, x: Tensor) -> None:
        report = supported_ops(self._network, x)
        found = [
            f"{', '.join(names)} {text}"
            for text, treatments in (
                ("is not piecewise linear", ("secant", "frozen", "not treated")),
                ("has pieces that are not gates", ("piece",)),
            )
            if (names := [f"{name} in layer {layer!r}" for name, layer, how, _ in report.rows if how in treatments])
        ]
        if found:
            text = "samples of one cluster may have several maps, see check()"
            warnings.warn(f"model: {'; '.join([*found, text])}", stacklevel=3)

    def _warn_of_single_samples(self) -> None:
        single, clusters = int((self.counts_ == 1).sum()), len(self.counts_)
        if clusters > _READABLE and 2 * single > clusters:
            warnings.warn(
                f"x: {single} of {clusters} clusters hold a single sample, whose maps say little about other samples; merge() "
                "makes a few clusters that approximate the network",
                stacklevel=3,
            )

    def _fewest(self, by: By, refit: bool, target: float) -> tuple[int, Fidelity, Fidelity]:
        """Find the smallest number of merged clusters that reaches the target on held-out samples.

        Returns the number, its fidelity there, and that of one cluster.
        """
        if not 0 < target < 1:
            raise ValueError(f"target: got {target}, want an R² between 0 and 1")
        inside = (self.labels_ >= 0).nonzero().squeeze(1)
        order = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(0)).to(inside.device)]
        rest, rows = order.tensor_split([-(-len(order) // _HELD_OUT)])
        if not len(rows):
            raise ValueError(
                f"n_clusters: got None, but {len(inside)} samples are too few to hold some out; want the number of clusters"
            )
        part = self._of_samples(rows)
        near = nearest(part.patterns_, self.patterns_[self.labels_[rest]])
        x, wanted = self.inputs_[rest], self.outputs_[rest]
        found: dict[int, Fidelity] = {}
        for n in track(range(1, min(_READABLE, len(part.counts_)) + 1), "merging", self.progress, "cluster"):
            merged = MergedClusters(part, by_size(part._grouped(by, n), part.counts_), refit)
            got = merged._apply(x, merged.members_[near])
            found[n] = fidelity_of(got, wanted)
            if found[n].r2 >= target or torch.allclose(got, wanted):  # R² is NaN for a constant network
                return n, found[n], found[1]
        best = max(found, key=lambda n: -torch.inf if found[n].r2 != found[n].r2 else found[n].r2)
        warnings.warn(
            f"target: {best} clusters reach an R² of {found[best].r2:.3f} with the network on held-out samples, below {target}, "
            f"and no other number up to {max(found)} reaches more; for a larger number call merge(n_clusters=...)"
            + (
                f". One map gives the network's answer more often: {found[1].agreement:.1%} against {found[best].agreement:.1%}"
                if found[1].agreement > found[best].agreement
                else ""
            ),
            stacklevel=3,
        )
        return best, found[best], found[1]

    def _of_samples(self, rows: Tensor) -> ActivationClusters:
        """Return the clusters that some samples are in, with these samples alone."""
        part = copy(self)
        kept, part.labels_ = self.labels_[rows].unique(return_inverse=True)
        part.counts_, part.patterns_ = part.labels_.bincount(), self.patterns_[kept]
        part.inputs_, part.outputs_ = self.inputs_[rows], self.outputs_[rows]
        vars(part).pop("rank_", None)
        vars(part)["affine_"] = self.affine_[kept]
        return part

    def _record(
        self, x: Tensor, check: bool = False
    ) -> tuple[ActivationPatterns, Tensor, Tensor, tuple[GateSite, ...]]:
        """Return the samples' patterns, outputs and margins, and the gates that make the patterns.

        With `check`, the first chunk is checked for samples that depend on one another.
        """
        packed: list[Tensor] = []
        outputs, margins = [], []
        sites: tuple[GateSite, ...] = ()
        width, network = 0, self._network
        for part in track(x.split(self.chunk_size), "patterns", self.progress, "chunk"):
            gates = record(network, part, check=check and not packed)
            if sites and gates.sites != sites:
                raise ValueError(
                    "model: samples go through different gates; want a forward that makes the same calls for all samples"
                )
            if not gates.sites:
                raise ValueError(
                    "model: has no gates, want a model with ReLU or a similar activation; for others use linearize"
                )
            if not isinstance(gates.output, Tensor):
                raise TypeError(f"model: returned {type(gates.output).__name__}, want one tensor")
            patterns, sites = gates.patterns(), gates.sites
            packed.append(patterns.packed)
            outputs.append(gates.output)
            margins.append(gates.margin())
            width = patterns.width
        return ActivationPatterns(torch.cat(packed), width), torch.cat(outputs), torch.cat(margins), sites

    def _response(self, y: object, x: Tensor) -> Tensor:
        response = to_tensor(y, "y")
        if response.shape != x.shape[:1]:
            raise ValueError(f"y: got shape {tuple(response.shape)}, want ({len(x)},)")
        return response.to(x.device)

    def _assign(self, x: object, unseen: Unseen) -> tuple[Tensor, Tensor, Tensor]:
        if unseen not in ("flag", "nearest"):
            raise ValueError(f"unseen: got {unseen!r}, want flag or nearest")
        known, x = self.patterns_, self._samples(x, reset=False)
        if x.shape[1:] != self.inputs_.shape[1:]:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (n, {', '.join(map(str, self.inputs_.shape[1:]))})")
        patterns, outputs, _, _ = self._record(x)
        # Groups are numbered as they first appear, so the clusters keep their numbers.
        labels = (
            ActivationPatterns(torch.cat([known.packed, patterns.packed]), known.width).groups().labels[len(known) :]
        )
        new = (labels >= len(known)).nonzero().squeeze(1)
        labels[new] = nearest(known, patterns[new]) if unseen == "nearest" else -1
        return x, outputs, labels

    def _grouped(self, by: By, n_clusters: int | None) -> Tensor:
        """Return the group of each cluster, (clusters,) int64, by a method that makes a given number of groups."""
        if by not in get_args(By):
            raise ValueError(f"by: got {by!r}, want one of {', '.join(get_args(By))}, or a tensor of groups")
        if n_clusters is None or not 1 <= n_clusters <= len(self.counts_):
            raise ValueError(f"n_clusters: got {n_clusters}, want 1 to {len(self.counts_)}, the number of clusters")
        if n_clusters == len(self.counts_):
            return torch.arange(n_clusters, device=self.counts_.device)
        if by == "coef":
            return by_functions(self._functions(constants=0.0), self.counts_, n_clusters)
        if by == "hamming":
            return by_distance(self.patterns_.hamming().double(), n_clusters)
        return by_distance(path_distances([self.layer_patterns(i) for i in range(len(self.sites_))]), n_clusters)

    def _functions(self, constants: float) -> Tensor:
        """Return the clusters' maps as vectors (clusters, outputs (d + 1)).

        They are functions of inputs with mean 0 and variance 1, so that two vectors are as far apart as their maps' values.
        Constant inputs get the standard deviation `constants`.
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


def nearest(known: ActivationPatterns, patterns: ActivationPatterns) -> Tensor:
    """Find for each pattern the known one that differs in the fewest gates, the first of several: (n,) int64.

    The packed patterns are compared word by word: an exclusive or, and the number of its bits.
    """
    counts = getattr(np, "bitwise_count", None)  # of NumPy 2
    size, dtype = (8, np.uint64) if counts is not None else (1, np.uint8)

    def words(packed: Tensor) -> np.ndarray:
        bytes_ = packed.cpu().numpy()
        padded = np.pad(bytes_, ((0, 0), (0, -bytes_.shape[1] % size)))
        return np.ascontiguousarray(padded.view(dtype).T)

    left, right = words(known.packed), words(patterns.packed)
    bits, differing = np.empty(len(known), np.uint8), np.empty(len(known), left.dtype)
    distance = np.empty(len(known), np.uint16 if known.width < 1 << 16 else np.uint32)
    found = np.empty(len(patterns), np.int64)
    for i in range(len(patterns)):
        distance[:] = 0
        for word, own in zip(left, right[:, i], strict=True):
            np.bitwise_xor(word, own, out=differing)
            distance += counts(differing, out=bits) if counts is not None else np.take(_BITS_OF, differing, out=bits)
        found[i] = distance.argmin()
    return torch.from_numpy(found).to(patterns.packed.device)


class MergedClusters(PiecewiseAffine):
    """Merged clusters, each with one map that approximates the network. `ActivationClusters.merge` makes them.

    Args:
        clusters: The clusters to merge.
        members: The merged cluster of each cluster, (clusters,) int64.
        refitted: Correct the maps to the network's outputs.
        held_out: Fidelity on samples that were held out to choose the number of clusters.
        one_map: Fidelity of a single cluster on these samples.

    Attributes:
        labels_: Merged cluster of each sample, (n,) int64, or -1. The largest is 0.
        counts_: Number of samples in each merged cluster, int64.
        inputs_: The samples (n, *input).
        outputs_: The network's outputs (n, *output).
        response_: The observed y (n,), or None.
        members_: As given.
        held_out_: As given: the fidelity of as many clusters, merged from four fifths of the samples, on the other fifth, which
            chose the number. None where the number was given.
        one_map_: As given: the same of one cluster.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> _ = nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
        >>> clusters = ActivationClusters(network).fit([[1.0], [2.0], [-1.0]])
        >>> clusters.merge(by=torch.tensor([0, 0]))
        MergedClusters(2 clusters merged into 1)
    """

    def __init__(
        self,
        clusters: ActivationClusters,
        members: Tensor,
        refitted: bool,
        held_out: Fidelity | None = None,
        one_map: Fidelity | None = None,
    ) -> None:
        # A copy, because `clusters` may be fitted again.
        self._clusters, self.members_, self._refitted = copy(clusters), members, refitted
        self.held_out_, self.one_map_ = held_out, one_map
        if "feature_names_in_" in vars(clusters):
            self.feature_names_in_ = clusters.feature_names_in_
        self._means = [mean_maps(part, members, clusters.counts_) for part in clusters._maps()]
        self.inputs_, self.outputs_, self.response_ = clusters.inputs_, clusters.outputs_, clusters.response_
        self.labels_ = self._merged(clusters.labels_)
        self.counts_ = clusters.counts_.new_zeros(int(members.max()) + 1).index_add_(0, members, clusters.counts_)

    @cached_property
    def affine_(self) -> AffineMap:
        """The maps of the merged clusters, computed at first use."""
        weight, bias = self._means
        if self._refitted:
            x, outputs, labels = self._inside()
            residual = outputs.reshape(len(x), -1) - apply_maps(weight, bias, x.flatten(1), labels)
            corrections = refit(x.flatten(1), residual, labels, len(self.counts_))
            weight, bias = weight + corrections[0], bias + corrections[1]
        inputs, outputs_ = self.inputs_.shape[1:], self.outputs_.shape[1:]
        return AffineMap.from_tensors(weight.view(-1, *outputs_, *inputs), bias.view(-1, *outputs_))

    def __repr__(self) -> str:
        text = f"{len(self.members_)} clusters merged into {len(self.counts_)}"
        if self.held_out_ is not None:
            text += f"; on the held-out samples that chose the number R² {self.held_out_.r2:.3f}, agreement "
            text += f"{self.held_out_.agreement:.1%}"
        if self.one_map_ is not None and len(self.counts_) > 1:
            text += f"; one map R² {self.one_map_.r2:.3f}, agreement {self.one_map_.agreement:.1%}"
        return f"MergedClusters({text})"

    def _merged(self, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, -1, self.members_[labels])

    def _assign(self, x: object, unseen: Unseen) -> tuple[Tensor, Tensor, Tensor]:
        x, outputs, labels = self._clusters._assign(x, unseen)
        return x, outputs, self._merged(labels)
