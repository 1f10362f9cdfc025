"""Keeping b orthonormal while it trains: by a penalty, by a step back after the optimizer's, or by a parametrization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrizations, parametrize

from interp_nn import linalg
from interp_nn.nn.base import LinearForm
from interp_nn.nn.weights import tied_parameters
from interp_nn.ops.library import is_dtensor

CONSTRAINTS = ("penalty", "retract", "parametrization")


def constrain(model: nn.Module, constraint: str | None) -> nn.Module:
    """Set how every layer of a model with a weight b keeps it orthonormal, and return the model.

    "penalty": add a multiple of `orthogonality_penalty(model)` to the loss. "retract": call `retract_(model)` after each step of
    the optimizer, or let it do so: `optimizer.register_step_post_hook(lambda *_: retract_(model))`. "parametrization": PyTorch's
    own, torch.nn.utils.parametrizations.orthogonal; exact, and the parameters are new ones, so make the optimizer afterwards.
    None: nothing; what was there ends, and b stays as it is.

    "retract" and "parametrization" begin at the nearest orthonormal b, which changes the outputs of a model that was elsewhere.
    `constrain(model.head, ...)` leaves the rest of a model alone. Raises ValueError for another constraint and for a model
    without such layers; naming the layer, TypeError for a parametrization of 16-bit weights, which PyTorch cannot compute, or
    of sharded ones, and ValueError for one of a weight tied to another.
    """
    if constraint not in (None, *CONSTRAINTS):
        raise ValueError(f"constraint: got {constraint!r}, want None, 'penalty', 'retract' or 'parametrization'")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LinearForm)}
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without a summary layer to constrain")
    if constraint == "parametrization":
        _check_parametrizable(model, layers)
    for layer in layers.values():
        if layer.constraint == "parametrization":
            parametrize.remove_parametrizations(layer, "weight")
            layer.constraint = None
        if constraint in ("retract", "parametrization"):
            layer.orthogonalize_()
        layer._drop_gram()
        if constraint == "parametrization":
            _parametrize(layer)
        layer.constraint = constraint
    return model


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """The sum of ‖bᵀb - I‖² (Frobenius; ‖bbᵀ - I‖² where k > d) over the layers of a model with the constraint "penalty".

    A scalar, differentiable to every order; its gradient is 4 b (bᵀb - I). A SummaryLinear or SummaryConv2d takes the bᵀb that
    its last forward formed, if its weight is fp32 or fp64, has not changed since (a write through `.data` goes unseen), and had
    no gradient then nor got one since: as in a step that begins with `optimizer.zero_grad()` and has the penalty in the loss.
    That saves two of three products, forward and backward, of 2 d k² operations each, and on the engines of one launch that
    bᵀb is an output of the forward's launch. It is formed anew otherwise, for layers that give pairs, for 16-bit weights (in
    fp32, as bᵀb - I cancels), in compiled code, under torch.func, and where the forward formed none. A weight that layers share
    counts once. Of sharded weights every device gets the whole sum, and its gradient counts once. Raises ValueError where no
    layer has the constraint.
    """
    layers = _constrained(model, "penalty")
    if not layers:
        raise ValueError("model: has no layer with the constraint 'penalty'; call constrain(model, 'penalty') first")
    first, *rest = map(_penalty, layers)
    return sum((term.to(first.device) for term in rest), first)


@torch.no_grad()
def retract_(model: nn.Module) -> None:
    """One Newton-Schulz step b <- b (3 I - bᵀb) / 2, in place, for the layers of a model with the constraint "retract".

    A singular value 1 + e becomes 1 - 3 e² / 2 and more of third order, so that after a step of an optimizer b is orthonormal
    again to the square of that step; it must have left them below √5. Two products of 2 d k² operations each (d² k where
    k > d); 16-bit weights are computed in fp32.
    """
    for layer in _constrained(model, "retract"):
        weight = layer.weight
        with linalg.autocast_off(weight.device):
            b = layer.matrix().to(linalg.accumulation_dtype(weight.dtype))
            weight.copy_(linalg.newton_schulz(b, linalg.gram_small(b)).mT.reshape(weight.shape))


class _Square(Function):
    """The known value of bᵀb (of bbᵀ where k > d), as a function of b."""

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
        both = upstream + upstream.mT
        return linalg.mul_gram(b, both), None


def _penalty(layer: LinearForm) -> Tensor:
    b, known = layer.whole_matrix(), layer.cached_gram()
    with linalg.autocast_off(b.device):
        b = b.to(linalg.accumulation_dtype(b.dtype))
        square = linalg.gram_small(b) if known is None else _Square.apply(b, known)
        return (square - torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)).square().sum()


def _constrained(model: nn.Module, constraint: str) -> list[LinearForm]:
    """The layers with a constraint; of those that share a weight the first."""
    found: dict[int, LinearForm] = {}
    for m in model.modules():
        if isinstance(m, LinearForm) and m.constraint == constraint:
            found.setdefault(id(m._parameters.get("weight", m)), m)
    return list(found.values())


def _check_parametrizable(model: nn.Module, layers: dict[str, LinearForm]) -> None:
    for path, layer in layers.items():
        if layer.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{path or 'model'}: got weight {layer.weight.dtype}, want float32 or float64 to parametrize"
            )
        if is_dtensor(layer.weight):
            raise TypeError(f"{path or 'model'}: its weight is a DTensor; parametrize it before it is shared out")
        if others := tied_parameters(model, layer, "weight"):
            raise ValueError(
                f"{path or 'model'}: its weight is tied to {', '.join(others)}, and cannot be parametrized"
            )


class _Kernels(nn.Module):
    """(groups, out per group, in per group * kh * kw) as a convolution's weight."""

    def __init__(self, shape: torch.Size, groups: int) -> None:
        super().__init__()
        self.shape, self.groups = shape, groups

    def forward(self, rows: Tensor) -> Tensor:
        return rows.reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).unflatten(0, (self.groups, -1))


def _parametrize(layer: LinearForm) -> None:
    """PyTorch's own acts on the last two dimensions, so kernels are parametrized as the matrices that b is made of."""
    shape = layer.weight.shape
    if len(shape) > 2:
        kernels = _Kernels(shape, layer.groups)
        parameter = nn.Parameter(kernels.right_inverse(layer.weight.detach()), layer.weight.requires_grad)
        layer.weight = parameter
        parametrizations.orthogonal(layer, "weight")
        parametrize.register_parametrization(layer, "weight", kernels, unsafe=True)
    else:
        parametrizations.orthogonal(layer, "weight")
