"""The polynomials q of layers Y = X b q(bᵀb) + bias, and the map of singular values s -> f(s) = s q(s²) of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

# Levels 1 to 4 of "PC Layer: Polynomial Weight Preconditioning for Improving LLM Pre-Training", arXiv 2606.06470, and one step
# of the Newton-Schulz iteration towards an orthonormal matrix.
NAMED: dict[str, tuple[float, ...]] = {
    "summary": (0.0, 1.0),
    "newton-schulz": (1.5, -0.5),
    "pc-1": (1.507, -0.507),
    "pc-2": (2.083, -1.643, 0.560),
    "pc-3": (2.909, -4.649, 4.023, -1.283),
    "pc-4": (3.625, -9.261, 14.097, -10.351, 2.890),
}
SUMMARY = NAMED["summary"]
_MOST_COEFFICIENTS = 5
_BISECTIONS = 60  # to the last bit of float64, from [0, 1]


def coefficients_of(polynomial: str | Sequence[float]) -> tuple[float, ...]:
    """Return the coefficients of a polynomial given by name or by its coefficients, the constant first.

    Raises:
        TypeError: `polynomial` is neither.
        ValueError: An unknown name; none or more than five coefficients; a coefficient that is not finite; all are zero.
    """
    wanted = f"want one of {', '.join(map(repr, NAMED))}, or 1 to {_MOST_COEFFICIENTS} finite numbers, not all zero"
    if isinstance(polynomial, str):
        if polynomial not in NAMED:
            raise ValueError(f"polynomial: got {polynomial!r}, {wanted}")
        return NAMED[polynomial]
    if not isinstance(polynomial, Sequence) or not all(
        isinstance(c, Real) and not isinstance(c, bool) for c in polynomial
    ):
        raise TypeError(f"polynomial: got {polynomial!r}, {wanted}")
    found = tuple(map(float, polynomial))
    if not 1 <= len(found) <= _MOST_COEFFICIENTS or not all(map(math.isfinite, found)) or not any(found):
        raise ValueError(f"polynomial: got {polynomial!r}, {wanted}")
    return found


def map_of(coefficients: Sequence[float], s: Tensor) -> Tensor:
    """Compute f(s) = s q(s²)."""
    square, q = s.square(), torch.full_like(s, coefficients[-1])
    for c in coefficients[-2::-1]:
        q = q * square + c
    return s * q


def monotone_until(coefficients: Sequence[float]) -> float:
    """Return the end of the first interval [0, s] on which f is monotone; infinity if it is so everywhere."""
    slopes = [(2 * i + 1) * c for i, c in enumerate(coefficients)]  # of f as a polynomial in s²
    while slopes[-1] == 0:
        slopes.pop()
    if len(slopes) == 1:
        return math.inf
    companion = torch.zeros(len(slopes) - 1, len(slopes) - 1, dtype=torch.float64)
    companion[1:, :-1].fill_diagonal_(1.0)
    companion[:, -1] = torch.tensor([-c / slopes[-1] for c in slopes[:-1]], dtype=torch.float64)
    roots = torch.linalg.eigvals(companion)
    real = roots.real[(roots.imag.abs() <= 1e-9 * roots.abs().clamp_min(1)) & (roots.real > 1e-12)]
    return math.sqrt(float(real.min())) if real.numel() else math.inf


def inverse_map(coefficients: Sequence[float], values: Tensor, wanted: str) -> Tensor:
    """Compute the s >= 0 with |f(s)| = values (float64, >= 0) on the first interval on which f is monotone.

    Raises:
        ValueError: A value beyond that interval. The message gives each one, after `wanted`.
    """
    end = monotone_until(coefficients)
    high = torch.ones((), dtype=torch.float64)
    while high < end and float(values.max() if values.numel() else 0) > float(map_of(coefficients, high).abs()):
        high = high * 2
    high = high.clamp_max(end)
    most = float(map_of(coefficients, high).abs())
    beyond = values[values > most * (1 + 1e-6)]
    if beyond.numel():
        found = ", ".join(f"{float(v):.6g}" for v in beyond.sort(descending=True).values[:5]) + (
            ", ..." if len(beyond) > 5 else ""
        )
        raise ValueError(
            f"{wanted}: got {beyond.numel()} singular values beyond {most:.6g}, the largest that f(s) = s q(s²) reaches "
            f"on its first monotone branch: {found}"
        )
    low, high = torch.zeros_like(values), torch.full_like(values, float(high))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = map_of(coefficients, middle).abs() < values
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(values > 0, (low + high) / 2, values)
