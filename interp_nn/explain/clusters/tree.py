"""Clusters layer by layer: those that share the first layer's gates, among them those that share the second's, and so on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interp_nn.explain.clusters.merging import by_size
from interp_nn.gates.patterns import ActivationPatterns

_CHILDREN = 4  # of the root that are printed; half as many of each of them, and so on down to one


@dataclass(frozen=True, eq=False)
class TreeLevel:
    """The nodes of one layer. nodes: (clusters,) int64, the node each cluster is in, numbered by size, the largest first.
    counts: (nodes,) samples. parents: (nodes,) their nodes in the level above, 0 for the first.
    """

    layer: str
    nodes: Tensor
    counts: Tensor
    parents: Tensor


class ClusterTree:
    """Nested clusters, `levels` by the gates of the first layer, the first two, ...; `str` of it shows the largest nodes.

    The nodes of a level are a merging: `clusters.merge(by=tree.levels[0].nodes)`. Within a node of level l the
    preactivations of layer l + 1 are affine functions of the input.
    """

    def __init__(self, levels: list[TreeLevel]) -> None:
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels)

    def __str__(self) -> str:
        lines = [f"{int(self.levels[0].counts.sum())} samples"]
        lines += [f"layer {level.layer}: {len(level.counts)} nodes" for level in self.levels]
        return "\n".join([*lines, *self._below(0, 0)])

    def _below(self, depth: int, parent: int) -> list[str]:
        """The largest nodes of a level within a node of the one above, and what is in them."""
        if depth == len(self.levels):
            return []
        level, lines = self.levels[depth], []
        children = (level.parents == parent).nonzero().squeeze(1).tolist()
        most = max(1, _CHILDREN >> depth)
        for node in children[:most]:
            lines += [f"{'  ' * depth}{level.layer} {node}: {int(level.counts[node])}", *self._below(depth + 1, node)]
        if rest := children[most:]:
            lines.append(f"{'  ' * depth}and {len(rest)} smaller: {int(level.counts[rest].sum())}")
        return lines


def cluster_tree(layers: dict[str, ActivationPatterns], counts: Tensor) -> ClusterTree:
    """The tree of clusters with these patterns of each layer, by its name, and these counts (clusters,)."""
    levels: list[TreeLevel] = []
    above = torch.zeros_like(counts)
    for name, layer in layers.items():
        # What shares the layers so far: a node above, and this layer's pattern within it.
        pairs = torch.stack([above, layer.groups().labels], 1)
        nodes = by_size(pairs.unique(dim=0, return_inverse=True)[1], counts)
        sizes = counts.new_zeros(int(nodes.max()) + 1).index_add_(0, nodes, counts)
        parents = torch.zeros_like(sizes).scatter_(0, nodes, above)
        levels.append(TreeLevel(name, nodes, sizes, parents))
        above = nodes
    return ClusterTree(levels)
