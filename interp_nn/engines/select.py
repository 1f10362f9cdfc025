"""Choose an engine and an order for a problem. Pure arithmetic on shapes and a device's figures.

`eager` takes the order with the least cost (see `interp_nn.engines.orders`). Where a GPU has kernels of one launch, "auto"
takes them if a tuned table says so. Without a table it takes Triton's if `interp_nn.engines.cost` predicts that they are no
slower, but not for losses in fp32, whose prediction is not trusted. It takes the compiled library's only by a table.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from interp_nn.engines import cost, orders
from interp_nn.engines.devices import DeviceSpec, interpreting, spec_for, spec_of
from interp_nn.engines.limits import MOST_COLUMNS, can_form_logits_from_x, padded, unsupported_reason
from interp_nn.engines.problem import ENGINES, Config, EngineName, Order, Plan, Problem
from interp_nn.engines.triton import configs
from interp_nn.engines.triton.configs import Bucket

_logger = logging.getLogger("interp_nn")
_logged: set[str] = set()


class Request(NamedTuple):
    """How the calls of a thread or task are to be computed. Equal ones are the same object, so that `is` compares them.

    Attributes:
        engine: The name given to `use_engine` or INTERP_NN_ENGINE; checked at use, so that an import never fails.
        followed: The calls of a model are followed one by one: operators and Functions of our own would be opaque.
    """

    engine: str
    followed: bool


_request_of = cache(Request)
_at_first = _request_of(os.environ.get("INTERP_NN_ENGINE") or "auto", False)
_requested = ContextVar("interp_nn_request", default=_at_first)
request_now = _requested.get
_latest = request_now().engine  # requested last, in any thread: compiled code is guarded by it
_WITH_KERNELS: tuple[EngineName, ...] = ("triton", "cuda")  # of one launch


class use_engine:  # noqa: N801 - used like a function, as torch.no_grad is
    """Force an engine for every later call of this thread or asyncio task, or inside a `with` block.

    It overrides the environment variable INTERP_NN_ENGINE, which holds for all threads. A backward always runs on the engine
    of its forward.

    Args:
        name: "eager", "triton" or "cuda"; "auto" chooses for each problem.

    Raises:
        ValueError: The name is not an engine's.
        RuntimeError: The engine cannot compute here, for the reason given. A later call that a forced engine cannot compute
            raises RuntimeError as well.

    Example:
        >>> import interp_nn
        >>> with interp_nn.use_engine("eager"):
        ...     y = interp_nn.functional.summary(torch.ones(2, 3), torch.eye(3))
    """

    def __init__(self, name: str) -> None:
        engine = _checked(name, "use_engine")
        reason = None if engine is None else unsupported_reason(engine)
        if reason is not None:
            raise RuntimeError(f"use_engine: the {name} engine is off: {reason}")
        self._previous = requested_now()
        _request(name)

    def __enter__(self) -> use_engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _request(self._previous)


def _request(name: str) -> None:
    global _latest
    _latest = name
    _requested.set(_request_of(name, followed()))


def requested_now() -> str:
    """Return `requested` where nothing is compiled."""
    return _requested.get().engine


def followed() -> bool:
    """Return True while the calls of a model are followed one by one (see `calls_followed`). Dynamo cannot trace it."""
    return _requested.get().followed


@contextmanager
def calls_followed() -> Iterator[None]:
    """Compute by plain PyTorch products in the block, the same ones whichever tensors need gradients."""
    before = followed()
    _requested.set(_request_of(requested_now(), True))
    try:
        yield
    finally:
        _requested.set(_request_of(requested_now(), before))


def _checked(name: str, source: str) -> EngineName | None:
    """The engine of that name; None for "auto"."""
    for engine in ENGINES:
        if engine == name:
            return engine
    if name != "auto":
        raise ValueError(f"{source}: unknown engine {name!r}; this build has {', '.join(ENGINES)}, or 'auto' to choose")
    return None


def requested() -> str:
    """Return the name given to `use_engine` or INTERP_NN_ENGINE, unchecked; "auto" without one."""
    return _read_while_compiling(_latest) if is_dynamo_compiling() else requested_now()


def _read_while_compiling(latest: str) -> str:
    """Dynamo cannot trace a context variable; `latest` makes it compile again where another engine is requested."""
    return requested_now()


_read_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined] # see devices.spec_of


def problem_of(
    x: torch.Tensor,
    n: int,
    d: int,
    k: int,
    pair: bool,
    needs: tuple[bool, bool],
    classes: int | None = None,
    degree: int | None = None,
    need_scale: bool = False,
) -> Problem:
    """Return the problem of rows x (n, d) on its device: a loss where there are classes, a head's unless of a pair."""
    device = x.device
    spec = spec_of(device) if device.type == "cuda" or interpreting() else None
    head = classes is not None and not pair
    return Problem(n, d, k, pair, *needs, classes, head, x.dtype, spec, device.type, degree, need_scale)


