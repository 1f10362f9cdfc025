"""Load checkpoints of other projects into these layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from interp_nn.nn.heads import SummaryHead


def head_from_reference(
    state_dict: Mapping[str, Tensor], layer: str | None = None, output: str = "output"
) -> SummaryHead:
    """Make a SummaryHead from a checkpoint of the reference network, with the same two logits.

    The reference code forms b by sending an identity matrix through nn.Linear(d, k), so the bias c of that layer shifts
    every row of b: b = Wᵀ + 1 cᵀ.

    Args:
        state_dict: The checkpoint's state_dict.
        layer: Name of the summary layer in the checkpoint ("classifier" for VGG, "summary_layer1" for the small CNN). None
            takes the only one.
        output: Name of the output layer.

    Returns:
        The head, in the checkpoint's dtype and on its device.

    Raises:
        ValueError: The checkpoint has no such layer, or several and `layer` is None.

    Example:
        >>> layers = {"classifier.beta_func1": torch.nn.Linear(8, 4), "output": torch.nn.Linear(4, 3)}
        >>> head_from_reference({f"{n}.{p}": t.detach() for n, m in layers.items() for p, t in m.named_parameters()})
        SummaryHead(
          in_features=8, out_features=4
          (output): Linear(in_features=4, out_features=3, bias=True)
        )

    Source: AskExplain/Interpretable-Neural-Net (MIT).
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
        head.b.copy_(weight.t())
        head.output.weight.copy_(a)
        head.output.bias.copy_(c)
    return head
