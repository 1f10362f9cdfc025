"""Derivatives along a line, around a ring, over a grid and on a graph, with the eigenpairs of DᵀD in closed form where known.

D acts on the rows of H (n, N), of which row i is what is at place i, and penalises |D H|². What matters of it are the modes T
(eigenvectors of DᵀD, smooth ones first) and what each costs (its eigenvalue). A numerical solver is wrong by eps times the
dearest mode, which may be 1e11 times a cheap one; a closed form is right to a few ulps of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.modes import (
    BeamModes,
    CosineModes,
    DenseModes,
    FourierModes,
    GridModes,
    Modes,
    SineModes,
)
from interp_nn.linalg import Blocks

__all__ = ["DerivativeOperator", "derivative_operator", "graph_operator", "matrix_operator"]

Apply = Callable[[Tensor], Tensor]


class DerivativeOperator:
    """A linear map D of n places with its modes T and their costs: DᵀD = T diag(eigenvalues) Tᵀ.

    kind: its name. n: how many places. eigenvalues: (n,) fp64, ascending. blocks: the runs [start, stop) of equal ones, within
    which modes may be rotated into each other. Made by `derivative_operator`, `graph_operator` and `matrix_operator`.
    """

    def __init__(self, kind: str, eigenvalues: Tensor, modes: Modes, apply: Apply, blocks: Blocks) -> None:
        self.kind, self.n, self.eigenvalues, self.blocks = kind, len(eigenvalues), eigenvalues, blocks
        self.modes, self._apply = modes, apply

    def apply(self, h: Tensor) -> Tensor:
        """D H (m, N) of H (n, N)."""
        return self._apply(self._checked(h))

    def transform(self, h: Tensor) -> Tensor:
        """Tᵀ H (n, N): how much of each mode the columns of H (n, N) have; by FFT where that is faster."""
        return self.modes.analyse(self._checked(h))

    def inverse(self, c: Tensor) -> Tensor:
        """T C (n, N): the columns that have as much of each mode as C (n, N) says; by FFT where that is faster."""
        return self.modes.synthesise(self._checked(c))

    def eigenvectors(self) -> Tensor:
        """T (n, n) fp64, a mode a column."""
        return self.modes.matrix()

    @property
    def rows(self) -> int:
        """m, of D (m, n)."""
        return len(self._apply(torch.zeros(self.n, 1)))

    def matrix(self) -> Tensor:
        """D (m, n) fp64."""
        return self._apply(torch.eye(self.n, dtype=torch.float64))

    def __repr__(self) -> str:
        return f"DerivativeOperator({self.kind!r}, {self.n} places)"

    def _checked(self, h: Tensor) -> Tensor:
        if h.dim() != 2 or h.shape[0] != self.n:
            raise ValueError(f"h: got shape {tuple(h.shape)}, want ({self.n}, N)")
        return h


def derivative_operator(n: int | Sequence[int], kind: str = "fourier2") -> DerivativeOperator:
    """The derivative of n places that `kind` names; for a sequence, of a grid of that shape (places in row-major order), where
    the penalty is the sum of those along each axis and DᵀD so a Kronecker sum.

    "fourier2": second derivative of the trigonometric interpolant of a ring of length 2 pi (Trefethen 2000, chapter 3); costs
    are 0, 1, 1, 16, 16, 81, 81, ... "dct", "dst": the same for a line of length pi that goes on as an even or an odd function;
    costs are k⁴. "diff1", "diff2": first and second differences inside of a line, whose ends are free: constants (and straight
    lines) cost nothing. "diff1_dirichlet", "diff2_dirichlet": with zeros beyond both ends. "diff1_periodic",
    "diff2_periodic": around a ring. Raises ValueError for another kind, and for an n below 1.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(_KINDS)}")
    shape = (n,) if isinstance(n, int) else tuple(n)
    if not shape or min(shape) < 1:
        raise ValueError(f"n: got {n}, want at least one place")
    axes = [_on_a_line(places, kind) for places in shape]
    return axes[0] if len(axes) == 1 else _on_a_grid(kind, axes)


def graph_operator(adjacency: Tensor) -> DerivativeOperator:
    """Differences along the edges of a graph: |D H|² is the sum of w_ij |h_i - h_j|², and DᵀD the graph's Laplacian.

    adjacency: (n, n) symmetric, the weights w >= 0 of the edges. Raises ValueError where it is not.
    """
    _check_matrix("adjacency", adjacency)
    weights = adjacency.detach().double()
    if weights.shape[0] != weights.shape[1] or not torch.equal(weights, weights.mT) or bool((weights < 0).any()):
        raise ValueError(f"adjacency: got shape {tuple(weights.shape)}, want a symmetric matrix of weights >= 0")
    laplacian = torch.diag(weights.sum(0)) - weights
    values, vectors, blocks = linalg.eigh(laplacian)
    i, j = weights.triu(1).nonzero().unbind(1)
    roots = weights[i, j].sqrt().unsqueeze(1)

    apply = partial(_along_edges, roots, i, j)
    return DerivativeOperator("graph", values.clamp_min(0).cpu(), DenseModes(vectors.cpu()), apply, blocks)


