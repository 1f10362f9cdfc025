"""The weights P W of a layer and W Pᵀ of the next one, as tensors or written into the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from interp_nn.explain.following.calls import tensors
from interp_nn.explain.following.layer_values import Wiring, find_layer, has_rows
from interp_nn.nn.base import LinearForm
from interp_nn.nn.weights import own_name


class DescrambledWeights(NamedTuple):
    """The weights of a layer and of the next one for descrambled features, the result of `Descrambler.weights`.

    Attributes:
        weight: P W of the layer, in the weight's own shape (n, ...), float64.
        following: W Pᵀ of the next layer, in the weight's own shape (m, n, ...), float64; None without a next layer.

    Example:
        >>> from interp_nn.explain import Descrambler
        >>> order = Descrambler(operator="diff1", group="permutation").fit(torch.tensor([[1.0, 9.0, 2.0]]))
        >>> order.weights(torch.tensor([[1.0], [9.0], [2.0]])).weight.flatten()
        tensor([1., 2., 9.], dtype=torch.float64)
    """

    weight: Tensor
    following: Tensor | None


def rotated_rows(w: Tensor, P: Tensor) -> Tensor:
    """Compute P W of a weight or bias (n, ...)."""
    if len(w) != len(P):
        raise ValueError(f"layer: got a weight of shape {tuple(w.shape)}, want ({len(P)}, ...)")
    return torch.einsum("ij,j...->i...", P.to(w.device), w.double())


def rotated_columns(w: Tensor, P: Tensor) -> Tensor:
    """Compute W Pᵀ of a weight (m, n, ...), or (m, n s) for s positions of each of n channels."""
    n = len(P)
    if w.dim() < 2 or w.shape[1] % n:
        raise ValueError(f"following: got a weight of shape {tuple(w.shape)}, want (m, {n}, ...) or a multiple of {n}")
    return torch.einsum("ij,mjs->mis", P.to(w.device), w.double().view(len(w), n, -1)).reshape(w.shape)


def weight_of(layer: nn.Module | Tensor, name: str) -> Tensor:
    """Return a layer's weight (out, in, ...); for a summary layer, its effective weight."""
    if isinstance(layer, Tensor):
        weight = layer
    elif not has_rows(layer):
        raise TypeError(f"{name}: got {type(layer).__name__}, want a matrix or a layer with a weight (out, in, ...)")
    else:
        weight = layer.effective_weight() if isinstance(layer, LinearForm) else layer.weight  # type: ignore[assignment]
    return weight.detach()


def scaled_columns(model: nn.Module, wires: Wiring, gram: Tensor) -> Tensor:
    """Return the next layer's weight as samples (n, m), scaled to the spectral norm of samples with this Gram matrix."""
    assert wires.following is not None
    weight = weight_of(find_layer(model, wires.following)[1], "following").double()
    columns = weight.view(len(weight), wires.features, -1).movedim(1, 0).flatten(1)
    norm = torch.linalg.matrix_norm(columns, ord=2)
    return columns * torch.where(norm > 0, torch.linalg.matrix_norm(gram, ord=2).sqrt() / norm, 0.0)


@torch.no_grad()
def rewire_(model: nn.Module, wires: Wiring, P: Tensor, permutation: bool, probe: Tensor) -> None:
    """Multiply a layer's parameters by P and the next layer's weight by Pᵀ, in place.

    Parameters and buffers of the modules between the two, with one value for each feature, are multiplied by P too. The function
    compares the outputs on `probe` before and after. If they differ by more than rounding, it restores the model and raises
    ValueError. It also raises ValueError for a P that is no permutation if any operation lies between the layers.
    """
    if wires.following is None:
        raise ValueError(
            f"apply_: no layer after {wires.layer!r} receives a function of its values alone, so that no layer can undo P"
        )
    if not permutation and not wires.direct:
        between = [(path, find_layer(model, path)[1]) for path in wires.between]
        modules = [f"{path} ({type(module).__name__})" for path, module in between if not any(module.children())]
        raise ValueError(
            f"apply_: between {wires.layer!r} and {wires.following!r} lies {', '.join(modules) or 'a function'}, which does not "
            "commute with an orthogonal P, so that the network would compute another function; want group='permutation'; "
            "weights() shows P W without a change of the model"
        )
    layer, following = (find_layer(model, path)[1] for path in (wires.layer, wires.following))
    for path, module in ((wires.layer, layer), (wires.following, following)):
        if not has_rows(module):
            raise ValueError(
                f"apply_: layer {path!r} is {type(module).__name__}, want a layer with a weight (out, in, ...)"
            )
        if getattr(module, "groups", 1) != 1:
            raise ValueError(
                f"apply_: layer {path!r} has {module.groups} groups, whose channels cannot be mixed; want one group"
            )
        if is_parametrized(module, own_name(module)):
            raise ValueError(
                f"apply_: the {own_name(module)} of layer {path!r} is parametrized and cannot be written; want a plain parameter"
            )
    own = [layer, *(find_layer(model, path)[1] for path in wires.between)]
    held = {key: t for module in own for key, t in _values(module).items() if t.dim() and len(t) == len(P)}
    columns = _weight_layout(following, own_name(following))
    changes = [(t, t.clone(), rotated_rows(t, P)) for t in held.values()]
    changes.append((columns, columns.clone(), rotated_columns(columns, P)))
    before = _output(model, probe)
    for value, _, new in changes:
        value.copy_(new)
    after = _output(model, probe)
    # The sums are taken in another order. A difference in the leading half of the digits means another function.
    if not torch.allclose(before, after, rtol=0, atol=torch.finfo(before.dtype).eps ** 0.5 * float(before.abs().max())):
        for value, old, _ in changes:
            value.copy_(old)
        raise ValueError(
            f"apply_: with the features of {wires.layer!r} exchanged, the model's output changes by "
            f"{float((before - after).abs().max()):.2g}, for instance because another layer uses them too; the model is unchanged"
        )


def _values(module: nn.Module) -> dict[int, Tensor]:
    """Map the ids of a module's parameters and buffers to them, in the layout of weights."""
    parameters = {id(p): _weight_layout(module, name) for name, p in module.named_parameters(recurse=False)}
    return parameters | {id(t): t for t in module.buffers(recurse=False)}


def _weight_layout(module: nn.Module, name: str) -> Tensor:
    """Return a parameter, a view (out, in) of a summary layer's b (in, out)."""
    parameter = module.get_parameter(name)
    return parameter.t() if name == "b" and isinstance(module, LinearForm) and parameter.dim() == 2 else parameter


def _output(model: nn.Module, probe: Tensor) -> Tensor:
    return torch.cat([t.flatten() for t in tensors(model(probe)) if t.is_floating_point()])
