"""Providers: every way to compute a problem, by interp_nn's engines and by the baselines that a user could take instead.

All read the same weight, (k, d) in memory as nn.Linear keeps it. A provider that cannot compute a problem raises
`UnsupportedError`, and its reason becomes a row of the record.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import interp_nn
from benchmarks.records.report import BEST_PLAN, REPEAT
from benchmarks.timing import custom
from benchmarks.timing.problems import DTYPES, Data, Problem
from interp_nn import engines, functional
from interp_nn.engines import orders
from interp_nn.engines.problem import EngineName, LossOptions, Order
from interp_nn.engines.problem import Problem as EngineProblem
from interp_nn.ops import direct, remembered

Function = Callable[[Data], Tensor]

# Providers by their engines; "ours" uses `auto` or the engine that is asked for.
OURS = {"ours": None, "ours-eager": "eager", "ours-triton": "triton", "ours-cuda": "cuda"}
# Their kernels called directly, without the operator and autograd around them.
KERNELS: dict[str, EngineName] = {"kernel-triton": "triton", "kernel-cuda": "cuda"}

# y of x (n, d) and b (d, k), by the order in which the products are formed.
ASSOCIATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "assoc-a": lambda x, b: (x @ b) @ (b.mT @ b), "assoc-b": lambda x, b: x @ (b @ (b.mT @ b)),
    "assoc-c": lambda x, b: ((x @ b) @ b.mT) @ b, "assoc-d": lambda x, b: (x @ (b @ b.mT)) @ b,
    "assoc-e": lambda x, b: x @ ((b @ b.mT) @ b),
}  # fmt: skip
# The same from p = x b, which a loss of the pair computes anyway.
_WITH_P: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "assoc-a": lambda p, x, b: p @ (b.mT @ b),
    "assoc-c": lambda p, x, b: (p @ b.mT) @ b,
}
# The order of each, as a plan of the eager engine: ours in the place of the chosen one, so that both have the same overhead.
PLANS: dict[str, Order] = {
    "plan-a": "(Xb)G", "plan-b": "X(bG)", "plan-c": "((Xb)bᵀ)b", "plan-d": "(X(bbᵀ))b", "plan-e": "X((bbᵀ)b)",
}  # fmt: skip
_BY_AUTOGRAD = "-autograd"
PLAN_NAMES = tuple(f"{name}{how}" for name in PLANS for how in ("", _BY_AUTOGRAD))


def _cholesky(x: Tensor, b: Tensor) -> Tensor:
    factor = torch.linalg.cholesky(b.mT @ b)
    return torch.cholesky_solve((x @ b).mT, factor).mT


# z = x b (bᵀb)⁻¹, the coordinates of x's projection on the columns of b.
INVERSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inverse-inv": lambda x, b: x @ b @ torch.linalg.inv(b.mT @ b),
    "inverse-cholesky": _cholesky,
    "inverse-lstsq": lambda x, b: torch.linalg.lstsq(b, x.mT).solution.mT,
}

ABOUT = {
    "ours": "interp_nn, by the engine that it chooses itself or that --engine names",
    "ours-eager": "interp_nn's PyTorch products", "ours-triton": "interp_nn's Triton kernels",
    "ours-cuda": "interp_nn's compiled CUDA kernels",
    "kernel-triton": "the triton engine called directly, without operator and autograd",
    "kernel-cuda": "the cuda engine called directly",
    "linear": "nn.Linear of the same size, the floor; behind cross entropy where a loss is timed",
    "unfused": "x @ b @ (b.T @ b) under autograd; the same calls as assoc-a, and timed once with it",
    "assoc-a": "(x b)(bᵀb)", "assoc-b": "x (b (bᵀb))", "assoc-c": "((x b) bᵀ) b",
    "assoc-d": "(x (b bᵀ)) b, only for k > d", "assoc-e": "x ((b bᵀ) b), only for k > d",
    "best-eager": "the fastest of these; chosen in one half of the rounds and timed in the other, and the reverse",
    "compile": "torch.compile of the fastest of these in a first trial",
    "compile-tuned": 'the same with mode="max-autotune", which takes minutes: only by --provider',
    "graphed": "a CUDA graph of the fastest of these in a first trial",
    "multi-dot": "torch.linalg.multi_dot([x, b, b.T, b])", "inverse-inv": "x b (bᵀb)⁻¹ by torch.linalg.inv",
    "inverse-cholesky": "the same by Cholesky", "inverse-lstsq": "the same by least squares",
    "orthogonal": "nn.Linear with torch's orthogonal parametrization",
    "cached": "nn.Linear with the effective weight b (bᵀb), kept: inference only",
    **{
        f"{name}{how}": f"ours by {order}{', its backward by autograd' * (how != '')}; suite selection"
        for name, order in PLANS.items()
        for how in ("", _BY_AUTOGRAD)
    },
    BEST_PLAN: "the fastest of these and ours by its median; suite selection",
    REPEAT: "the same provider once more, ours or the first one: the ratio of the two, 1 but for noise, is the run's noise floor",
}  # fmt: skip
OF_THE_BEST = ("compile", "compile-tuned", "graphed")  # they take the fastest association
NAMES = tuple(name for name in ABOUT if name not in ("compile-tuned", BEST_PLAN, *PLAN_NAMES))  # when none is asked for


# The backward of "orthogonal" updates a matrix for each column: over a minute at d = 4096, k = 256 on a CPU.
_MOST_ORTHOGONAL = 2**26


def chosen(names: Sequence[str], known: Container[str]) -> list[str]:
    """Return the names that a suite knows; none where "repeat" has nothing to repeat."""
    found = [name for name in names if name in known]
    return found if any(name != REPEAT for name in found) else []


def repeated(names: Sequence[str]) -> str:
    """Return the provider that "repeat" times once more."""
    return next(
        (name for name in ("ours", *names) if name in names and name not in (REPEAT, BEST_PLAN, "best-eager")), "ours"
    )


class UnsupportedError(Exception):
    """A provider does not compute a problem; the message is the reason."""


class Provider(NamedTuple):
    """A provider of one problem: its output (y, or the loss) for the i-th set of inputs, and the leaves of its gradients.

    Providers of a `family` compute the same function. `plain` is that function in PyTorch at the same precision, whose error
    sets the tolerance; `exact` returns it in fp64, with its leaves. `engine` is in use meanwhile, None for a baseline. A
    `strict` provider has the tolerances of interp_nn's own. `direct` computes all results of a set by itself. `gradients` names
    those of the leaves.
    """

    output: Callable[[int], Tensor]
    leaves: Callable[[int], tuple[Tensor, ...]]
    family: str
    plain: Function
    exact: Callable[[], tuple[Callable[[], Tensor], tuple[Tensor, ...]]]
    engine: str | None = None
    strict: bool = False
    plan: str | None = None
    direct: Callable[[int], list[Tensor]] | None = None
    gradients: Sequence[str] = ("dx", "dw", "da", "dc")

    def using(self) -> contextlib.AbstractContextManager[object]:
        """Return the context in which its calls are made."""
        return contextlib.nullcontext() if self.engine is None else interp_nn.use_engine(self.engine)


def build(name: str, problem: Problem, mode: str, sets: Sequence[Data], engine: str, best: str | None) -> Provider:
    """Build one of ABOUT, "ours" by an engine, those of OF_THE_BEST of the association `best`; raises UnsupportedError."""
    if name in custom.FOUND:
        return _custom(custom.FOUND[name], problem, mode, sets)
    if name in OURS:
        return _ours(OURS[name] or engine, problem, mode, sets)
    if name in PLAN_NAMES:
        return _planned_as(name, problem, mode, sets, engine)
    if name in KERNELS:
        provider = _ours(KERNELS[name], problem, mode, sets)
        return provider._replace(direct=_kernel_calls(KERNELS[name], problem, mode, sets))
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
    plan = (best or "assoc-a") if name in OF_THE_BEST else None
    function = _expression(problem, plan or name)
    if name.startswith("compile"):
        tuned = "max-autotune" if name == "compile-tuned" else None
        made = compiled(problem, f"{name} {plan}", lambda *inputs: function(Data(*inputs)), tuned)
        return _of("summary", lambda t: made(*t), problem, sets)._replace(plan=plan)
    return _of("summary", function, problem, sets)._replace(plan=plan)


def _custom(given: custom.Custom, problem: Problem, mode: str, sets: Sequence[Data]) -> Provider:
    """Make a provider of a user's function, after a call that shows what it returns; raises ValueError if that does not fit."""
    infer, shape = mode == "infer", () if problem.loss else (problem.n, problem.k)

    def arguments(t: Data) -> tuple[Tensor, ...]:
        return (t.x, t.w.mT, t.target) if problem.loss else (t.x, t.w.mT)

    with torch.set_grad_enabled(not infer):
        got = given.function(*arguments(sets[0]))
    if not isinstance(got, Tensor) or got.shape != shape:
        what = f"a tensor of shape {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{given.name} returned {what}, want a tensor of shape {shape}")
    if not problem.loss and got.dtype != sets[0].x.dtype:
        raise ValueError(f"{given.name} returned {got.dtype}, want the dtype of x, {sets[0].x.dtype}")
    if not infer and not got.requires_grad:
        raise UnsupportedError("its result has no gradient: time --mode infer, or write a torch.autograd.Function")
    family, plain = "summary", None
    if (reference := given.reference) is not None:
        family, plain = f"reference of {given.name}", lambda t: reference(*arguments(t))
    made = _of(family, lambda t: given.function(*arguments(t)), problem, sets, plain)
    return made._replace(strict=given.file is not None)


