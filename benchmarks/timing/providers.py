"""Every way to compute a problem that is timed: ours by each engine, and what a user could write or take instead.

All read the same weight, (k, d) in memory as nn.Linear keeps it. A provider that cannot compute a problem says why: that is
a row of the record, not a gap.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import interp_nn
from benchmarks.timing.problems import DTYPES, Data, Problem
from interp_nn import functional

Function = Callable[[Data], Tensor]

# Engines whose name a provider carries; "ours" is what `auto`, or the engine asked for, makes of a problem.
OURS = {"ours": None, "ours-reference": "reference", "ours-triton": "triton", "ours-cuda": "cuda"}

# y of x (n, d) and b (d, k), by the order in which the products are formed.
ASSOCIATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "assoc-a": lambda x, b: (x @ b) @ (b.mT @ b),
    "assoc-b": lambda x, b: x @ (b @ (b.mT @ b)),
    "assoc-c": lambda x, b: ((x @ b) @ b.mT) @ b,
    "assoc-d": lambda x, b: (x @ (b @ b.mT)) @ b,
    "assoc-e": lambda x, b: x @ ((b @ b.mT) @ b),
}
# The same with p = x b at hand, as a loss of the pair has it.
_WITH_P: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "assoc-a": lambda p, x, b: p @ (b.mT @ b),
    "assoc-c": lambda p, x, b: (p @ b.mT) @ b,
}


def _cholesky(x: Tensor, b: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(b.mT @ b)
    return torch.cholesky_solve((x @ b).mT, factor).mT


# z = x b (bᵀb)⁻¹, the coordinates of x's projection on the columns of b.
INVERSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inverse-inv": lambda x, b: x @ b @ torch.linalg.inv(b.mT @ b),
    "inverse-cholesky": _cholesky,
    "inverse-lstsq": lambda x, b: torch.linalg.lstsq(b, x.mT).solution.mT,
}

NAMES = (
    *OURS, "linear", "unfused", *ASSOCIATIONS, "best-eager", "compile", "graphed", "multi-dot", *INVERSES, "orthogonal", "cached",
)  # fmt: skip
ABOUT = {
    "ours": "interp_nn, by the engine that it chooses itself or that --engine names",
    "ours-reference": "interp_nn's PyTorch products",
    "ours-triton": "interp_nn's Triton kernels",
    "ours-cuda": "interp_nn's compiled CUDA kernels",
    "linear": "nn.Linear of the same size, the floor; behind cross entropy where a loss is timed",
    "unfused": "x @ b @ (b.T @ b) under autograd; the same calls as assoc-a, so that their difference is noise",
    "assoc-a": "(x b)(bᵀb)",
    "assoc-b": "x (b (bᵀb))",
    "assoc-c": "((x b) bᵀ) b",
    "assoc-d": "(x (b bᵀ)) b, only for k > d",
    "assoc-e": "x ((b bᵀ) b), only for k > d",
    "best-eager": "the fastest of these by its median",
    "compile": "torch.compile of the fastest of these in a first trial",
    "graphed": "a CUDA graph of the fastest of these in a first trial",
    "multi-dot": "torch.linalg.multi_dot([x, b, b.T, b])",
    "inverse-inv": "x b (bᵀb)⁻¹ by torch.linalg.inv",
    "inverse-cholesky": "the same by Cholesky",
    "inverse-lstsq": "the same by least squares",
    "orthogonal": "nn.Linear with torch's orthogonal parametrization",
    "cached": "nn.Linear with the effective weight b (bᵀb), kept: inference only",
}


# Its backward is a loop over columns, each of which updates a matrix: on a CPU over a minute at d = 4096, k = 256.
_MOST_ORTHOGONAL = 2**26


class UnsupportedError(Exception):
    """Why a provider does not compute a problem."""


class Provider(NamedTuple):
    """A provider of one problem: its output (y, or the loss) of each set of inputs, and what it differentiates by.

    plain: the same function in PyTorch at the same precision, whose error allows as much again. exact: the function in fp64,
    of a set's double and the leaves that belong to it. engine: asked for meanwhile, if it is ours.
    """

    output: Callable[[int], Tensor]
    leaves: Callable[[int], tuple[Tensor, ...]]
    family: str
    plain: Function
    exact: Callable[[], tuple[Callable[[], Tensor], tuple[Tensor, ...]]]
    engine: str | None = None
    plan: str | None = None

    def using(self) -> contextlib.AbstractContextManager[object]:
        """In which its calls are made."""
        return contextlib.nullcontext() if self.engine is None else interp_nn.use_engine(self.engine)


def build(name: str, problem: Problem, mode: str, sets: Sequence[Data], engine: str, best: str | None) -> Provider:
    """The named provider. engine: what "ours" is asked of. best: the association that "compile" and "graphed" take.

    Raises UnsupportedError with the reason.
    """
    if name in OURS:
        return _ours(OURS[name] or engine, problem, mode, sets)
    if name == "orthogonal":
        return _orthogonal(problem, mode, sets)
    if name == "cached":
        return _cached(problem, mode, sets)
    if name == "linear":
        return _of("linear", _linear(problem), problem, sets)
    if name in INVERSES:
        if problem.loss:
            raise UnsupportedError("the inverse has no loss of its own")
        if problem.k > problem.d:
            raise UnsupportedError("bᵀb has no inverse for k > d")
        if DTYPES[problem.dtype].itemsize < 4:
            raise UnsupportedError("torch.linalg has no 16-bit form of it")
        return _of("inverse", lambda t: INVERSES[name](t.x, t.w.mT), problem, sets)
    if name in ("assoc-d", "assoc-e") and problem.k <= problem.d:
        raise UnsupportedError("never the cheapest for k <= d")
    if name == "compile":
        return _compiled(problem, sets, best or "assoc-a")
    return _of("summary", _expression(problem, best or "assoc-a" if name == "graphed" else name), problem, sets)


def _of(family: str, function: Function, problem: Problem, sets: Sequence[Data]) -> Provider:
    """A function of a set of inputs as a provider; its truth is that of its family."""
    plain = {"summary": _expression(problem, "unfused"), "linear": _linear(problem)}.get(family) or (
        lambda t: INVERSES["inverse-inv"](t.x, t.w.mT)
    )

    def exact() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        t = sets[0].double()
        return functools.partial(plain, t), leaves_of(problem, t)

    return Provider(lambda i: function(sets[i]), lambda i: leaves_of(problem, sets[i]), family, plain, exact)


def leaves_of(problem: Problem, t: Data) -> tuple[Tensor, ...]:
    """What a problem's gradients are of."""
    return (t.x, t.w, t.a, t.c) if problem.m is not None else (t.x, t.w)


