"""Warn, once for a layer, of a parameter b that is not finite, or is far from orthonormal under a constraint.

No forward looks: `eval`, `state_dict`, `fold`, `freeze`, `spectrum` and the retraction do. Without a constraint a large b is no
fault: a converted layer may have any singular values, and so may one that was initialised by its user or trained well. Only
`spectrum`, which computes them, then warns.
"""

from __future__ import annotations

import math
import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from interp_nn import linalg
from interp_nn.ops.library import is_wrapped

_STEPS = 4  # of the power iteration
_warned: WeakSet[nn.Module] = WeakSet()
_modes_active = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # such as the one of fake tensors
_ADVICE = {
    None: "A layer converted with its outputs kept may have it. Where it came by training, lower the learning rate, clip "
    "gradients, or constrain the layer (interp_nn.nn.constrain).",
    "penalty": "Give orthogonality_penalty(model) more weight in the loss, lower the learning rate, clip gradients, or call "
    "orthogonalize_() on the layer.",
    "retract": "Each step of the optimizer needs a retraction, see interp_nn.nn.follow; if it has one, lower the learning rate "
    "or clip gradients.",
}


def look(layer: Any, path: str | nn.Module = "") -> None:
    """Warn if b, or a tensor of its parametrization, is not finite, or b has an orthogonality defect above 1 and a constraint.

    It takes one reduction, and with a constraint eight products of b with a vector. On a GPU it synchronises. Meta, sharded,
    wrapped and traced tensors are not looked at.

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
            _warn(
                layer,
                path,
                names.get(id(t), "b"),
                "has a value that is not finite, as training leaves it that has diverged. Load an earlier checkpoint or call "
                "reset_parameters(); then lower the learning rate, clip gradients, or constrain the layer "
                "(interp_nn.nn.constrain).",
            )
            return
    b = layer._parameters.get("b")  # a parametrized b is orthonormal
    if layer.constraint is not None and b is not None and _has_values(b):
        look_at_norm(layer, _norm_at_least(layer.matrix()), path)


def look_at_norm(layer: Any, s: float, path: str | nn.Module = "") -> None:
    """Warn if `s`, the largest singular value of b or a lower bound on it, says that the orthogonality defect exceeds 1."""
    if not s > 2 or layer in _warned:
        return
    advice = _ADVICE.get(layer.constraint, _ADVICE[None])
    _warn(layer, path, "b", f"has a singular value of at least {s:.3g}, an orthogonality defect above 1. {advice}")


@torch.no_grad()
def _norm_at_least(b: Tensor) -> float:
    """Return a lower bound on the largest singular value of b (..., d, k), by a power iteration; infinite if that overflows."""
    with linalg.autocast_off(b.device):
        b = b.to(linalg.accumulation_dtype(b.dtype))
        # Any start would do that is in no relation to the rows of b.
        v = torch.arange(1, b.shape[-1] + 1, dtype=b.dtype, device=b.device).square().cos().unsqueeze(-1)
        for _ in range(_STEPS):
            u = b @ v
            v = b.mT @ u
        u, v = torch.linalg.vector_norm(u, dim=-2), torch.linalg.vector_norm(v, dim=-2)
        grown = torch.where(v.isfinite(), v / u, math.inf)  # b is finite
        return float(grown.nan_to_num(0.0, math.inf).max())  # 0 / 0 of zeros


def _warn(layer: nn.Module, path: str | nn.Module, parameter: str, fault: str) -> None:
    _warned.add(layer)
    if isinstance(path, nn.Module):
        path = next((name for name, m in path.named_modules() if m is layer), "")
    name = f"{path}.{parameter}" if path else f"{parameter} of {type(layer).__name__}({layer.extra_repr()})"
    warnings.warn(f"{name} {fault}", RuntimeWarning, stacklevel=4)


def _has_values(t: Tensor) -> bool:
    if type(t) not in (Tensor, nn.Parameter) or t.is_meta or is_wrapped(t) or not t.is_floating_point():
        return False
    capturing = t.is_cuda and torch.cuda.is_current_stream_capturing()
    return not capturing and t.numel() > 0 and t.untyped_storage().nbytes() > 0
