"""The neural path kernel of any network with gates, estimated: E[f(x) f(x')] over random signs as weights, with the gates held.

Unequal paths have uncorrelated products of independent signs, and each path's own has mean square 1, so that the mean is the
number of paths which are active for both, with their inputs: the neural path kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.explain.following.gate_record import frozen
from interp_nn.explain.following.replay import check_model
from interp_nn.nn.base import LinearForm
from interp_nn.nn.gated.networks import GatedNetwork

_CHUNK = 256


class SampledKernel(NamedTuple):
    """kernel (n, m) and the standard error of each of its entries, (n, m), which falls as 1 / sqrt(draws)."""

    kernel: Tensor
    standard_error: Tensor


@torch.no_grad()
def npk_montecarlo(
    model: nn.Module,
    X: Tensor,
    Y: Tensor | None = None,
    *,
    draws: int = 100,
    seed: int = 0,
    normalize: bool = True,
    chunk: int | None = None,
) -> SampledKernel:
    """The neural path kernel (n, m) of samples X (n, ...) and Y (m, ...; default: X), fp64, as a mean over draws of the weights.

    Every parameter becomes a random sign: weights, of two dimensions and more, over sqrt(fan-in) with `normalize` (the entries of
    one output, along the first dimension); biases, and the scales and shifts of norms, as they are. Batch norms have no other
    statistics then. model: any that `frozen` takes, with what its sigmoids and norms multiply by held as gates are; or a
    `GatedNetwork`, whose value network is drawn. chunk: samples at a time. Raises ValueError for fewer than two draws, and for
    layers whose weight is computed from others.
    """
    if draws < 2:
        raise ValueError(f"draws: got {draws}, want at least 2")
    size = _CHUNK if chunk is None else chunk
    if size < 1:
        raise ValueError(f"chunk: got {chunk}, want at least 1")
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, LinearForm):
            raise ValueError(f"model: layer {name!r} computes its weight from another one; want it folded (`fold`)")
    left = torch.cat([_outputs(model, part, draws, seed, normalize) for part in X.split(size)], 1)
    right = left
    if Y is not None:
        right = torch.cat([_outputs(model, part, draws, seed, normalize) for part in Y.split(size)], 1)
    mean, squares = left.new_zeros(len(X), right.shape[1]), left.new_zeros(len(X), right.shape[1])
    for i, (a, b) in enumerate(zip(left, right, strict=True), 1):
        change = a @ b.T / a.shape[1] - mean
        mean += change / i
        squares += change.square_().mul_((i - 1) / i)
    return SampledKernel(mean, (squares / (draws - 1) / draws).sqrt())


def _outputs(model: nn.Module, x: Tensor, draws: int, seed: int, normalize: bool) -> Tensor:
    """The outputs (draws, n, outputs), fp64, with the gates of x. All parts of the samples see the same draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn, f = _held(model, x)
    outputs = []
    for _ in range(draws):
        _draw(drawn, normalize, generator)
        outputs.append(f().reshape(len(x), -1).double())
    return torch.stack(outputs)


def _held(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A copy whose weights may be changed, and its output with the gates of x held."""
    if isinstance(model, GatedNetwork):
        gates = model.value_gates(model.gating(x))
        z = torch.ones_like(x) if model.value_input == "ones" else x
        value = copy.deepcopy(model.value)
        return value, lambda: value(z, gates)
    drawn = copy.deepcopy(model)
    replay = frozen(drawn, x)
    return drawn, lambda: replay(x)


def _draw(model: nn.Module, normalize: bool, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            assert module.running_mean is not None
            module.running_var.fill_(1 - module.eps)
            # Without a bias of its own, the mean is its shift.
            module.running_mean.copy_(
                _signs(module.running_mean, generator) if module.bias is None else 0 * module.running_mean
            )
    for parameter in model.parameters():
        weight = normalize and parameter.dim() > 1
        parameter.copy_(_signs(parameter, generator) / (parameter[0].numel() ** 0.5 if weight else 1))


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)
