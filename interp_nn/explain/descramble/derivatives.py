"""Derivatives along a line, around a ring, over a grid and on a graph, with the eigenpairs of DᵀD in closed form where known.

D acts on the rows of x (n, samples), where row i is the value at place i. The penalty is |D x|². The modes T are the eigenvectors
of DᵀD, the smooth ones first, and the cost of a mode is its eigenvalue. A numerical solver has an error of eps times the largest
cost, which may be 1e11 times the smallest one. A closed form has an error of a few ulps in each cost.
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
    """A linear map D (m, n) of n places with its modes T and their costs: DᵀD = T diag(eigenvalues) Tᵀ.

    `derivative_operator`, `graph_operator` and `matrix_operator` make one.

    Args:
        kind: Name of the operator.
        eigenvalues: Costs of the modes, (n,) float64, ascending.
        modes: The basis T.
        apply: Function that computes D x.
        blocks: Runs [start, stop) of equal eigenvalues. Modes of one run may be rotated into each other.

    Attributes:
        kind: Name of the operator.
        n: Number of places.
        eigenvalues: Costs of the modes, (n,) float64, ascending.
        modes: The basis T.
        blocks: Runs [start, stop) of equal eigenvalues.

    Example:
        >>> operator = derivative_operator(3, "diff1")
        >>> operator.matrix()
        tensor([[-1.,  1.,  0.],
                [ 0., -1.,  1.]], dtype=torch.float64)
        >>> operator.apply(torch.tensor([[1.0], [2.0], [4.0]])).flatten()
        tensor([1., 2.])
    """

    def __init__(self, kind: str, eigenvalues: Tensor, modes: Modes, apply: Apply, blocks: Blocks) -> None:
        self.kind, self.n, self.eigenvalues, self.blocks = kind, len(eigenvalues), eigenvalues, blocks
        self.modes, self._apply = modes, apply

    def apply(self, x: Tensor) -> Tensor:
        """Compute D x.

        Args:
            x: Values at the places, (n, samples).

        Returns:
            Tensor of shape (m, samples), in the dtype of x.

        Raises:
            ValueError: x has another shape.
        """
        return self._apply(self._checked("x", x))

    def transform(self, x: Tensor) -> Tensor:
        """Compute Tᵀ x, the coefficient of each mode in each column of x; by FFT where that is faster.

        Args:
            x: Values at the places, (n, samples).

        Returns:
            Tensor of shape (n, samples), in the dtype of x.

        Raises:
            ValueError: x has another shape.
        """
        return self.modes.analyse(self._checked("x", x))

    def inverse(self, coefficients: Tensor) -> Tensor:
        """Compute T c, the columns whose modes have the coefficients c; by FFT where that is faster.

        Args:
            coefficients: c, of shape (n, samples).

        Returns:
            Tensor of shape (n, samples), in the dtype of the coefficients.

        Raises:
            ValueError: The coefficients have another shape.
        """
        return self.modes.synthesise(self._checked("coefficients", coefficients))

    def eigenvectors(self) -> Tensor:
        """Return T (n, n) in float64, with a mode in each column."""
        return self.modes.matrix()

    @property
    def rows(self) -> int:
        """The number m of rows of D (m, n)."""
        return len(self._apply(torch.zeros(self.n, 1)))

    def matrix(self) -> Tensor:
        """Return D (m, n) in float64."""
        return self._apply(torch.eye(self.n, dtype=torch.float64))

    def __repr__(self) -> str:
        return f"DerivativeOperator({self.kind!r}, {self.n} places)"

    def _checked(self, name: str, values: Tensor) -> Tensor:
        if values.dim() != 2 or values.shape[0] != self.n:
            raise ValueError(f"{name}: got shape {tuple(values.shape)}, want ({self.n}, samples)")
        return values


def derivative_operator(n: int | Sequence[int], kind: str = "fourier2") -> DerivativeOperator:
    """Make a derivative of places along a line, around a ring or over a grid.

    | kind | derivative | costs |
    |---|---|---|
    | "fourier2" | second, of the trigonometric interpolant around a ring of length 2 pi | 0, 1, 1, 16, 16, 81, 81, ... |
    | "dct" | second, on a line of length pi that continues as an even function | 0, 1, 16, 81, ... |
    | "dst" | second, on a line of length pi that continues as an odd function | 1, 16, 81, ... |
    | "diff1", "diff2" | first and second differences on a line with free ends | 0 for constants; "diff2": and for lines |
    | "diff1_dirichlet", "diff2_dirichlet" | differences on a line with zeros beyond both ends | above 0 |
    | "diff1_periodic", "diff2_periodic" | differences around a ring | 0 for constants |

    Args:
        n: Number of places. A sequence makes a grid of that shape, with its places in row-major order. The penalty of a grid is
            the sum of the penalties along its axes, so that DᵀD is a Kronecker sum.
        kind: Name of the derivative.

    Returns:
        `DerivativeOperator` of n places.

    Raises:
        ValueError: Another kind, or an n below 1.

    Example:
        >>> derivative_operator(5, "fourier2").eigenvalues
        tensor([ 0.,  1.,  1., 16., 16.], dtype=torch.float64)
        >>> derivative_operator((2, 3), "diff1").n
        6

    Source: Trefethen (2000), Spectral Methods in MATLAB, chapter 3, for "fourier2".
    """
    if kind not in _KINDS:
        raise ValueError(f"kind: got {kind!r}, want one of {', '.join(_KINDS)}")
    shape = (n,) if isinstance(n, int) else tuple(n)
    if not shape or min(shape) < 1:
        raise ValueError(f"n: got {n}, want at least one place")
    axes = [_on_a_line(places, kind) for places in shape]
    return axes[0] if len(axes) == 1 else _on_a_grid(kind, axes)


def graph_operator(adjacency: Tensor) -> DerivativeOperator:
    """Make the differences along the edges of a graph: |D x|² = sum over edges of w_ij |x_i - x_j|².

    DᵀD is the Laplacian of the graph.

    Args:
        adjacency: The weights w_ij >= 0 of the edges, a symmetric matrix (n, n), real floating-point.

    Returns:
        `DerivativeOperator` of n places.

    Raises:
        TypeError: A complex or integer matrix.
        ValueError: A matrix that is not symmetric, not finite or has negative entries.

    Example:
        >>> line = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> [round(cost, 6) for cost in graph_operator(line).eigenvalues.tolist()]
        [0.0, 1.0, 3.0]
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
    """Make an operator of any matrix D, with the eigenpairs of DᵀD from an SVD of D, since DᵀD would lose half the digits.

    Args:
        matrix: D, of shape (m, n) with n > 0, real floating-point and finite.

    Returns:
        `DerivativeOperator` of n places.

    Raises:
        TypeError: A complex or integer matrix.
        ValueError: Another shape, or entries that are not finite.

    Example:
        >>> matrix_operator(torch.tensor([[-1.0, 1.0]])).eigenvalues.round(decimals=6)
        tensor([0., 2.], dtype=torch.float64)
    """
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
    """Find the runs of equal eigenvalues, given in closed form: each has an error of a few of its own ulps."""
    return linalg.equal_runs(values, values[1:])


# The actions of the operators. They are functions of the module, so that an operator can be pickled.


def _times(matrix: Tensor, h: Tensor) -> Tensor:
    return matrix.to(h) @ h


def _along_edges(roots: Tensor, i: Tensor, j: Tensor, h: Tensor) -> Tensor:
    return roots.to(h) * (h[i.to(h.device)] - h[j.to(h.device)])


def _over_grid(axes: Sequence[DerivativeOperator], h: Tensor) -> Tensor:
    grid = h.unflatten(0, [axis.n for axis in axes])
    moved = [grid.movedim(i, 0).flatten(1) for i in range(len(axes))]
    return torch.cat([a.apply(m).reshape(-1, h.shape[1]) for a, m in zip(axes, moved, strict=True)])


# The costs and the action of each kind of derivative.


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
