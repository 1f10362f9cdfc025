"""A ReLU network, or the value network of a gated network, as layers of weights and the terms between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from interp_nn.explain.following.replay import check_model
from interp_nn.explain.paths.path_terms import Layer
from interp_nn.explain.paths.path_walk import GATE, Pool, Walk
from interp_nn.gates.graph import apply_gates, trace
from interp_nn.nn.gated.networks import GatedNetwork, ValueNetwork


class PathNetwork:
    """A network's layers of weights in the order of its calls, with the terms that lead from one to another.

    The first layer is the input. Each of its channels and positions is 1; the values of the input are in the terms' profiles. The
    last layer is added to the network: its terms are the output. For a `GatedNetwork`, the layers are the value network's.

    Args:
        model: The network.
        dtype: Dtype of the profiles.

    Raises:
        TypeError: The model cannot be traced.
        ValueError: The model cannot be traced, or a layer is in training mode where that matters.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        check_model(model)
        self._gated = model if isinstance(model, GatedNetwork) else None
        self._graph = trace(model if self._gated is None else _ValueNetwork(self._gated))
        self._pools = [] if self._gated is None else _pools(self._gated)
        self._dtype, self._resampled = dtype, dict[fx.Node, Any]()

    @torch.no_grad()
    def layers(self, x: Tensor) -> list[Layer]:
        """Return the layers at samples x (n, ...). Raises UnsupportedOperation for an operation whose paths are not known."""
        gates: list[Tensor] = []
        if self._gated is not None:
            gates = self._gated.value_gates(self._gated.gating(x))
            x = torch.ones_like(x) if self._gated.value_input == "ones" else x
        walk = Walk(self._graph, gates, self._pools, self._dtype, self._resampled)
        walk.run(x)
        return walk.layers


class _ValueNetwork(nn.Module):
    """The value network of a gated network as a function of its input, for tracing. Each gate is a buffer."""

    def __init__(self, model: GatedNetwork) -> None:
        super().__init__()
        self.value = model.value
        self.gates = [torch.empty(0) for _ in (*model.layers, *_pools(model))]
        for i, gate in enumerate(self.gates):
            self.register_buffer(f"{GATE}{i}", gate)

    def forward(self, z: Tensor) -> Tensor:
        if not isinstance(self.value, ValueNetwork):
            return self.value(z, self.gates)
        *hidden, last = self.value.layers  # a ValueNetwork is a leaf of the graph, so its layers are called here
        for layer, gate in zip(hidden, self.gates, strict=True):
            z = apply_gates(layer(z), gate)
        return last(z)


def _pools(model: GatedNetwork) -> list[Pool]:
    """List the max-poolings of a gating network. Its value network takes the same positions; their gates come last."""

    def pool(node: Any) -> Pool:
        return lambda z: node.target(z, *node.args[1:], **node.kwargs)[0]

    graph = getattr(model.gating, "graph", None)
    nodes = [] if graph is None else graph.nodes
    return [pool(node) for node in nodes if "with_indices" in getattr(node.target, "__name__", "")]
