"""Weights of plain and summary layers: each computed from the other, and copied between layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interp_nn import linalg
from interp_nn.nn.base import LinearForm


def copy_parameters(source: nn.Module, to: nn.Module, weight: Tensor) -> None:
    """Copy `weight`, and the bias, requires_grad flags and training mode of `source`, into `to`."""
    for name, value in (("weight", weight), ("bias", source.bias)):
        if value is not None:
            trains = getattr(source, name).requires_grad  # a parametrized weight has the flag only outside of no_grad
            with torch.no_grad():
                getattr(to, name).copy_(value).requires_grad_(trains)
    to.train(source.training)


def tied_parameters(model: nn.Module, layer: nn.Module, name: str) -> list[str]:
    """List the parameters of a model's other modules that are this layer's parameter `name`."""
    parameter = layer._parameters.get(name)
    others = ((path, m) for path, m in model.named_modules() if m is not layer and parameter is not None)
    return [f"{path}.{of}".lstrip(".") for path, m in others for of, p in m._parameters.items() if p is parameter]


def check_preserve(preserve: str) -> None:
    """Raise ValueError unless `preserve` is 'function' or 'weight'."""
    if preserve not in ("function", "weight"):
        raise ValueError(f"preserve: got {preserve!r}, want 'function' or 'weight'")


def cube_root_weight(layer: str, weight: Tensor, preserve: str, groups: int = 1) -> Tensor:
    """Compute the `weight` of a summary layer from a plain layer's: its cube root ("function") or itself ("weight").

    Args:
        layer: Name of the plain layer, for messages.
        weight: The plain layer's weight, (out, ...).
        preserve: "function" or "weight".
        groups: The number of groups of a grouped convolution.

    Raises:
        TypeError: The weight is uninitialized.
        ValueError: `preserve` is something else.
    """
    check_preserve(preserve)
    if isinstance(weight, nn.UninitializedParameter):
        raise TypeError(f"{layer}: got an uninitialized weight (a lazy module), want one that has run once")
    if preserve == "weight" or weight.numel() == 0:
        return weight.detach()
    rows = weight.detach().flatten(1).unflatten(0, (groups, -1))
    return linalg.cube_root(rows).view(weight.shape)


def exact_effective_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Compute the effective weight of a summary layer's `weight`, in its shape and in float64."""
    if weight.numel() == 0:
        return weight.detach().double()
    b = weight.detach().double().flatten(1).unflatten(0, (groups, -1)).mT
    return linalg.effective_weight(b).mT.reshape(weight.shape)


def folded_weight(layer: LinearForm) -> Tensor:
    """Compute a layer's effective weight in float64, and round it once to the weight's dtype."""
    return exact_effective_weight(layer.weight, layer.groups).to(layer.weight.dtype)


def meta_arguments(layer: Any, *names: str) -> dict[str, Any]:
    """Return the arguments that make a layer like `layer` on the meta device, where no parameter is drawn."""
    given = {name: getattr(layer, name) for name in names}
    return given | {"bias": layer.bias is not None, "device": "meta", "dtype": layer.weight.dtype}
