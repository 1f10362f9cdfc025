"""Exact attribution with the interface of captum: what each input adds to an output.

Around x, a network of linear maps and gates is W x + c. Entry j of x then adds exactly W[k, j] x_j to output k, and the
constant c_k is the rest. On piecewise affine networks W[k, j] x_j is gradient x input.

Source: Li et al., arXiv 2310.16295.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from interp_nn.explain.linear.affine_map import linearize

Tensors: TypeAlias = Tensor | tuple[Tensor, ...]
Target: TypeAlias = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None


def _wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method behind a function with `__wrapped__`: captum's NoiseTunnel calls it in place of the method."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


class InstanceLinearization:
    """Compute the contributions of the inputs to one output of each sample.

    It works like an attribution method of captum, and does not need captum. `attribute` is an explanation function for
    captum's metrics, and captum's NoiseTunnel takes the object.

    Args:
        model: The network, in evaluation mode, with one or several inputs.

    Raises:
        TypeError: A model that is not an nn.Module.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
        >>> _ = nn.init.constant_(network[0].weight, 3.0)
        >>> InstanceLinearization(network).attribute(torch.tensor([[1.0, 2.0]]), target=0)
        tensor([[3., 6.]])
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
        self.forward_func = model

    @property
    def multiplies_by_inputs(self) -> bool:
        """True: contributions are coefficients times inputs."""
        return True

    def has_convergence_delta(self) -> bool:
        """Return True: `attribute` can return its own error."""
        return True

    @_wrapped
    def attribute(
        self,
        inputs: Tensors,
        baselines: Tensor | float | tuple[Tensor | float, ...] | None = None,
        target: Target = None,
        additional_forward_args: Any = None,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
    ) -> Tensors | tuple[Tensors, Tensor]:
        """Compute the contributions W[k] * (x - x0) of the inputs to output k of each sample.

        Args:
            inputs: Samples (n,) or (n, ...), or a tuple of inputs for a model of several.
            baselines: x0: for each input a tensor that broadcasts to it, or a number. None is 0.
            target: The output k. For outputs (n, k): an index, or n indices in a 1-D tensor or a list. For outputs
                (n, k, l, ...): a tuple of indices, or a list of n tuples. None for outputs (n,), or (n, 1). For one sample, the
                output may be a scalar.
            additional_forward_args: Further arguments of the model, which are not explained.
            internal_batch_size: Number of samples to explain at a time. None is all.
            return_convergence_delta: Also return the error of each sample.

        Returns:
            A tensor of the shape of each input, in a tuple if the inputs are one. With `return_convergence_delta` a pair of
            it and the errors (n,): F_k(x) - sum of the contributions - (W x0 + b)_k. The errors are rounding if the map is
            exact.

        Raises:
            UnsupportedOperation: An operation without an affine map.
            ValueError: Inputs, baselines or targets that do not fit.
            TypeError: A target of another type.
        """
        points, extra = _tuple(inputs), _arguments(additional_forward_args)
        for i, x in enumerate(points):
            if not isinstance(x, Tensor):
                raise TypeError(f"inputs[{i}]: got {type(x).__name__}, want a torch.Tensor (n, ...)")
            if x.dim() < 1 or len(x) != len(points[0]):
                raise ValueError(f"inputs[{i}]: got {tuple(x.shape)}, want a tensor (n, ...) with the same n in all")
        points = tuple(x.detach() for x in points)
        n = len(points[0])
        if not n:
            raise ValueError("inputs: got no samples, want at least one")
        starts = [_baseline(b, x) for b, x in zip(_baselines(baselines, len(points)), points, strict=True)]
        size = n if internal_batch_size is None else internal_batch_size
        if size < 1:
            raise ValueError(f"internal_batch_size: got {internal_batch_size}, want at least 1")
        parts = []
        for first in range(0, n, size):
            chosen = slice(first, first + size)
            parts.append(
                self._part(
                    tuple(x[chosen] for x in points),
                    tuple(b[chosen] for b in starts),
                    _of_samples(target, chosen, n),
                    tuple(a[chosen] if isinstance(a, Tensor) and a.dim() and len(a) == n else a for a in extra),
                )
            )
        contributions = tuple(torch.cat(column) for column in zip(*(part[0] for part in parts), strict=True))
        result = contributions if isinstance(inputs, tuple) else contributions[0]
        return (result, torch.cat([part[1] for part in parts])) if return_convergence_delta else result

    def _part(
        self, points: tuple[Tensor, ...], starts: tuple[Tensor, ...], target: Target, extra: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the contributions to the chosen outputs of some samples, and their error."""
        call = _WithArguments(self.forward_func, extra)
        linear = linearize(call, points, target=lambda output: _select(output, target))
        contributions = _tuple(linear.contributions(tuple(x - b for x, b in zip(points, starts, strict=True))))
        with torch.no_grad():
            outputs = _select(call(*points), target)
        explained = torch.stack([part.reshape(len(part), -1).sum(1) for part in contributions]).sum(0)
        return contributions, outputs - explained - linear(starts)


class _WithArguments(nn.Module):
    """A model with fixed values for the arguments after its inputs."""

    def __init__(self, model: nn.Module, extra: tuple[Any, ...]) -> None:
        super().__init__()
        self.model, self.extra = model, extra

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs, *self.extra)


def _tuple(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def _arguments(extra: Any) -> tuple[Any, ...]:
    return () if extra is None else _tuple(extra)


def _baselines(baselines: Any, count: int) -> tuple[Any, ...]:
    given = (0.0,) * count if baselines is None else _tuple(baselines)
    if len(given) != count:
        raise ValueError(f"baselines: got {len(given)}, want one for each of {count} inputs")
    return given


def _baseline(baseline: Tensor | float, x: Tensor) -> Tensor:
    value = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return value.expand_as(x)
    except RuntimeError:
        raise ValueError(
            f"baselines: got shape {tuple(value.shape)}, want one that broadcasts to {tuple(x.shape)}"
        ) from None


def _of_samples(target: Target, chosen: slice, n: int) -> Target:
    """Return the targets of the chosen samples, of n in all."""
    if isinstance(target, list) or (isinstance(target, Tensor) and target.numel() != 1):
        if (isinstance(target, Tensor) and target.dim() != 1) or len(target) != n:
            got = tuple(target.shape) if isinstance(target, Tensor) else len(target)
            raise ValueError(f"target: got {got}, want one index, or one for each of {n} samples")
        return target[chosen]
    return target


def _select(output: Any, target: Target) -> Tensor:
    """Return one output (n,) of each sample, chosen by a target of captum."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model: returned {type(output).__name__}, want a tensor; wrap the model to return the output to explain"
        )
    if output.dim() == 0:
        output = output.unsqueeze(0)  # one sample, or samples that depend on one another, which `linearize` refuses
    shape = output.shape[1:]
    given = target.tolist() if isinstance(target, Tensor) else target
    if given is None and shape.numel() == 1:
        given = (0,) * len(shape)
    columns = [k if isinstance(k, tuple) else (k,) for k in (given if isinstance(given, list) else [given])]
    if any(not isinstance(k, int) for column in columns for k in column) and given is not None:
        raise TypeError(f"target: got {target!r}, want integers, tuples of them, or a list or 1-D tensor of them")
    for column in columns:
        if len(column) != len(shape) or not all(
            k is not None and -s <= k < s for k, s in zip(column, shape, strict=True)
        ):
            got = given if len(columns) == 1 else column
            raise ValueError(
                f"target: got {got} for outputs of shape {tuple(output.shape)}, want the index of one output"
            )
    index = torch.tensor(columns, dtype=torch.long, device=output.device)  # (1 or n, dimensions of an output)
    places = (torch.arange(len(output), device=output.device), *index.T)
    return output[places]
