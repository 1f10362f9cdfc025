"""Training regimes of gated networks: which of the two networks is trained, and where the gates come from.

Lakshminarayanan & Singh (NeurIPS 2020) separate learning in the gates from learning in the weights by these regimes. For a
DGN `model`:

    DLNPF        soft gates, both networks trained                 no call needed
    FRNPF (II)   gates random and fixed, weights independent       fix_gates(model)
    FRNPF (DI)   the same, from equal weights                      copy_gates(model.value, model), then fix_gates(model)
    FLNPF        gates of a trained ReLU network, fixed            copy_gates(network, model), then fix_gates(model)

All but the first have hard gates. A later paper (arXiv 2203.16455) permutes the gates' layers: `permute_gates`.
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
    """Stop training the gating network, or train it again.

    The parameters of a fixed gating network have requires_grad False. Its batch norms and dropouts stay in evaluation mode
    after `model.train()`.

    Args:
        model: A DGN, DLGN or result of `to_dgn`, changed in place.
        fixed: True fixes the gating network, False trains it again.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a gated network.

    Example:
        >>> from interp_nn.nn import DGN
        >>> model = fix_gates(DGN((4, 8, 3)))
        >>> {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        {'value'}
    """
    _check(model)
    model.gates_fixed = fixed
    model.gating.requires_grad_(not fixed)
    model.gating.train(model.training and not fixed)
    return model


def copy_gates(source: nn.Module, to: Network) -> Network:
    """Copy the weights of `source`, and its batch norms' statistics, into the gating network of `to`.

    A bias that the source does not have becomes zero.

    Args:
        source: A gated network, whose gating network is copied, or a plain network of the same shape. For a result of
            `to_dgn` layers are matched by name. For a DGN its nn.Linear layers are matched in order, and one more at the end
            is ignored.
        to: A DGN, DLGN or result of `to_dgn`, changed in place.

    Returns:
        `to`.

    Raises:
        TypeError: `to` is not a gated network.
        ValueError: A layer does not match. The message names it.

    Example:
        >>> from interp_nn.nn import DGN
        >>> network = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
        >>> model = copy_gates(network, DGN((4, 8, 3)))
        >>> torch.equal(model.gating.layers[0].weight, network[0].weight)
        True
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
    """Multiply value layer l by the gates of gating layer order[l], counted from 0.

    Args:
        model: A DGN, DLGN or result of `to_dgn`, changed in place.
        order: A permutation of the layers (`range(L)` restores the original order), or a seed for a random permutation among
            layers of equal shape.
        x: Input (n, ...) with n > 0, from which the result of `to_dgn` computes its gates' shapes. Others need none.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a gated network.
        ValueError: `order` is no permutation, gives a layer gates of another shape, or is a seed where all layers have
            different shapes; `x` is missing.

    Example:
        >>> from interp_nn.nn import DGN
        >>> permute_gates(DGN((4, 8, 8, 3)), (1, 0)).gate_order
        (1, 0)
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
        raise ValueError("x: got None, want inputs, from which a converted network computes the shapes of its gates")
    return [site.shape for site in model.gates(x).sites]


def _drawn(shapes: Sequence[torch.Size], seed: int) -> list[int]:
    """Draw a random permutation within each group of equal shapes, other than the identity."""
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
    """Return the parameters of a network's nn.Linear layers by the layer's number and the parameter's name."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    return {f"{i}.{name}": p.detach() for i, layer in enumerate(layers) for name, p in layer.named_parameters()}


def _check(model: nn.Module, name: str = "model") -> None:
    if not isinstance(model, GatedNetwork):
        raise TypeError(f"{name}: got {type(model).__name__}, want a DGN, DLGN or what to_dgn returns")