def _of(
    family: str, function: Function, problem: Problem, sets: Sequence[Data], plain: Function | None = None
) -> Provider:
    """Make a provider of a function of a set of inputs; `plain` is needed for another family than those here."""
    plain = (
        plain
        or {"summary": _expression(problem, "unfused"), "linear": _linear(problem)}.get(family)
        or (lambda t: INVERSES["inverse-inv"](t.x, t.w.mT))
    )

    def exact() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        t = sets[0].double()
        return functools.partial(plain, t), leaves_of(problem, t)

    return Provider(lambda i: function(sets[i]), lambda i: leaves_of(problem, sets[i]), family, plain, exact)


def leaves_of(problem: Problem, t: Data) -> tuple[Tensor, ...]:
    """Return the tensors that a problem's gradients are taken of."""
    return (t.x, t.w, t.a, t.c) if problem.m is not None else (t.x, t.w)


def _expression(problem: Problem, name: str) -> Function:
    """Write the summary, or its loss, as PyTorch's operations in the named order."""
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
    """Return the engine and the order that compute a problem when this engine is asked for; raises UnsupportedError."""
    if engine == "eager" and device.type == "cpu":
        raise UnsupportedError("on a CPU `ours` is this engine")
    try:
        with interp_nn.use_engine(engine):
            plan = interp_nn.plan(
                problem.n, problem.d, problem.k,
                pair=problem.op == "cross_entropy", grad=() if mode == "infer" else ("x", "b"),
                classes=(problem.m or problem.k) if problem.loss else None, dtype=DTYPES[problem.dtype], device=device,
                degree=problem.degree,
            )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(str(error)) from error
    return f"{plan.engine} {plan.order}" + (" by autograd" if plan.autograd else "")


