"""Keep b orthonormal while it trains: by a penalty, by a retraction after the optimizer's step, or by a parametrization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrizations, parametrize

from interp_nn import linalg
from interp_nn.nn import diagnosis
from interp_nn.nn.base import LinearForm, as_parameter
from interp_nn.nn.weights import remove_parametrizations, tied_parameters
from interp_nn.ops.library import is_dtensor

CONSTRAINTS = ("penalty", "retract", "parametrization")


def constrain(model: nn.Module, constraint: str | None) -> nn.Module:
    """Set how every layer of a model with a parameter b keeps it orthonormal.

    "retract" and "parametrization" replace b by the nearest orthonormal matrix at once, which changes the outputs unless b is
    orthonormal already. To constrain a part of a model, pass that part: `constrain(model.head, ...)`.

    Args:
        model: The model, changed in place.
        constraint: "penalty": you add a multiple of `orthogonality_penalty(model)` to the loss. "retract": you call
            `interp_nn.nn.follow(optimizer, model)` once, or `retract_(model)` after each step. "parametrization":
            torch.nn.utils.parametrizations.orthogonal, which is exact; it makes new parameters, so create the optimizer
            afterwards. None: no constraint; an earlier one is removed, and b keeps its value.

    Returns:
        The model.

    Raises:
        TypeError: A b to parametrize is 16-bit, which PyTorch cannot compute, or sharded. The message names the layer.
        ValueError: Another constraint; a model without such layers; a b to parametrize that is tied to another parameter.

    Example:
        >>> from interp_nn.nn import SummaryLinear
        >>> model = constrain(nn.Sequential(SummaryLinear(4, 3)), "retract")
        >>> model
        Sequential(
          (0): SummaryLinear(in_features=4, out_features=3, bias=True, constraint='retract')
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    if constraint not in (None, *CONSTRAINTS):
        raise ValueError(f"constraint: got {constraint!r}, want None, 'penalty', 'retract' or 'parametrization'")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LinearForm)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without a summary layer to constrain")
    if constraint == "parametrization":
        _check_parametrizable(model, layers)
    for layer in layers.values():
        if layer.constraint == "parametrization":
            remove_parametrizations(layer, "b")
            layer.constraint = None
        if constraint in ("retract", "parametrization"):
            layer.orthogonalize_()
        layer._drop_gram()
        if constraint == "parametrization":
            _parametrize(layer)
        layer.constraint = constraint
    return model


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Compute the sum of ‖bᵀb - I‖² (Frobenius; ‖bbᵀ - I‖² where k > d) over the layers with the constraint "penalty".

    The gradient is 4 b (bᵀb - I), and the penalty is differentiable to every order. A b that several layers share counts
    once. For a sharded b every device gets the whole sum, and its gradient counts once.

    A SummaryLinear or SummaryConv2d reuses the bᵀb of its last forward if its b is float32 or float64, has not changed
    since, and has had no gradient since. A step that begins with `optimizer.zero_grad()` and adds the penalty to the loss meets
    this. It saves two of three products, forward and backward, of 2 d k² operations each. A write through `.data` is not
    noticed. In all other cases bᵀb is computed: for layers that return pairs, for a 16-bit b (in float32, as bᵀb - I
    cancels), in compiled code, under torch.func, and if the forward formed none.

    Args:
        model: A model with layers that `constrain(model, "penalty")` has marked.

    Returns:
        A scalar; float32 for a 16-bit b, else in b's dtype.

    Raises:
        ValueError: No layer has the constraint "penalty".

    Example:
        >>> from interp_nn.nn import SummaryLinear
        >>> layer = constrain(SummaryLinear(4, 3), "penalty")
        >>> orthogonality_penalty(layer).item() < 1e-6
        True
    """
    layers = _constrained(model, "penalty")
    if not layers:
        raise ValueError("model: has no layer with the constraint 'penalty'; call constrain(model, 'penalty') first")
    first, *rest = map(_penalty, layers)
    return sum((term.to(first.device) for term in rest), first)


@torch.no_grad()
def retract_(model: nn.Module) -> None:
    """Replace b by its nearest orthonormal matrix, in place, for the layers with the constraint "retract".

    After a step of an optimizer that keeps the singular values between 0.3 and 1.4, that takes two products of 2 d k² operations
    each (2 d² k where k > d) and a few of k³; after a larger step more. A 16-bit b is computed in float32. A sharded b is
    gathered, so every rank must call.

    Args:
        model: A model with layers that `constrain(model, "retract")` has marked; their b is changed.

    Example:
        >>> from interp_nn.nn import SummaryLinear
        >>> layer = constrain(SummaryLinear(4, 3), "retract")
        >>> _ = layer.b.data.mul_(1.01)
        >>> retract_(layer)
        >>> layer.orthogonality_defect() < 1e-6
        True
    """
    for layer in _constrained(model, "retract"):
        parameter = layer.b
        with linalg.autocast_off(parameter.device):
            b = layer.whole_matrix().to(linalg.accumulation_dtype(parameter.dtype))
            nearest, near = linalg.retraction(b)
            if not near:  # so that most steps cost no look
                diagnosis.look(layer, model)
            layer._write(as_parameter(nearest.to(parameter.dtype), parameter.shape))


class _CachedGram(Function):
    """Return a cached bᵀb (bbᵀ where k > d) with its gradient for b."""

    generate_vmap_rule = True

    @staticmethod
    def forward(b: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (b,) = ctx.saved_tensors
        return linalg.mul_gram(b, upstream + upstream.mT), None


def _penalty(layer: LinearForm) -> Tensor:
    b, cached = layer.whole_matrix(), layer.cached_gram()
    with linalg.autocast_off(b.device):
        b = b.to(linalg.accumulation_dtype(b.dtype))
        g = linalg.gram_small(b) if cached is None else _CachedGram.apply(b, cached)
        return (g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)).square().sum()


def _constrained(model: nn.Module, constraint: str) -> list[LinearForm]:
    """Return the layers with a constraint; only the first of those that share b."""
    found: dict[int, LinearForm] = {}
    for m in model.modules():
        if isinstance(m, LinearForm) and m.constraint == constraint:
            found.setdefault(id(m._parameters.get("b", m)), m)
    return list(found.values())


def _check_parametrizable(model: nn.Module, layers: dict[str, LinearForm]) -> None:
    for path, layer in layers.items():
        if layer.b.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{path or 'model'}: got b {layer.b.dtype}, want float32 or float64 to parametrize")
        if is_dtensor(layer.b):
            raise TypeError(f"{path or 'model'}: its b is a DTensor; parametrize it before it is shared out")
        if others := tied_parameters(model, layer, "b"):
            raise ValueError(f"{path or 'model'}: its b is tied to {', '.join(others)}, and cannot be parametrized")


class _Kernels(nn.Module):
    """Reshape (groups, out per group, in per group * kh * kw) to the layout of kernels, and back."""

    def __init__(self, shape: torch.Size, groups: int) -> None:
        super().__init__()
        self.shape, self.groups = shape, groups

    def forward(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.shape)

    def right_inverse(self, b: Tensor) -> Tensor:
        return b.flatten(1).unflatten(0, (self.groups, -1))


def _parametrize(layer: LinearForm) -> None:
    """Parametrize `b` by PyTorch's orthogonal, which acts on the last two dimensions; kernels first become matrices."""
    shape = layer.b.shape
    if len(shape) > 2:
        kernels = _Kernels(shape, layer.groups)
        layer.b = nn.Parameter(kernels.right_inverse(layer.b.detach()), layer.b.requires_grad)
        parametrizations.orthogonal(layer, "b")
        parametrize.register_parametrization(layer, "b", kernels, unsafe=True)
    else:
        parametrizations.orthogonal(layer, "b")
