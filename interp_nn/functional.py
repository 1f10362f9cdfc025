"""Summaries, their losses and their matrices as functions of tensors, as in torch.nn.functional.

With projection P = X b and Gram matrix G = bᵀb the summary is Y = P G. It is a linear layer with effective weight W = b G.

`polynomial` and `scale` make it Y = P q(G) with q(G) = c0 I + c1 G + ... + c4 G⁴, P = a X b and G = a² bᵀb. The summary is
polynomial=(0, 1) with scale=1. The degree is the number of coefficients less one. Coefficients and scale may be tensors on x's
device, whose values are read there, and may require gradients. The triton and cuda engines compute degrees 1 to 4 for
k <= 128, unless the scale requires a gradient; the eager engine computes all other polynomials.

x is (..., d) and b is (d, k), with any strides: a layer's (out, in) weight passes as `weight.t()` without a copy. Both have
one dtype out of float64, float32, bfloat16, float16 and one device. Under autocast they are cast (except by `orthogonalize`),
and gradients come back in the parameter's dtype. Empty tensors, k > d and rank-deficient b work. No argument is modified.

Calls with the same shapes, values and requested gradients return the same bits. Under torch.no_grad another order of the
products may be chosen, so the last bits can differ. All functions are differentiable to every order, and work under
torch.func and torch.compile. All raise TypeError or ValueError for bad arguments; the message names the argument, what it got
and what it wants.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from interp_nn import linalg
from interp_nn.engines import eager
from interp_nn.engines.devices import fp32_precision
from interp_nn.engines.eager_polynomial import MOST_COEFFICIENTS, Polynomial
from interp_nn.engines.problem import LossOptions
from interp_nn.engines.select import requested_now
from interp_nn.linalg import Orthogonalized, autocast_available
from interp_nn.ops import direct
from interp_nn.ops import losses as _cross_entropy
from interp_nn.ops import polynomial as _polynomial
from interp_nn.ops import reconstruction as _reconstruction
from interp_nn.ops import summary as _summary
from interp_nn.ops.library import (
    any_autocast_enabled,
    any_batched,
    cast,
    followed,
    function_modes,
    is_dtensor,
    is_tracing,
    is_wrapped,
    ordinary,
    tensor_check,
)

__all__ = [
    "Orthogonalized",
    "SummaryPair",
    "effective_weight",
    "gram",
    "inverse_summary",
    "orthogonalize",
    "reconstruction_loss",
    "summary",
    "summary_cross_entropy",
    "summary_head_cross_entropy",
    "summary_pair",
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = frozenset((Tensor, Parameter))
_MOST_PLANS = 4096
# Calls by all that they depend on; and the latest of each b, with a check of its tensors, by what the check does not see.
_plans: dict[tuple[object, ...], Any] = {}
EQUAL_WEIGHTS = (1.0, 1.0, 1.0)
_NUMBERS = frozenset((int, float))
_REDUCTIONS = ("mean", "sum", "none")
# The polynomial and the scale of the summary. Calls without either are known by `is`, the scale first: in Dynamo, which cannot
# trace `is` of tuples, no two floats are the same object.
_SUMMARY, _ONE = (0.0, 1.0), 1.0
_MOST_CONSTANTS = 256
_constants: dict[tuple[object, ...], Tensor] = {}  # none is ever dropped: captured CUDA graphs read them
_Coefficients = Sequence[float] | Tensor


class SummaryPair(NamedTuple):
    """The two outputs of `summary_pair` and of the layers that return a pair.

    Attributes:
        projection: P = X b, (..., k).
        summary: Y = P (bᵀb), (..., k).

    Example:
        >>> pair = summary_pair(torch.ones(1, 2), 2 * torch.eye(2))
        >>> pair.projection, pair.summary
        (tensor([[2., 2.]]), tensor([[8., 8.]]))
    """

    projection: Tensor
    summary: Tensor


def summary(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    polynomial: Sequence[float] | Tensor = _SUMMARY,
    scale: float | Tensor = _ONE,
) -> Tensor:
    """Compute the summary Y = X b (bᵀb) + bias, or Y = a X b q(a² bᵀb) + bias for a polynomial q and a scale a.

    `interp_nn.plan` tells which product is formed first. Each product accumulates in float32 (float64 for float64) and is
    rounded to the dtype.

    Args:
        x: Input of shape (..., d).
        b: Weight of shape (d, k), any strides.
        bias: Vector of shape (k,), or None.
        polynomial: One to five coefficients of q, the constant first: finite numbers, or a 1-D tensor on x's device.
        scale: The factor a of b: a finite number, or a 0-dim tensor on x's device.

    Returns:
        Tensor of shape (..., k) in x's dtype (autocast's under autocast).

    Raises:
        TypeError: A dtype that is not supported or differs between the arguments; a polynomial or a scale of another type.
        ValueError: Shapes or devices that do not fit; numbers of `polynomial` or `scale` that are not finite.
        RuntimeError: The engine given to `use_engine` has no kernels for the polynomial.

    Example:
        >>> summary(torch.ones(2, 3), torch.eye(3)[:, :2])
        tensor([[1., 1.],
                [1., 1.]])
        >>> summary(torch.ones(1, 2), 2 * torch.eye(2), polynomial=(1.5, -0.5), scale=0.25)
        tensor([[0.6875, 0.6875]])

    Source:
        Banh, Interpretable-Neural-Net.
    """
    if scale is not _ONE or polynomial is not _SUMMARY:
        given = _given(polynomial, scale)
        if given is not None:
            x, b, bias, call, plain = _planned(x, b, bias, False, given)
            q = _as_tensors(given, x)
            if plain and not call.plan.autograd:
                return direct.polynomial_summary(x, b, bias, q, call)[1]
            return _polynomial.summary(x, b, bias, q, call.plan)
    x, b, bias, call, plain = _planned(x, b, bias, False)
    if plain:
        return direct.summary(x, b, bias, call)
    if type(b) not in _PLAIN and is_dtensor(b):
        from interp_nn.ops import sharding

        return sharding.summary(x, b, bias)
    return _summary.summary(x, b, bias, call.plan)[0]


def summary_and_gram(x: Tensor, b: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return `summary`, and the smaller of bᵀb and bbᵀ, without gradient, if its launch has formed that; else None."""
    x, b, bias, call, _ = _planned(x, b, bias, False)
    y, saved = _summary.summary(x, b, bias, call.plan)
    return y, _summary.small_gram(call.plan, saved, b)


