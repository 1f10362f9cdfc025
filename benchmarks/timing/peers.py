"""Providers of other packages, where they are installed. Each is a function, as in a user's file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import custom
from benchmarks.timing.custom import Custom

# The package that a provider's function imports, and what the function is.
_PACKAGES = {
    "quack": ("quack", "the summary by quack-kernels' products, on a GPU from Hopper on, in 16 bits"),
    "liger": ("liger_kernel", "nn.Linear and cross entropy by liger-kernel's fused operator, on a GPU"),
    "gram-newton-schulz": (
        "gram_newton_schulz",
        "x times the polar factor of b by gram-newton-schulz, on a GPU, in 16 bits",
    ),
}
NAMES = tuple(_PACKAGES)


def listing() -> list[str]:
    """Return a line for each provider."""
    return [
        f"{name:18} {about}{'' if find_spec(package) else f' ({package} is not installed)'}"
        for name, (package, about) in _PACKAGES.items()
    ]


def find(name: str) -> None:
    """Make a provider of this name known.

    Raises:
        ValueError: Its package is not installed, or there is no GPU.
    """
    package = _PACKAGES[name][0]
    if find_spec(package) is None or not torch.cuda.is_available():
        raise ValueError(f"{name}: " + ("needs a GPU" if find_spec(package) else f"{package} is not installed"))
    function, op, reference = _FUNCTIONS[name]
    custom.FOUND.setdefault(name, Custom(name, _PACKAGES[name][1], function, op, reference, None))


def _quack(x: Tensor, b: Tensor) -> Tensor:
    from quack.linear import linear_func  # type: ignore[import-not-found]

    weight = b.mT  # (k, d), contiguous
    return linear_func(linear_func(x, weight), linear_func(weight, weight))


def _liger(x: Tensor, b: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    return LigerFusedLinearCrossEntropyLoss()(b.mT, x, target)


def _linear_cross_entropy(x: Tensor, b: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ b, target)


@functools.cache
def _iteration() -> tuple[Callable[[Tensor], Tensor], Sequence[Sequence[float]]]:
    import gram_newton_schulz as package  # type: ignore[import-not-found]

    coefficients = package.POLAR_EXPRESS_COEFFICIENTS
    return package.GramNewtonSchulz(ns_coefficients=coefficients, gram_newton_schulz_reset_iterations=[2]), coefficients


def _gram_newton_schulz(x: Tensor, b: Tensor) -> Tensor:
    return x @ _iteration()[0](b.mT.clone()).mT  # it writes into its argument


def _newton_schulz(x: Tensor, b: Tensor) -> Tensor:
    """Compute the same by the standard iteration, in the dtype of the arguments."""
    w = b.mT / (torch.linalg.matrix_norm(b) + 1e-7)
    for first, second, third in _iteration()[1]:
        gram = w @ w.mT
        w = first * w + (second * gram + third * gram @ gram) @ w
    return x @ w.mT


_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], str, Callable[..., Tensor] | None]] = {
    "quack": (_quack, "summary", None),
    "liger": (_liger, "cross_entropy", _linear_cross_entropy),
    "gram-newton-schulz": (_gram_newton_schulz, "summary", _newton_schulz),
}