def _expression(problem: Problem, name: str) -> Function:
    """The summary, or its loss, as PyTorch's operations, in the order that is named."""
    of = _multi_dot if name == "multi-dot" else ASSOCIATIONS["assoc-a" if name == "unfused" else name]
    if not problem.loss:
        return lambda t: of(t.x, t.w.mT)
    after = _WITH_P.get("assoc-a" if name == "unfused" else name)

    def loss(t: Data) -> Tensor:
        b = t.w.mT
        p = t.x @ b
        y = of(t.x, b) if after is None else after(p, t.x, b)
        if problem.m is not None:
            p, y = F.linear(p, t.a, t.c), F.linear(y, t.a, t.c)
        return F.cross_entropy(p, t.target) + F.cross_entropy(y, t.target) + F.mse_loss(p, y)

    return loss


def _multi_dot(x: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.multi_dot([x, b, b.mT, b])


def _linear(problem: Problem) -> Function:
    if not problem.loss:
        return lambda t: F.linear(t.x, t.w)
    if problem.m is None:
        return lambda t: F.cross_entropy(F.linear(t.x, t.w), t.target)
    return lambda t: F.cross_entropy(F.linear(F.linear(t.x, t.w), t.a, t.c), t.target)


def _ours(engine: str, problem: Problem, mode: str, sets: Sequence[Data]) -> Provider:
    functions: dict[str, Function] = {
        "summary": lambda t: functional.summary(t.x, t.w.mT),
        "cross_entropy": lambda t: functional.summary_cross_entropy(t.x, t.w.mT, t.target),
        "head": lambda t: functional.summary_head_cross_entropy(t.x, t.w.mT, t.a, t.c, t.target),
    }
    plan = planned(engine, problem, mode, sets[0].x.device)
    return _of("summary", functions[problem.op], problem, sets)._replace(engine=engine, plan=plan)


def planned(engine: str, problem: Problem, mode: str, device: torch.device) -> str:
    """Which engine computes a problem when this one is asked for, and in which form. Raises UnsupportedError where it cannot."""
    if engine == "reference" and device.type == "cpu":
        raise UnsupportedError("is what `ours` is on a CPU")
    try:
        with interp_nn.use_engine(engine):
            plan = interp_nn.plan(
                problem.n, problem.d, problem.k,
                pair=problem.op == "cross_entropy", grad=() if mode == "infer" else ("x", "b"),
                classes=(problem.m or problem.k) if problem.loss else None, dtype=DTYPES[problem.dtype], device=device,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(str(error)) from error
    return f"{plan.engine} {plan.form}"


def _compiled(problem: Problem, sets: Sequence[Data], association: str) -> Provider:
    if problem not in _compilations:  # what is compiled for another one is in the way of PyTorch's limits
        torch._dynamo.reset()
        _compilations.clear()
        _compilations[problem] = {}
    made = _compilations[problem]
    if association not in made:
        function = _expression(problem, association)
        # Of a graph that is walked again and again, no buffers may be given away.
        torch._functorch.config.donated_buffer = False
        made[association] = torch.compile(lambda *inputs: function(Data(*inputs)), fullgraph=True, dynamic=False)
    return _of("summary", lambda t: made[association](*t), problem, sets)


_compilations: dict[Problem, dict[str, Callable[..., Tensor]]] = {}


def _orthogonal(problem: Problem, mode: str, sets: Sequence[Data]) -> Provider:
    if problem.loss:
        raise UnsupportedError("timed as a layer only")
    if DTYPES[problem.dtype].itemsize < 4:
        raise UnsupportedError("the parametrization's factorizations have no 16-bit form")
    if mode not in ("fwd", "infer") and problem.d**2 * problem.k > _MOST_ORTHOGONAL:
        raise UnsupportedError(f"its backward takes minutes: d² k is over {_MOST_ORTHOGONAL}")

    def layer(t: Data) -> torch.nn.Module:
        linear = torch.nn.Linear(problem.d, problem.k, bias=False, device=t.x.device, dtype=t.x.dtype)
        with torch.no_grad():
            linear.weight.copy_(t.w)
        return torch.nn.utils.parametrizations.orthogonal(linear)

    layers = [layer(t) for t in sets]

    def leaves(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return (x, *module.parameters())

    def exact() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        module, x = copy.deepcopy(layers[0]).double(), sets[0].double().x
        return lambda: module(x), leaves(module, x)

    # Its parameters are coordinates about a random completion of the weight, so that no two of them share a gradient.
    family = f"orthogonal, {mode}"
    return Provider(
        lambda i: layers[i](sets[i].x), lambda i: leaves(layers[i], sets[i].x), family, lambda t: layers[0](t.x), exact
    )  # fmt: skip


def _cached(problem: Problem, mode: str, sets: Sequence[Data]) -> Provider:
    if mode != "infer":
        raise UnsupportedError("the weight changes with every step of training")
    with torch.no_grad():
        kept = [functional.effective_weight(t.w.mT).mT.contiguous() for t in sets]
    return _of("summary", _linear(problem), problem, sets)._replace(output=lambda i: F.linear(sets[i].x, kept[i]))
