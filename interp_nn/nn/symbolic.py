"""Layers as leaves of symbolic graphs, as torch.fx treats those of torch.nn, whatever the tracer's class.

A tracer calls the forward of a module that it does not know as a leaf; forward then records the call of the layer itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn


def call_in_graph(layer: nn.Module, input: Tensor) -> Any:
    """Return the proxy of a layer's call while torch.fx traces it symbolically; None at any other time."""
    given: Any = input
    if isinstance(given, fx.Proxy):
        tracer: Any = given.tracer
    elif torch.compiler.is_compiling() or not getattr(fx._symbolic_trace, "_is_fx_tracing_flag", False):
        return None
    else:  # a constant input: the parameters of a traced model are proxies too
        proxies = (getattr(layer, name) for name in layer._parameters)
        tracer = next((p.tracer for p in proxies if isinstance(p, fx.Proxy)), None)
    return tracer and tracer.create_proxy("call_module", tracer.path_of_module(layer), (given,), {})
