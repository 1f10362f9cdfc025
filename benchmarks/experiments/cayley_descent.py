"""Descrambling by descent, the published method: the baseline of the closed form.

Amey et al., PNAS 118(5), 2021, minimise eta(P) = tr(A P B Pᵀ) over P = (I + Q)⁻¹ (I - Q) with Q antisymmetric, from Q = 0, for
A = DᵀD and B = HHᵀ scaled to a spectral norm of n. The optimiser here is SciPy's L-BFGS. Far from Q = 0 the transform is badly
conditioned; it is taken anew around the P reached after a few hundred iterations, which comes several times closer to the
minimum in as many iterations as one chart does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

CHART = 200  # iterations between two charts

_Vector = NDArray[np.float64]


class Descent(NamedTuple):
    """The result of a descent.

    P: (n, n) fp64 orthogonal. loss: tr(A P B Pᵀ). evaluations: of the objective with its gradient. converged: False where
    iterations or seconds ran out. history: seconds since the call, and the loss, at the start and after each iteration.
    """

    P: Tensor
    loss: float
    evaluations: int
    seconds: float
    converged: bool
    history: list[tuple[float, float]]


def descend(
    A: Tensor,
    B: Tensor,
    start: Tensor | None = None,
    *,
    iterations: int = 10_000,
    tolerance: float = 1e-9,
    seconds: float = float("inf"),
) -> Descent:
    """Minimise tr(A P B Pᵀ) over orthogonal P with the determinant of `start`, by L-BFGS on the Cayley transform.

    A, B: (n, n) fp64, symmetric, positive semidefinite and not zero. start: the first P, the identity without it. Ends where a
    chart lowers the loss by at most `tolerance` of it, and when iterations or seconds run out.
    """
    begin = time.perf_counter()
    n = len(A)
    norms = torch.linalg.matrix_norm(A, 2), torch.linalg.matrix_norm(B, 2)
    a, b = (matrix * (n / norm) for matrix, norm in zip((A, B), norms, strict=True))
    unit = float(norms[0] * norms[1]) / n**2
    P = torch.eye(n, dtype=torch.float64) if start is None else start
    loss = float((a @ P @ b * P).sum())
    history = [(time.perf_counter() - begin, unit * loss)]
    evaluations, converged = 0, False

    def watch(intermediate_result: Any) -> None:
        taken = time.perf_counter() - begin
        history.append((taken, unit * float(intermediate_result.fun)))
        if taken > seconds:
            raise StopIteration

    while not converged and len(history) <= iterations and time.perf_counter() - begin < seconds:
        step, found = _one_chart(a, P @ b @ P.mT, min(CHART, iterations + 1 - len(history)), watch)
        P, before, loss = step @ P, loss, float(found.fun)
        evaluations += int(found.nfev)
        converged = before - loss <= tolerance * before
    loss = float((A @ P @ B * P).sum())
    return Descent(P, loss, evaluations, time.perf_counter() - begin, converged, history)


def _one_chart(a: Tensor, c: Tensor, iterations: int, watch: Callable[[Any], None]) -> tuple[Tensor, Any]:
    """Run L-BFGS from Q = 0 on f(Q) = tr(a S c Sᵀ), S = (I + Q)⁻¹ (I - Q); return S and SciPy's result."""
    eye = torch.eye(len(a), dtype=torch.float64)
    upper = torch.triu_indices(len(a), len(a), 1).unbind()

    def transform(values: _Vector) -> tuple[Tensor, Tensor]:
        """Return S and (I + Q)⁻¹."""
        q = torch.zeros_like(eye)
        q[upper] = torch.from_numpy(values)
        inverse = torch.linalg.inv(eye + q - q.mT)
        return 2 * inverse - eye, inverse  # I - Q = 2 I - (I + Q)

    def evaluate(values: _Vector) -> tuple[float, _Vector]:
        s, inverse = transform(values)
        product = a @ s @ c
        # dS = -(I + Q)⁻¹ dQ (I + S), so that the gradient by all entries of Q is -2 (I + Q)⁻ᵀ a S c (I + S)ᵀ.
        g = -2 * inverse.mT @ (product + product @ s.mT)
        return float((product * s).sum()), (g - g.mT)[upper].numpy()

    limits = {"maxiter": iterations, "maxfun": 2 * iterations, "maxcor": 20, "ftol": 0.0, "gtol": 1e-12}
    start = np.zeros(len(upper[0]))
    found = minimize(evaluate, start, jac=True, method="L-BFGS-B", callback=watch, options=limits)
    return transform(found.x)[0], found
