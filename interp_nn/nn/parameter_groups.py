"""Parameter groups of an optimizer: the parameters that decay, and those that do not."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from interp_nn.nn.base import LinearForm
from interp_nn.nn.polynomial_layer import PolynomialLayer

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters of a model into groups for an optimizer: those that decay, and those that do not.

    These do not decay: biases, gains and all other parameters with at most one dimension; the parameters of PyTorch's norms; a
    normalised b (`normalize=True`), because decay would not change the layer's weight, only the size of its later steps; and a
    b with a constraint, which decay would work against. All others decay: weights, embeddings, the b of a summary, and the b of
    `normalize="restore"`. Decay λ of a summary's b shrinks the singular values of its weight like decay 3 λ of an nn.Linear's.

    Call it after `summarize` and `constrain`, before a wrapper that flattens parameters. Frozen parameters are in the groups.

    Args:
        model: The model.
        weight_decay: The decay of the first group, at least 0.

    Returns:
        A list of at most two groups, for the first argument of any optimizer that takes groups and `weight_decay`. Every
        parameter is in one of them, once, also if modules share it. It does not decay if one of them says so.

    Raises:
        TypeError: `model` is not an nn.Module, `weight_decay` is not a number, or a parameter is uninitialized (a lazy module).
        ValueError: `weight_decay` is negative or not finite, or the parameters are flattened, by FullyShardedDataParallel.

    Example:
        >>> import torch
        >>> from interp_nn.nn import SummaryLinear
        >>> model = nn.Sequential(SummaryLinear(4, 4, polynomial="newton-schulz"), nn.ReLU(), SummaryLinear(4, 2))
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-3)
        >>> [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
        [(0.1, [(4, 2)]), (0.0, [(4, 4), (4,), (1,), (2,)])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    if not isinstance(weight_decay, Real) or isinstance(weight_decay, bool):
        raise TypeError(f"weight_decay: got {type(weight_decay).__name__}, want a number")
    decay = float(weight_decay)
    if not (math.isfinite(decay) and decay >= 0):
        raise ValueError(f"weight_decay: got {weight_decay!r}, want a finite number >= 0")
    kept: set[int] = set()
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                f"model: {path or 'it'} is a FullyShardedDataParallel, whose flat parameters have lost their shapes; call "
                "parameter_groups before wrapping, or use torch.distributed.fsdp.fully_shard"
            )
        # A layer is looked at with the parametrizations of its b, which are modules.
        for name, parameter in module.named_parameters(recurse=isinstance(module, LinearForm)):
            if isinstance(parameter, nn.UninitializedParameter):
                raise TypeError(
                    f"{path}.{name}".lstrip(".") + ": is uninitialized (a lazy module); run the model once first"
                )
            if parameter.dim() <= 1 or isinstance(module, _NORMS) or _is_scale_free(module, name):
                kept.add(id(parameter))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) not in kept], "weight_decay": decay},
        {"params": [p for p in parameters if id(p) in kept], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_scale_free(module: nn.Module, name: str) -> bool:
    """Say if a parameter is a b, or parametrizes a b, that decay should leave alone."""
    if name != "b" and not name.startswith("parametrizations.b."):
        return False
    normalized = isinstance(module, PolynomialLayer) and module.normalize is True
    return isinstance(module, LinearForm) and (normalized or module.constraint is not None)
