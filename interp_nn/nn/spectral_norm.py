"""Spectral norms of normalised layers, and the hook of an optimizer that updates them after each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from interp_nn.nn.orthogonality import retract_
from interp_nn.nn.polynomial_layer import PolynomialLayer


def update_spectral_norms(model: nn.Module) -> None:
    """Update the spectral norm of b of each layer with `normalize`, after b has changed.

    It takes 10 power iterations from the singular vectors of the last update, as published for PC layers. The buffers `u`, `v`
    and `scale` change, in place; nothing waits for the device. A forward only reads `scale`, so that forwards between two
    updates, recomputed ones too, use one norm. A b that is sharded is gathered, so every rank must call, and gets the same bits.
    DistributedDataParallel broadcasts buffers from rank 0 at each forward.

    Args:
        model: The model.

    Example:
        >>> from interp_nn.nn import SummaryLinear
        >>> layer = SummaryLinear(4, 3, polynomial="newton-schulz")
        >>> with torch.no_grad():
        ...     _ = layer.b.mul_(2)
        >>> update_spectral_norms(layer)
        >>> layer.scale
        tensor(0.5000)

    Source: Miyato et al., Spectral Normalization for Generative Adversarial Networks (2018).
    """
    for layer in model.modules():
        if isinstance(layer, PolynomialLayer):
            layer._update_norm()


def follow(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Do after each step of an optimizer what the layers of a model need: `retract_`, then `update_spectral_norms`.

    Layers with the constraint "retract" and layers with `normalize` need it; others are left alone. Layers are looked up at each
    step, so that constraints may be set later. A step that a GradScaler skips changes nothing.

    Args:
        optimizer: The optimizer of the model's parameters, or accelerate's wrapper of it.
        model: The model, or a part of it. Under FSDP2 and DistributedDataParallel every rank calls.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        TypeError: `optimizer` is not an optimizer, or `model` is not an nn.Module.

    Example:
        >>> from interp_nn.nn import SummaryLinear
        >>> model = nn.Sequential(SummaryLinear(4, 4, polynomial="newton-schulz"), nn.ReLU(), nn.Linear(4, 1))
        >>> sgd = torch.optim.SGD(model.parameters(), 0.1)
        >>> handle = follow(sgd, model)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> sgd.step()
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, want a torch.optim.Optimizer")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")

    while not hasattr(optimizer, "_optimizer_step_post_hooks"):  # a wrapper, which has no hooks
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer: got {type(optimizer).__name__}, which has no hooks; want the optimizer inside of it"
            )
        optimizer = inner

    def after_step(*_: Any) -> None:
        retract_(model)
        update_spectral_norms(model)

    return optimizer.register_step_post_hook(after_step)
