"""Nest clusters layer by layer: by the first layer's gates, then by the second's, and so on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from interp_nn.explain.clusters.merging import by_size
from interp_nn.gates.patterns import ActivationPatterns

_CHILDREN = 4  # printed for the root; half as many at each further level, at least one


@dataclass(frozen=True, eq=False)
class TreeLevel:
    """The nodes of one layer of gates.

    Attributes:
        layer: Name of the gates.
        nodes: Node of each cluster, (clusters,) int64. The largest node is 0.
        counts: Number of samples in each node, (nodes,).
        parents: Each node's node in the level above, (nodes,); 0 in the first level.
    """

    layer: str
    nodes: Tensor
    counts: Tensor
    parents: Tensor


class ClusterTree:
    """Nested clusters: level l groups clusters by the gates of the first l + 1 layers; it prints its largest nodes.

    The nodes of a level are groups for `ActivationClusters.merge`: `clusters.merge(by=tree.levels[0].nodes)`. Within a node
    of level l, the preactivations of the next layer are affine functions of the input.

    Args:
        levels: The levels, one for each layer of gates.

    Attributes:
        levels: As given.
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
        """Return the lines of the largest nodes of a level within one parent node, and of their children."""
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
    """Build the tree of clusters.

    Args:
        layers: By name, the clusters' patterns in each layer of gates.
        counts: Number of samples in each cluster, (clusters,).
    """
    levels: list[TreeLevel] = []
    above = torch.zeros_like(counts)
    for name, layer in layers.items():
        # Clusters share a node if they share the node above and this layer's pattern.
        pairs = torch.stack([above, layer.groups().labels], 1)
        nodes = by_size(pairs.unique(dim=0, return_inverse=True)[1], counts)
        sizes = counts.new_zeros(int(nodes.max()) + 1).index_add_(0, nodes, counts)
        parents = torch.zeros_like(sizes).scatter_(0, nodes, above)
        levels.append(TreeLevel(name, nodes, sizes, parents))
        above = nodes
    return ClusterTree(levels)