def summary_pair(
    x: Tensor, b: Tensor, *, polynomial: Sequence[float] | Tensor = _SUMMARY, scale: float | Tensor = _ONE
) -> SummaryPair:
    """Compute the pair (P, Y) = (X b, X b (bᵀb)), or (a X b, a X b q(a² bᵀb)), in one launch where an engine has one.

    Args:
        x: Input of shape (..., d).
        b: Weight of shape (d, k), any strides.
        polynomial: Coefficients of q, as in `summary`.
        scale: The factor a of b, as in `summary`.

    Returns:
        `SummaryPair` of two tensors of shape (..., k).

    Raises:
        TypeError: A dtype that is not supported or differs between the arguments; a polynomial or a scale of another type.
        ValueError: Shapes or devices that do not fit; numbers of `polynomial` or `scale` that are not finite.
        RuntimeError: The engine given to `use_engine` has no kernels for the polynomial.

    Example:
        >>> projection, y = summary_pair(torch.ones(1, 2), 2 * torch.eye(2))
        >>> projection, y
        (tensor([[2., 2.]]), tensor([[8., 8.]]))
        >>> summary_pair(torch.ones(1, 2), 2 * torch.eye(2), polynomial=(0, 0, 1)).summary
        tensor([[32., 32.]])

    Source:
        Banh, Interpretable-Neural-Net.
    """
    if scale is not _ONE or polynomial is not _SUMMARY:
        given = _given(polynomial, scale)
        if given is not None:
            x, b, _, call, plain = _planned(x, b, None, True, given)
            q = _as_tensors(given, x)
            if plain and not call.plan.autograd:
                projection, y = direct.polynomial_summary(x, b, None, q, call)
                assert projection is not None
                return SummaryPair(projection, y)
            return SummaryPair(*_polynomial.summary_pair(x, b, q, call.plan))
    x, b, _, call, plain = _planned(x, b, None, True)
    if plain:
        return SummaryPair(*direct.summary_pair(x, b, call))
    return SummaryPair(*_summary.summary_pair(x, b, call.plan))


