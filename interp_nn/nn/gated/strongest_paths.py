"""The strongest paths through a gated network, found without going through all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Paths(NamedTuple):
    """Some paths to each output of each sample, the strongest first.

    units (n, out, k, L + 1) int64: the input where a path starts, then its unit in each hidden layer; a path that starts at a
    layer's bias has -1 before it. contribution (n, out, k): its input (1 for a bias) times its weights and gates. Over all
    paths the contributions sum to the output.
    """

    units: Tensor
    contribution: Tensor


def strongest_paths(layers: Sequence[nn.Linear], z: Tensor, gates: Sequence[Tensor], k: int) -> Paths:
    """The k paths (all, where there are fewer) of largest |contribution| to each output of a value network.

    layers: its linear layers; z (n, d_in), gates [(n, w_l)]: what it is given. The k strongest paths to a unit continue some
    of the k strongest to the units before, so that one sweep over the layers finds them: w_l w_(l-1) k entries a sample.
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
