"""Any ReLU network as a gated one: traced once, and made two networks, one of gates and one of the values they multiply."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from interp_nn.gates.graph import apply_gates, argument, first, kind, layer_of, name_of, routed, trace, where
from interp_nn.gates.jvp import jvp
from interp_nn.nn.gated.networks import GatedNetwork, GateWeights

_REFUSED = ("other", "gate", "route")
_COLUMNS = 128  # of the gates' weights, at a time


class DualNetwork(GatedNetwork):
    """A network's `gating` and `value` graphs, made by `to_dgn`, with parameters of their own under the model's names.

    `layers` are the ReLU's calls, named as `interp_nn.explain.record` names them. gating: x -> [q of each ReLU, then the chosen
    positions of each max-pooling, if the gating is a ReLU network]. value: (z, [gates and positions]) -> y, linear in z.
    """

    def __init__(
        self,
        gating: fx.GraphModule,
        value: fx.GraphModule,
        gate: nn.Module | None,
        value_input: str,
        layers: Sequence[str],
        gating_kind: str,
    ) -> None:
        super().__init__(gating, value, gate, value_input, layers)
        self.gating_kind = gating_kind

    def effective_gate_weights(self, input_shape: Sequence[int]) -> list[GateWeights]:
        """The half-spaces of the gates, a `GateWeights` for each gating layer: weight (units, inputs), bias (units,).

        input_shape: of one sample, (c, h, w) say; units and inputs are flattened. The weights take units * inputs entries.
        Raises ValueError for a ReLU gating, and where a batch norm or dropout is in training mode.
        """
        if self.gating_kind == "relu":
            raise ValueError("gating: is 'relu', whose gates are not affine in the input; want 'linear'")
        self._check_evaluating()
        like = next(self.gating.parameters(), torch.empty(0))
        zero = like.new_zeros(1, *input_shape)

        def moved(v: Tensor) -> tuple[Tensor, ...]:
            return jvp(lambda x: tuple(self.gating(x)), (zero,), (v.unsqueeze(0),))[1]

        units = torch.eye(zero.numel(), dtype=like.dtype, device=like.device).unflatten(1, zero.shape[1:])
        with torch.no_grad():
            columns = torch.vmap(moved, chunk_size=_COLUMNS)(units)
            return [GateWeights(t.flatten(1).T, q.flatten()) for t, q in zip(columns, self.gating(zero), strict=True)]

    def extra_repr(self) -> str:
        return f"gating={self.gating_kind!r}, {super().extra_repr()}"


def to_dgn(
    model: nn.Module,
    *,
    gating: str = "linear",
    value_input: str = "ones",
    gate: nn.Module | None = None,
    reset: bool = True,
) -> DualNetwork:
    """The gated network of a ReLU network: a gating and a value network, two copies of the model around its ReLU's.

    gating='relu' (DGN): the gating network is the model; 'linear' (DLGN): without its ReLU's, so that each gate is on in a
    half-space (while batch norms are in evaluation mode). Each ReLU's preactivation there gives a gate, by `gate` (a module,
    SoftGate() by default), and in the value network each ReLU multiplies by its gate. value_input: what the value network
    sees, 'ones' or 'x'. reset: whether both are drawn anew (each layer's own `reset_parameters`), or keep the model's weights.

    Max-pooling becomes average pooling in both networks of a linear gating (over the entries that it would choose from). A
    ReLU gating keeps it, and its choices are gates too: the value network takes the entries at the chosen positions, and so
    stays linear in its input. With a HardGate, reset=False and value_input='x' it then computes exactly what the model does.
    Of ones, a batch norm that follows linear layers alone leaves nothing but its shift while it trains: every row is the same.

    Works for what torch.fx can trace: modules, functions and methods, reused and in-place ones. The model is left as it is.
    Raises ValueError that names the layer that cannot be converted: another nonlinearity, none at all, control flow that
    depends on the input, more than one input or output; TypeError for what is not an nn.Module.
    """
    if gating not in ("relu", "linear"):
        raise ValueError(f"gating: got {gating!r}, want 'relu' or 'linear'")
    traced = trace(model)
    _check(traced)
    networks = [copy.deepcopy(traced) for _ in range(2)]
    for network in networks:
        for node in _calls(network, "dropout"):
            _dropout_as_module(network, node)
        if gating == "linear":
            for node in _calls(network, "max_pool"):
                _average(network, node)
    for_gates, for_values = networks
    layers = _site_names(for_gates)
    _gates_out(for_gates, keep=gating == "relu")
    _gates_in(for_values, layers)
    # Anew, with what its graph refers to and nothing else.
    for_gates, for_values = (fx.GraphModule(n, n.graph, type(model).__name__) for n in (for_gates, for_values))
    if reset:
        _reset(for_gates)
        _reset(for_values)
    return DualNetwork(for_gates, for_values, gate, value_input, layers, gating).train(traced.training)


def _check(graph_module: fx.GraphModule) -> None:
    """Leaves out what the output does not depend on, and refuses what has no gates or more than gates."""
    graph = graph_module.graph
    graph.eliminate_dead_code()
    (output,) = (node for node in graph.nodes if node.op == "output")
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs[1:]:
        if not node.users:
            graph.erase_node(node)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise ValueError(f"model: takes inputs {[str(node.target) for node in inputs]}, want one")
    if not isinstance(output.args[0], fx.Node):
        raise ValueError(f"model: returns a {type(output.args[0]).__name__}, want one tensor")
    for node in graph.nodes:
        if kind(graph_module, node) in _REFUSED:
            raise ValueError(
                f"model: {where(graph_module, node)} is not linear and no ReLU; want a network of linear layers, "
                "ReLU and pooling that gives logits"
            )
    if not any(kind(graph_module, node) == "relu" for node in graph.nodes):
        raise ValueError("model: has no ReLU, want one to make a gate of")


def _calls(network: fx.GraphModule, *kinds: str) -> Iterator[fx.Node]:
    return (node for node in list(network.graph.nodes) if kind(network, node) in kinds)


def _call(network: fx.GraphModule, node: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call just before a node, in the same layer."""
    with network.graph.inserting_before(node):
        made = network.graph.call_function(function, args, kwargs)
    made.meta["layer"] = node.meta.get("layer", "")
    return made


def _replace(network: fx.GraphModule, node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    network.graph.erase_node(node)


def _dropout_as_module(network: fx.GraphModule, node: fx.Node) -> None:
    """A functional dropout follows `train()` and `eval()` of the network, not of the model when it was traced.

    One that was off while the model was in training mode is off for good; in evaluation mode it cannot be told from one that
    was given `self.training`.
    """
    if node.op == "call_module":
        return
    if network.training and argument(network, node, 2, "training") is False:
        _replace(network, node, first(node))
        return
    p = argument(network, node, 1, "p")
    dimensions = name_of(network, node).removeprefix("dropout")
    module = getattr(nn, f"Dropout{dimensions}")(0.5 if p is None else p)
    module.train(network.training)
    name = f"{node.name}_module"
    network.add_submodule(name, module)
    with network.graph.inserting_before(node):
        made = network.graph.call_module(name, (first(node),))
    _replace(network, node, made)


def _pooling(network: fx.GraphModule, node: fx.Node) -> tuple[str, dict[str, Any]]:
    """The dimensions of a max-pooling ('1d', ...), and its arguments."""
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = {name: argument(network, node, place, name) for place, name in enumerate(names, 1)}
    if given.pop("return_indices"):
        raise ValueError(
            f"model: {where(network, node)} returns indices, which are not linear; want return_indices=False"
        )
    return name_of(network, node)[-2:], {name: value for name, value in given.items() if value is not None}


def _average(network: fx.GraphModule, node: fx.Node) -> None:
    dimensions, given = _pooling(network, node)
    dilation = given.pop("dilation", 1)
    if any(d != 1 for d in (dilation if isinstance(dilation, (tuple, list)) else [dilation])):
        raise ValueError(f"model: {where(network, node)} is dilated, as no average pooling is; want dilation=1")
    average = getattr(F, f"avg_pool{dimensions}")
    _replace(network, node, _call(network, node, average, first(node), **given, count_include_pad=False))


def _site_names(network: fx.GraphModule) -> list[str]:
    """The ReLU's calls by module path ('features.3', 'relu#1' for a second call), or path, operation and count."""
    calls, names = Counter[str](), []
    for node in _calls(network, "relu"):
        module = node.op == "call_module"
        stem = layer_of(node) if module else f"{layer_of(node)}:{node.meta.get('spelling', name_of(network, node))}"
        names.append(stem if module and not calls[stem] else f"{stem}#{calls[stem]}")
        calls[stem] += 1
    return names


def _gates_out(network: fx.GraphModule, keep: bool) -> None:
    """Make a network return what its ReLU's look at, and the positions that its max-poolings choose; keep: its ReLU's."""
    preactivations, choices = [], []
    for node in _calls(network, "relu", "max_pool"):
        if kind(network, node) == "relu":
            preactivations.append(first(node))
            if not keep:
                _replace(network, node, first(node))
        else:
            dimensions, given = _pooling(network, node)
            pool = getattr(F, f"max_pool{dimensions}_with_indices")
            both = _call(network, node, pool, first(node), **given, return_indices=True)
            choices.append(_call(network, node, operator.getitem, both, 1))
            _replace(network, node, _call(network, node, operator.getitem, both, 0))
    (output,) = (node for node in network.graph.nodes if node.op == "output")
    output.args = ([*preactivations, *choices],)
    network.graph.eliminate_dead_code()


def _gates_in(network: fx.GraphModule, layers: Sequence[str]) -> None:
    """Make a network take gates, which its ReLU's multiply by, and positions, which its max-poolings take."""
    (x,) = (node for node in network.graph.nodes if node.op == "placeholder")
    with network.graph.inserting_after(x):
        gates = network.graph.placeholder("gates")
    names, places = iter(enumerate(layers)), count(len(layers))
    for node in _calls(network, "relu", "max_pool"):
        if kind(network, node) == "relu":
            place, name = next(names)
            gate = _call(network, node, operator.getitem, gates, place)
            other = _call(network, node, apply_gates, first(node), gate, name)
        else:
            index = _call(network, node, operator.getitem, gates, next(places))
            other = _call(network, node, routed, first(node), index)
        _replace(network, node, other)


def _reset(network: fx.GraphModule) -> None:
    for name, module in network.named_modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(
                f"model: layer {name!r} has parameters of its own and no reset_parameters(); want reset=False"
            )
