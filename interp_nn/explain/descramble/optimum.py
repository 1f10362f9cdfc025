"""The P of a group for which |D P H|² is least, from the Gram matrix H Hᵀ alone, and what it is for a P drawn at random."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.derivatives import DerivativeOperator
from interp_nn.explain.descramble.seriation import seriate_gram
from interp_nn.linalg import Blocks

Group = Literal["orthogonal", "special", "permutation"]
_ENTRIES_AT_ONCE = 1 << 22  # of D P


class Spectrum(NamedTuple):
    """tau: (n,) fp64 ascending, what the operator's modes cost; lam: (n,) descending, the energies of the data's principal
    components, of which each goes to the mode at its place. For the diagonal criteria tau is 1, and lam W's singular values.
    """

    tau: Tensor
    lam: Tensor


class Ambiguity(NamedTuple):
    """How far an optimal P is not determined, beyond the sign of each component, which never is.

    operator_blocks, data_blocks: runs [start, stop) of equal tau, and of equal lam: rotating their modes, or components, into
    each other costs nothing. rank, features: the data has no energy in its last features - rank components.
    """

    operator_blocks: Blocks
    data_blocks: Blocks
    rank: int
    features: int


class Optimum(NamedTuple):
    """P (n, n) fp64, its loss, what no P has less than, and what both follow from."""

    P: Tensor
    loss: float
    lower_bound: float
    spectrum: Spectrum
    ambiguity: Ambiguity


def smoothest(
    gram: Tensor, operator: DerivativeOperator, group: Group, canonical: bool = True, precision: float = 0.0
) -> Optimum:
    """The P of the group with the least |D P H|², which is T Uᵀ for T the modes of D and U the principal components of H.

    canonical: whether U's largest entries are made positive. precision: eps of the data, for its rank.
    """
    n, tau = len(gram), operator.eigenvalues.to(gram.device)
    values, vectors, _ = linalg.eigh(gram) if canonical else (*torch.linalg.eigh(gram), ())
    # What is below rounding of the largest is nothing, and would count much where a mode is dear.
    lam, u = values.flip(0), vectors.flip(1)
    lam = lam.where(lam > n * torch.finfo(lam.dtype).eps * lam[0], 0.0)
    spectrum = Spectrum(tau, lam)
    rank = int((lam > precision**2 * lam[0]).sum())  # rounding of data is its eps of their norm, whose square lam is
    ambiguity = Ambiguity(operator.blocks, linalg.equal_runs(lam), rank, n)
    if group == "permutation":
        best = seriate_gram(gram, operator)
        P = torch.eye(n, dtype=gram.dtype, device=gram.device)[best.order]
        return Optimum(P, best.loss, best.lower_bound, spectrum, ambiguity)
    P = operator.inverse(u.mT)
    if group == "special" and float(torch.linalg.slogdet(P).sign) < 0:
        u[:, -1].neg_()
        P = operator.inverse(u.mT)
    return Optimum(P, loss(P, gram, operator), float(tau @ lam), spectrum, ambiguity)


def loss(P: Tensor, gram: Tensor, operator: DerivativeOperator) -> float:
    """|D P H|² = tr(D P H Hᵀ Pᵀ Dᵀ), some columns of D P at a time."""
    turned, total = P @ gram, 0.0
    for columns in torch.arange(len(P)).split(max(1, _ENTRIES_AT_ONCE // max(1, operator.rows))):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        total += float((operator.apply(turned[:, part]) * operator.apply(P[:, part])).sum())
    return total


def chance(gram: Tensor, operator: DerivativeOperator, group: Group) -> float:
    """The mean of |D P H|² over a uniform P: tr(DᵀD) tr(H Hᵀ) / n, and for permutations the same with constants apart."""
    n, cost, energy = len(gram), float(operator.eigenvalues.sum()), float(gram.trace())
    mean = cost * energy / n
    if group == "permutation" and n > 1:
        constant = float(operator.apply(gram.new_ones(n, 1)).square().sum())
        mean += (constant - cost) * (float(gram.sum()) - energy) / (n * (n - 1))
    return mean
