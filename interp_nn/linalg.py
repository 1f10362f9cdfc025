"""Small shared maths on a tall or wide matrix b (..., d, k): Gram matrix, effective weight, polar factor, spectrum."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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


def effective_weight(b: Tensor) -> Tensor:
    """W = b (bᵀb) = (b bᵀ) b (..., d, k), formed through the smaller of the two square products."""
    return b @ gram(b) if b.shape[-1] <= b.shape[-2] else gram(b.mT) @ b


def singular_values(b: Tensor) -> Tensor:
    """The min(d, k) singular values of b in descending order, computed and returned in fp64."""
    return torch.linalg.svdvals(b.detach().double())


def orthogonality_defect(b: Tensor) -> float:
    """max |s - 1| over the singular values s of b; 0 where there are none."""
    s = singular_values(b)
    return float((s - 1).abs().max()) if s.numel() else 0.0


def cube_root(w: Tensor) -> Tensor:
    """The b with b (bᵀb) = w: same singular vectors, cube roots of the singular values (taken in fp64)."""
    u, s, vh = torch.linalg.svd(w.detach().double(), full_matrices=False)
    return (u * s.pow(1 / 3).unsqueeze(-2) @ vh).to(w.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the 16-bit types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def orthogonalize(b: Tensor, tolerance: float | None = None, max_iterations: int = 100) -> Orthogonalized:
    """Polar factor of b by Newton-Schulz: b <- b (3 I - bᵀb) / 2 after scaling b by a bound on its spectral norm.

    Every singular value s in (0, sqrt 3) moves to s (3 - s²) / 2, so to 1. Ones that are exactly zero stay zero, and the
    defect says so; ones at the level of rounding grow to 1 as well, in directions that mean nothing. Stops when the
    Frobenius norm of bᵀb - I is at most `tolerance`, or has met rounding. Differentiable.
    """
    if min(b.shape) == 0:
        return Orthogonalized(b.clone(), 0.0, 0)
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
        factor = 1.5 * factor - 0.5 * (factor @ g)
        g = gram(factor)
        iterations += 1

    result = (factor.mT if wide else factor).to(b.dtype)
    finite = bool(torch.isfinite(result.detach()).all())
    return Orthogonalized(result, orthogonality_defect(result) if finite else math.nan, iterations)


def inverse_summary(x: Tensor, b: Tensor) -> Tensor:
    """Z = X b (bᵀb)⁻¹ (..., k), by a solve; 16-bit inputs are solved in fp32."""
    p = x @ b
    work = accumulation_dtype(b.dtype)
    rows = torch.atleast_2d(p.to(work))
    return torch.linalg.solve(gram(b.to(work)), rows, left=False).to(p.dtype).reshape(p.shape)
