"""Arguments of functions of tensors, checked: errors name the argument, what it got and what it wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from interp_nn.engines.eager_polynomial import MOST_COEFFICIENTS, Polynomial
from interp_nn.engines.problem import LossOptions
from interp_nn.linalg import autocast_available, centred
from interp_nn.ops.library import cast, is_dtensor, is_wrapped

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PLAIN = frozenset((Tensor, Parameter))
# The polynomial and the scale of the summary. Calls without either are known by `is`, the scale first: in Dynamo, which cannot
# trace `is` of tuples, no two floats are the same object.
SUMMARY, ONE = (0.0, 1.0), 1.0
Coefficients = Sequence[float] | Tensor
REDUCTIONS = ("mean", "sum", "none")
_MOST_CONSTANTS = 256
_constants: dict[tuple[object, ...], Tensor] = {}  # none is ever dropped: captured CUDA graphs read them


def matrices(x: Tensor, b: Tensor, sharded: bool = False) -> tuple[Tensor, Tensor]:
    """Check x (..., d) and b (d, k), and cast them under autocast. sharded: they may be DTensors."""
    x, b = operands(x, "x", sharded, b=b)
    if b is None:
        raise TypeError("b: got NoneType, want a torch.Tensor")
    if b.dim() != 2:
        raise ValueError(f"b: got shape {shape_of(b)}, want a matrix (d, k)")
    if x.dim() == 0:
        raise ValueError("x: got a scalar, want (..., d)")
    if x.shape[-1] != b.shape[0]:
        raise ValueError(f"x: got shape {shape_of(x)}, want (..., {b.shape[0]}) for b of shape {shape_of(b)}")
    return x, b


def given_polynomial(polynomial: Coefficients, scale: float | Tensor) -> tuple[Coefficients, float | Tensor] | None:
    """Return the checked polynomial and scale: numbers as floats, tensors as they are. None for those of the summary."""
    wanted = f"want 1 to {MOST_COEFFICIENTS} coefficients, the constant first: finite real numbers, or a 1-D tensor"
    coefficients: Coefficients
    if isinstance(polynomial, Tensor):
        check_tensor("polynomial", polynomial, sharded=True)
        if polynomial.dim() != 1 or not 1 <= polynomial.shape[0] <= MOST_COEFFICIENTS:
            raise ValueError(f"polynomial: got shape {shape_of(polynomial)}, {wanted}")
        coefficients = polynomial
    else:
        if isinstance(polynomial, str | bytes) or not isinstance(polynomial, Sequence):
            raise TypeError(f"polynomial: got {polynomial!r}, {wanted}")
        if not 1 <= len(polynomial) <= MOST_COEFFICIENTS:
            raise ValueError(f"polynomial: got {len(polynomial)} numbers, {wanted}")
        coefficients = tuple(finite("polynomial", number, polynomial, wanted) for number in polynomial)
    if isinstance(scale, Tensor):
        check_tensor("scale", scale, sharded=True)
        if scale.dim() != 0:
            raise ValueError(f"scale: got shape {shape_of(scale)}, want a finite real number, or a 0-dim tensor")
    else:
        scale = finite("scale", scale, scale, "want a finite real number, or a 0-dim tensor")
    if not isinstance(scale, Tensor) and scale == 1 and coefficients == SUMMARY:
        return None
    return coefficients, scale


def finite(name: str, number: object, given: object, wanted: str) -> float:
    """Return a finite real number as a float, checked."""
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name}: got {given!r}, {wanted}")
    try:
        value = float(number)
    except OverflowError:
        raise ValueError(f"{name}: got a number beyond the range of floats, {wanted}") from None
    if not abs(value) < math.inf:
        raise ValueError(f"{name}: got {given!r}, {wanted}")
    return value


def as_tensors(
    given: tuple[Coefficients, float | Tensor], x: Tensor, name: str = "x", centre: bool = False
) -> Polynomial:
    """Return the polynomial of `_given` as tensors on x's device, without a synchronisation.

    centre: numbers may become those around another value (see `linalg.centred`), for the eager engine.
    """
    tensors: list[Tensor | None] = []
    shift = 0.0
    if centre and isinstance(given[0], tuple) and not is_dtensor(x):
        numbers, shift = centred(given[0])
        given = numbers, given[1]
    for argument, value in zip(("polynomial", "scale"), given, strict=True):
        if isinstance(value, Tensor):
            _check_mesh(name, x, argument, value)
            if value.device != x.device:
                raise ValueError(f"{argument}: got device {value.device}, want {x.device}, the device of {name}")
            tensors.append(value)
        elif argument == "scale" and value == 1:
            tensors.append(None)
        else:
            tensors.append(constant(value, x))
    coefficients, scale = tensors
    assert coefficients is not None
    return Polynomial(coefficients, scale, shift)


def constant(value: Sequence[float] | float, x: Tensor) -> Tensor:
    """Return the numbers as a float32 tensor (float64 for x of float64), the same one for the same numbers.

    It is filled on its device: a copy from the host would synchronise, and cannot be captured in a CUDA graph. One that is made
    inside of a transform, a mode or a capture belongs to that and is not kept.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    keep = type(x) in PLAIN and not torch.compiler.is_compiling()
    key = (value, dtype, x.device)
    if keep and key in _constants:
        return _constants[key]
    numbers = [
        torch.full((), v, dtype=dtype, device=x.device) for v in (value if isinstance(value, tuple) else (value,))
    ]
    made = torch.stack(numbers) if isinstance(value, tuple) else numbers[0]
    capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    keep = keep and type(made) is Tensor and not (is_wrapped(made) or made.is_inference() or capturing)
    if keep and len(_constants) < _MOST_CONSTANTS:
        _constants[key] = made
    return made