def summary_cross_entropy(
    x: Tensor,
    b: Tensor,
    target: Tensor,
    *,
    weights: Sequence[float] = EQUAL_WEIGHTS,
    ignore_index: int = -100,
    reduction: str = "mean",
    polynomial: Sequence[float] | Tensor = _SUMMARY,
    scale: float | Tensor = _ONE,
) -> Tensor:
    """Compute the loss w1 CE(P, t) + w2 CE(Y, t) + w3 MSE(P, Y) of `summary_pair`, with the k columns as classes.

    A row's MSE is its mean over k. On a GPU engine the forward pass computes the gradients too, except for float16 and for
    reduction "none". On a CPU, and for polynomials on the eager engine, PyTorch's autograd computes them in the backward pass. A
    row whose logits overflow makes gradients NaN even if it is ignored, as in PyTorch.

    Args:
        x: Input of shape (..., d).
        b: Weight of shape (d, k), any strides.
        target: Class indices in [0, k), int64 of shape (...).
        weights: The factors (w1, w2, w3).
        ignore_index: Rows with this target are left out of all three terms.
        reduction: "mean" divides by the number of kept rows (NaN without any, as in PyTorch), "sum" adds the rows, "none"
            returns one loss for each row.
        polynomial: Coefficients of q, as in `summary`.
        scale: The factor a of b, as in `summary`.

    Returns:
        Scalar, or a tensor of target's shape for "none"; float32 for 16-bit inputs, else x's dtype.

    Raises:
        TypeError: A dtype that is not supported, or a target that is not int64.
        ValueError: Shapes or devices that do not fit, or a class index out of range (on a GPU: a failed assertion on the device).

    Example:
        >>> x, b = torch.eye(2), 2 * torch.eye(2)
        >>> summary_cross_entropy(x, b, torch.tensor([0, 1]), weights=(1.0, 0.0, 0.0))
        tensor(0.1269)

    Source:
        Banh, "Representing information as linear combinations of signals", section 2.1.
    """
    given = None if scale is _ONE and polynomial is _SUMMARY else _given(polynomial, scale)
    key = None
    if given is None:
        found, key = _loss_call(x, b, None, None, target, weights, ignore_index, reduction)
        if found is not None:
            return direct.cross_entropy(x, b, None, None, target, found)
    x, b = _matrices(x, b)
    options = _loss_options(x, target, b.shape[1], weights, ignore_index, reduction)
    return _loss(x, b, None, None, target, options, given, key)


def summary_head_cross_entropy(
    x: Tensor,
    b: Tensor,
    output_weight: Tensor,
    output_bias: Tensor | None,
    target: Tensor,
    *,
    weights: Sequence[float] = EQUAL_WEIGHTS,
    ignore_index: int = -100,
    reduction: str = "mean",
    polynomial: Sequence[float] | Tensor = _SUMMARY,
    scale: float | Tensor = _ONE,
) -> Tensor:
    """Compute the reference network's loss w1 CE(O1, t) + w2 CE(O2, t) + w3 MSE(O1, O2), with (P, Y) of `summary_pair`.

    The logits are O1 = P Aᵀ + c and O2 = Y Aᵀ + c. Where m is small against k they are formed without any n x k intermediate.
    Gradients are computed as by `summary_cross_entropy`.

    Args:
        x: Input of shape (..., d).
        b: Weight of shape (d, k), any strides.
        output_weight: A of shape (m, k).
        output_bias: c of shape (m,), or None.
        target: Class indices in [0, m), int64 of shape (...).
        weights: The factors (w1, w2, w3).
        ignore_index: Rows with this target are left out of all three terms.
        reduction: "mean", "sum" or "none", as in `summary_cross_entropy`.
        polynomial: Coefficients of q, as in `summary`.
        scale: The factor a of b, as in `summary`.

    Returns:
        Scalar, or a tensor of target's shape for "none"; float32 for 16-bit inputs, else x's dtype.

    Raises:
        TypeError: A dtype that is not supported, or a target that is not int64.
        ValueError: Shapes or devices that do not fit, or a class index out of range (on a GPU: a failed assertion on the device).

    Example:
        >>> x, b, a = torch.eye(2), torch.eye(2), torch.eye(2)
        >>> summary_head_cross_entropy(x, b, a, None, torch.tensor([0, 1]))
        tensor(0.6265)

    Source:
        AskExplain, Interpretable-Neural-Net.
    """
    given = None if scale is _ONE and polynomial is _SUMMARY else _given(polynomial, scale)
    a, c = output_weight, output_bias
    key = None
    if given is None:
        found, key = _loss_call(x, b, a, c, target, weights, ignore_index, reduction)
        if found is not None:
            return direct.cross_entropy(x, b, a, c, target, found)
    x, b = _matrices(x, b)
    _, a, c = _operands(b, "b", output_weight=output_weight, output_bias=output_bias)
    if a is None or a.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"output_weight: got shape {_shape(a)}, want (classes, {b.shape[1]}) for b of shape {_shape(b)}"
        )
    if c is not None and (c.dim() != 1 or c.shape[0] != a.shape[0]):
        raise ValueError(f"output_bias: got shape {_shape(c)}, want ({a.shape[0]},) for output_weight {_shape(a)}")
    options = _loss_options(x, target, a.shape[0], weights, ignore_index, reduction)
    return _loss(x, b, a, c, target, options, given, key)


