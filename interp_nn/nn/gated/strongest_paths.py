"""Find the strongest paths through a gated network without enumerating all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Paths(NamedTuple):
    """Hold k paths to each output of each sample, strongest first.

    Attributes:
        units: Units of the paths, (n, out, k, L + 1) int64: the input where a path starts, then its unit in each hidden layer.
            A path that starts at a layer's bias has -1 before that layer.
        contribution: Contribution of each path, (n, out, k): its input (1 for a bias) times its weights and gates. The
            contributions of all paths sum to the output.

    Example:
        >>> from interp_nn.nn import DGN
        >>> model, x = DGN((2, 3, 1)), torch.ones(1, 2)
        >>> found = model.paths(x, topk=6)  # all of them
        >>> found.units.shape, torch.allclose(found.contribution.sum(2), model(x), atol=1e-6)
        (torch.Size([1, 1, 6, 2]), True)
    """

    units: Tensor
    contribution: Tensor


def strongest_paths(layers: Sequence[nn.Linear], z: Tensor, gates: Sequence[Tensor], k: int) -> Paths:
    """Find the k paths of largest |contribution| to each output of a value network.

    The k strongest paths to a unit extend some of the k strongest paths to the units before it. One sweep over the layers finds
    them, with w_l w_(l-1) k entries a sample.

    Args:
        layers: The value network's linear layers.
        z: Its input, (n, d_in) or (1, d_in).
        gates: Its gates, (n, w_l) each.
        k: Number of paths; all paths if there are fewer.
    """
    samples = [_of_one(layers, z[i % len(z)], [gate[i] for gate in gates], k) for i in range(len(gates[0]))]
    return Paths(*map(torch.stack, zip(*samples, strict=True)))


@torch.no_grad()
def _of_one(layers: Sequence[nn.Linear], z: Tensor, gates: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    values = z.unsqueeze(1)  # (units, paths kept to each)
    units = torch.arange(len(z), device=z.device).view(-1, 1, 1)
    for layer, gate in zip(layers, [*gates, None], strict=True):
        products = (layer.weight.unsqueeze(2) * values).flatten(1)
        history = units.flatten(0, 1)
        if layer.bias is not None:
            products = torch.cat([products, layer.bias.unsqueeze(1)], 1)
            history = torch.cat([history, history.new_full((1, history.shape[1]), -1)])
        if gate is not None:
            products = products * gate.unsqueeze(1)
        kept = products.abs().topk(min(k, products.shape[1]), 1).indices
        values = products.gather(1, kept)
        here = torch.arange(len(values), device=z.device).view(-1, 1, 1).expand(*kept.shape, 1)
        units = torch.cat([history[kept], here], 2)
    return units[:, :, :-1], values