def _planned_as(name: str, problem: Problem, mode: str, sets: Sequence[Data], engine: str) -> Provider:
    """Make the provider of ours with another plan: the calls of `functional.summary`, its choice included."""
    if problem.op != "summary":
        raise UnsupportedError("a plan of the summary")
    grad, device = mode != "infer", sets[0].x.device
    order, autograd = PLANS[name.removesuffix(_BY_AUTOGRAD)], name.endswith(_BY_AUTOGRAD)
    planned_problem = EngineProblem(problem.n, problem.d, problem.k, False, grad, grad, device=device.type)
    plans = [plan for plan in orders.candidates(planned_problem) if (plan.order, plan.autograd) == (order, autograd)]
    if not plans or not (grad or autograd):
        raise UnsupportedError("not a candidate" if grad or autograd else "without gradients the same as by autograd")
    label = f"eager {order}{' by autograd' * autograd}"
    if label == planned(engine, problem, mode, device):
        raise UnsupportedError("the plan of ours")

    call = direct.Call(plans[0])

    def function(t: Data) -> Tensor:
        x, b, *_ = remembered.planned(t.x, t.w.mT, None, False)
        return direct.summary(x, b, None, call)

    return _of("summary", function, problem, sets)._replace(engine=engine, plan=label)


def _kernel_calls(name: EngineName, problem: Problem, mode: str, sets: Sequence[Data]) -> Callable[[int], list[Tensor]]:
    """Return an engine's own calls of a mode on the i-th set of inputs."""
    engine = engines.unverified(name)
    kept: dict[int, list[Tensor]] = {}
    options = LossOptions((1.0, 1.0, 1.0), -100, "mean")
    n, d, k, m = problem[1:5]
    with interp_nn.use_engine(name):
        plan = interp_nn.plan(
            n, d, k, pair=problem.loss and m is None, classes=(m or k) if problem.loss else None,
            dtype=DTYPES[problem.dtype], device=sets[0].x.device,
        )  # fmt: skip

    def call(i: int) -> list[Tensor]:
        t = Data(*(value.detach() for value in sets[i]))
        b, head = t.w.t(), m is not None
        if problem.loss:
            a, c = (t.a, t.c) if head else (None, None)
            value, grads = engine.loss(t.x, b, a, c, t.target, options, plan, None, (True, True, head, head))
            dx, db, *rest = grads
            return [value, dx, db.t(), *(grad for grad in rest if grad is not None)]
        y: list[Tensor] = []
        if mode != "bwd" or i not in kept:
            _, out, kept[i] = engine.forward(t.x, b, None, plan, False)
            y = [out] if mode != "bwd" else []
        if mode in ("fwd", "infer"):
            return y
        gradients = engine.backward(None, t.dy, t.x, b, kept[i], plan, True, True)[:2]
        dx, db = (t for t in gradients if t is not None)
        return [*y, dx, db.t()]

    return call