def gram(b: Tensor) -> Tensor:
    """Compute the Gram matrix G = bᵀb.

    Args:
        b: Matrix of shape (d, k).

    Returns:
        Tensor of shape (k, k).

    Raises:
        TypeError: A dtype that is not supported.
        ValueError: b is not a matrix.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.],
                [2., 4.]])
    """
    return linalg.gram(_matrix(b, sharded=True))


def effective_weight(
    b: Tensor, *, polynomial: Sequence[float] | Tensor = _SUMMARY, scale: float | Tensor = _ONE
) -> Tensor:
    """Compute the effective weight W = b (bᵀb), or a b q(a² bᵀb), with which `summary(x, b)` is `x @ W`.

    A singular value s of b becomes s³, or a s q(a² s²).

    Args:
        b: Matrix of shape (d, k).
        polynomial: Coefficients of q, as in `summary`.
        scale: The factor a of b, as in `summary`.

    Returns:
        Tensor of shape (d, k).

    Raises:
        TypeError: A dtype that is not supported; a polynomial or a scale of another type.
        ValueError: b is not a matrix; numbers of `polynomial` or `scale` that are not finite.

    Example:
        >>> effective_weight(2 * torch.eye(2))
        tensor([[8., 0.],
                [0., 8.]])
        >>> effective_weight(2 * torch.eye(2), polynomial=(1, 1))
        tensor([[10.,  0.],
                [ 0., 10.]])
    """
    given = _given(polynomial, scale)
    b = _matrix(b, sharded=True)
    return linalg.effective_weight(b) if given is None else _polynomial.weight(b, _as_tensors(given, b, "b"))


def orthogonalize(b: Tensor, tolerance: float | None = None, max_iterations: int = 100) -> Orthogonalized:
    """Compute the polar factor of b, its nearest matrix with orthonormal columns (rows for k > d), by Newton-Schulz.

    Iterates b <- b (3 I - bᵀb) / 2 in float32 (float64 for float64), also under autocast. A column of zeros (row, for k > d)
    stays zero, and the defect is then 1. Where b lacks a rank otherwise, its missing directions come out orthonormal and
    arbitrary (see `SummaryLinear.spectrum`).

    Args:
        b: Matrix of shape (d, k).
        tolerance: Stop when the Frobenius norm of bᵀb - I is at most this. None stops at rounding.
        max_iterations: Stop after so many iterations.

    Returns:
        `Orthogonalized` (factor, defect, iterations). The defect is max |s - 1| over the singular values s of the factor.

    Raises:
        TypeError: A dtype that is not supported, or arguments of other types.
        ValueError: b is not a matrix.

    Example:
        >>> orthogonalize(torch.diag(torch.tensor([3.0, 0.5]))).factor.abs().round(decimals=4)
        tensor([[1., 0.],
                [0., 1.]])
    """
    if tolerance is not None and (not isinstance(tolerance, Real) or isinstance(tolerance, bool)):
        raise TypeError(f"tolerance: got {tolerance!r}, want a number or None (rounding)")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance!r}, want a number >= 0 or None (rounding)")
    if not isinstance(max_iterations, int) or isinstance(max_iterations, bool):
        raise TypeError(f"max_iterations: got {max_iterations!r}, want an int")
    if max_iterations < 0:
        raise ValueError(f"max_iterations: got {max_iterations}, want an int >= 0")
    _check_tensor("b", b)
    with linalg.autocast_off(b.device):
        return linalg.orthogonalize(_matrix(b), tolerance, max_iterations)


