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
    return tracer and tracer.create_proxy("call_module", tracer.path_of_module(layer), (given,), {})


def weight_in_graph(layer: nn.Module) -> Any:
    """Return the proxy of a layer's `weight`, read when the graph runs, while torch.fx traces; None at any other time."""
    tracer = _tracer(layer)
    return tracer and tracer.create_proxy("get_attr", tracer.path_of_module(layer), (), {}).weight


def _tracer(layer: nn.Module) -> Any:
    """Return the tracer that makes proxies of the layer's parameters now, or None."""
    if not getattr(fx_state, "_is_fx_tracing_flag", False) or torch.compiler.is_compiling():
        return None
    values = (getattr(layer, name) for name in layer._parameters)
    return next((value.tracer for value in values if isinstance(value, fx.Proxy)), None)
