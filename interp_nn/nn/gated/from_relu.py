"""Convert a ReLU network to a gated one: trace it, and make a gating network and a value network of the graph."""

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

_UNSUPPORTED = ("other", "gate", "route")
_COLUMNS_AT_ONCE = 128  # of the gates' weights


class DualNetwork(GatedNetwork):
    """Compute a gated network that `to_dgn` made of a ReLU network.

    Each of the two networks has parameters of its own, under the model's names.

    Args:
        gating: Graph that maps x to the q of each ReLU, followed by the chosen positions of each max-pooling if the gating is
            a ReLU network.
        value: Graph that maps (z, [gates and positions]) to y, linear in z.
        gate: Module that maps preactivations to gates; None is `SoftGate()`.
        value_input: The value network's input z: 'x', or 'ones' of x's shape.
        layers: Names of the ReLUs' calls, as `interp_nn.explain.record` names them.
        gating_kind: 'relu' or 'linear'.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> dual = to_dgn(model)
        >>> dual.layers, dual(torch.ones(2, 4)).shape
        (('1',), torch.Size([2, 3]))
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
        """Compute the half-spaces of the gates.

        Args:
            input_shape: Shape of one sample, such as (c, h, w).

        Returns:
            A `GateWeights` for each gating layer: weight (units, inputs) and bias (units,), with units and inputs flattened.

        Raises:
            ValueError: The gating is 'relu', or a batch norm or dropout is in training mode.
        """
        if self.gating_kind == "relu":
            raise ValueError("gating: is 'relu', whose gates are not affine in the input; want 'linear'")
        self._check_evaluating()
        like = next(self.gating.parameters(), torch.empty(0))
        zero = like.new_zeros(1, *input_shape)

        def derivative(v: Tensor) -> tuple[Tensor, ...]:
            return jvp(lambda x: tuple(self.gating(x)), (zero,), (v.unsqueeze(0),))[1]

        units = torch.eye(zero.numel(), dtype=like.dtype, device=like.device).unflatten(1, zero.shape[1:])
        with torch.no_grad():
            columns = torch.vmap(derivative, chunk_size=_COLUMNS_AT_ONCE)(units)
            return [GateWeights(t.flatten(1).T, q.flatten()) for t, q in zip(columns, self.gating(zero), strict=True)]

    def extra_repr(self) -> str:
        """Return the settings for repr."""
        return f"gating={self.gating_kind!r}, {super().extra_repr()}"


def to_dgn(
    model: nn.Module,
    *,
    gating: str = "linear",
    value_input: str = "ones",
    gate: nn.Module | None = None,
    reset: bool = True,
) -> DualNetwork:
    """Convert a ReLU network to a gated network.

    Both networks are copies of the model. In the gating network, the preactivation of each ReLU gives a gate. In the value
    network, a multiplication by that gate replaces the ReLU. The model is not changed. torch.fx traces it: modules, functions
    and methods, reused and in-place calls. A ReLU may have any spelling that `explain.record` takes for one, such as
    `x.clamp(min=0)` or `x * (x > 0)`; its gate is on where x > 0.

    With a linear gating, max-pooling becomes average pooling over the same windows, in both networks. With a ReLU gating its
    choices are gates too: the value network takes the entries at the positions that the gating network chose. The value network
    is linear in its input. With gating='relu', value_input='x', a HardGate and reset=False the result computes what the model
    computes.

    With value_input='ones', all rows before the first gates are equal. A batch norm in training mode that follows linear layers
    alone then outputs only its shift.

    Args:
        model: A network of linear layers, ReLUs and pooling, with one input and one output tensor.
        gating: 'relu' (DGN): the gating network is the model. 'linear' (DLGN): it is the model without its ReLUs, so that each
            gate is on in a half-space, if batch norms are in evaluation mode.
        value_input: Input of the value network, 'ones' or 'x'.
        gate: Module that maps preactivations to gates; None is `SoftGate()`.
        reset: True draws the weights of both networks by each layer's `reset_parameters`. False copies the model's weights.

    Returns:
        The gated network, in the model's training mode.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: The model has another nonlinearity, no ReLU, control flow that depends on the input, or several inputs or
            outputs. The message names the layer.

    Example:
        >>> from interp_nn.nn import HardGate
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.ones(2, 4)
        >>> dual = to_dgn(model, gating="relu", value_input="x", gate=HardGate(), reset=False)
        >>> torch.allclose(dual(x), model(x))
        True

    Source: Lakshminarayanan and Singh, NeurIPS 2020, arXiv 2006.10529.
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
    # A new module has only the parameters and buffers that its graph refers to.
    for_gates, for_values = (fx.GraphModule(n, n.graph, type(model).__name__) for n in (for_gates, for_values))
    if reset:
        _reset(for_gates)
        _reset(for_values)
    return DualNetwork(for_gates, for_values, gate, value_input, layers, gating).train(traced.training)


def _check(graph_module: fx.GraphModule) -> None:
    """Remove dead code. Raise ValueError for a graph without ReLU, with another nonlinearity, or with several outputs."""
    graph = graph_module.graph
    graph.eliminate_dead_code()
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise ValueError(f"model: returns a {type(output.args[0]).__name__}, want one tensor")
    for node in graph.nodes:
        if kind(graph_module, node) in _UNSUPPORTED:
            raise ValueError(
                f"model: {where(graph_module, node)} is neither linear nor a ReLU; want a network of linear layers, "
                "ReLU and pooling that gives logits"
            )
    if not any(kind(graph_module, node) == "relu" for node in graph.nodes):
        raise ValueError("model: has no ReLU, want one to make a gate of")


def _calls(network: fx.GraphModule, *kinds: str) -> Iterator[fx.Node]:
    return (node for node in list(network.graph.nodes) if kind(network, node) in kinds)


def _call(network: fx.GraphModule, node: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call just before a node, in the same layer."""
    with network.graph.inserting_before(node):
        made = network.graph.call_function(function, args, kwargs)
    made.meta["layer"] = node.meta.get("layer", "")
    return made


def _replace(network: fx.GraphModule, node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    network.graph.erase_node(node)


def _dropout_as_module(network: fx.GraphModule, node: fx.Node) -> None:
    """Replace a functional dropout by a module, which follows `train()` and `eval()` of the converted network.

    A dropout that was off while the model was in training mode is removed. In evaluation mode it is kept, as it may have been
    given `self.training`.
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
    """Return the dimensions of a max-pooling ('1d', ...) and its arguments."""
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
    """Name the ReLUs' calls by module path ('features.3', 'relu#1' for a second call), or path, operation and count."""
    calls, names = Counter[str](), []
    for node in _calls(network, "relu"):
        module = node.op == "call_module"
        stem = layer_of(node) if module else f"{layer_of(node)}:{node.meta.get('spelling', name_of(network, node))}"
        names.append(stem if module and not calls[stem] else f"{stem}#{calls[stem]}")
        calls[stem] += 1
    return names


def _gates_out(network: fx.GraphModule, keep: bool) -> None:
    """Make a network return its ReLUs' inputs and its max-poolings' positions. Without `keep` its ReLUs are removed."""
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
    """Make a network take gates, in place of its ReLUs, and positions, in place of its max-poolings' own choices."""
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
