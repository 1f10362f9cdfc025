"""The P of a group that makes P W as diagonal as possible, by its trace or by the sum of squares on its diagonal."""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.optimum import Ambiguity, Group, Optimum, Spectrum

DiagonalCriterion = Literal["diag_sum", "diag_normsq"]
_STEPS = 10_000
_SETTLED = 1e-15  # relative growth of the sum of squares at which the ascent stops


def most_diagonal(W: Tensor, criterion: DiagonalCriterion, group: Group) -> Optimum:
    """Find the P of the group with the largest tr(P W) (diag_sum) or sum of (P W)_ii² (diag_normsq); the loss is minus that.

    diag_sum reaches the sum of W's singular values, and P W is then symmetric. Rotations reach twice the smallest singular value
    less where det W < 0. diag_normsq finds a local maximum, which is at most |W|_F². For permutations, the problem is a linear
    assignment, which scipy solves exactly.
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
    """Return minus the loss, divided by the largest value that a matrix with W's Frobenius norm can reach."""
    norm = float(torch.linalg.matrix_norm(W.double()))
    most = sqrt(len(W)) * norm if criterion == "diag_sum" else norm**2
    return -loss / most if most else float("nan")


def asymmetry(P: Tensor, W: Tensor) -> float:
    """Return the asymmetry of P W diag(P W) relative to its norm. It is 0 at a stationary point of the sum of (P W)_ii²."""
    turned = P @ W
    gradient = turned * turned.diagonal()
    size = float(torch.linalg.matrix_norm(gradient))
    return float(torch.linalg.matrix_norm(gradient - gradient.mT)) / size if size else 0.0


def _climbed(W: Tensor, special: bool) -> Tensor:
    """Maximise the sum of (P W)_ii² by ascent: P <- transposed polar factor of W diag(P W), until the sum no longer grows.

    The sum is convex in P. So the P that maximises its tangent plane has at least the same sum. The ascent starts from the P
    that maximises the trace.
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
    """Return the order (n,) int64 with the largest sum of gains[order[i], i]."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("group='permutation' with a diagonal criterion needs scipy: pip install scipy") from error
    _, order = linear_sum_assignment(gains.mT.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(gains.device)
