"""Descrambling in closed form and by descent, side by side: the loss reached and the time it took.

The descent is that of Amey et al., PNAS 118(5), 2021. They minimise eta(P) = tr(A P B Pᵀ) over P = (I + Q)⁻¹ (I - Q) with Q
antisymmetric, from Q = 0, for A = DᵀD and B = HHᵀ scaled to a spectral norm of n. The optimiser here is SciPy's L-BFGS. Far
from Q = 0 the transform is badly conditioned. It is taken anew around the P after a few hundred iterations, which comes
several times closer to the minimum in as many iterations as one chart does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from timeit import timeit
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from benchmarks.experiments import common, signals
from interp_nn.explain.descramble.brockett import brockett_min
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.explain.descramble.descrambler import Descrambler

NAME = "descent"
OPERATORS = ("fourier2", "diff1")
NEAR = (1e-1, 1e-2, 1e-3)  # relative gaps whose time is recorded


class Size(NamedTuple):
    """The trials with n features for each operator, the descents in each, and the seconds of each descent."""

    n: int
    trials: int
    starts: int
    seconds: float


FULL = (Size(32, 2, 20, 1.5), Size(80, 2, 20, 3.0), Size(256, 1, 20, 8.0), Size(1024, 1, 3, 60.0))
QUICK = (Size(8, 1, 4, 0.5), Size(32, 1, 2, 0.5))


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


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, 1 where a descent passed the closed form."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    sizes = QUICK if given.quick else FULL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for both: at most of these sizes more are slower
    try:
        with tqdm(total=len(OPERATORS) * sum(size.trials * size.starts for size in sizes), unit="descent") as progress:
            trials = [
                _trial(size, operator, given.seed + seed, progress)
                for size in sizes
                for operator in OPERATORS
                for seed in range(size.trials)
            ]
    finally:
        torch.set_num_threads(threads)
    rows = [_row(n, operator, trials) for n in dict.fromkeys(s.n for s in sizes) for operator in OPERATORS]
    passed = all(trial["closed"]["loss"] <= trial["best_of_descents"] * (1 + 1e-10) for trial in trials)
    _draw(run, trials, rows)
    for trial in trials:
        for one in trial["descents"]:
            del one["history"]
    budget = {"sizes": [size._asdict() for size in sizes], "samples": "4 n", "threads": 1}
    run.finish(budget, {"closed_form_at_most_best_descent": passed, "table": rows, "trials": trials})
    return 0 if passed else 1


def _trial(size: Size, operator: str, seed: int, progress: tqdm[Any]) -> dict[str, Any]:
    """Time the closed form and descents on one problem in turn: the closed form again after each descent."""
    n = size.n
    H, smooth = signals.scrambled(n, 4 * n, seed=seed)
    D = derivative_operator(n, operator).matrix()
    A, B = D.mT @ D, H @ H.mT
    generator = torch.Generator().manual_seed(seed)
    exact = Descrambler(operator=operator).fit(H.mT)
    solves, fits = [], []
    descents: list[dict[str, Any]] = []
    for index in range(size.starts):
        progress.set_postfix_str(f"n {n}, {operator}")
        solves.append(timeit(lambda: brockett_min(A, B), number=1))
        fits.append(timeit(lambda: Descrambler(operator=operator).fit(H.mT), number=1))
        # The first from Q = 0, as published; an orthogonal start has either determinant.
        start = None if index == 0 else signals.orthogonal(n, generator)
        found = descend(A, B, start, seconds=size.seconds)
        curve = [(seconds, loss / exact.lower_bound_ - 1) for seconds, loss in found.history]
        descents.append(
            {
                "loss": found.loss,
                "gap": found.loss / exact.lower_bound_ - 1,
                "iterations": len(found.history) - 1,
                "evaluations": found.evaluations,
                "seconds": found.seconds,
                "converged": found.converged,
                "seconds_to_gap": {f"{near:g}": next((s for s, gap in curve if gap <= near), None) for near in NEAR},
                "history": curve,
            }
        )
        progress.update()
    return {
        "n": n,
        "operator": operator,
        "seed": seed,
        "loss_before_scrambling": float((D @ smooth).square().sum()),
        "closed": {
            "loss": exact.loss_,
            "error_of_its_loss": abs(exact.loss_ / exact.lower_bound_ - 1),
            "error_of_orthogonality": _defect(exact.P_),
            "seconds": statistics.median(solves),
            "seconds_of_fit": statistics.median(fits),
        },
        "best_of_descents": min(one["loss"] for one in descents),
        "descents": descents,
    }


def _defect(P: Tensor) -> float:
    return float((P @ P.mT - torch.eye(len(P), dtype=P.dtype)).abs().max())


def _row(n: int, operator: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians and extremes over the descents of one n and operator.

    Descents that had not converged were stopped, so that the ratio of times is what it is at least.
    """
    here = [trial for trial in trials if (trial["n"], trial["operator"]) == (n, operator)]
    descents = [one for trial in here for one in trial["descents"]]
    gaps, seconds = [one["gap"] for one in descents], [one["seconds"] for one in descents]
    near = {}
    for name in descents[0]["seconds_to_gap"]:
        reached = [one["seconds_to_gap"][name] for one in descents if one["seconds_to_gap"][name] is not None]
        near[name] = {"reached": len(reached), "seconds": statistics.median(reached) if reached else None}
    closed = statistics.median(trial["closed"]["seconds"] for trial in here)
    return {
        "n": n, "operator": operator, "trials": len(here), "descents": len(descents),
        "converged": sum(one["converged"] for one in descents),
        "gap": {"least": min(gaps), "median": statistics.median(gaps), "most": max(gaps)},
        "iterations": statistics.median(one["iterations"] for one in descents), "seconds": statistics.median(seconds),
        "within": near, "closed_seconds": closed,
        "fit_seconds": statistics.median(trial["closed"]["seconds_of_fit"] for trial in here),
        "descent_over_closed_at_least": statistics.median(seconds) / closed,
    }  # fmt: skip


