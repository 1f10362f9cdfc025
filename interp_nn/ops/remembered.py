"""Calls with their plans, remembered by all that a plan and the checks of the arguments depend on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn import Parameter

from interp_nn.engines import eager
from interp_nn.engines.devices import fp32_precision
from interp_nn.engines.problem import LossOptions
from interp_nn.engines.select import request_now
from interp_nn.ops import direct, losses, summary
from interp_nn.ops.library import (
    any_autocast_enabled,
    any_batched,
    cast,
    is_tracing,
    ordinary,
    tensor_check,
    unwatched,
)
from interp_nn.ops.validation import (
    DTYPES,
    PLAIN,
    Coefficients,
    as_tensors,
    autocast_enabled,
    degree_of,
    matrices,
    operands,
    shape_of,
)

_MOST_PLANS, _MOST_RECENT = 4096, 8
# Calls by all that they depend on; the latest ones of the same shapes, by `_keep_recent`; and the very latest one by its b.
plans: dict[object, Any] = {}
EQUAL_WEIGHTS = (1.0, 1.0, 1.0)
_NUMBERS = frozenset((int, float))
# The latest call of a kind lies at the address of its b plus the kind, plus 1 with gradients: objects of Python lie at multiples
# of 8. The address is a guess: what is found there is compared with all that the call depends on.
_SUMMARY, _PAIR, _LOSS, _HEAD = range(0, 8, 2)


def latest(x: Tensor, b: Tensor, bias: Tensor | None, pair: bool = False) -> direct.Call | None:
    """Return the latest call of a summary or a pair with this b if it was like this one, whose tensors are right then."""
    if is_dynamo_compiling():
        return None
    place = id(b) if type(b) is Parameter else 0
    entry = plans.get(place + (_PAIR if pair else _SUMMARY) + is_grad_enabled())
    if entry is None:
        return None
    check, request, call, precision, is_plain, without = entry
    if (
        request is request_now()
        and without is (bias is None)
        and (check(x, b) if without else check(x, b, bias))
        and (precision is None or precision == fp32_precision("cuda", "matmul"))
        and (is_plain or unwatched())
    ):
        found: direct.Call = call
        return found
    return None


def planned(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None,
    pair: bool,
    given: tuple[Coefficients, float | Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, direct.Call, bool]:
    """Return checked x, b and bias, the call with its plan, and True if the call may pass the operators by.

    It is remembered by everything that the plan and the checks depend on, and by the layouts, which engines prepare for.
    """
    place = 0
    state: tuple[object, ...] = ()
    if given is None and not is_dynamo_compiling():
        try:
            state = x.shape, b.shape, pair, bias is None, is_grad_enabled()
            recent = plans.get(state, ())
        except (AttributeError, TypeError):  # of an x that is no tensor, or whose sizes are symbols
            state, recent = (), ()
        place = (id(b) if type(b) is Parameter else 0) + (_PAIR if pair else _SUMMARY) + is_grad_enabled()
        for entry in recent:
            check, request, call, precision, is_plain, _ = entry
            if (
                request is request_now()
                and (check(x, b) if bias is None else check(x, b, bias))
                and (precision is None or precision == fp32_precision("cuda", "matmul"))
                and (is_plain or unwatched())
            ):
                _remember(place, entry)
                return x, b, bias, call, True
    key: tuple[object, ...] | None = None
    plain = type(x) in PLAIN and type(b) in PLAIN and (bias is None or type(bias) in PLAIN)
    passes = plain and ordinary() and not any_batched(x, b, bias)
    autocast = (passes or not is_compiling()) and any_autocast_enabled()
    if autocast:
        passes = passes and given is None and all(t is None or t.dtype in DTYPES for t in (x, b, bias))
        if passes and autocast_enabled(x):  # it does not change the products of tensors that are cast already
            x, b, bias = cast(x.device.type, x, b, bias)
    if passes or (plain and not (autocast or is_compiling() or is_tracing() or request_now().followed)):
        # The same for all three, or it is an error: by comparison, which is cheaper than a place in the key.
        dtype, device = x.dtype, x.device
        alike = x.layout is b.layout is torch.strided and b.dtype is dtype and b.device == device
        if bias is not None:
            alike = alike and bias.layout is torch.strided and bias.dtype is dtype and bias.device == device
        if alike:
            key = (
                x.shape, b.shape, x.stride(), b.stride(), dtype, device, x.requires_grad, b.requires_grad,
                is_grad_enabled(), pair, request_now(), fp32_precision("cuda", "matmul"),
                None if bias is None else (bias.shape, bias.is_contiguous()),
                None if given is None else degree_of(given),
            )  # fmt: skip
        call = None if key is None else plans.get(key)
        if given is not None:
            tensors = [t for t in given if isinstance(t, Tensor)]
            passes = passes and PLAIN.issuperset(map(type, tensors)) and not any_batched(*tensors)
        if call is not None:
            if passes and not autocast:
                _keep_recent(place, state, call, (bias is None,), x, b, bias)
            return x, b, bias, call, passes
    x, b = matrices(x, b, sharded=True)
    if bias is not None:
        _, bias = operands(b, "b", True, bias=bias)
        if bias.dim() != 1 or bias.shape[0] != b.shape[1]:
            raise ValueError(f"bias: got shape {shape_of(bias)}, want ({b.shape[1]},) for b of shape {shape_of(b)}")
    plan = summary.choose(x, b, pair, *(() if given is None else degree_of(given)))
    call = direct.Call(plan, pair, in_place=key is not None and eager.in_place(x, b))
    if key is not None:
        _remember(key, call)
    return x, b, bias, call, passes


def _keep_recent(
    place: int, state: tuple[object, ...], call: direct.Call, beside: tuple[object, ...], *tensors: Tensor | None
) -> None:
    """Keep a call as the latest one of its b, and as the first one among those of a state, with all that it depends on.

    PyTorch's guard of compiled functions compares type, dtype, device, sizes, strides and requires_grad of all tensors in one
    call, and the dispatch keys, among them those of transforms, autocast and tracing; `unwatched` sees the rest. Plain products
    for PyTorch's autograd are the same for whoever looks into the call.

    Args:
        place: Where the latest call of its b is.
        state: Shapes, and all that the guard does not see.
        call: The call.
        beside: What else is compared where the call is found by its b.
        tensors: The arguments.
    """
    given = [t for t in tensors if t is not None]
    check = tensor_check(*given) if state else None
    if check is not None:
        # On a CPU nothing depends on how GPUs multiply, unless a kernel is asked for.
        precise = call.plan.engine != "eager" or given[0].device.type != "cpu"
        precision = fp32_precision("cuda", "matmul") if precise else None
        entry = check, request_now(), call, precision, call.plan.autograd, *beside
        _remember(place, entry)
        _remember(state, (entry, *plans.get(state, ())[: _MOST_RECENT - 1]))


def _remember(key: object, value: object) -> None:
    """Remember a value, in the place of the oldest one where there are many."""
    while len(plans) >= _MOST_PLANS and key not in plans:
        with suppress(KeyError, RuntimeError, StopIteration):  # of another thread that does the same
            del plans[next(iter(plans))]
    plans[key] = value


def loss_call(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    weights: Sequence[float],
    ignore_index: int,
    reduction: str,
) -> tuple[direct.Call | None, tuple[object, ...] | None]:
    """Return a remembered call of a loss or None, and what to remember it by or None."""
    place = 0
    state: tuple[object, ...] = ()
    # Dynamo cannot trace a comparison of tuples by `is`.
    if not is_dynamo_compiling() and weights is EQUAL_WEIGHTS and type(ignore_index) is int and type(reduction) is str:
        place = (id(b) if type(b) is Parameter else 0) + (_LOSS if a is None else _HEAD) + is_grad_enabled()
        entry = plans.get(place)
        if entry is not None:
            check, request, call, precision, is_plain, index, how, without = entry
            if (
                request is request_now()
                and index == ignore_index
                and how == reduction
                and without is (c is None)
                and (
                    check(x, b, target)
                    if a is None
                    else check(x, b, target, a)
                    if c is None
                    else check(x, b, target, a, c)
                )
                and (precision is None or precision == fp32_precision("cuda", "matmul"))
                and (is_plain or unwatched())
            ):
                return call, None
        try:
            state = (
                x.shape, b.shape, None if a is None else a.shape, c is None, is_grad_enabled(), ignore_index, reduction,
            )  # fmt: skip
            recent = plans.get(state, ())
        except (AttributeError, TypeError):
            state, recent = (), ()
        for entry in recent:
            if _is_like(entry, x, b, a, c, target):
                _remember(place, entry)
                return entry[2], None
    key = _loss_key(x, b, a, c, target, weights, ignore_index, reduction)
    found = None if key is None else plans.get(key)
    if found is not None:
        _keep_recent(place, state, found, (ignore_index, reduction, c is None), x, b, target, a, c)
    return found, key


def _is_like(entry: tuple[Any, ...], x: Tensor, b: Tensor, a: Tensor | None, c: Tensor | None, target: Tensor) -> bool:
    """Return True if a loss with the options of a remembered one, and the same arguments None, is like it."""
    check, request, _, precision, is_plain, *_ = entry
    return bool(
        request is request_now()
        and (check(x, b, target) if a is None else check(x, b, target, a) if c is None else check(x, b, target, a, c))
        and (precision is None or precision == fp32_precision("cuda", "matmul"))
        and (is_plain or unwatched())
    )


def _loss_key(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    weights: Sequence[float],
    ignore_index: int,
    reduction: str,
) -> tuple[object, ...] | None:
    """Return all that the checks and the plan of a loss depend on; None for a call that has to go by the operators.

    So do options of other types, which are checked each time: a tensor among the weights may change, and True == 1.
    """
    if not ordinary() or any_autocast_enabled():
        return None
    if weights is not EQUAL_WEIGHTS and (type(weights) is not tuple or not _NUMBERS.issuperset(map(type, weights))):
        return None
    if type(ignore_index) is not int or type(reduction) is not str or type(target) is not Tensor:
        return None
    if type(x) not in PLAIN or type(b) not in PLAIN:
        return None
    if (a is not None and type(a) not in PLAIN) or (c is not None and type(c) not in PLAIN):
        return None
    if any_batched(x, b, a, c, target):
        return None
    dtype, device = x.dtype, x.device
    if not x.layout is b.layout is target.layout is torch.strided or b.dtype is not dtype:
        return None
    if b.device != device or target.device != device:
        return None
    return (
        x.shape, b.shape, x.stride(), b.stride(), dtype, device, x.requires_grad, b.requires_grad,
        is_grad_enabled(), request_now(), fp32_precision("cuda", "matmul"),
        target.shape, target.is_contiguous(), target.dtype,
        weights is EQUAL_WEIGHTS or (weights, *map(type, weights)), ignore_index, reduction,
        None if a is None else (a.shape, a.dtype, a.device, a.layout, a.layout is torch.strided and a.is_contiguous()),
        None if c is None else (c.shape, c.dtype, c.device, c.layout, c.layout is torch.strided and c.is_contiguous()),
    )  # fmt: skip


def loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    given: tuple[Coefficients, float | Tensor] | None,
    key: tuple[object, ...] | None,
) -> Tensor:
    """Return the loss of checked arguments, and remember options and plan under the key if there is one."""
    q = None if given is None else as_tensors(given, x)
    plan = losses.choose(x, b, a, q)
    if given is not None and plan.engine == "eager":
        q = as_tensors(given, x, centre=True)
    if key is None:
        return losses.cross_entropy(x, b, a, c, target, options, plan, q)
    call = direct.Call(plan, options=options, in_place=eager.loss_in_place(x, b, a, plan))
    _remember(key, call)
    return direct.cross_entropy(x, b, a, c, target, call)
