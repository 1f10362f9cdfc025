"""Linear algebra that several parts share.

For a matrix b: Gram matrix, effective weight, cube root, polar factor and singular values. For any matrix: eigh and svd with
canonical signs, in float64; and a Gram matrix of samples that arrive in batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

__all__ = [
    "Eigensystem",
    "GramAccumulator",
    "Orthogonalized",
    "SingularSystem",
    "cube_root",
    "effective_weight",
    "eigh",
    "gram",
    "inverse_summary",
    "orthogonality_defect",
    "orthogonalize",
    "polar",
    "polynomial_weight",
    "retract",
    "singular_values",
    "svd",
]

Blocks = tuple[tuple[int, int], ...]
_STEPS_TOGETHER = 4  # by rounding: they enlarge that of small eigenvalues of the Gram matrix up to 25 times
_CENTRE = 0.5  # of the eigenvalues of the Gram matrix of a b whose spectral norm is 1
_ENTRIES_AT_ONCE = 1 << 22  # entries of a batch that are cast to fp64 at a time


class Orthogonalized(NamedTuple):
    """Hold the result of `orthogonalize`.

    Attributes:
        factor: Matrix (d, k) with orthonormal columns (k <= d) or rows (k > d), up to `defect`.
        defect: max |s - 1| over the min(d, k) singular values s of `factor`, measured in float64.
        iterations: Number of Newton-Schulz steps taken.

    Example:
        >>> orthogonalize(torch.tensor([[3.0, 0.0], [0.0, 2.0]])).factor.round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
    """

    factor: Tensor
    defect: float
    iterations: int


def gram(b: Tensor) -> Tensor:
    """Compute the Gram matrix G = bᵀb.

    Args:
        b: Matrix of shape (..., d, k).

    Returns:
        Tensor of shape (..., k, k), in b's dtype.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[1., 2.],
                [2., 5.]])
    """
    return b.mT @ b


def is_column_major(b: Tensor) -> bool:
    """Return True if b's memory is that of a contiguous bᵀ and not its own, as a layer's transposed weight has it."""
    return not b.is_contiguous() and b.mT.is_contiguous()


def gram_small(b: Tensor) -> Tensor:
    """Compute the smaller of the two Gram matrices: bᵀb (..., k, k), or b bᵀ (..., d, d) where k > d."""
    return gram(b) if b.shape[-1] <= b.shape[-2] else gram(b.mT)


def mul_gram(b: Tensor, g: Tensor) -> Tensor:
    """Multiply b by a matrix of the size of `gram_small(b)`, from the side where it fits; in b's order of memory."""
    left = b.shape[-1] > b.shape[-2]
    if is_column_major(b):
        return (b.mT @ g.mT if left else g.mT @ b.mT).mT
    return g @ b if left else b @ g


def effective_weight(b: Tensor) -> Tensor:
    """Compute the effective weight W = b (bᵀb) = (b bᵀ) b through the smaller of the two Gram matrices.

    Args:
        b: Matrix of shape (..., d, k).

    Returns:
        Tensor of shape (..., d, k), in b's dtype.

    Example:
        >>> effective_weight(torch.tensor([[2.0], [1.0]]))
        tensor([[10.],
                [ 5.]])
    """
    return mul_gram(b, gram_small(b))


def polynomial_weight(b: Tensor, coefficients: Sequence[Tensor | float], scale: Tensor | None = None) -> Tensor:
    """Compute the effective weight a b q(a² bᵀb) of a polynomial q(G) = c0 I + c1 G + ... + c4 G⁴ and a scale a.

    A singular value s of b becomes a s q(a² s²). It is computed through the smaller of the two Gram matrices.

    Args:
        b: Matrix of shape (..., d, k).
        coefficients: One to five coefficients, the constant first: numbers, or tensors that broadcast with b.
        scale: The factor a of b, a tensor that broadcasts with b. None is 1.

    Returns:
        Tensor of shape (..., d, k), in b's dtype.

    Example:
        >>> polynomial_weight(torch.tensor([[2.0], [1.0]]), (1.5, -0.5))
        tensor([[-2.],
                [-1.]])
    """
    if scale is not None:
        b = b * scale
    return centred_weight(b, coefficients, 0.0)


