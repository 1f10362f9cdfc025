"""The `interp_nn` operator library: define an operator, apply an autograd Function, and probes of autocast and functorch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from interp_nn.engines.select import followed

try:
    from torch._functorch import eager_transforms
except ImportError:
    eager_transforms = None  # type: ignore[assignment]

_LIBRARY = torch.library.Library("interp_nn", "DEF")


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], cast_inputs: bool = True
) -> Callable[..., Any]:
    """Register an operator with one implementation for every device, a fake kernel and an autocast rule; return it.

    Operators sit below autograd: they give no gradients of their own, the Functions around them do. Under autocast a
    forward operator's floating-point inputs (but fp64, and a polynomial's coefficients and scale) are cast; a backward
    operator's are taken as they are saved.
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"interp_nn::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.interp_nn, name).default
    names = [argument.name for argument in operator._schema.arguments]  # type: ignore[attr-defined] # of an OpOverload
    end = 0 if not cast_inputs else names.index("coefficients") if "coefficients" in names else len(names)
    for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
        _LIBRARY.impl(name, _autocast_rule(operator, device_type, end), key)
    return operator


def implement(name: str, implementation: Callable[..., Any], key: str) -> None:
    """Register another implementation of an operator, for one dispatch key."""
    _LIBRARY.impl(name, implementation, key)


def _autocast_rule(operator: Callable[..., Any], device_type: str, end: int) -> Callable[..., Any]:
    def rule(*args: Any) -> Any:
        args = (*cast(device_type, *args[:end]), *args[end:])
        with torch.autocast(device_type, enabled=False):
            return operator(*args)

    return rule


def cast(device_type: str, *args: Any) -> tuple[Any, ...]:
    """Return the arguments with their floating-point tensors (except fp64) in the autocast dtype of the device."""
    dtype = torch.get_autocast_dtype(device_type)

    def one(a: Any) -> Any:
        eligible = isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        return a.to(dtype) if eligible else a

    return tuple(map(one, args))


# Read once; should a future PyTorch drop one, its fast path is never taken and nothing else changes.
any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)

# Of autograd.grad(is_grads_batched=True), whose vmap is older than torch.func's and not among its transforms.
is_batched: Callable[[Tensor], bool] = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: True)

# Of a tensor that stands for another one inside a torch.func transform, and has no memory of its own.
is_wrapped: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_functorch_wrapped_tensor", lambda t: transforming(t)
)


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", lambda: True)


def ordinary() -> bool:
    """Return True if a call on plain tensors may pass the operators by.

    So no dispatch or function mode, transform, forward-mode AD, tracing, compilation or following of calls is active, which
    would not see what an engine does. A batched tensor of `is_batched` and autocast are not noticed.
    """
    return not (
        is_compiling()
        or _dispatch_modes()
        or function_modes()
        or _transforms_active()
        or is_tracing()
        or followed()
        or getattr(forward_ad, "_current_level", 0) >= 0
    )


def tensor_check(*tensors: Tensor) -> Callable[..., bool] | None:
    """Return a function that says whether tensors have the metadata of these, and the same dispatch keys; None without it."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
        guards: Any = TensorGuards  # whose stub is not right about these arguments
        check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except (ImportError, AttributeError, TypeError, RuntimeError, SystemError):  # of another PyTorch
        return None
    return check


def unwatched() -> bool:
    """Return True unless something is active that has to see operators and that a `tensor_check` does not notice.

    Of the dispatch modes it does not notice those of fake tensors and of make_fx. Following of calls is told by the request.
    """
    return not (_dispatch_modes() or function_modes() or getattr(forward_ad, "_current_level", 0) >= 0)


def any_batched(*tensors: Tensor | None) -> bool:
    """Return True if a tensor is one of `is_batched`, which has no memory for a kernel to read."""
    return any(t is not None and is_batched(t) for t in tensors)


def is_dtensor(t: Tensor) -> bool:
    """Return True if t is a DTensor. torch.distributed.tensor is not imported for it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def transforming(*tensors: Any) -> bool:
    """Return True in a torch.func transform, or if a tensor has a tangent of forward-mode AD (never while compiling).

    The level of forward-mode AD is the process's and not the thread's, so that it says nothing by itself.
    """
    return _transforms_active() or (getattr(forward_ad, "_current_level", 0) >= 0 and any(map(_has_tangent, tensors)))


def _has_tangent(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and forward_ad.unpack_dual(t).tangent is not None


def loses_derivatives(*tensors: Any) -> bool:
    """Return True where PyTorch silently drops a Function's derivative: nested forward mode, transforms while compiling."""
    if torch.compiler.is_compiling():
        return _transforms_active()
    return transforming(*tensors) and getattr(eager_transforms, "JVP_NESTING", 2) > 1


def apply(function: type[Function], *args: Any) -> Any:
    """Return `function.apply(*args)`, without its cost where that buys nothing.

    With `setup_context`, PyTorch binds the arguments to an inspected signature on every call, which costs more than a small
    product; outside of transforms the step below it is enough. With gradients off and no transform the forward alone is.
    """
    if torch.compiler.is_compiling() or transforming(*args):
        return function.apply(*args)
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]
