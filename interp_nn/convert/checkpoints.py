"""From other people's checkpoints to these layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from interp_nn.nn.heads import SummaryHead


def head_from_reference(
    state_dict: Mapping[str, Tensor], layer: str | None = None, output: str = "output"
) -> SummaryHead:
    """A SummaryHead with the weights of a checkpoint of AskExplain/Interpretable-Neural-Net.

    That code forms b by sending an identity matrix through nn.Linear(d, k), so its bias c shifts every row of b:
    b = Wᵀ + 1 cᵀ. The head gets that b, and computes the same two logits.

    layer: the summary layer's name in the checkpoint ("classifier" for VGG, "summary_layer1" for the small CNN); found
    by itself when there is only one. output: the output layer's name. Raises ValueError when either is not there.
    """
    suffix = ".beta_func1.weight"
    found = [name.removesuffix(suffix) for name in state_dict if name.endswith(suffix)]
    if layer is None and len(found) == 1:
        (layer,) = found
    if layer not in found:
        raise ValueError(f"layer: got {layer!r}, want one of the summary layers in the checkpoint: {found}")
    if f"{output}.weight" not in state_dict:
        raise ValueError(f"output: got {output!r}, but the checkpoint has no {output}.weight")
    weight = state_dict[layer + suffix] + state_dict[f"{layer}.beta_func1.bias"].unsqueeze(1)
    a, c = state_dict[f"{output}.weight"], state_dict[f"{output}.bias"]
    head = SummaryHead(weight.shape[1], weight.shape[0], a.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.output.weight.copy_(a)
        head.output.bias.copy_(c)
    return head