def centred_weight(b: Tensor, c: Sequence[Tensor | float], shift: float) -> Tensor:
    """Compute the weight b q(bᵀb) of one to five coefficients c of powers of bᵀb - shift I."""
    if len(c) == 1:
        return c[0] * b
    return c[0] * b + mul_gram(b, polynomial_terms(minus_identity(gram_small(b), shift), c))


def minus_identity(g: Tensor, shift: float) -> Tensor:
    """Compute G - shift I of a matrix (..., m, m); G itself for 0."""
    return g - shift * torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) if shift else g


def centred(coefficients: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    """Compute the coefficients of the same polynomial in powers of G - s I, and s: 1/2 where that rounds less, else 0.

    The terms of coefficients with alternating signs cancel: those of PC layers are up to 14 times a value of about 1. If the
    signs alternate around 1/2 too, the sizes of the terms add up to no more than those around 0, at every eigenvalue t >= 0 of G:
    with sizes r_i around 1/2 they are Σ_i r_i |t - 1/2|ⁱ and Σ_i r_i (t + 1/2)ⁱ. Two coefficients round the same either way.
    """
    return _centred.__wrapped__(coefficients) if is_dynamo_compiling() else _centred(coefficients)


@lru_cache(maxsize=256)
def _centred(coefficients: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    found, degree = list(coefficients), len(coefficients) - 1
    for first in range(degree):
        for i in range(degree - 1, first - 1, -1):
            found[i] += _CENTRE * found[i + 1]
    alternate = degree > 1 and all(left * right < 0 for left, right in pairwise(found))
    return (tuple(found), _CENTRE) if alternate else (coefficients, 0.0)


def polynomial_terms(g: Tensor, c: Sequence[Tensor | float]) -> Tensor:
    """Compute c1 G + c2 G² + G² (c3 G + c4 G²), with as few products as can be, for two to five coefficients c."""
    total = c[1] * g
    if len(c) == 2:
        return total
    square = g @ g
    total = add_multiple(total, c[2], square)
    if len(c) == 3:
        return total
    upper = c[3] * g if len(c) == 4 else add_multiple(c[3] * g, c[4], square)
    return torch.addmm(total, square, upper) if g.dim() == 2 else total + square @ upper


def add_multiple(total: Tensor, c: Tensor | float, t: Tensor) -> Tensor:
    """Compute total + c t, of a number in one pass."""
    return total + c * t if isinstance(c, Tensor) else torch.add(total, t, alpha=c)


def singular_values(b: Tensor) -> Tensor:
    """Compute the singular values of b.

    Args:
        b: Matrix of shape (..., d, k).

    Returns:
        Tensor of shape (..., min(d, k)), float64, in descending order.

    Raises:
        ValueError: b has less than two dimensions.

    Example:
        >>> singular_values(torch.tensor([[0.0, 3.0], [2.0, 0.0]])).round(decimals=6)
        tensor([3., 2.], dtype=torch.float64)
    """
    if b.dim() < 2:
        raise ValueError(f"b: got shape {tuple(b.shape)}, want (..., d, k)")
    return torch.linalg.svdvals(b.detach().double())


def check_finite(b: Tensor, name: str = "b") -> Tensor:
    """Return b. Raises ValueError if a value is not finite; on the meta device there are none."""
    if not b.is_meta and not bool(b.isfinite().all()):
        raise ValueError(f"{name}: got a value that is not finite (training has diverged?), want finite values")
    return b


def orthogonality_defect(b: Tensor) -> float:
    """Compute max |s - 1| over the singular values s of b.

    Args:
        b: Matrix of shape (..., d, k).

    Returns:
        The defect, computed in float64; 0 if there are no singular values.

    Raises:
        ValueError: A value of b is not finite, or b has less than two dimensions.

    Example:
        >>> orthogonality_defect(torch.diag(torch.tensor([1.0, 0.5])))
        0.5
    """
    s = singular_values(check_finite(b))
    return float((s - 1).abs().max()) if s.numel() else 0.0


def cube_root(w: Tensor) -> Tensor:
    """Compute the b with b (bᵀb) = w: the same singular vectors, and the cube roots of the singular values.

    For float64 by an SVD. For other dtypes as w (wᵀw)^(-1/3), by the float64 eigenvalues of the smaller Gram matrix, which is
    several times faster. Singular values below 1e-7 of the largest one, which is rounding there, come out smaller than their
    cube roots.

    Args:
        w: Matrix of shape (..., d, k).

    Returns:
        Tensor of shape (..., d, k), in w's dtype.

    Example:
        >>> cube_root(torch.tensor([[0.0, 8.0], [1.0, 0.0]]).double()).abs().round(decimals=6)
        tensor([[0., 2.],
                [1., 0.]], dtype=torch.float64)
    """
    return map_singular_values(w, lambda s: s.pow(1 / 3))


def map_singular_values(w: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the matrix with the singular vectors of w and the singular values function(s), as `cube_root` does.

    Args:
        w: Matrix of shape (..., d, k).
        function: Maps singular values (..., min(d, k)), float64, to as many numbers. It is zero at zero.

    Returns:
        Tensor of shape (..., d, k), in w's dtype.
    """
    exact = w.detach().double()
    if w.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        return u * function(s).unsqueeze(-2) @ vh
    values, vectors = torch.linalg.eigh(gram_small(exact))
    info = torch.finfo(torch.float64)
    s = torch.maximum(values, values[..., -1:] * info.eps * values.shape[-1]).clamp_min(info.tiny).sqrt()
    return mul_gram(exact, vectors * (function(s) / s).unsqueeze(-2) @ vectors.mT).to(w.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for the 16-bit dtypes, and any other dtype unchanged."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_available(device_type: str) -> bool:
    """Return whether PyTorch has autocast on such devices. On others, torch.is_autocast_enabled raises."""
    if is_dynamo_compiling():  # PyTorch 2.10's cannot trace the call below, and compiles for few devices
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, for devices with and without autocast."""
    return torch.autocast(device.type, enabled=False) if autocast_available(device.type) else nullcontext()


def orthogonalize(b: Tensor, tolerance: float | None = None, max_iterations: int = 100) -> Orthogonalized:
    """Compute the polar factor of b by Newton-Schulz steps b <- b (3 I - bᵀb) / 2, after scaling b by a bound on its norm.

    Up to four steps at a time are taken on bᵀb, so that b itself is multiplied twice for them.

    Each step moves a singular value s in (0, √3) to s (3 - s²) / 2, closer to 1. A column of zeros (row, for k > d) stays zero,
    and `defect` is then 1. Other singular values of zero are rounding, and grow to 1 in arbitrary directions, as all orthonormal
    completions are equally near. Differentiable.

    Args:
        b: Matrix of shape (d, k).
        tolerance: The iteration stops when the Frobenius norm of bᵀb - I is at most this. None: when it is rounding.
        max_iterations: Largest number of steps.

    Returns:
        The factor in b's dtype, its defect, and the number of steps. 16-bit matrices are computed in float32.

    Source: Björck and Bowie, An iterative algorithm for computing the best estimate of an orthogonal matrix (1971).

    Example:
        >>> result = orthogonalize(torch.diag(torch.tensor([2.0, 1.0])))
        >>> result.factor.round(decimals=4), result.defect < 1e-6
        (tensor([[1., 0.],
                [0., 1.]]), True)
    """
    if min(b.shape) == 0:
        return Orthogonalized(b.clone(), 0.0, 0)
    with autocast_off(b.device):
        return _orthogonalize(b, tolerance, max_iterations)


def _orthogonalize(b: Tensor, tolerance: float | None, max_iterations: int) -> Orthogonalized:
    factor, iterations = _newton_schulz(b.to(accumulation_dtype(b.dtype)), tolerance, max_iterations)
    result = factor.to(b.dtype)
    finite = bool(torch.isfinite(result.detach()).all())
    return Orthogonalized(result, orthogonality_defect(result) if finite else math.nan, iterations)


def retract(b: Tensor) -> Tensor:
    """Compute the polar factor of a b that is nearly orthonormal, as after a step of an optimizer.

    If no singular value is beyond √2 or close to 0, the cost is two products of 2 d k² operations (2 d² k for k > d), and
    products of k x k matrices; else it is that of `orthogonalize`.

    Args:
        b: Matrix of shape (..., d, k), float32 or float64.

    Returns:
        Tensor of shape (..., d, k).

    Example:
        >>> retract(torch.tensor([[1.2, 0.0], [0.0, 0.9]])).round(decimals=6) + 0.0
        tensor([[1., 0.],
                [0., 1.]])
    """
    return retraction(b)[0]


def retraction(b: Tensor) -> tuple[Tensor, bool]:
    """Return what `retract` returns, and whether b was near; a b that is not finite is not."""
    if not b.numel():
        return b.clone(), True
    g = gram_small(b)
    steps = _steps_left(_deviation(g), _rounding(g))
    if steps is None:
        return _newton_schulz(b, None, 100)[0], False
    return (mul_gram(b, _root_of_inverse(g, steps)) if steps else b.clone()), True


def _newton_schulz(b: Tensor, tolerance: float | None, most: int) -> tuple[Tensor, int]:
    """Return the polar factor of b (..., d, k), and the number of steps.

    Steps are taken on the Gram matrix, a few at a time: rounding of its small eigenvalues grows with each step, and is gone when
    it is formed again. For a nearly square b, steps on b itself are cheaper.
    """
    d, k = max(b.shape[-2:]), min(b.shape[-2:])
    together = _STEPS_TOGETHER if 2 * d >= 3 * k else 1
    # Scale by the largest entry first, so that neither the Gram matrix nor the bound over- or underflows.
    factor = b / b.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(b.dtype).tiny)
    g = gram_small(factor)
    bound = _largest_eigenvalue_bound(g.detach())
    factor, g = factor / bound.sqrt(), g / bound
    tolerance = _rounding(g) if tolerance is None else tolerance
    error, iterations = math.inf, 0
    while iterations < most:
        previous, error = error, float(_error(g.detach()).max())
        # Convergence is quadratic once the error is below 1: an error that does not even halve is rounding.
        if error <= tolerance or (error < 0.1 and error > previous / 2) or math.isnan(error):
            break
        steps = min(_steps_left(error, tolerance) or together, together, most - iterations)
        factor = mul_gram(factor, _root_of_inverse(g, steps))
        g = gram_small(factor)
        iterations += steps
    return factor, iterations


def _root_of_inverse(g: Tensor, steps: int) -> Tensor:
    """Return the product of the matrices Z = (3 I - R) / 2 of some Newton-Schulz steps R <- Z R Z from R = G: about G^(-1/2)."""
    eye = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    z = 1.5 * eye - 0.5 * g
    q = z
    for _ in range(steps - 1):
        g = z @ g @ z
        z = 1.5 * eye - 0.5 * g
        q = q @ z
    return q


def _steps_left(deviation: float, tolerance: float) -> int | None:
    """Return the number of steps that take the eigenvalues of G from 1 ± deviation to 1 ± tolerance; None: scale it first."""
    if not deviation < 0.95:
        return None
    steps = 0
    while deviation > tolerance:
        deviation = deviation * deviation * (3 + deviation) / 4
        steps += 1
    return steps


def _rounding(g: Tensor) -> float:
    return torch.finfo(g.dtype).eps * math.sqrt(g.shape[-1])


def _error(g: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device))


def _deviation(g: Tensor) -> float:
    """Return a bound on the largest |eigenvalue| of G - I: the root of the Frobenius norm of its square."""
    e = g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
    return float(torch.linalg.matrix_norm(e @ e).sqrt().max())


def _largest_eigenvalue_bound(g: Tensor) -> Tensor:
    """Return a bound (..., 1, 1) on the eigenvalues of a Gram matrix with entries of at most its size; 1 for zero."""
    square = g @ g
    bounds = torch.linalg.matrix_norm(square @ square).pow(0.25), torch.linalg.matrix_norm(g, ord=float("inf"))
    bound = torch.minimum(*bounds)
    return torch.where(bound > 0, bound, 1.0)[..., None, None]


def polar(a: Tensor, special: bool = False) -> Tensor:
    """Compute the orthogonal polar factor U Vᵀ of a = U S Vᵀ by an SVD.

    Of all orthonormal Q it has the largest tr(Qᵀa), the sum of the singular values. It is exact at any rank, and arbitrary
    in the directions that `a` lacks. `orthogonalize` approaches the same factor by products alone.

    Args:
        a: Matrix of shape (d, k).
        special: Allow only rotations (d = k, det Q = 1). tr(Qᵀa) is then smaller, if det a < 0, by twice the smallest singular
            value.

    Returns:
        Tensor of shape (d, k), float64.

    Example:
        >>> polar(torch.tensor([[0.0, -3.0], [2.0, 0.0]])).round(decimals=6) + 0.0
        tensor([[ 0., -1.],
                [ 1.,  0.]], dtype=torch.float64)

    Source: Schönemann, A generalized solution of the orthogonal Procrustes problem (1966).
    """
    u, s, vh = torch.linalg.svd(a.detach().double(), full_matrices=False)
    if special and s.numel() and bool((torch.linalg.slogdet(u).sign * torch.linalg.slogdet(vh).sign) < 0):
        u[:, -1].neg_()
    return u @ vh


class Eigensystem(NamedTuple):
    """Hold the eigensystem of a symmetric matrix, a = vectors diag(values) vectorsᵀ.

    Attributes:
        values: Eigenvalues, (n,) float64, ascending.
        vectors: Eigenvectors in columns, (n, n) float64.
        blocks: Runs [start, stop) of values that are equal up to rounding. Within a run the vectors are unique only up to a
            rotation.

    Example:
        >>> eigh(torch.diag(torch.tensor([2.0, 1.0, 2.0]))).blocks
        ((1, 3),)
    """

    values: Tensor
    vectors: Tensor
    blocks: Blocks


class SingularSystem(NamedTuple):
    """Hold the thin singular value decomposition a = u diag(s) vh of a (d, k) matrix.

    Attributes:
        u: Left singular vectors in columns, (d, min(d, k)) float64.
        s: Singular values, (min(d, k),) float64, descending.
        vh: Right singular vectors in rows, (min(d, k), k) float64.
        blocks: Runs [start, stop) of values that are equal up to rounding, as in `Eigensystem`.

    Example:
        >>> svd(torch.diag(torch.tensor([2.0, 1.0, 2.0]))).blocks
        ((0, 2),)
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    blocks: Blocks


def eigh(a: Tensor) -> Eigensystem:
    """Compute eigenvalues and eigenvectors of a symmetric matrix. The largest entry of each vector is positive.

    Args:
        a: Symmetric matrix of shape (n, n), any real dtype.

    Returns:
        The eigensystem, in float64.

    Example:
        >>> eigh(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).values.round(decimals=6)
        tensor([-1.,  1.], dtype=torch.float64)
    """
    values, vectors = torch.linalg.eigh(a.detach().double())
    values = values + 0.0  # -0.0 becomes 0.0
    return Eigensystem(values, vectors * signs(vectors), equal_runs(values))


def svd(a: Tensor) -> SingularSystem:
    """Compute the thin singular value decomposition. The largest entry of each left vector is positive.

    Args:
        a: Matrix of shape (d, k), any real dtype.

    Returns:
        The decomposition, in float64.

    Example:
        >>> svd(torch.tensor([[0.0, -3.0], [2.0, 0.0]])).s.round(decimals=6)
        tensor([3., 2.], dtype=torch.float64)
    """
    u, s, vh = torch.linalg.svd(a.detach().double(), full_matrices=False)
    sign = signs(u)
    return SingularSystem(u * sign, s, vh * sign.unsqueeze(1), equal_runs(s))


def equal_runs(values: Tensor, scale: Tensor | None = None) -> Blocks:
    """Find runs [start, stop) of two or more sorted values (n,) whose gaps are below rounding, 8 n eps times `scale`.

    The default scale is the largest |value|, as in the error of an eigenvalue solver. A scale (n - 1,) is one for each gap.
    """
    if len(values) < 2:
        return ()
    scale = values.abs().max() if scale is None else scale
    gaps = values.diff().abs() > 8 * len(values) * torch.finfo(values.dtype).eps * scale
    edges = [0, *(1 + gaps.nonzero().squeeze(1)).tolist(), len(values)]
    return tuple((start, stop) for start, stop in pairwise(edges) if stop - start > 1)


def signs(vectors: Tensor) -> Tensor:
    """Return ±1 for each column: the sign of its largest entry, of the first one if several are equal up to rounding."""
    if not vectors.numel():
        return vectors.new_ones(vectors.shape[1])
    sizes = vectors.abs()
    first = (sizes >= (1 - 1e-6) * sizes.amax(0)).int().argmax(0, keepdim=True)
    return torch.where(vectors.gather(0, first).squeeze(0) < 0, -1.0, 1.0).to(vectors)


class GramAccumulator:
    """Sum the Gram matrix H Hᵀ of samples that arrive in batches, in float64 and O(n²) memory.

    It keeps the sum over deviations from the mean, so that a centred Gram matrix loses no digits.

    Args:
        features: The number of features, n.
        device: Device of the sums; None is PyTorch's default device.

    Attributes:
        count: Number of samples seen.
        mean: Mean of the samples, (n,) float64.

    Example:
        >>> samples = GramAccumulator(2)
        >>> samples.update(torch.tensor([[1.0, 3.0], [0.0, 2.0]]))
        >>> samples.gram(), samples.mean
        (tensor([[10.,  6.],
                [ 6.,  4.]], dtype=torch.float64), tensor([2., 1.], dtype=torch.float64))

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances (1979).
    """

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._deviations = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, batch: Tensor) -> None:
        """Add the samples in the columns of `batch` (n, m), few at a time so that their float64 copy stays small."""
        for part in batch.detach().split(max(1, _ENTRIES_AT_ONCE // max(1, len(self.mean))), dim=1):
            if part.shape[1]:
                values = part.double()
                mean = values.mean(1)
                self._add(part.shape[1], mean, gram((values - mean.unsqueeze(1)).mT))

    def merge(self, other: GramAccumulator) -> GramAccumulator:
        """Return the accumulator of both sets of samples; neither is changed."""
        both = copy.deepcopy(self)
        if other.count:
            both._add(other.count, other.mean, other._deviations)
        return both

    def gram(self, center: bool = False) -> Tensor:
        """Return H Hᵀ, (n, n) float64; with `center`, that of the deviations from the mean."""
        return self._deviations.clone() if center else self._deviations + self.count * torch.outer(self.mean, self.mean)

    def _add(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        step, total = mean - self.mean, self.count + count
        self._deviations += deviations + (self.count * count / total) * torch.outer(step, step)
        self.mean += step * (count / total)
        self.count = total


def check_real(name: str, t: Tensor) -> Tensor:
    """Return t. Raises TypeError if it is not a tensor of real floating-point numbers."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, want a torch.Tensor (arrays: torch.from_numpy)")
    if not t.is_floating_point():
        raise TypeError(f"{name}: got {t.dtype}, want a real floating dtype")
    return t


def inverse_summary(x: Tensor, b: Tensor) -> Tensor:
    """Compute the least-squares code Z = X b (bᵀb)⁻¹ by a solve.

    Args:
        x: Input of shape (..., d).
        b: Matrix of shape (d, k) with k <= d, in x's dtype.

    Returns:
        Tensor of shape (..., k), in x's dtype. 16-bit inputs are solved in float32.

    Raises:
        torch.linalg.LinAlgError: k > d, or the solver meets a singular bᵀb.

    Example:
        >>> inverse_summary(torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0], [0.0]]))
        tensor([[2.]])
    """
    d, k = b.shape
    if k > d:
        message = f"b: got shape ({d}, {k}), want k <= d: bᵀb is singular for more columns than rows"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined] # which its stubs hide
    p = x @ b
    work = accumulation_dtype(b.dtype)
    rows = p.to(work).reshape(-1, k)  # more than two dimensions would be batches of systems to vmap
    with autocast_off(b.device):
        return torch.linalg.solve(gram(b.to(work)), rows, left=False).to(p.dtype).reshape(p.shape)
