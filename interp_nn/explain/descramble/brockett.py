"""The Brockett function tr(A P B Pᵀ) on the orthogonal group: its extremes in closed form, and the smoothness that is one.

Brockett (1991); Sule, Spencer & Czaja (arXiv 2301.07820). In the eigenbases of A and B, the function is linear in the squares of
P's entries, which are doubly stochastic; so an extreme pairs the eigenvalues, and rearrangement says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.derivatives import DerivativeOperator, derivative_operator, matrix_operator

Operator = str | Tensor | DerivativeOperator | Callable[[Tensor], Tensor]


class BrockettExtreme(NamedTuple):
    """P (n, n) orthogonal, fp64, and the value tr(A P B Pᵀ) there, which no orthogonal matrix passes."""

    P: Tensor
    value: float


def brockett_min(A: Tensor, B: Tensor) -> BrockettExtreme:
    """The orthogonal P with the least tr(A P B Pᵀ), for symmetric A and B (n, n): the dearest with the least, sum a_i b_(n-i).

    Unique up to n signs where neither has equal eigenvalues. Raises TypeError for complex or integer matrices, ValueError for
    ones that are not symmetric or not of one size.
    """
    return _extreme(A, B, reverse=True)


def brockett_max(A: Tensor, B: Tensor) -> BrockettExtreme:
    """The orthogonal P with the largest tr(A P B Pᵀ), which is the sum a_i b_i; the rest as in `brockett_min`."""
    return _extreme(A, B, reverse=False)


def smoothness(P: Tensor, H: Tensor, D: Operator) -> Tensor:
    """|D P H|², a scalar that is differentiable in P and H: how rough the rows of P H (n, N) are, one after another.

    P (n, n), H (n, N) and what `Descrambler` takes as its operator.
    """
    h = P @ H
    return operator_on(D, len(h)).apply(h).square().sum()


def operator_on(D: Operator, n: int) -> DerivativeOperator:
    """The operator for n places. Raises ValueError and TypeError for one that is not known, or of other places."""
    if isinstance(D, str):
        return derivative_operator(n, D)
    if isinstance(D, DerivativeOperator):
        operator = D
    elif isinstance(D, Tensor):
        operator = matrix_operator(D)
    elif callable(D):
        operator = _of_function(D, n)
    else:
        raise TypeError(f"operator: got {type(D).__name__}, want a name, a matrix, a DerivativeOperator or a function")
    if operator.n != n:
        raise ValueError(f"operator: got one of {operator.n} places, want {n}, as many as there are features")
    return operator


def _of_function(function: Callable[[Tensor], Tensor], n: int) -> DerivativeOperator:
    """The operator of a function H (n, N) -> (m, N) that is linear in each column."""
    matrix = function(torch.eye(n, dtype=torch.float64))
    probe = torch.stack((torch.linspace(-1, 2, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)), 1)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or matrix.shape[1] != n:
        got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"operator: the function gave {got} for ({n}, {n}), want (m, {n})")
    if not torch.allclose(function(probe), matrix @ probe):
        raise ValueError("operator: the function is not linear in each column; want D(H) = D H")
    return matrix_operator(matrix)


def _extreme(A: Tensor, B: Tensor, reverse: bool) -> BrockettExtreme:
    for name, matrix in (("A", A), ("B", B)):
        linalg.check_real(name, matrix)
        if matrix.dim() != 2 or matrix.shape != A.shape or not torch.allclose(matrix, matrix.mT):
            raise ValueError(f"{name}: got shape {tuple(matrix.shape)}, want a symmetric matrix, both of one size")
    a, b = linalg.eigh(A), linalg.eigh(B)
    values, vectors = (b.values.flip(0), b.vectors.flip(1)) if reverse else (b.values, b.vectors)
    return BrockettExtreme(a.vectors @ vectors.mT, float(a.values @ values))