def _draw(run: common.Run, trials: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    sizes = list(dict.fromkeys(trial["n"] for trial in trials))
    colours = dict(zip(OPERATORS, ("C0", "C1"), strict=True))
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.4 * len(sizes), 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, n in zip(panels[0], sizes, strict=True):
        for trial in (trial for trial in trials if trial["n"] == n):
            colour, label = colours[trial["operator"]], f"descents, {trial['operator']}"
            for one in trial["descents"]:
                seconds, gaps = zip(*one["history"], strict=True)
                at_least = [max(gap, 1e-12) for gap in gaps]  # less is rounding
                axes.plot(seconds, at_least, color=colour, linewidth=0.6, alpha=0.6, label=label)
                label = "_"
            axes.axvline(trial["closed"]["seconds"], color=colour, linestyle="--", linewidth=1, label="_")
        axes.set(xscale="log", yscale="log", xlabel="seconds", title=f"n = {n}")
    panels[0][0].set_ylabel("loss / minimum - 1")
    panels[0][0].axvline(float("nan"), color="0.3", linestyle="--", label="closed form, exact")
    lines = dict(zip(*reversed(panels[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside lower center", ncols=3)
    largest = [row for row in rows if row["n"] == sizes[-1]]
    least = min(row["gap"]["least"] for row in largest)
    stopped, closed = (max(row[key] for row in largest) for key in ("seconds", "closed_seconds"))
    figure.suptitle(
        f"n = {sizes[-1]}: the best descent has {1 + least:.3g} times the minimum after {stopped:.2g} s, "
        f"the closed form the minimum after {closed:.2g} s",
        fontsize=11,
    )
    run.figure(figure, "gap")
    _draw_time(run, rows)


def _draw_time(run: common.Run, rows: list[dict[str, Any]]) -> None:
    """Draw the median time of a closed form and of a descent over n; nearly all descents are stopped by their limit."""
    figure, axes = plt.subplots(figsize=(5.4, 4), layout="constrained")
    for operator, colour in zip(OPERATORS, ("C0", "C1"), strict=True):
        of = [row for row in rows if row["operator"] == operator]
        n = [row["n"] for row in of]
        axes.plot(n, [row["closed_seconds"] for row in of], color=colour, marker=".", label=f"closed form, {operator}")
    converged, descents = (sum(row[key] for row in rows) for key in ("converged", "descents"))
    label = f"a descent until its limit ({converged} of {descents} converged)"
    axes.plot(n, [row["seconds"] for row in of], color="0.4", linestyle="--", marker=".", label=label)
    ratio = min(row["descent_over_closed_at_least"] for row in rows if row["n"] == n[-1])
    axes.set(xscale="log", yscale="log", xlabel="features n", ylabel="seconds, median")
    axes.set_title(f"n = {n[-1]}: a descent takes at least {ratio:.2g} times the closed form's time", fontsize=10)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
    run.figure(figure, "time")
