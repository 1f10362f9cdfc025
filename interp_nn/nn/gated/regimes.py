"""What is trained of a gated network, and where its gates come from.

The regimes in which Lakshminarayanan & Singh (NeurIPS 2020) tell what gates learn from what weights do, for a DGN `model`:

    DLNPF        soft gates, both networks trained                 model as it is
    FRNPF (II)   gates random and fixed, weights independent       fix_gates(model)
    FRNPF (DI)   the same, from equal weights                      copy_gates(model.value, model), then fix_gates(model)
    FLNPF        gates of a trained ReLU network, fixed            copy_gates(network, model), then fix_gates(model)

with hard gates in all but the first. Their successor (arXiv 2203.16455) permutes the gates' layers: `permute_gates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from interp_nn.nn.gated.from_relu import DualNetwork
from interp_nn.nn.gated.networks import GatedNetwork

Network = TypeVar("Network", bound=GatedNetwork)


def fix_gates(model: Network, fixed: bool = True) -> Network:
    """Stop training the gating network (or, fixed=False, train it again); returns the model.

    Its parameters want no gradient, and its batch norms and dropouts stay in evaluation mode whatever `train()` says.
    """
    _check(model)
    model.gates_fixed = fixed
    model.gating.requires_grad_(not fixed)
    model.gating.train(model.training and not fixed)
    return model


def copy_gates(source: nn.Module, to: Network) -> Network:
    """Give the gating network of `to` the weights of `source`, with its batch norms' statistics; returns `to`.

    source: another gated network, of which the gating network is taken; or a network of the same shape, matched by the names of
    its layers for a converted network, and by its nn.Linear layers in order for a `DGN`, where one more at the end is left out.
    A bias that the source does not have becomes zero. Raises ValueError that names the layer that does not match.
    """
    _check(to, "to")
    network = source.gating if isinstance(source, GatedNetwork) else source
    if isinstance(to, DualNetwork):
        given, wanted = network.state_dict(), to.gating.state_dict()
    else:
        given, wanted = _linear_layers(network), _linear_layers(to.gating)
        layers, wants = (len([n for n in names if n.endswith("weight")]) for names in (given, wanted))
        if layers not in (wants, wants + 1):
            raise ValueError(
                f"source: has {layers} nn.Linear layers, want {wants}, or {wants + 1} with an output layer"
            )
    for name, tensor in wanted.items():
        if name in given and given[name].shape != tensor.shape:
            raise ValueError(
                f"source: {name!r} has shape {tuple(given[name].shape)}, want {tuple(tensor.shape)} as the gating has it"
            )
        if name not in given and not name.endswith(".bias"):
            raise ValueError(f"source: has no {name!r}, want the names {list(wanted)}")
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias in given and bias not in wanted:
            raise ValueError(f"source: {bias!r} has no place in a gating without biases; want one with bias=True")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(given[name]) if name in given else tensor.zero_()
    return to


def permute_gates(model: Network, order: Sequence[int] | int, x: Tensor | None = None) -> Network:
    """Let value layer l take the gates of gating layer order[l], counted from 0; returns the model.

    order: a permutation of the layers (`range(L)` undoes it), or a seed, for a random one among layers of equal shape.
    x: inputs (1 or more, ...), which a converted network needs to know its gates' shapes. Raises ValueError that names the
    layers whose gates have other shapes, and where no two layers have the same.
    """
    _check(model)
    shapes = _gate_shapes(model, x)
    if isinstance(order, int):
        order = _drawn(shapes, order)
    if sorted(order) != list(range(len(shapes))):
        raise ValueError(f"order: got {tuple(order)}, want a permutation of the {len(shapes)} gated layers, or a seed")
    for place, source in enumerate(order):
        if shapes[place] != shapes[source]:
            raise ValueError(
                f"order: layer {model.layers[place]!r} with gates of shape {tuple(shapes[place])} cannot take those of "
                f"{model.layers[source]!r}, {tuple(shapes[source])}"
            )
    model.gate_order = tuple(order)
    return model


def _gate_shapes(model: GatedNetwork, x: Tensor | None) -> list[torch.Size]:
    if not isinstance(model, DualNetwork):
        return [weight.shape[:1] for name, weight in _linear_layers(model.gating).items() if name.endswith("weight")]
    if x is None:
        raise ValueError("x: got None, want inputs, from which the shapes of a converted network's gates follow")
    return [site.shape for site in model.gates(x).sites]


def _drawn(shapes: Sequence[torch.Size], seed: int) -> list[int]:
    """A random permutation within each group of equal shapes, and not the identity."""
    groups = [[i for i, shape in enumerate(shapes) if shape == one] for one in dict.fromkeys(shapes)]
    if all(len(group) == 1 for group in groups):
        raise ValueError(f"order: no two layers have gates of one shape, {[tuple(shape) for shape in shapes]}")
    generator = torch.Generator().manual_seed(seed)
    order = list(range(len(shapes)))
    while order == sorted(order):
        for group in groups:
            for place, j in zip(group, torch.randperm(len(group), generator=generator).tolist(), strict=True):
                order[place] = group[j]
    return order


def _linear_layers(network: nn.Module) -> dict[str, Tensor]:
    """The parameters of a network's nn.Linear layers, by the layer's number."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return {f"{i}.{name}": p.detach() for i, layer in enumerate(layers) for name, p in layer.named_parameters()}


def _check(model: nn.Module, name: str = "model") -> None:
    if not isinstance(model, GatedNetwork):
        raise TypeError(f"{name}: got {type(model).__name__}, want a DGN, DLGN or what to_dgn returns")
