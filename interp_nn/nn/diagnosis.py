"""Warn, once for a layer, of a parameter b that is not finite or is far from orthonormal.

No forward looks: `eval`, `state_dict`, `fold`, `freeze`, `spectrum` and the retraction do. All but `spectrum` look at whether
b is finite alone: a converted layer may have any singular values, and no layer knows whether its b came by conversion, by
training or from a state, so each converted model would warn of layers that are right.
"""

from __future__ import annotations

import math
import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from interp_nn.ops.library import is_wrapped

_warned: WeakSet[nn.Module] = WeakSet()
_modes_active = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # such as the one of fake tensors


def look(layer: Any, path: str | nn.Module = "") -> None:
    """Warn if b, or a tensor of its parametrization, has a value that is not finite.

    It takes one reduction, and a synchronisation on a GPU. Meta, sharded, wrapped and traced tensors are not looked at.

    Args:
        layer: The layer.
        path: Its path for the message, or the model that it is in.
    """
    if torch.compiler.is_compiling() or _modes_active() or layer in _warned:
        return
    try:
        sources = layer._sources()
    except AttributeError:  # b was taken away
        return
    names = {id(t): name for name, t in (*layer._parameters.items(), *layer._buffers.items())}
    for t in sources:
        # The sum is the fastest reduction; one that is not finite may also have overflowed.
        if _has_values(t) and not (math.isfinite(float(t.detach().sum())) or bool(t.detach().isfinite().all())):
            if isinstance(path, nn.Module):
                path = next((name for name, m in path.named_modules() if m is layer), "")
            _warn(
                layer,
                path,
                names.get(id(t), "b"),
                "has a value that is not finite, as training leaves it that has diverged. Load an earlier checkpoint or call "
                "reset_parameters(); then lower the learning rate, clip gradients, or constrain the layer "
                "(interp_nn.nn.constrain).",
            )
            return


def look_at_norm(layer: nn.Module, s: float, path: str = "") -> None:
    """Warn if `s`, the largest singular value of b or a lower bound on it, says that the orthogonality defect exceeds 1."""
    if s <= 2 or layer in _warned:
        return
    _warn(
        layer,
        path,
        "b",
        f"has a singular value of at least {s:.3g}, an orthogonality defect above 1. A layer "
        "converted with its outputs kept may have it. Where it came by training, lower the learning rate, clip gradients, or "
        "constrain the layer (interp_nn.nn.constrain).",
    )


def _warn(layer: nn.Module, path: str, parameter: str, fault: str) -> None:
    _warned.add(layer)
    name = f"{path}.{parameter}" if path else f"{parameter} of {type(layer).__name__}({layer.extra_repr()})"
    warnings.warn(f"{name} {fault}", RuntimeWarning, stacklevel=4)


def _has_values(t: Tensor) -> bool:
    if type(t) not in (Tensor, nn.Parameter) or t.is_meta or is_wrapped(t) or not t.is_floating_point():
        return False
    capturing = t.is_cuda and torch.cuda.is_current_stream_capturing()
    return not capturing and t.numel() > 0 and t.untyped_storage().nbytes() > 0