def matrix_operator(matrix: Tensor) -> DerivativeOperator:
    """Any D (m, n), real and finite, its eigenpairs by an svd of D itself: that of DᵀD would lose half the digits."""
    _check_matrix("matrix", matrix)
    d = matrix.detach().double().cpu()
    _, s, vh = torch.linalg.svd(d, full_matrices=len(d) < d.shape[1])
    values, modes = torch.zeros(d.shape[1], dtype=d.dtype), vh.mT.flip(1)
    if len(s):
        values[-len(s) :] = s.flip(0)
    return DerivativeOperator(
        "matrix",
        values.square(),
        DenseModes(modes * linalg.signs(modes)),
        partial(_times, d),
        linalg.equal_runs(values),
    )


def _on_a_line(n: int, kind: str) -> DerivativeOperator:
    make, cost, apply = _KINDS[kind]
    modes = make(n)
    values = cost(modes)
    return DerivativeOperator(kind, values, modes, partial(apply, modes), _blocks(values))


def _on_a_grid(kind: str, axes: Sequence[DerivativeOperator]) -> DerivativeOperator:
    costs = axes[0].eigenvalues
    for axis in axes[1:]:
        costs = (costs.unsqueeze(1) + axis.eigenvalues).flatten()
    values, order = costs.sort(stable=True)

    name = f"{kind} on a grid of {' x '.join(str(axis.n) for axis in axes)}"
    modes = GridModes([axis.modes for axis in axes], order)
    return DerivativeOperator(name, values, modes, partial(_over_grid, axes), _blocks(values))


def _blocks(values: Tensor) -> Blocks:
    """Of eigenvalues in closed form, which are right to a few ulps of each and not of the largest."""
    return linalg.equal_runs(values, values[1:])


# How an operator acts; functions of the module, so that one can be pickled.


def _times(matrix: Tensor, h: Tensor) -> Tensor:
    return matrix.to(h) @ h


def _along_edges(roots: Tensor, i: Tensor, j: Tensor, h: Tensor) -> Tensor:
    return roots.to(h) * (h[i.to(h.device)] - h[j.to(h.device)])


def _over_grid(axes: Sequence[DerivativeOperator], h: Tensor) -> Tensor:
    grid = h.unflatten(0, [axis.n for axis in axes])
    moved = [grid.movedim(i, 0).flatten(1) for i in range(len(axes))]
    return torch.cat([a.apply(m).reshape(-1, h.shape[1]) for a, m in zip(axes, moved, strict=True)])


# What each kind of derivative costs its modes, and how it acts.


def _spectral_cost(modes: Any) -> Tensor:
    return modes.waves**4


def _first_cost(modes: Any) -> Tensor:
    return 4 * (modes.radians / 2).sin().square()


def _second_cost(modes: Any) -> Tensor:
    return _first_cost(modes).square()


def _spectral(modes: Any, h: Tensor) -> Tensor:
    return modes.synthesise(-modes.waves.square().unsqueeze(1).to(h) * modes.analyse(h))


def _free(order: int, modes: Modes, h: Tensor) -> Tensor:
    return h.diff(order, 0)


def _held(order: int, modes: Modes, h: Tensor) -> Tensor:
    none = torch.zeros_like(h[:1])
    return torch.cat((none, h, none)).diff(order, 0)


def _around(order: int, modes: Modes, h: Tensor) -> Tensor:
    step = h.roll(-1, 0) - h
    return step if order == 1 else step - step.roll(1, 0)


_KINDS: dict[str, tuple[Callable[[int], Modes], Callable[[Any], Tensor], Callable[[Any, Tensor], Tensor]]] = {
    "fourier2": (FourierModes, _spectral_cost, _spectral),
    "dct": (CosineModes, _spectral_cost, _spectral),
    "dst": (SineModes, _spectral_cost, _spectral),
    "diff1": (CosineModes, _first_cost, partial(_free, 1)),
    "diff2": (BeamModes, _second_cost, partial(_free, 2)),
    "diff1_dirichlet": (SineModes, _first_cost, partial(_held, 1)),
    "diff2_dirichlet": (SineModes, _second_cost, partial(_held, 2)),
    "diff1_periodic": (FourierModes, _first_cost, partial(_around, 1)),
    "diff2_periodic": (FourierModes, _second_cost, partial(_around, 2)),
}


def _check_matrix(name: str, matrix: Tensor) -> None:
    linalg.check_real(name, matrix)
    if matrix.dim() != 2 or not matrix.shape[1] or not bool(matrix.isfinite().all()):
        raise ValueError(f"{name}: got shape {tuple(matrix.shape)}, want a finite matrix with at least one column")
