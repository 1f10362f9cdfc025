"""Layers as leaves of symbolic graphs, as torch.fx treats those of torch.nn, whatever the tracer's class.

A tracer calls the forward of a module that it does not know as a leaf; forward then records the call of the layer itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

fx_state: Any = fx._symbolic_trace


def call_in_graph(layer: nn.Module, input: Tensor) -> Any:
    """Return the proxy of a layer's call while torch.fx traces it symbolically; None at any other time."""
    given: Any = input
    tracer: Any = given.tracer if isinstance(given, fx.Proxy) else _tracer(layer)
    if tracer:
        _check_recordable(layer)
    return tracer and tracer.create_proxy("call_module", _path(tracer, layer), (given,), {})


def weight_in_graph(layer: nn.Module) -> Any:
    """Return the proxy of a layer's `weight`, read when the graph runs, while torch.fx traces; None at any other time."""
    tracer = _tracer(layer)
    return tracer and tracer.create_proxy("get_attr", _path(tracer, layer), (), {}).weight


def _check_recordable(layer: nn.Module) -> None:
    """Refuse a layer whose call has more than its forward. The graph calls the layer, so all of the rest would run twice."""
    if not type(layer).forward.__module__.startswith("interp_nn."):
        more = "a subclass's forward"
    elif "forward" in vars(layer):
        more = "a replaced forward"
    elif layer._forward_hooks or layer._forward_pre_hooks:
        more = "forward hooks"
    else:
        return
    raise TypeError(
        f"torch.fx: cannot trace {type(layer).__name__} with {more}, which would run twice; remove it while torch.fx traces, or "
        "make the layer a leaf (is_leaf_module of a torch.fx.Tracer)"
    )


def _path(tracer: Any, layer: nn.Module) -> str:
    path: str = tracer.path_of_module(layer)
    if not path:
        raise TypeError(
            f"torch.fx: got a {type(layer).__name__} to trace, want a module that holds it, such as nn.Sequential(layer)"
        )
    return path


def _tracer(layer: nn.Module) -> Any:
    """Return the tracer that makes proxies of the layer's parameters now, or None."""
    if not getattr(fx_state, "_is_fx_tracing_flag", False) or torch.compiler.is_compiling():
        return None
    values = (getattr(layer, name) for name in layer._parameters)
    return next((value.tracer for value in values if isinstance(value, fx.Proxy)), None)
