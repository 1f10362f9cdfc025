"""Problem -> Plan: which engine computes, and which product is formed first. Pure arithmetic on shapes and a chip's figures.

`reference` takes the association with the least cost (see `interp_nn.engines.orders`). Where a GPU has kernels of one
launch, "auto" takes them if a tuned table says so, or, without one, if `interp_nn.engines.cost` predicts that they are no
slower. Triton's come before those of the compiled library then, as they have the faster matrix products of newer GPUs.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch

from interp_nn import engines
from interp_nn.engines import ENGINES, cost, orders
from interp_nn.engines.cost import Prediction, Problem
from interp_nn.engines.devices import Chip, chip_of, interpreting, known
from interp_nn.engines.orders import EXPRESSIONS, KEEPS, cheapest
from interp_nn.engines.triton import configs
from interp_nn.engines.triton.configs import Bucket, Config, padded

_logger = logging.getLogger("interp_nn")
_logged: set[str] = set()
_requested = os.environ.get("INTERP_NN_ENGINE") or "auto"  # checked at use: an import never fails
_FORMS = (*KEEPS, "flat", "latent")
_WITH_KERNELS = ("triton", "cuda")  # of one launch, in the order in which they are asked where nothing was measured


@dataclass(frozen=True)
class Plan:
    """How a problem is computed, forward and backward: by which engine, in which form (see `interp_nn.engines.orders`), why.

    bytes and seconds are predictions for a GPU, and config the tiles of its kernels, forward first; None and () elsewhere.
    """

    engine: str
    form: str
    flops: int
    reason: str
    bytes: int | None = None
    seconds: float | None = None
    config: tuple[tuple[str, Config], ...] = ()

    @property
    def association(self) -> str:
        return self.form[0]

    def __str__(self) -> str:
        product = EXPRESSIONS.get(self.association, "the loss of a head")
        text = f"{self.engine}, {self.form}: {product}; {self.reason}"
        if self.seconds is not None and self.bytes is not None:
            text += f"; predicted {self.bytes / 1e6:.4g} MB, {self.flops / 1e6:.4g} MFLOP, {self.seconds * 1e6:.4g} µs"
        return text + "".join(f"; {kernel} {config}" for kernel, config in self.config)


class use_engine:  # noqa: N801 - used like a function, as torch.no_grad is
    """Force an engine for every later call, or inside a `with` block: `use_engine("reference")`; "auto" lets dispatch choose.

    Overrides the environment variable INTERP_NN_ENGINE. Global to the process, like torch.backends' flags. A backward
    always runs on the engine of its forward. Raises ValueError for a name that is not an engine, and RuntimeError with the
    reason for one that cannot compute here; a call that a forced engine cannot compute raises RuntimeError as well.
    """

    def __init__(self, name: str) -> None:
        global _requested
        _check_engine(name, "use_engine")
        reason = None if name == "auto" else engines.unavailable(name)
        if reason is not None:
            raise RuntimeError(f"use_engine: the {name} engine is off: {reason}")
        self._previous, _requested = _requested, name

    def __enter__(self) -> use_engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


def _check_engine(name: str, source: str) -> None:
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"{source}: unknown engine {name!r}; this build has {', '.join(ENGINES)}, or 'auto' to choose")


def requested() -> str:
    """The engine asked for by `use_engine` or INTERP_NN_ENGINE, unchecked; "auto" where none was."""
    return _requested


def problem_of(
    x: torch.Tensor, n: int, d: int, k: int, pair: bool, needs: tuple[bool, bool], classes: int | None = None
) -> Problem:
    """The problem of rows x (n, d) on its device; of a loss where there are classes, and then of a head unless of a pair."""
    device = x.device
    chip = chip_of(device) if device.type == "cuda" or interpreting() else None
    head = classes is not None and not pair
    return Problem(n, d, k, pair, *needs, classes, head, x.dtype, chip, device.type)


def _refusal(name: str, problem: Problem) -> str | None:
    p = problem
    return engines.refusal(name, p.chip, p.device, p.dtype, p.n, p.d, p.k, p.classes, p.head)


def engine(problem: Problem) -> tuple[str, str]:
    """(the engine that computes, why): the one asked for by `use_engine` or INTERP_NN_ENGINE, else the faster one.

    Raises RuntimeError with the reason where the one asked for cannot.
    """
    _check_engine(_requested, "INTERP_NN_ENGINE")
    if _requested != "auto":
        reason = _refusal(_requested, problem)
        if reason is not None:
            raise RuntimeError(f"the {_requested} engine was asked for, but {reason}")
        _log_if_slow(problem)
        return _requested, "asked for"
    chip = problem.chip
    if chip is None or problem.device == "cpu":
        return "reference", "the only engine for this device"
    if problem.classes is None and problem.k > engines.MOST_COLUMNS:
        return "reference", f"cuBLAS is faster than a kernel of one launch for k > {engines.MOST_COLUMNS}"
    refusals = {name: _refusal(name, problem) for name in _WITH_KERNELS}
    able = [name for name, reason in refusals.items() if reason is None]
    if not able:
        return "reference", "; ".join(f"not {name}: {reason}" for name, reason in refusals.items())
    bucket = Bucket(_kind(problem), problem.dtype.itemsize, padded(problem.k), padded(problem.classes or 1), problem.n)
    measured = configs.measured_engine(chip, bucket)
    if measured == "reference" or measured in able:
        return measured, "measured faster on this kind of chip"
    ours = cost.one_launch(problem, _kernel_form(problem, able[0]), chip, able[0]).seconds
    theirs = cost.reference(problem, _reference_form(problem, False), chip).seconds
    verdict = f"predicted {ours * 1e6:.3g} µs in one launch each, {theirs * 1e6:.3g} µs in PyTorch's operations"
    return (able[0] if ours <= theirs else "reference"), verdict


def _log_if_slow(problem: Problem) -> None:
    """Say once that a problem sent to the kernels by name takes a slow way through them."""
    if _requested == "reference" or problem.device != "cuda" or torch.compiler.is_compiling():
        return
    slow = {
        "columns": problem.k > engines.MOST_COLUMNS
        and f"k = {problem.k} > {engines.MOST_COLUMNS} is slower than cuBLAS",
        "features": cost.unaligned(problem) and f"d = {problem.d} is not a multiple of 16, so X is not read in vectors",
    }
    for way, text in slow.items():
        if text and way not in _logged:
            _logged.add(way)
            _logger.warning("the %s engine was asked for: %s", _requested, text)


def _kind(problem: Problem) -> str:
    """What a tuned table calls the whole of forward and backward."""
    if problem.classes is None:
        return "pair" if problem.pair else "summary"
    return "head_loss" if problem.head else "pair_loss"


def _kernel_form(problem: Problem, name: str) -> str:
    """The form that an engine's kernels of one launch compute."""
    if problem.head and problem.classes is not None:
        if not _flat_fits(problem, name):
            return "latent"
        return orders.head_form(problem.n, problem.d, problem.k, problem.classes)
    if problem.k <= engines.MOST_COLUMNS:
        return "A+" if problem.pair else "A"
    return "A+" if problem.pair or problem.n <= problem.d else "B"