def choose_engine(problem: Problem) -> tuple[EngineName, str]:
    """Return (engine, reason): the requested engine, else the one that should be faster.

    Raises:
        RuntimeError: The requested engine cannot compute the problem, for the reason given.
    """
    forced = _checked(requested(), "INTERP_NN_ENGINE")
    if forced is not None:
        reason = unsupported_reason(forced, problem)
        if reason is not None:
            raise RuntimeError(f"the {forced} engine was asked for, but {reason}")
        _log_if_slow(problem, forced)
        return forced, "asked for"
    spec = problem.spec
    if spec is None or problem.device == "cpu":
        return "eager", "the only engine for this device"
    if problem.classes is None and problem.k > MOST_COLUMNS:
        return "eager", f"cuBLAS is faster than a kernel of one launch for k > {MOST_COLUMNS}"
    reasons = {name: unsupported_reason(name, problem) for name in _WITH_KERNELS}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        return "eager", "; ".join(f"not {name}: {reason}" for name, reason in reasons.items())
    bucket = Bucket(_kind(problem), problem.dtype.itemsize, padded(problem.k), padded(problem.classes or 1), problem.n)
    # The tables are those of the summary.
    measured = configs.measured_engine(spec, bucket) if problem.degree is None else None
    for name in ("eager", *able):
        if name == measured:
            return name, "measured faster on this kind of GPU"
    if "triton" not in able:
        return "eager", f"not triton: {reasons['triton']}; not cuda: no table measured it for this problem"
    if problem.classes is not None and problem.dtype == torch.float32:
        return "eager", "no table measured the kernels of fp32 losses for this problem"
    ours = cost.predict_fused(problem, _kernel_plan(problem, "triton"), spec).seconds
    theirs = cost.predict_eager(problem, _eager_plan(problem, False), spec).seconds
    verdict = f"predicted {ours * 1e6:.3g} µs in one launch each, {theirs * 1e6:.3g} µs in PyTorch's operations"
    return ("triton" if ours <= theirs else "eager"), verdict


def _log_if_slow(problem: Problem, forced: EngineName) -> None:
    """Warn once that a forced engine's kernels are slow for a problem."""
    if forced == "eager" or problem.device != "cuda" or torch.compiler.is_compiling():
        return
    slow = {
        "columns": problem.k > MOST_COLUMNS and f"k = {problem.k} > {MOST_COLUMNS} is slower than cuBLAS",
        "features": cost.unaligned(problem) and f"d = {problem.d} is not a multiple of 16, so X is not read in vectors",
    }
    for way, text in slow.items():
        if text and way not in _logged:
            _logged.add(way)
            _logger.warning("the %s engine was asked for: %s", forced, text)


def _kind(problem: Problem) -> str:
    """The name that a tuned table gives to the whole of forward and backward."""
    if problem.classes is None:
        return "pair" if problem.pair else "summary"
    return "head_loss" if problem.head else "pair_loss"


def _kernel_plan(problem: Problem, engine: EngineName) -> Plan:
    """The plan of an engine's kernels of one launch."""
    if problem.head and problem.classes is not None:
        if not can_form_logits_from_x(engine, problem):
            return Plan(engine, "logits_from_latent")
        return Plan(engine, orders.head_order(problem.n, problem.d, problem.k, problem.classes))
    if problem.k <= MOST_COLUMNS:
        return Plan(engine, "(Xb)G" if problem.degree is None else "(Xb)q", problem.pair)
    if problem.pair or problem.n <= problem.d:
        return Plan(engine, "(Xb)G", True)
    return Plan(engine, "X(bG)")


