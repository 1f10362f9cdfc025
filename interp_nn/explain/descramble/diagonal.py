"""The P of a group that makes a square matrix as diagonal as can be from the left, by P W's trace or its diagonal's squares."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.optimum import Ambiguity, Group, Optimum, Spectrum

DiagonalCriterion = Literal["diag_sum", "diag_normsq"]
_STEPS = 10_000
_SETTLED = 1e-15  # relative growth of a sum of squares


def most_diagonal(W: Tensor, criterion: DiagonalCriterion, group: Group) -> Optimum:
    """The P of the group with the largest tr(P W), or sum of (P W)_ii²; the loss is minus that.

    diag_sum: the sum of W's singular values, with P W symmetric; rotations lose twice the smallest where det W < 0.
    diag_normsq: at most |W|_F²; a local maximum. Permutations: an assignment, exactly (needs scipy).
    """
    W = W.detach().double()
    sums, special = criterion == "diag_sum", group == "special"
    s = linalg.svd(W).s
    if group == "permutation":
        P = torch.eye(len(W), dtype=W.dtype, device=W.device)[_assigned(W if sums else W.square())]
    else:
        P = _polar(W, special) if sums else _climbed(W, special)
    diagonal = _diagonal_of(P, W)
    reached = diagonal.sum() if sums else diagonal.square().sum()
    most = s.sum() if sums else s.square().sum()
    if sums and special and bool(torch.linalg.slogdet(W).sign < 0):
        most = most - 2 * s[-1]
    rank = int((s > len(s) * torch.finfo(s.dtype).eps * s[0]).sum())
    ambiguity = Ambiguity((), ((rank, len(s)),) if len(s) - rank > 1 else (), rank, len(s))
    return Optimum(P, -float(reached), -float(most), Spectrum(torch.ones_like(s), s), ambiguity)


def in_units_of_norm(loss: float, W: Tensor, criterion: DiagonalCriterion) -> float:
    """Minus the loss in units of the largest that a matrix of W's Frobenius norm can reach."""
    norm = float(torch.linalg.matrix_norm(W.double()))
    most = sqrt(len(W)) * norm if criterion == "diag_sum" else norm**2
    return -loss / most if most else float("nan")


def asymmetry(P: Tensor, W: Tensor) -> float:
    """How far P is from a stationary point of the sum of (P W)_ii², where P W diag(P W) is symmetric; relative to its norm."""
    turned = P @ W
    gradient = turned * turned.diagonal()
    size = float(torch.linalg.matrix_norm(gradient))
    return float(torch.linalg.matrix_norm(gradient - gradient.mT)) / size if size else 0.0


def _climbed(W: Tensor, special: bool) -> Tensor:
    """The sum of squares is convex in P, so the P that is best for its tangent is better, or it is the last one: from the best
    for the sum, P <- polar factor of W diag(P W), transposed, until the sum no longer grows.
    """
    P, reached = _polar(W, special), 0.0
    for _ in range(_STEPS):
        diagonal = _diagonal_of(P, W)
        last, reached = reached, float(diagonal.square().sum())
        if reached <= last * (1 + _SETTLED):
            break
        P = _polar(W * diagonal, special)
    return P


def _polar(W: Tensor, special: bool) -> Tensor:
    return linalg.polar(W, special).mT.contiguous()


def _diagonal_of(P: Tensor, W: Tensor) -> Tensor:
    return (P * W.mT).sum(1)


def _assigned(gains: Tensor) -> Tensor:
    """The order (n,) int64 with the largest sum of gains[order[i], i]."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "group='permutation' with a diagonal criterion needs scipy: pip install interp_nn[explain]"
        ) from error
    _, order = linear_sum_assignment(gains.mT.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(gains.device)