def inverse_summary(x: Tensor, b: Tensor) -> Tensor:
    """Compute the least-squares code Z = X b (bᵀb)⁻¹ that the summary replaces; a baseline.

    16-bit inputs are solved in float32. A bᵀb that is singular except for rounding is not noticed, and Z is then large and
    arbitrary.

    Args:
        x: Input of shape (..., d).
        b: Weight of shape (d, k), k <= d.

    Returns:
        Tensor of shape (..., k).

    Raises:
        TypeError: A dtype that is not supported or differs between the arguments.
        ValueError: Shapes or devices that do not fit.
        torch.linalg.LinAlgError: k > d, or the solver meets a singular bᵀb.

    Example:
        >>> inverse_summary(torch.ones(1, 2), 2 * torch.eye(2))
        tensor([[0.5000, 0.5000]])
    """
    x, b = _matrices(x, b)
    return linalg.inverse_summary(x, b)


def reconstruction_loss(
    x: Tensor, b: Tensor, *, target: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Compute the share ‖X - X b bᵀ‖² / ‖X‖² of X that the tied reconstruction from the codes X b misses.

    It is computed from P = X b as (‖X‖² - 2 ‖P‖² + <PᵀP, bᵀb>) / ‖X‖², and no matrix of X's size is formed. Products are those of
    float32 (float64 for float64), also for 16-bit inputs and under autocast. For codes that explain X without training of X, pass
    `x.detach()`, as the layers' losses do.

    Args:
        x: Features of shape (..., d).
        b: Weight of shape (d, k). A 16-bit x may have a float32 b.
        target: Class indices of shape (...), int64, by which `ignore_index` leaves rows out; None keeps all rows.
        ignore_index: Rows with this target are left out.
        reduction: "mean" returns the share, "sum" the share times the number of kept rows, "none" what each row adds to that.

    Returns:
        Scalar, or a tensor of shape (...) for "none"; float32 for 16-bit features, else in x's dtype. At least 0; 0 if no row is
        kept.

    Raises:
        TypeError: A dtype that is not supported or differs between the arguments.
        ValueError: Shapes, devices or a reduction that do not fit. The message names the argument.

    Example:
        >>> x, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
        >>> reconstruction_loss(x, b)  # 4² / (3² + 4²)
        tensor(0.6400)
    """
    _check_tensor("x", x)
    _check_tensor("b", b)
    wide = linalg.accumulation_dtype(x.dtype)
    if b.dtype not in (x.dtype, wide):
        raise TypeError(f"b: got dtype {b.dtype}, want {x.dtype}, the dtype of x" + f", or {wide}" * (wide != x.dtype))
    if b.dim() != 2 or x.dim() == 0 or x.shape[-1] != b.shape[0]:
        raise ValueError(f"x, b: got shapes {_shape(x)} and {_shape(b)}, want (..., d) and (d, k)")
    if b.device != x.device:
        raise ValueError(f"b: got device {b.device}, want {x.device}, the device of x")
    kept = None
    if target is not None:
        _loss_options(x, target, 1, (0, 0, 0), ignore_index, reduction)
        kept = target != ignore_index
    elif reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {_REDUCTIONS}")
    return _reconstruction.missed_share(x, b, kept, reduction)


def reconstruction_weight(value: float) -> float:
    """Return the weight of a loss's reconstruction term, checked."""
    wanted = "want a finite number >= 0, the weight of the reconstruction"
    if (weight := _finite("reconstruction", value, value, wanted)) < 0:
        raise ValueError(f"reconstruction: got {value!r}, {wanted}")
    return weight


def three_term_loss(
    logits: Sequence[Tensor],
    target: Tensor,
    weights: tuple[float, float, float],
    ignore_index: int,
    reduction: str,
    codes: Sequence[Tensor] = (),
) -> Tensor:
    """Compute the loss of `summary_head_cross_entropy` from a pair of logits (..., m), with PyTorch's autograd.

    With `codes`, a pair (..., k), the MSE is that of the codes. 16-bit tensors are cast to float32.
    """
    options = LossOptions(weights, ignore_index, reduction)
    work, classes = linalg.accumulation_dtype(logits[0].dtype), target.flatten()
    o1, o2, *pair = (t.to(work).reshape(len(classes), t.shape[-1]) for t in (*logits, *codes))
    loss = eager.three_terms(o1, o2, classes, options, masked=True, codes=pair)
    return loss.view(target.shape) if reduction == "none" else loss


@contextmanager
def calls_followed() -> Iterator[None]:
    """Compute by plain PyTorch calls in the block, the same ones whichever tensors need gradients, for modes that follow them."""
    token = followed.set(True)
    try:
        yield
    finally:
        followed.reset(token)


def _matrices(x: Tensor, b: Tensor, sharded: bool = False) -> tuple[Tensor, Tensor]:
    """Check x (..., d) and b (d, k), and cast them under autocast. sharded: they may be DTensors."""
    x, b = _operands(x, "x", sharded, b=b)
    if b is None:
        raise TypeError("b: got NoneType, want a torch.Tensor")
    if b.dim() != 2:
        raise ValueError(f"b: got shape {_shape(b)}, want a matrix (d, k)")
    if x.dim() == 0:
        raise ValueError("x: got a scalar, want (..., d)")
    if x.shape[-1] != b.shape[0]:
        raise ValueError(f"x: got shape {_shape(x)}, want (..., {b.shape[0]}) for b of shape {_shape(b)}")
    return x, b


def _given(polynomial: _Coefficients, scale: float | Tensor) -> tuple[_Coefficients, float | Tensor] | None:
    """Return the checked polynomial and scale: numbers as floats, tensors as they are. None for those of the summary."""
    wanted = f"want 1 to {MOST_COEFFICIENTS} coefficients, the constant first: finite real numbers, or a 1-D tensor"
    coefficients: _Coefficients
    if isinstance(polynomial, Tensor):
        _check_tensor("polynomial", polynomial, sharded=True)
        if polynomial.dim() != 1 or not 1 <= polynomial.shape[0] <= MOST_COEFFICIENTS:
            raise ValueError(f"polynomial: got shape {_shape(polynomial)}, {wanted}")
        coefficients = polynomial
    else:
        if isinstance(polynomial, str | bytes) or not isinstance(polynomial, Sequence):
            raise TypeError(f"polynomial: got {polynomial!r}, {wanted}")
        if not 1 <= len(polynomial) <= MOST_COEFFICIENTS:
            raise ValueError(f"polynomial: got {len(polynomial)} numbers, {wanted}")
        coefficients = tuple(_finite("polynomial", number, polynomial, wanted) for number in polynomial)
    if isinstance(scale, Tensor):
        _check_tensor("scale", scale, sharded=True)
        if scale.dim() != 0:
            raise ValueError(f"scale: got shape {_shape(scale)}, want a finite real number, or a 0-dim tensor")
    else:
        scale = _finite("scale", scale, scale, "want a finite real number, or a 0-dim tensor")
    if not isinstance(scale, Tensor) and scale == 1 and coefficients == _SUMMARY:
        return None
    return coefficients, scale


def _finite(name: str, number: object, given: object, wanted: str) -> float:
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{name}: got {given!r}, {wanted}")
    try:
        value = float(number)
    except OverflowError:
        raise ValueError(f"{name}: got a number beyond the range of floats, {wanted}") from None
    if not abs(value) < math.inf:
        raise ValueError(f"{name}: got {given!r}, {wanted}")
    return value


def _as_tensors(given: tuple[_Coefficients, float | Tensor], x: Tensor, name: str = "x") -> Polynomial:
    """Return the polynomial of `_given` as tensors on x's device, without a synchronisation."""
    tensors: list[Tensor | None] = []
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
    return Polynomial(coefficients, scale)


def constant(value: Sequence[float] | float, x: Tensor) -> Tensor:
    """Return the numbers as a float32 tensor (float64 for x of float64), the same one for the same numbers.

    It is filled on its device: a copy from the host would synchronise, and cannot be captured in a CUDA graph. One that is made
    inside of a transform, a mode or a capture belongs to that and is not kept.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    keep = type(x) in _PLAIN and not torch.compiler.is_compiling()
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


def _planned(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None,
    pair: bool,
    given: tuple[_Coefficients, float | Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, direct.Call, bool]:
    """Return checked x, b and bias, the call with its plan, and True if the call may pass the operators by.

    It is remembered by everything that the plan and the checks depend on, and by the layouts, which engines prepare for.
    """
    state: tuple[object, ...] = ()
    if given is None and not is_compiling():
        state = id(b), is_grad_enabled(), pair, bias is None, requested_now(), fp32_precision("cuda", "matmul")
        found = _recalled(state, x, b) if bias is None else _recalled(state, x, b, bias)
        if found is not None:
            return x, b, bias, found, True
    key: tuple[object, ...] | None = None
    plain = type(x) in _PLAIN and type(b) in _PLAIN and (bias is None or type(bias) in _PLAIN)
    passes = plain and ordinary() and not any_batched(x, b, bias)
    autocast = (passes or not is_compiling()) and any_autocast_enabled()
    if autocast:
        passes = passes and given is None and all(t is None or t.dtype in _DTYPES for t in (x, b, bias))
        if passes and _autocast_enabled(x):  # it does not change the products of tensors that are cast already
            x, b, bias = cast(x.device.type, x, b, bias)
    if passes or (plain and not (autocast or is_compiling() or is_tracing() or followed.get())):
        # The same for all three, or it is an error: by comparison, which is cheaper than a place in the key.
        dtype, device = x.dtype, x.device
        alike = x.layout is b.layout is torch.strided and b.dtype is dtype and b.device == device
        if bias is not None:
            alike = alike and bias.layout is torch.strided and bias.dtype is dtype and bias.device == device
        if alike:
            key = (
                x.shape, b.shape, x.stride(), b.stride(), dtype, device, x.requires_grad, b.requires_grad,
                is_grad_enabled(), pair, requested_now(), fp32_precision("cuda", "matmul"),
                None if bias is None else (bias.shape, bias.is_contiguous()),
                None if given is None else _degree(given),
            )  # fmt: skip
        call = None if key is None else _plans.get(key)
        if given is not None:
            tensors = [t for t in given if isinstance(t, Tensor)]
            passes = passes and _PLAIN.issuperset(map(type, tensors)) and not any_batched(*tensors)
        if call is not None:
            if passes and not autocast:
                _keep_recent(state, call, x, b, bias)
            return x, b, bias, call, passes
    x, b = _matrices(x, b, sharded=True)
    if bias is not None:
        _, bias = _operands(b, "b", True, bias=bias)
        if bias.dim() != 1 or bias.shape[0] != b.shape[1]:
            raise ValueError(f"bias: got shape {_shape(bias)}, want ({b.shape[1]},) for b of shape {_shape(b)}")
    call = direct.Call(_summary.choose(x, b, pair, *(() if given is None else _degree(given))), pair)
    if key is not None:
        _remember(key, call)
    return x, b, bias, call, passes


def _recalled(state: tuple[object, ...], *tensors: Tensor) -> direct.Call | None:
    """Return the last call in a state if nothing else has changed that it depends on, else None.

    PyTorch's guard of compiled functions compares type, dtype, device, sizes, strides and requires_grad of all tensors in one
    call, and the dispatch keys, among them those of modes, transforms, autocast and tracing.

    Args:
        state: What else a call depends on, with the identity of b first, so that each layer has its own.
        tensors: The arguments.
    """
    recent = _plans.get(state)
    if recent is None or function_modes() or followed.get() or getattr(forward_ad, "_current_level", 0) >= 0:
        return None
    return recent[1] if recent[0](*tensors) else None


def _keep_recent(state: tuple[object, ...], call: direct.Call, *tensors: Tensor | None) -> None:
    """Keep a call for `_recalled`."""
    check = tensor_check(*(t for t in tensors if t is not None))
    if state and check is not None:
        _remember(state, (check, call))


def _remember(key: tuple[object, ...], value: object) -> None:
    """Remember a value, in the place of the oldest one where there are many."""
    while len(_plans) >= _MOST_PLANS:
        with suppress(KeyError, RuntimeError, StopIteration):  # of another thread that does the same
            del _plans[next(iter(_plans))]
    _plans[key] = value


def _degree(given: tuple[_Coefficients, float | Tensor]) -> tuple[int, bool, bool]:
    """Return the degree of a polynomial, True if a coefficient or the scale needs a gradient, and True if the scale does."""
    coefficients, scale = (isinstance(t, Tensor) and t.requires_grad for t in given)
    return len(given[0]) - 1, coefficients or scale, scale


def _autocast_enabled(t: Tensor) -> bool:
    device_type = t.device.type
    return autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _operands(first: Tensor, name: str, sharded: bool = False, **others: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors (None stays None), of one supported dtype and one device; cast first under autocast.

    sharded: they may be DTensors, all of them and on one mesh.
    """
    _check_tensor(name, first, sharded)
    for other, t in others.items():
        if t is not None:
            _check_tensor(other, t, sharded)
            if type(t) not in _PLAIN or type(first) not in _PLAIN:
                _check_mesh(name, first, other, t)
    values: tuple[Any, ...] = (first, *others.values())
    if _autocast_enabled(first):
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


def _check_tensor(name: str, t: Tensor, sharded: bool = False) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: got {type(t).__name__}, want a torch.Tensor")
    if t.dtype not in _DTYPES:
        raise TypeError(f"{name}: got dtype {t.dtype}, want float64, float32, bfloat16 or float16")
    if t.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {t.layout}, want a dense tensor (call .to_dense())")
    if not sharded and type(t) not in _PLAIN and is_dtensor(t):
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


def _matrix(b: Tensor, sharded: bool = False) -> Tensor:
    (b,) = _operands(b, "b", sharded)
    if b.dim() != 2:
        raise ValueError(f"b: got shape {_shape(b)}, want a matrix (d, k)")
    return b


def _loss_options(
    x: Tensor, target: Tensor, classes: int, weights: Sequence[float], ignore_index: int, reduction: str
) -> LossOptions:
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, want a torch.Tensor of class indices")
    if target.layout is not torch.strided:
        raise TypeError(f"target: got layout {target.layout}, want a dense tensor (call .to_dense())")
    if target.dtype != torch.int64:
        raise TypeError(f"target: got dtype {target.dtype}, want int64 class indices")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target: got shape {_shape(target)}, want {tuple(x.shape[:-1])}, x's without its last dimension"
        )
    if target.device != x.device:
        raise ValueError(f"target: got device {target.device}, want {x.device}, the device of x")
    if classes == 0:
        raise ValueError("target: got zero classes to choose from, want at least one")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {_REDUCTIONS}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, want an int")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {ignore_index}, want an int of 64 bits")
    return LossOptions(loss_weights(weights), ignore_index, reduction)