def degree_of(given: tuple[Coefficients, float | Tensor]) -> tuple[int, bool, bool]:
    """Return the degree of a polynomial, True if a coefficient or the scale needs a gradient, and True if the scale does."""
    coefficients, scale = (isinstance(t, Tensor) and t.requires_grad for t in given)
    return len(given[0]) - 1, coefficients or scale, scale


def autocast_enabled(t: Tensor) -> bool:
    """Return True if autocast is on for the tensor's device."""
    device_type = t.device.type
    return autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def operands(first: Tensor, name: str, sharded: bool = False, **others: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors (None stays None), of one supported dtype and one device; cast first under autocast.

    sharded: they may be DTensors, all of them and on one mesh.
    """
    check_tensor(name, first, sharded)
    for other, t in others.items():
        if t is not None:
            check_tensor(other, t, sharded)
            if type(t) not in PLAIN or type(first) not in PLAIN:
                _check_mesh(name, first, other, t)
    values: tuple[Any, ...] = (first, *others.values())
    if autocast_enabled(first):
        values = cast(first.device.type, *values)
    first = values[0]
    for other, t in zip(others, values[1:], strict=True):
        if t is None:
            continue
        if t.device != first.device:
            raise ValueError(f"{other}: got device {t.device}, want {first.device}, the device of {name}")
        if t.dtype != first.dtype:
            raise TypeError(f"{other}: got dtype {t.dtype}, want {first.dtype}, the dtype of {name}")
    return values


def check_tensor(name: str, t: Tensor, sharded: bool = False) -> None:
    """Raise TypeError unless t is a dense tensor of a supported dtype; a DTensor if `sharded`."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, want a torch.Tensor")
    if t.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {t.dtype}, want float64, float32, bfloat16 or float16")
    if t.is_nested:
        raise TypeError(f"{name}: got a nested tensor, want a dense tensor (call .to_padded_tensor(0.0))")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {t.layout}, want a dense tensor (call .to_dense())")
    if not sharded and type(t) not in PLAIN and is_dtensor(t):
        raise TypeError(
            f"{name}: got a DTensor, which has no sharding rule here; want a local tensor (call .full_tensor())"
        )


def _check_mesh(name: str, first: Tensor, other: str, t: Tensor) -> None:
    """Raise unless both tensors are DTensors on one mesh, or neither is one."""
    if is_dtensor(first) != is_dtensor(t):
        local, distributed = (name, other) if is_dtensor(t) else (other, name)
        raise TypeError(
            f"{local}: got a local tensor, want a DTensor on the mesh of {distributed} (call DTensor.from_local or "
            "distribute_tensor; distribute_module has input_fn for it)"
        )
    meshes = getattr(first, "device_mesh", None), getattr(t, "device_mesh", None)
    if meshes[0] != meshes[1]:
        raise ValueError(f"{other}: got a DTensor on {meshes[1]}, want {meshes[0]}, the mesh of {name}")


def matrix(b: Tensor, sharded: bool = False) -> Tensor:
    """Return b, checked to be a matrix; cast under autocast."""
    (b,) = operands(b, "b", sharded)
    if b.dim() != 2:
        raise ValueError(f"b: got shape {shape_of(b)}, want a matrix (d, k)")
    return b


def loss_options(
    x: Tensor, target: Tensor, classes: int, weights: Sequence[float], ignore_index: int, reduction: str
) -> LossOptions:
    """Return the options of a loss with so many classes, checked with its targets."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, want a torch.Tensor of class indices")
    if target.layout is not torch.strided:
        raise TypeError(f"target: got layout {target.layout}, want a dense tensor (call .to_dense())")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got dtype {target.dtype}, want int64 class indices")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target: got shape {shape_of(target)}, want {tuple(x.shape[:-1])}, x's without its last dimension"
        )
    if target.device != x.device:
        raise ValueError(f"target: got device {target.device}, want {x.device}, the device of x")
    if classes == 0:
        raise ValueError("target: got zero classes to choose from, want at least one")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {REDUCTIONS}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, want an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {ignore_index}, want an int of 64 bits")
    return LossOptions(loss_weights(weights), ignore_index, reduction)


def loss_weights(weights: Sequence[float]) -> tuple[float, float, float]:
    """Return the weights of a loss's three terms, checked."""
    wanted = "want three finite numbers (of CE, CE and MSE), which get no gradient"
    if isinstance(weights, str | bytes | set | frozenset):
        raise TypeError(f"weights: got {weights!r}, {wanted}")
    if isinstance(weights, Tensor):  # as PyTorch's losses take the weights of classes
        raise TypeError(
            f"weights: got a tensor of shape {shape_of(weights)}, {wanted}; weights of classes are not taken: apply your own "
            "loss to both outputs"
        )
    try:
        given = tuple(weights)
        if any(isinstance(w, bool | str | bytes) or (isinstance(w, Tensor) and w.requires_grad) for w in given):
            raise TypeError
        values = tuple(map(float, given))
    except (TypeError, ValueError):
        raise TypeError(f"weights: got {weights!r}, {wanted}") from None
    except OverflowError:
        raise ValueError(f"weights: got a number beyond the range of floats, {wanted}") from None
    if len(values) != 3 or not all(abs(w) < math.inf for w in values):
        raise ValueError(f"weights: got {values}, {wanted}")
    return values[0], values[1], values[2]


def shape_of(t: Tensor | None) -> str:
    """Return the shape for an error message."""
    return "None" if t is None else str(tuple(t.shape))
