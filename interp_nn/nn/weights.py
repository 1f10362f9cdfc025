"""Weights of plain and summary layers: each computed from the other, and copied between layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interp_nn import linalg
from interp_nn.nn import diagnosis
from interp_nn.nn.base import LinearForm, as_matrix, b_of_weight
from interp_nn.nn.polynomial_layer import Options, Solved, solve


def own_name(layer: nn.Module) -> str:
    """Return the name of the parameter that a layer's weight is, or is computed from."""
    return "b" if isinstance(layer, LinearForm) else "weight"


def copy_parameters(source: nn.Module, to: nn.Module, value: Tensor) -> None:
    """Copy `value` into the b or weight of `to`, and the bias, requires_grad flags and training mode of `source`.

    A gain gets the flag of the weight.
    """
    if getattr(to, "gain", None) is not None:
        to.get_parameter("gain").requires_grad_(getattr(source, own_name(source)).requires_grad)
    for name, target, new in ((own_name(source), own_name(to), value), ("bias", "bias", source.bias)):
        if new is not None:
            trains = getattr(source, name).requires_grad  # a parametrized b has the flag only outside of no_grad
            with torch.no_grad():
                getattr(to, target).copy_(new).requires_grad_(trains)
    to.train(source.training)


def tied_parameters(model: nn.Module, layer: nn.Module, name: str) -> list[str]:
    """List the parameters of a model's other modules that are this layer's parameter `name`."""
    parameter = layer._parameters.get(name)
    others = ((path, m) for path, m in model.named_modules() if m is not layer and parameter is not None)
    return [f"{path}.{of}".lstrip(".") for path, m in others for of, p in m._parameters.items() if p is parameter]


def remove_parametrizations(layer: Any, name: str) -> None:
    """Remove the parametrizations of a layer's parameter, whose value stays.

    PyTorch shares the class that it makes for a parametrized module with the module's deep copies, and here changes it for all of
    them. So the layer first gets a class of its own.
    """
    made = type(layer)
    members = {key: value for key, value in vars(made).items() if key not in ("__dict__", "__weakref__")}
    layer.__class__ = type(made.__name__, made.__bases__, members)
    parametrize.remove_parametrizations(layer, name)


def check_preserve(preserve: str) -> None:
    """Raise ValueError unless `preserve` is 'function' or 'weight'."""
    if preserve not in ("function", "weight"):
        raise ValueError(f"preserve: got {preserve!r}, want 'function' or 'weight'")


def solved_from(layer: str, weight: Tensor, preserve: str, options: Options, groups: int = 1) -> Solved:
    """Compute b, gain and norm of a summary layer from a plain layer's weight.

    Args:
        layer: Name of the plain layer, for messages.
        weight: The plain layer's weight, (out, ...).
        preserve: "function" keeps the weight, "weight" takes it as b, with a gain of 1.
        options: The options of the summary layer.
        groups: The number of groups of a grouped convolution.

    Raises:
        TypeError: The weight is uninitialized.
        ValueError: `preserve` is something else, or no b has the weight.
    """
    check_preserve(preserve)
    if isinstance(weight, nn.UninitializedParameter):
        raise TypeError(f"{layer}: got an uninitialized weight (a lazy module), want one that has run once")
    if preserve == "function":
        return solve(weight, groups, options, layer)
    b = b_of_weight(weight, groups, root=False)
    norm = linalg.singular_values(as_matrix(b, groups))[..., :1].flatten() if options.normalize and b.numel() else None
    return Solved(b, torch.ones(groups, dtype=torch.float64, device=b.device), norm)


def folded_weight(layer: LinearForm) -> Tensor:
    """Compute a layer's effective weight in float64, and round it once to b's dtype."""
    diagnosis.look(layer)
    return layer.exact_weight().to(layer.b.dtype)


def meta_arguments(layer: Any, *names: str) -> dict[str, Any]:
    """Return the arguments that make a layer like `layer` on the meta device, where no parameter is drawn."""
    given = {name: getattr(layer, name) for name in names}
    return given | {"bias": layer.bias is not None, "device": "meta", "dtype": getattr(layer, own_name(layer)).dtype}
