"""A ReLU network, or the value network of a gated network, as layers of weights and the terms between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.replay import check_model
from interp_nn.explain.paths.path_terms import Layer
from interp_nn.explain.paths.path_walk import GATE, Pool, Walk
from interp_nn.gates.graph import apply_gates, trace, where
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
        model = getattr(model, "_orig_mod", model)
        self._gated = model if isinstance(model, GatedNetwork) else None
        if self._gated is not None:
            model = _ValueNetwork(self._gated)
        elif type(model).__module__.startswith(("torch.nn.", "interp_nn.nn.")) and not isinstance(model, nn.Sequential):
            model = nn.Sequential(model)  # a layer alone is a network of one layer
        self._graph = trace(model)
        self._checked = False
        self._pools = [] if self._gated is None else _pools(self._gated)
        self._dtype, self._resampled = dtype, dict[fx.Node, Any]()

    @torch.no_grad()
    def layers(self, x: Tensor) -> list[Layer]:
        """Return the layers at samples x (n, ...). Raises UnsupportedOperation for an operation whose paths are not known."""
        gates: list[Tensor] = []
        if self._gated is not None:
            gates = self._gated.value_gates(self._gated.gating(x))
            x = torch.ones_like(x) if self._gated.value_input == "ones" else x
        walk = self._walk(x, gates)
        if walk.computed and not self._checked:
            self._check_independence(walk, x[:1], [gate[:1] for gate in gates])
        self._checked = True
        return walk.layers

    def _walk(self, x: Tensor, gates: list[Tensor]) -> Walk:
        walk = Walk(self._graph, gates, self._pools, self._dtype, self._resampled)
        walk.run(x)
        return walk

    def _check_independence(self, walk: Walk, x: Tensor, gates: list[Tensor]) -> None:
        """Check that no value computed from the input depends on another sample, so that tiles give what the whole gives."""
        beside = self._walk(torch.cat([x, 1 - x.flip(-1)]), [torch.cat([gate, gate]) for gate in gates])
        for node, value in walk.computed.items():
            alone, other = (v[:1].to(torch.complex128) for v in (value, beside.computed[node]))
            tolerance = 2**-10 * float(alone.abs().amax())
            if alone.shape != other.shape or not torch.allclose(alone, other, rtol=0, atol=tolerance, equal_nan=True):
                raise UnsupportedOperation(
                    f"{where(self._graph, node)}: its value for a sample depends on the other samples, so that there is no "
                    "kernel of two samples; want an operation on each sample alone"
                )


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