def _loss_call(
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
    state: tuple[object, ...] = ()
    others = [target] if a is None else [target, a] if c is None else [target, a, c]
    if not is_compiling() and weights is EQUAL_WEIGHTS and type(ignore_index) is int:
        state = (
            id(b), is_grad_enabled(), len(others), ignore_index, reduction, requested_now(), fp32_precision("cuda", "matmul")
        )  # fmt: skip
        found = _recalled(state, x, b, *others)
        if found is not None:
            return found, None
    key = _loss_key(x, b, a, c, target, weights, ignore_index, reduction)
    found = None if key is None else _plans.get(key)
    if found is not None:
        _keep_recent(state, found, x, b, *others)
    return found, key


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
    if type(x) not in _PLAIN or type(b) not in _PLAIN:
        return None
    if (a is not None and type(a) not in _PLAIN) or (c is not None and type(c) not in _PLAIN):
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
        is_grad_enabled(), requested_now(), fp32_precision("cuda", "matmul"),
        target.shape, target.is_contiguous(), target.dtype,
        weights is EQUAL_WEIGHTS or (weights, *map(type, weights)), ignore_index, reduction,
        None if a is None else (a.shape, a.dtype, a.device, a.layout),
        None if c is None else (c.shape, c.dtype, c.device, c.layout),
    )  # fmt: skip


