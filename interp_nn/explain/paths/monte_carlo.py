"""An estimate of the neural path kernel of any network with gates: E[f(x) f(x')] over random signs as weights.

The gates stay fixed. The weight products of two different paths are uncorrelated, and the square of one path's product is 1. So
the mean sums x(i) x'(i) over the paths that are active for both samples, where i is the path's input. That is the kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from interp_nn.display import track
from interp_nn.explain.following.gate_record import frozen
from interp_nn.explain.following.replay import check_model
from interp_nn.nn.base import LinearForm
from interp_nn.nn.gated.networks import GatedNetwork

_CHUNK_SIZE = 256


class SampledKernel(NamedTuple):
    """An estimated kernel with its standard error, the result of `npk_montecarlo`.

    Attributes:
        kernel: Tensor of shape (n, m), float64.
        standard_error: Standard error of each entry, (n, m), float64. It falls as 1 / sqrt(draws).

    Example:
        >>> sampled = npk_montecarlo(nn.Linear(2, 1, bias=False), torch.eye(2), draws=4)
        >>> sampled.kernel.diagonal(), sampled.standard_error.diagonal()
        (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([0., 0.], dtype=torch.float64))
    """

    kernel: Tensor
    standard_error: Tensor


@torch.no_grad()
def npk_montecarlo(
    model: nn.Module,
    x: Tensor,
    other_x: Tensor | None = None,
    *,
    draws: int = 100,
    seed: int = 0,
    normalize: bool = True,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> SampledKernel:
    """Estimate the neural path kernel as the mean of f(x) f(x') over random draws of the weights, with the gates fixed.

    Each draw replaces every parameter by random signs. Batch norms get statistics that do nothing.

    Args:
        model: A network that `frozen` takes. The factors of its sigmoids and norms are fixed as gates are. For a `GatedNetwork`,
            the weights of its value network are drawn.
        x: Samples of shape (n, ...), in the model's dtype.
        other_x: Samples of shape (m, ...). Default: x.
        draws: Number of draws, at least 2.
        seed: Seed of the draws. PyTorch's generators stay as they are.
        normalize: Divide the parameters of two and more dimensions by sqrt(fan-in), the square root of the number of entries for
            each output. Biases, and the scales and shifts of norms, keep magnitude 1.
        chunk_size: Number of samples that run through the model at a time. Default: 256.
        progress: Show a progress bar. None shows one in a terminal or a notebook, where tqdm is installed.

    Returns:
        `SampledKernel` of the kernel and its standard error, (n, m) each, float64.

    Raises:
        TypeError: The model is no `nn.Module`.
        UnsupportedOperation: An operation of the model that `frozen` does not take.
        ValueError: Fewer than two draws, a chunk_size below 1, a layer in training mode where that matters, or a layer that
            computes its weight from other parameters.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> sampled = npk_montecarlo(nn.Linear(2, 1, bias=False), x, draws=1000)
        >>> bool(((sampled.kernel - x @ x.T / 2).abs() < 4 * sampled.standard_error).all())
        True

    Source: Lakshminarayanan & Singh (2020), arXiv 2006.10529.
    """
    if draws < 2:
        raise ValueError(f"draws: got {draws}, want at least 2")
    size = _CHUNK_SIZE if chunk_size is None else chunk_size
    if size < 1:
        raise ValueError(f"chunk_size: got {chunk_size}, want at least 1")
    check_model(model)
    for name, module in model.named_modules():
        weight = vars(module).get("weight")  # where a hook computes it, as weight_norm does
        if isinstance(module, LinearForm) or is_parametrized(module) or isinstance(weight, Tensor):
            raise ValueError(
                f"model: layer {name!r} computes its weight from another parameter; want a plain layer, as `fold` makes it"
            )
    chunks = track(x.split(size), "draws", progress, "chunk")
    left = torch.cat([_outputs(model, part, draws, seed, normalize) for part in chunks], 1)
    right = left
    if other_x is not None:
        chunks = track(other_x.split(size), "draws", progress, "chunk")
        right = torch.cat([_outputs(model, part, draws, seed, normalize) for part in chunks], 1)
    mean, squares = left.new_zeros(len(x), right.shape[1]), left.new_zeros(len(x), right.shape[1])
    for i, (a, b) in enumerate(zip(left, right, strict=True), 1):
        change = a @ b.T / a.shape[1] - mean
        mean += change / i
        squares += change.square_().mul_((i - 1) / i)
    return SampledKernel(mean, (squares / (draws - 1) / draws).sqrt())


def _outputs(model: nn.Module, x: Tensor, draws: int, seed: int, normalize: bool) -> Tensor:
    """Return the outputs (draws, n, outputs) in float64, with the gates of x. Each call makes the same draws."""
    generator = torch.Generator().manual_seed(seed)
    drawn, f = _held(model, x)
    outputs = []
    for _ in range(draws):
        _draw(drawn, normalize, generator)
        outputs.append(f().reshape(len(x), -1).double())
    return torch.stack(outputs)


def _held(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a copy of the model, whose weights may be changed, and a function for its output with the gates of x."""
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
            # A norm without a bias has its running mean as its shift.
            module.running_mean.copy_(
                _signs(module.running_mean, generator) if module.bias is None else 0 * module.running_mean
            )
    for parameter in model.parameters():
        weight = normalize and parameter.dim() > 1
        parameter.copy_(_signs(parameter, generator) / (parameter[0].numel() ** 0.5 if weight else 1))


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).mul_(2).sub_(1).to(like)
