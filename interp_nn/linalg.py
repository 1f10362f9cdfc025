"""Small shared maths: a matrix b's Gram matrix, effective weight, polar factor and spectrum; canonical eigh and svd in fp64."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

Blocks = tuple[tuple[int, int], ...]
_ENTRIES_AT_ONCE = 1 << 22  # of a batch that is taken to fp64


class Orthogonalized(NamedTuple):
    """What `orthogonalize` reached.

    factor: (d, k), orthonormal columns (k <= d) or rows (k > d) up to `defect`.
    defect: max |s - 1| over the min(d, k) singular values s of `factor`, measured in fp64.
    iterations: Newton-Schulz steps taken.
    """

    factor: Tensor
    defect: float
    iterations: int


def gram(b: Tensor) -> Tensor:
    """Gram matrix bᵀb (..., k, k)."""
    return b.mT @ b


def is_column_major(b: Tensor) -> bool:
    """Return True if b's memory is that of a contiguous bᵀ and not its own, as a layer's transposed weight has it."""
    return not b.is_contiguous() and b.mT.is_contiguous()


def smaller_square(b: Tensor) -> Tensor:
    """The smaller of the two square products: bᵀb (..., k, k), or b bᵀ (..., d, d) where k > d."""
    return gram(b) if b.shape[-1] <= b.shape[-2] else gram(b.mT)


def by_square(b: Tensor, square: Tensor) -> Tensor:
    """b times a matrix of the size of its smaller square product, from the side where it fits; in b's order of memory."""
    left = b.shape[-1] > b.shape[-2]
    if is_column_major(b):
        return (b.mT @ square.mT if left else square.mT @ b.mT).mT
    return square @ b if left else b @ square


def effective_weight(b: Tensor) -> Tensor:
    """W = b (bᵀb) = (b bᵀ) b (..., d, k), formed through the smaller of the two square products."""
    return by_square(b, smaller_square(b))


def newton_schulz(b: Tensor, square: Tensor) -> Tensor:
    """b (3 I - bᵀb) / 2 for b (..., d, k) and its smaller square product: a singular value s becomes s (3 - s²) / 2."""
    return 1.5 * b - 0.5 * by_square(b, square)


def singular_values(b: Tensor) -> Tensor:
    """The min(d, k) singular values of b in descending order, computed and returned in fp64."""
    return torch.linalg.svdvals(b.detach().double())


def orthogonality_defect(b: Tensor) -> float:
    """max |s - 1| over the singular values s of b; 0 where there are none."""
    s = singular_values(b)
    return float((s - 1).abs().max()) if s.numel() else 0.0