def _flat_fits(problem: Problem, name: str) -> bool:
    """Whether an engine has the flat form of a head, and a block the shared memory for its last phase: the bytes are those of
    the matrices which Triton's compiler lays there, operands of exact fp32 products in two parts, found with `tests/compile`.
    """
    if name == "reference":
        return True
    if name == "cuda" or problem.chip is None:
        return False
    k, m = padded(problem.k), padded(problem.classes or 1)
    needed = 8 * k * k + 24 * k * m if problem.dtype == torch.float32 else 4 * k * k + 8 * k * m
    return needed <= problem.chip.shared


def _reference_form(problem: Problem, composed: bool) -> str:
    left = composed and _left_to_autograd(problem)
    if problem.head and problem.classes is not None:
        return orders.head_form(problem.n, problem.d, problem.k, problem.classes) + "*" * left
    n, d, k, pair, need_x, need_b = problem[:6]
    return cheapest(n, d, k, pair, need_x, need_b, not left, composed if problem.classes is None else left)


def _left_to_autograd(problem: Problem) -> bool:
    """Whether an eager problem is left to PyTorch's autograd at any size: a loss on the CPU, whose cross entropy and its
    backward are single passes there, where the operator, which has to form the logits' gradients itself, takes many.
    """
    return problem.classes is not None and problem.device == "cpu"


def choose(problem: Problem, any_rows: bool = False) -> str:
    """The token of the plan. While compiling, operators: there they cost nothing extra.

    any_rows: an operator's form that keeps nothing of the size of n.
    """
    name, _ = engine(problem)
    if any_rows or torch.compiler.is_exporting():
        return f"{name}:{_for_any_rows(name, problem)}"
    if name != "reference":
        return f"{name}:{_kernel_form(problem, name)}"
    return f"{name}:{_reference_form(problem, not torch.compiler.is_compiling())}"


def _for_any_rows(name: str, problem: Problem) -> str:
    """The form of a large n. An exported program serves every n, and a choice by n would guard on it."""
    _, d, k, pair = problem[:4]
    if problem.head and problem.classes is not None:
        return "flat" if 2 * problem.classes < k and _flat_fits(problem, name) else "latent"
    if name != "reference" and not pair:
        return "A" if k <= engines.MOST_COLUMNS else "B"
    return "E" if k > d and name == "reference" else "A+" if pair else "B"