def compiled(
    problem: Problem, key: str, function: Callable[..., Tensor], compile_mode: str | None = None
) -> Callable[..., Tensor]:
    """Return a function of a problem compiled, once for all modes."""
    if problem not in _compilations:  # compilations for another one count towards PyTorch's limits
        torch._dynamo.reset()
        _compilations.clear()
        _compilations[problem] = {}
    made = _compilations[problem]
    if key not in made:
        # "bwd" walks a graph again and again: its buffers must not be donated.
        torch._functorch.config.donated_buffer = False
        made[key] = torch.compile(function, fullgraph=True, dynamic=False, mode=compile_mode)
    return made[key]


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

    # The parameters are coordinates about a random completion of the weight: no two layers share a gradient.
    layers = [layer(t) for t in sets]
    return of_layers(layers, layers[0], sets)._replace(family=f"orthogonal, {mode}")


def of_layers(
    layers: Sequence[torch.nn.Module], plain: torch.nn.Module, sets: Sequence[Data],
    call: Callable[[torch.nn.Module, Tensor], Tensor] = torch.nn.Module.__call__,
) -> Provider:  # fmt: skip
    """Make a provider of one layer for each set. `plain` computes the first one's function, with the same parameters."""

    def leaves(module: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return (x, *module.parameters())

    def exact() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        module, x = copy.deepcopy(plain).double(), sets[0].double().x
        return lambda: module(x), leaves(module, x)

    return Provider(
        lambda i: call(layers[i], sets[i].x), lambda i: leaves(layers[i], sets[i].x), "", lambda t: plain(t.x), exact,
        gradients=["dx", *(f"d{name}" for name, _ in layers[0].named_parameters())],
    )  # fmt: skip


def _cached(problem: Problem, mode: str, sets: Sequence[Data]) -> Provider:
    if mode != "infer":
        raise UnsupportedError("the weight changes with every step of training")
    with torch.no_grad():
        kept = [functional.effective_weight(t.w.mT).mT.contiguous() for t in sets]
    return _of("summary", _linear(problem), problem, sets)._replace(output=lambda i: F.linear(sets[i].x, kept[i]))
