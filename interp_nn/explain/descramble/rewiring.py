"""The weights of a layer and of the next in other coordinates of what passes between them, seen or written into the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from interp_nn.explain.following.calls import tensors
from interp_nn.explain.following.layer_values import Wiring, find_layer, has_rows
from interp_nn.nn.base import LinearForm


class DescrambledWeights(NamedTuple):
    """A layer's weight from the left, P W, and the next layer's from the right, W Pᵀ (None without one), in fp64 and in the
    shapes that the layers have them.
    """

    weight: Tensor
    following: Tensor | None


def rotated_rows(w: Tensor, P: Tensor) -> Tensor:
    """P W of a weight or bias (n, ...)."""
    if len(w) != len(P):
        raise ValueError(f"layer: got a weight of shape {tuple(w.shape)}, want ({len(P)}, ...)")
    return torch.einsum("ij,j...->i...", P.to(w.device), w.double())


def rotated_columns(w: Tensor, P: Tensor) -> Tensor:
    """W Pᵀ of a weight (m, n, ...), or (m, n s) with s positions of each of n channels."""
    n = len(P)
    if w.dim() < 2 or w.shape[1] % n:
        raise ValueError(f"following: got a weight of shape {tuple(w.shape)}, want (m, {n}, ...) or a multiple of {n}")
    return torch.einsum("ij,mjs->mis", P.to(w.device), w.double().view(len(w), n, -1)).reshape(w.shape)


def weight_of(layer: nn.Module | Tensor, name: str) -> Tensor:
    """A layer's weight (out, in, ...); of a summary layer, that of the linear layer which it is."""
    if isinstance(layer, Tensor):
        weight = layer
    elif not has_rows(layer):
        raise TypeError(f"{name}: got {type(layer).__name__}, want a matrix or a layer with a weight (out, in, ...)")
    else:
        weight = layer.effective_weight() if isinstance(layer, LinearForm) else layer.weight  # type: ignore[assignment]
    return weight.detach()


def scaled_columns(model: nn.Module, wires: Wiring, gram: Tensor) -> Tensor:
    """The next layer's weight as samples of the features (n, m), scaled to the spectral norm of those with this Gram matrix."""
    assert wires.following is not None
    weight = weight_of(find_layer(model, wires.following)[1], "following").double()
    columns = weight.view(len(weight), wires.features, -1).movedim(1, 0).flatten(1)
    norm = torch.linalg.matrix_norm(columns, ord=2)
    return columns * torch.where(norm > 0, torch.linalg.matrix_norm(gram, ord=2).sqrt() / norm, 0.0)


@torch.no_grad()
def rewire_(model: nn.Module, wires: Wiring, P: Tensor, permutation: bool, probe: Tensor) -> None:
    """Put P after a layer and Pᵀ before the next one, in place: weights, biases, and what lies between with a value a feature.

    Compares the model's outputs on `probe` before and after; where they differ by more than rounding, everything is put back
    and ValueError raised. Raises ValueError too for a P that is no permutation where anything lies between.
    """
    if wires.following is None:
        raise ValueError(
            f"apply_: no layer after {wires.layer!r} receives a function of its values alone, so none can undo P"
        )
    if not permutation and not wires.direct:
        between = [(path, find_layer(model, path)[1]) for path in wires.between]
        modules = [f"{path} ({type(module).__name__})" for path, module in between if not any(module.children())]
        raise ValueError(
            f"apply_: between {wires.layer!r} and {wires.following!r} lies {', '.join(modules) or 'a function'}, which does not "
            "commute with an orthogonal P, so the network would compute something else; want group='permutation', or look at "
            "weights()"
        )
    layer, following = (find_layer(model, path)[1] for path in (wires.layer, wires.following))
    for path, module in ((wires.layer, layer), (wires.following, following)):
        if not has_rows(module):
            raise ValueError(
                f"apply_: layer {path!r} is of {type(module).__name__}, want one with a weight (out, in, ...)"
            )
        if getattr(module, "groups", 1) != 1:
            raise ValueError(
                f"apply_: layer {path!r} has {module.groups} groups, whose channels cannot be mixed; want one"
            )
        if is_parametrized(module, "weight"):
            raise ValueError(
                f"apply_: the weight of layer {path!r} is parametrized, so cannot be written; remove that first"
            )
    own = [layer, *(find_layer(model, path)[1] for path in wires.between)]
    held = {id(t): t for module in own for t in _values(module) if t.dim() and len(t) == len(P)}
    columns: Tensor = following.weight  # type: ignore[assignment]
    changes = [(t, t.clone(), rotated_rows(t, P)) for t in held.values()]
    changes.append((columns, columns.clone(), rotated_columns(columns, P)))
    before = _output(model, probe)
    for value, _, new in changes:
        value.copy_(new)
    after = _output(model, probe)
    # Sums are taken in another order; anything beyond half the digits is another function.
    if not torch.allclose(before, after, rtol=0, atol=torch.finfo(before.dtype).eps ** 0.5 * float(before.abs().max())):
        for value, old, _ in changes:
            value.copy_(old)
        raise ValueError(
            f"apply_: exchanging the features of {wires.layer!r} changes what the model computes by "
            f"{float((before - after).abs().max()):.2g}, as where another layer uses them too; the model is as it was"
        )


def _values(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _output(model: nn.Module, probe: Tensor) -> Tensor:
    return torch.cat([t.flatten() for t in tensors(model(probe)) if t.is_floating_point()])
