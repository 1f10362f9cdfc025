"""The minimum of |D P H|² over the P of a group, and its mean over random P, both from the Gram matrix H Hᵀ alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.derivatives import DerivativeOperator
from interp_nn.explain.descramble.seriation import seriate_gram
from interp_nn.linalg import Blocks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Group = Literal["orthogonal", "special", "permutation"]
_CHUNK_ENTRIES = 1 << 22  # entries of D P that are computed at a time


class Spectrum(NamedTuple):
    """The costs of the operator's modes, and the energies of the data's components, of which component i becomes mode i.

    The smallest loss is sum_i mode_costs[i] energies[i].

    Attributes:
        mode_costs: Eigenvalues tau of DᵀD, (n,) float64, ascending. For the diagonal criteria, ones.
        energies: Eigenvalues lambda of the Gram matrix H Hᵀ, (n,) float64, descending. For the diagonal criteria, the singular
            values of the matrix.

    Example:
        >>> from interp_nn.explain import Descrambler
        >>> spectrum = Descrambler(operator="diff1").fit(torch.tensor([[3.0, 0.0], [0.0, 2.0]])).spectrum_
        >>> spectrum.mode_costs.round(decimals=6), spectrum.energies.round(decimals=6)
        (tensor([0., 2.], dtype=torch.float64), tensor([9., 4.], dtype=torch.float64))
    """

    mode_costs: Tensor
    energies: Tensor

    def plot(self, **options: Any) -> Axes:
        """Draw energies and costs by `plots.spectrum_curves`, and return the axes.

        Args:
            options: Of that function, such as `axes`.
        """
        from interp_nn.explain.plots.spectra import spectrum_curves

        return spectrum_curves(self, **options)


class Ambiguity(NamedTuple):
    """The directions in which an optimal P is arbitrary, beyond the sign of each component, which always is.

    Attributes:
        operator_blocks: Runs [start, stop) of equal mode costs. P may rotate the modes of a run into each other at the same loss.
        data_blocks: Runs [start, stop) of equal energies. P may rotate the components of a run into each other at the same loss.
        rank: Rank of the data. The last features - rank components have no energy.
        features: Number of features n.

    Example:
        >>> from interp_nn.explain import Descrambler
        >>> Descrambler(operator="fourier2").fit(torch.diag(torch.tensor([3.0, 2.0, 1.0]))).ambiguity_
        Ambiguity(operator_blocks=((1, 3),), data_blocks=(), rank=3, features=3)
    """

    operator_blocks: Blocks
    data_blocks: Blocks
    rank: int
    features: int

    def plot(self, **options: Any) -> Axes:
        """Draw what is arbitrary by `plots.ambiguity_strips`, and return the axes.

        Args:
            options: Of that function, such as `axes`.
        """
        from interp_nn.explain.plots.spectra import ambiguity_strips

        return ambiguity_strips(self, **options)


class Optimum(NamedTuple):
    """The optimal P (n, n) in float64, its loss, a lower bound of the loss of any P, and the spectrum and ambiguity of P."""

    P: Tensor
    loss: float
    lower_bound: float
    spectrum: Spectrum
    ambiguity: Ambiguity


def smoothest(
    gram: Tensor, operator: DerivativeOperator, group: Group, canonical: bool = True, precision: float = 0.0
) -> Optimum:
    """Find the P of the group with the smallest |D P H|²: P = T Uᵀ, with the modes T of D and the principal components U of H.

    canonical: make the largest entry of each column of U positive. precision: eps of the data, for its rank.
    """
    n, costs = len(gram), operator.eigenvalues.to(gram.device)
    values, vectors, _ = linalg.eigh(gram) if canonical else (*torch.linalg.eigh(gram), ())
    # Energies below the rounding error of the largest one are set to 0. Otherwise the cost of a rough mode would amplify them.
    energies, u = values.flip(0), vectors.flip(1)
    energies = energies.where(energies > n * torch.finfo(energies.dtype).eps * energies[0], 0.0)
    spectrum = Spectrum(costs, energies)
    # Rounding changes the data by eps of their norm, and energies are squares of norms.
    rank = int((energies > precision**2 * energies[0]).sum())
    ambiguity = Ambiguity(operator.blocks, linalg.equal_runs(energies), rank, n)
    if group == "permutation":
        best = seriate_gram(gram, operator)
        P = torch.eye(n, dtype=gram.dtype, device=gram.device)[best.order]
        return Optimum(P, best.loss, best.lower_bound, spectrum, ambiguity)
    P = operator.inverse(u.mT)
    if group == "special" and float(torch.linalg.slogdet(P).sign) < 0:
        u[:, -1].neg_()
        P = operator.inverse(u.mT)
    return Optimum(P, loss(P, gram, operator), float(costs @ energies), spectrum, ambiguity)


def smallest_loss(gram: Tensor, operator: DerivativeOperator, group: Group) -> float:
    """Compute the loss that `smoothest` reaches, without P where that is possible."""
    if group == "permutation":
        return seriate_gram(gram, operator).loss
    return float(operator.eigenvalues.to(gram.device) @ torch.linalg.eigvalsh(gram).flip(0).clamp_min(0))


def loss(P: Tensor, gram: Tensor, operator: DerivativeOperator) -> float:
    """Compute |D P H|² = tr(D P H Hᵀ Pᵀ Dᵀ), with a chunk of the columns of D P at a time."""
    turned, total = P @ gram, 0.0
    for columns in torch.arange(len(P)).split(max(1, _CHUNK_ENTRIES // max(1, operator.rows))):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        total += float((operator.apply(turned[:, part]) * operator.apply(P[:, part])).sum())
    return total


def chance(gram: Tensor, operator: DerivativeOperator, group: Group) -> float:
    """Compute the mean of |D P H|² over uniformly random P of the group.

    It is tr(DᵀD) tr(H Hᵀ) / n for orthogonal P. Permutations keep constants, whose part is computed by itself.
    """
    n, cost, energy = len(gram), float(operator.eigenvalues.sum()), float(gram.trace())
    mean = cost * energy / n
    if group == "permutation" and n > 1:
        constant = float(operator.apply(gram.new_ones(n, 1)).square().sum())
        mean += (constant - cost) * (float(gram.sum()) - energy) / (n * (n - 1))
    return mean