def _eager_plan(problem: Problem, autograd: bool) -> Plan:
    """The cheapest plan of PyTorch's products. autograd: PyTorch's autograd may compute the backward."""
    left = autograd and _prefers_autograd(problem)
    if problem.head and problem.classes is not None:
        order = orders.head_order(problem.n, problem.d, problem.k, problem.classes)
        return Plan("eager", order, autograd=left)
    return orders.cheapest(problem, not left, autograd if problem.classes is None else left)


def _prefers_autograd(problem: Problem) -> bool:
    """True for a loss on a CPU, whatever its size, and for the loss of a polynomial, which has no operator.

    On a CPU PyTorch's cross entropy and its backward are single passes. The operator has to form the gradients of the logits
    itself, in many passes.
    """
    return problem.classes is not None and (problem.device == "cpu" or problem.degree is not None)


def choose(problem: Problem, any_rows: bool = False) -> Plan:
    """Return the plan of a problem, without reason and predictions. While compiling it is an operator's, which is free there.

    Args:
        problem: The problem.
        any_rows: Take an operator's plan that saves nothing with n rows.
    """
    name, _ = choose_engine(problem)
    if any_rows or torch.compiler.is_exporting():
        return _plan_for_any_rows(name, problem)
    if name != "eager":
        return _kernel_plan(problem, name)
    return _eager_plan(problem, not torch.compiler.is_compiling())


def choose_followed(problem: Problem) -> Plan:
    """Return the plan of plain PyTorch products, the same whichever tensors need gradients."""
    return orders.cheapest(problem._replace(need_x=True, need_b=True), False, True)


def _plan_for_any_rows(name: EngineName, problem: Problem) -> Plan:
    """The plan of a large n. An exported program serves every n, and a choice by n would guard on it."""
    d, k, pair = problem.d, problem.k, problem.pair
    if problem.head and problem.classes is not None:
        from_x = 2 * problem.classes < k and can_form_logits_from_x(name, problem)
        return Plan(name, "logits_from_x" if from_x else "logits_from_latent")
    if name != "eager" and (problem.degree is not None or not pair):
        return _kernel_plan(problem, name) if k <= MOST_COLUMNS else Plan(name, "X(bG)")
    if problem.degree is not None:
        of_degree: Order = "X(q(K)b)" if k > d and problem.degree else "(Xb)q" if pair else "X(bq)"
        return Plan(name, of_degree, of_degree == "(Xb)q", autograd=problem.degree == 0)
    order: Order = "X((bbᵀ)b)" if k > d and name == "eager" else "(Xb)G" if pair else "X(bG)"
    return Plan(name, order, order == "(Xb)G")