def resolve(token: str) -> tuple[str, str]:
    """(engine, form) of a token that an operator was given; ValueError if it is not one."""
    name, _, form = token.partition(":")
    if name not in ENGINES or form not in _FORMS:
        raise ValueError(f"plan: got {token!r}, want 'engine:form' with engine in {ENGINES} and form in {_FORMS}")
    return name, form


def plan(
    n: int,
    d: int,
    k: int,
    *,
    pair: bool = False,
    grad: Iterable[str] = ("x", "b"),
    classes: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Plan:
    """How X (n x d) with b (d x k) is computed in eager mode, and why.

    The problem is `functional.summary`; `summary_pair` with pair=True; `summary_cross_entropy` with classes=k and pair=True;
    `summary_head_cross_entropy` with classes=m and pair=False. grad: which of "x" and "b" need a gradient; () for
    inference. device: a PyTorch device, or "sm_90" and the like to plan for a GPU that is not at hand.
    Raises ValueError for a negative size, another name, or classes that do not fit.
    """
    for name, size in (("n", n), ("d", d), ("k", k), ("classes", 1 if classes is None else classes)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"plan: {name} must be an integer >= 0, got {size!r}")
    wanted = set(grad)
    if not wanted <= {"x", "b"}:
        raise ValueError(f"plan: grad may hold 'x' and 'b', got {sorted(wanted)}")
    if pair and classes not in (None, k):
        raise ValueError(f"plan: the loss of a pair has k = {k} classes, got classes={classes}")
    chip, where = _chip_named(device)
    head = classes is not None and not pair
    problem = Problem(n, d, k, pair, "x" in wanted, "b" in wanted, classes, head, dtype, chip, where)
    name, why = engine(problem)
    form = choose(problem).partition(":")[2]
    if name == "reference":
        prediction = None if chip is None else cost.reference(problem, form, chip)
        return _explained(problem, form, why, prediction)
    assert chip is not None
    prediction = cost.one_launch(problem, form, chip, name)
    tiles = () if name == "cuda" else tuple((kernel, _config(problem, kernel)) for kernel in _kernels(problem, form))
    return Plan(name, form, int(prediction.flops), why, int(prediction.bytes), prediction.seconds, tiles)


def _chip_named(device: torch.device | str) -> tuple[Chip | None, str]:
    if isinstance(device, str) and device.startswith("sm_"):
        digits = device[3:]
        chip = known((int(digits[:-1]), int(digits[-1]))) if digits.isdigit() and len(digits) > 1 else None
        if chip is None:
            raise ValueError(f"plan: device must be a PyTorch device or 'sm_75' and newer, got {device!r}")
        return chip, device
    device = torch.device(device)
    return chip_of(device), device.type


def _explained(problem: Problem, form: str, why: str, prediction: Prediction | None) -> Plan:
    """A plan of the reference engine, with what its rivals would have cost."""
    n, d, k, pair, need_x, need_b = problem[:6]
    if problem.head and problem.classes is not None:
        flops, count = orders.head_products(form.rstrip("*"), n, d, k, problem.classes)
        reason = f"{why}; {flops / 1e6:.4g} MFLOP in {count} products"
    else:
        flops, count = orders.products(form, n, d, k, pair, need_x, need_b)
        left = _left_to_autograd(problem)
        forms = orders.candidates(n, d, k, pair, not left, problem.classes is None or left)
        charges = {f: orders.cost(f, n, d, k, pair, need_x, need_b) for f in forms}
        rivals = ", ".join(f"{f} {c / charges[form]:.3g}" for f, c in charges.items() if f != form)
        how = "left to autograd" if form[-1] == "*" else "one operator each way"
        reason = f"{why}; {flops / 1e6:.4g} MFLOP in {count} products, {how}; cost of the others: {rivals}"
    if prediction is None:
        return Plan("reference", form, flops, reason)
    return Plan("reference", form, flops, reason, int(prediction.bytes), prediction.seconds)


def _kernels(problem: Problem, form: str) -> tuple[str, ...]:
    """The kernels of forward and backward, or of the loss."""
    if problem.classes is not None:
        return (f"{form}_loss" if problem.head else "pair_loss",)
    if problem.k > engines.MOST_COLUMNS:
        both = "phased_forward", "phased_backward"
    else:
        both = "stream", "pair_backward" if problem.pair else "summary_backward"
    return both if problem.need_x or problem.need_b else both[:1]


def _config(problem: Problem, kernel: str) -> Config:
    assert problem.chip is not None
    classes = padded(problem.classes) if problem.head and problem.classes is not None else 16
    return configs.choose(problem.chip, Bucket(kernel, problem.dtype.itemsize, padded(problem.k), classes, problem.n))