def _loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    given: tuple[_Coefficients, float | Tensor] | None,
    key: tuple[object, ...] | None,
) -> Tensor:
    """Return the loss of checked arguments, and remember options and plan under the key if there is one."""
    q = None if given is None else _as_tensors(given, x)
    plan = _cross_entropy.choose(x, b, a, q)
    if key is None:
        return _cross_entropy.cross_entropy(x, b, a, c, target, options, plan, q)
    call = direct.Call(plan, options=options)
    _remember(key, call)
    return direct.cross_entropy(x, b, a, c, target, call)


def loss_weights(weights: Sequence[float]) -> tuple[float, float, float]:
    """Return the weights of a loss's three terms, checked."""
    wanted = "want three finite numbers (of CE, CE and MSE), which get no gradient"
    if isinstance(weights, str | bytes) or (isinstance(weights, Tensor) and weights.requires_grad):
        raise TypeError(f"weights: got {weights!r}, {wanted}")
    try:
        given = tuple(weights)
        if any(isinstance(w, bool) or (isinstance(w, Tensor) and w.requires_grad) for w in given):
            raise TypeError
        values = tuple(map(float, given))
    except (TypeError, ValueError):
        raise TypeError(f"weights: got {weights!r}, {wanted}") from None
    except OverflowError:
        raise ValueError(f"weights: got a number beyond the range of floats, {wanted}") from None
    if len(values) != 3 or not all(abs(w) < math.inf for w in values):
        raise ValueError(f"weights: got {values}, {wanted}")
    return values[0], values[1], values[2]


def _shape(t: Tensor | None) -> str:
    return "None" if t is None else str(tuple(t.shape))
