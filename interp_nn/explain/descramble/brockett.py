"""The Brockett function tr(A P B Pᵀ) on the orthogonal matrices P: its minimum in closed form, and smoothness as a case of it.

In the eigenbases of A and B, the function is linear in the squares of P's entries, which form a doubly stochastic matrix. So a
minimum pairs each eigenvalue of A with one of B. By the rearrangement inequality, the largest goes with the smallest.
See Brockett (1991) and Sule, Spencer & Czaja (arXiv 2301.07820).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.derivatives import DerivativeOperator, derivative_operator, matrix_operator

OperatorLike = str | Tensor | DerivativeOperator | Callable[[Tensor], Tensor]


class BrockettExtreme(NamedTuple):
    """An extreme of tr(A P B Pᵀ), the result of `brockett_min`.

    Attributes:
        P: The orthogonal matrix, of shape (n, n), float64.
        value: tr(A P B Pᵀ), the extreme value over all orthogonal matrices.

    Example:
        >>> best = brockett_min(torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([3.0, 5.0])))
        >>> best.value  # 1 * 5 + 2 * 3
        11.0
    """

    P: Tensor
    value: float


def brockett_min(A: Tensor, B: Tensor) -> BrockettExtreme:
    """Find the orthogonal P that minimises tr(A P B Pᵀ), which pairs A's ascending with B's descending eigenvalues.

    P is unique up to n signs if neither matrix has equal eigenvalues. `brockett_min(-A, B)` finds the maximum.

    Args:
        A: Symmetric matrix (n, n), real floating-point.
        B: Symmetric matrix (n, n), real floating-point.

    Returns:
        `BrockettExtreme` of P, (n, n) float64, and the value.

    Raises:
        TypeError: Complex or integer matrices.
        ValueError: A matrix that is not symmetric, or of another size than the other one.

    Example:
        >>> A, B = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([3.0, 5.0]))
        >>> brockett_min(A, B).P.abs()
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)

    Source: Brockett (1991); Sule, Spencer & Czaja, arXiv 2301.07820.
    """
    for name, matrix in (("A", A), ("B", B)):
        linalg.check_real(name, matrix)
        if matrix.dim() != 2 or matrix.shape != A.shape or not torch.allclose(matrix, matrix.mT):
            raise ValueError(f"{name}: got shape {tuple(matrix.shape)}, want a symmetric matrix, both of one size")
    a, b = linalg.eigh(A), linalg.eigh(B)
    return BrockettExtreme(a.vectors @ b.vectors.flip(1).mT, float(a.values @ b.values.flip(0)))


def smoothness(P: Tensor, x: Tensor, operator: OperatorLike, *, features_first: bool = False) -> Tensor:
    """Compute |D P xᵀ|², which is small if the rows of P xᵀ change little from each to the next.

    Args:
        P: Matrix of shape (n, n).
        x: Samples (samples, n) of n features, in P's dtype.
        operator: D, as in `Descrambler`.
        features_first: x is (n, samples).

    Returns:
        A scalar tensor, differentiable in P and x.

    Raises:
        TypeError: An operator of another kind.
        ValueError: An operator that is not known, or for another number of features.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, 2.0]])
        >>> smoothness(torch.eye(3), x, "diff1")  # 1 + 4 + 4 + 0
        tensor(9.)

    Source: Sule, Spencer & Czaja, arXiv 2301.07820.
    """
    h = P @ (x if features_first else x.mT)
    return operator_on(operator, len(h)).apply(h).square().sum()


def operator_on(operator: OperatorLike, n: int) -> DerivativeOperator:
    """Return the operator for n places. Raises ValueError or TypeError for one that is not known or for other places."""
    if isinstance(operator, str):
        return derivative_operator(n, operator)
    if isinstance(operator, DerivativeOperator):
        found = operator
    elif isinstance(operator, Tensor):
        found = matrix_operator(operator)
    elif callable(operator):
        found = _of_function(operator, n)
    else:
        raise TypeError(
            f"operator: got {type(operator).__name__}, want a name, a matrix, a DerivativeOperator or a function"
        )
    if found.n != n:
        raise ValueError(f"operator: got one for {found.n} places, want {n}, the number of features")
    return found


def _of_function(function: Callable[[Tensor], Tensor], n: int) -> DerivativeOperator:
    """Return the operator of a function (n, samples) -> (m, samples) that is linear in each column."""
    matrix = function(torch.eye(n, dtype=torch.float64))
    probe = torch.stack((torch.linspace(-1, 2, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)), 1)
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or matrix.shape[1] != n:
        got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"operator: the function gave {got} for ({n}, {n}), want (m, {n})")
    if not torch.allclose(function(probe), matrix @ probe):
        raise ValueError("operator: the function is not linear in each column; want a matrix product D x")
    return matrix_operator(matrix)