def plan(
    n: int,
    d: int,
    k: int,
    *,
    pair: bool = False,
    grad: Iterable[str] = ("x", "b"),
    classes: int | None = None,
    degree: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Plan:
    """Return how X (n x d) with b (d x k) is computed in eager mode, and why.

    Args:
        n: Rows of X.
        d: Features.
        k: Columns of b.
        pair: False for `functional.summary` and `summary_head_cross_entropy`, True for `summary_pair` and
            `summary_cross_entropy`.
        grad: The tensors that need a gradient, of "x" and "b"; () for inference.
        classes: k for `summary_cross_entropy`, the number of classes for `summary_head_cross_entropy`, else None.
        degree: Degree 0 to 4 of a polynomial, the length of `polynomial` less one; None for the summary.
        dtype: Dtype of X and b.
        device: A PyTorch device, or "sm_90" and the like for a GPU that is not at hand.

    Returns:
        The plan, with its reason and, for a GPU, predictions and the tiles of its kernels.

    Raises:
        TypeError: `grad`, `dtype` or `device` of another type.
        ValueError: A negative size, another name in `grad` or `device`, or classes that do not fit.
        RuntimeError: The engine given to `use_engine` cannot compute the problem.

    Example:
        >>> import interp_nn
        >>> interp_nn.plan(65536, 512, 64, dtype=torch.bfloat16, device="sm_90").engine
        'triton'
    """
    for name, size, least in (("n", n, 0), ("d", d, 0), ("k", k, 0), ("classes", 1 if classes is None else classes, 1)):
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"plan: {name} must be an integer >= {least}, got {size!r}")
    if not isinstance(grad, Iterable):
        raise TypeError(f"plan: grad: got {grad!r}, want a sequence of 'x' and 'b', or ()")
    wanted = set(grad)
    if not wanted <= {"x", "b"}:
        raise ValueError(f"plan: grad may hold 'x' and 'b', got {sorted(map(str, wanted))}")
    if degree is not None and (isinstance(degree, bool) or not isinstance(degree, int) or not 0 <= degree <= 4):
        raise ValueError(f"plan: degree must be an integer from 0 to 4, or None (the summary), got {degree!r}")
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"plan: dtype: got {dtype!r}, want torch.float64, float32, bfloat16 or float16")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"plan: device: got {device!r}, want a torch.device, its name, or 'sm_90' and the like")
    if pair and classes not in (None, k):
        raise ValueError(f"plan: the loss of a pair has k = {k} classes, got classes={classes}")
    spec, where = _spec_named(device)
    head = classes is not None and not pair
    problem = Problem(n, d, k, pair, "x" in wanted, "b" in wanted, classes, head, dtype, spec, where, degree)
    engine, why = choose_engine(problem)
    chosen = choose(problem)
    if engine == "eager":
        return _explain_eager(problem, chosen, why)
    assert spec is not None
    prediction = cost.predict_fused(problem, chosen, spec)
    tiles = (
        () if engine == "cuda" else tuple((kernel, _config(problem, kernel)) for kernel in _kernels(problem, chosen))
    )
    return chosen._replace(
        tiles=tiles, reason=why, flops=int(prediction.flops), bytes=int(prediction.bytes), seconds=prediction.seconds
    )


def _spec_named(device: torch.device | str) -> tuple[DeviceSpec | None, str]:
    if isinstance(device, str) and device.startswith("sm_"):
        digits = device[3:]
        spec = spec_for((int(digits[:-1]), int(digits[-1]))) if digits.isdigit() and len(digits) > 1 else None
        if spec is None:
            raise ValueError(f"plan: device must be a PyTorch device or 'sm_75' and newer, got {device!r}")
        return spec, device
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"plan: device: got {device!r}, want a PyTorch device or 'sm_75' and newer") from error
    return spec_of(device), device.type


def _explain_eager(problem: Problem, chosen: Plan, why: str) -> Plan:
    """An eager plan with its cost, and those of the other candidates relative to it."""
    flops, count = orders.flops_and_products(chosen, problem)
    reason = f"{why}; {flops / 1e6:.4g} MFLOP in {count} products"
    if not problem.head:
        left = _prefers_autograd(problem)
        charges = {
            _label(plan): orders.cost(plan, problem)
            for plan in orders.candidates(problem, not left, problem.classes is None or left)
        }
        least = charges.pop(_label(chosen))
        others = ", ".join(f"{label} {charge / least:.3g}" for label, charge in charges.items())
        reason += f"; cost of the others: {others}" if others else ""
    explained = chosen._replace(reason=reason, flops=flops)
    if problem.spec is None:
        return explained
    prediction = cost.predict_eager(problem, chosen, problem.spec)
    return explained._replace(bytes=int(prediction.bytes), seconds=prediction.seconds)


def _label(plan: Plan) -> str:
    return plan.order + (" by autograd" if plan.autograd else "")


def _kernels(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """The kernels of forward and backward, or of the loss."""
    if problem.classes is not None:
        return (configs.LOSS_KERNELS[plan.order],)
    if problem.k > MOST_COLUMNS:
        both = "phased_forward", "phased_backward"
    else:
        both = "stream", "pair_backward" if problem.pair else "summary_backward"
    return both if problem.need_x or problem.need_b else both[:1]


def _config(problem: Problem, kernel: str) -> Config:
    assert problem.spec is not None
    classes = padded(problem.classes) if problem.head and problem.classes is not None else 16
    return configs.choose(problem.spec, Bucket(kernel, problem.dtype.itemsize, padded(problem.k), classes, problem.n))