def cube_root(w: Tensor) -> Tensor:
    """The b with b (bᵀb) = w (..., d, k): same singular vectors, cube roots of the singular values (taken in fp64).

    For fp64 by an svd. Else as w (wᵀw)^(-1/3) by the eigenvalues of the smaller square product, several times faster: singular
    values below 1e-7 of the largest one, which is rounding there, come out smaller than their cube roots.
    """
    exact = w.detach().double()
    if w.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        return u * s.pow(1 / 3).unsqueeze(-2) @ vh
    values, vectors = torch.linalg.eigh(smaller_square(exact))
    info = torch.finfo(torch.float64)
    values = torch.maximum(values, values[..., -1:] * info.eps * values.shape[-1]).clamp_min(info.tiny)
    return by_square(exact, vectors * values.pow(-1 / 3).unsqueeze(-2) @ vectors.mT).to(w.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the 16-bit types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_available(device_type: str) -> bool:
    """Whether PyTorch has autocast on such devices: on others, asking whether it is on is an error."""
    if is_dynamo_compiling():  # that of PyTorch 2.10 cannot trace what follows, and compiles for few devices
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which nothing is cast, on devices with and without autocast."""
    return torch.autocast(device.type, enabled=False) if autocast_available(device.type) else nullcontext()


def orthogonalize(b: Tensor, tolerance: float | None = None, max_iterations: int = 100) -> Orthogonalized:
    """Polar factor of b by Newton-Schulz: b <- b (3 I - bᵀb) / 2 after scaling b by a bound on its spectral norm.

    Every singular value s in (0, sqrt 3) moves to s (3 - s²) / 2, so to 1. Ones that are exactly zero stay zero, and the
    defect says so; ones at the level of rounding grow to 1 as well, in directions that mean nothing. Stops when the
    Frobenius norm of bᵀb - I is at most `tolerance`, or has met rounding. Differentiable.
    """
    if min(b.shape) == 0:
        return Orthogonalized(b.clone(), 0.0, 0)
    with autocast_off(b.device):
        return _orthogonalize(b, tolerance, max_iterations)


def _orthogonalize(b: Tensor, tolerance: float | None, max_iterations: int) -> Orthogonalized:
    wide = b.shape[1] > b.shape[0]
    factor = (b.mT if wide else b).to(accumulation_dtype(b.dtype))
    k = factor.shape[1]
    eye = torch.eye(k, dtype=factor.dtype, device=factor.device)
    if tolerance is None:
        tolerance = torch.finfo(factor.dtype).eps * math.sqrt(k)

    # Scaled first by the largest entry, so that neither the Gram matrix nor the bound over- or underflows.
    factor = factor / factor.detach().abs().max().clamp_min(torch.finfo(factor.dtype).tiny)
    g = gram(factor)
    with torch.no_grad():  # s_max² <= |G|_F and s_max² <= the largest absolute row sum of G
        bound = torch.minimum(torch.linalg.matrix_norm(g), torch.linalg.matrix_norm(g, ord=float("inf"))).sqrt()
        bound = torch.where(bound > 0, bound, torch.ones_like(bound))
    factor, g = factor / bound, g / bound.square()

    error, iterations = math.inf, 0
    while iterations < max_iterations:
        previous, error = error, float(torch.linalg.matrix_norm(g.detach() - eye))
        # Convergence is quadratic once the error is below 1, so halving less than that means rounding is met.
        if error <= tolerance or (error < 0.1 and error > previous / 2) or math.isnan(error):
            break
        factor = newton_schulz(factor, g)
        g = gram(factor)
        iterations += 1

    result = (factor.mT if wide else factor).to(b.dtype)
    finite = bool(torch.isfinite(result.detach()).all())
    return Orthogonalized(result, orthogonality_defect(result) if finite else math.nan, iterations)


def polar(a: Tensor, special: bool = False) -> Tensor:
    """The orthogonal polar factor U Vᵀ of a = U S Vᵀ (d, k), in fp64: of all orthonormal matrices Q the one with the largest
    tr(Qᵀa), which is the sum of the singular values (Schönemann 1966).

    What `orthogonalize` approaches by products alone, here by an svd: exact at any rank, and arbitrary in the directions that a
    lacks. special: only rotations (a square, det Q = 1), which lose twice the smallest singular value where det a < 0.
    """
    u, s, vh = torch.linalg.svd(a.detach().double(), full_matrices=False)
    if special and s.numel() and bool((torch.linalg.slogdet(u).sign * torch.linalg.slogdet(vh).sign) < 0):
        u[:, -1].neg_()
    return u @ vh


class Eigensystem(NamedTuple):
    """a = vectors diag(values) vectorsᵀ. values: (n,) ascending; vectors: (n, n), in columns; both fp64.

    blocks: runs [start, stop) of values that are equal but for rounding; within one, any rotation of its vectors will do.
    """

    values: Tensor
    vectors: Tensor
    blocks: Blocks


class SingularSystem(NamedTuple):
    """a = u diag(s) vh with s descending, all fp64; blocks as in `Eigensystem`."""

    u: Tensor
    s: Tensor
    vh: Tensor
    blocks: Blocks


def eigh(a: Tensor) -> Eigensystem:
    """Eigenvalues and -vectors of a symmetric (n, n), in fp64: the largest entry of each vector is positive."""
    values, vectors = torch.linalg.eigh(a.detach().double())
    values = values + 0.0  # -0.0 becomes 0.0
    return Eigensystem(values, vectors * signs(vectors), equal_runs(values))


def svd(a: Tensor) -> SingularSystem:
    """The thin svd of a (d, k), in fp64: the largest entry of each left vector is positive."""
    u, s, vh = torch.linalg.svd(a.detach().double(), full_matrices=False)
    sign = signs(u)
    return SingularSystem(u * sign, s, vh * sign.unsqueeze(1), equal_runs(s))


def equal_runs(values: Tensor, scale: Tensor | None = None) -> Blocks:
    """Runs [start, stop) of at least two neighbours among sorted values (n,) that are closer than rounding tells apart.

    Rounding is 8 n eps times `scale`: the largest |value| by default, which is the error of an eigenvalue solver; (n - 1,) gives
    each gap its own.
    """
    if len(values) < 2:
        return ()
    scale = values.abs().max() if scale is None else scale
    gaps = values.diff().abs() > 8 * len(values) * torch.finfo(values.dtype).eps * scale
    edges = [0, *(1 + gaps.nonzero().squeeze(1)).tolist(), len(values)]
    return tuple((start, stop) for start, stop in pairwise(edges) if stop - start > 1)


def signs(vectors: Tensor) -> Tensor:
    """±1 for each column, of the first of its entries that has the largest size: rounding must not choose between equal ones."""
    if not vectors.numel():
        return vectors.new_ones(vectors.shape[1])
    sizes = vectors.abs()
    first = (sizes >= (1 - 1e-6) * sizes.amax(0)).int().argmax(0, keepdim=True)
    return torch.where(vectors.gather(0, first).squeeze(0) < 0, -1.0, 1.0).to(vectors)


class GramAccumulator:
    """The Gram matrix H Hᵀ of samples that arrive in batches, summed in fp64 in O(n²) memory.

    count: how many samples were seen; mean: (n,) fp64. The sum kept is that of the deviations from the mean, so that centring
    cancels nothing (Chan, Golub & LeVeque 1979).
    """

    def __init__(self, features: int, device: torch.device | str | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._deviations = torch.zeros(features, features, dtype=torch.float64, device=device)

    def update(self, batch: Tensor) -> None:
        """Add samples, the columns of batch (n, m); few at a time, so that their fp64 copy stays small."""
        for part in batch.detach().split(max(1, _ENTRIES_AT_ONCE // max(1, len(self.mean))), dim=1):
            if part.shape[1]:
                values = part.double()
                mean = values.mean(1)
                self._add(part.shape[1], mean, gram((values - mean.unsqueeze(1)).mT))

    def merge(self, other: GramAccumulator) -> GramAccumulator:
        """The accumulator of both sets of samples; neither is changed."""
        both = copy.deepcopy(self)
        if other.count:
            both._add(other.count, other.mean, other._deviations)
        return both

    def gram(self, center: bool = False) -> Tensor:
        """H Hᵀ (n, n) fp64; center: of the deviations from the mean."""
        return self._deviations.clone() if center else self._deviations + self.count * torch.outer(self.mean, self.mean)

    def _add(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        step, total = mean - self.mean, self.count + count
        self._deviations += deviations + (self.count * count / total) * torch.outer(step, step)
        self.mean += step * (count / total)
        self.count = total


def check_real(name: str, t: Tensor) -> Tensor:
    """t itself. Raises TypeError where it is not a tensor of real floating-point numbers."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, want a torch.Tensor (arrays: torch.from_numpy)")
    if not t.is_floating_point():
        raise TypeError(f"{name}: got {t.dtype}, want a real floating dtype")
    return t


def inverse_summary(x: Tensor, b: Tensor) -> Tensor:
    """Z = X b (bᵀb)⁻¹ (..., k) for k <= d, by a solve; 16-bit inputs are solved in fp32."""
    d, k = b.shape
    if k > d:
        message = f"b: got shape ({d}, {k}), want k <= d: bᵀb is singular for more columns than rows"
        raise torch.linalg.LinAlgError(message)  # type: ignore[attr-defined] # which its stubs hide
    p = x @ b
    work = accumulation_dtype(b.dtype)
    rows = torch.atleast_2d(p.to(work))
    with autocast_off(b.device):
        return torch.linalg.solve(gram(b.to(work)), rows, left=False).to(p.dtype).reshape(p.shape)
