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

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from interp_nn import linalg
from interp_nn.engines import eager
from interp_nn.engines.problem import LossOptions
from interp_nn.engines.select import calls_followed as calls_followed
from interp_nn.linalg import Orthogonalized
from interp_nn.ops import direct
from interp_nn.ops import polynomial as _polynomial
from interp_nn.ops import reconstruction as _reconstruction
from interp_nn.ops import summary as _summary
from interp_nn.ops.library import is_dtensor, ordinary
from interp_nn.ops.losses import any_ignored
from interp_nn.ops.remembered import EQUAL_WEIGHTS as EQUAL_WEIGHTS
from interp_nn.ops.remembered import latest, loss, loss_call, planned
from interp_nn.ops.validation import (
    ONE,
    PLAIN,
    REDUCTIONS,
    SUMMARY,
    as_tensors,
    check_tensor,
    finite,
    given_polynomial,
    loss_options,
    matrices,
    matrix,
    operands,
    shape_of,
)
from interp_nn.ops.validation import constant as constant
from interp_nn.ops.validation import loss_weights as loss_weights

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

    def __getattr__(self, name: str) -> Any:
        # Python calls this only for attributes that it did not find, such as argmax.
        raise AttributeError(
            f"SummaryPair has no attribute {name!r}: it is the pair that a summary layer, or a head in training mode, returns; "
            "take its `projection` or `summary`, or call model.eval() for one tensor of logits"
        )


def summary(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    polynomial: Sequence[float] | Tensor = SUMMARY,
    scale: float | Tensor = ONE,
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
    if scale is ONE and polynomial is SUMMARY:
        found = latest(x, b, bias)
        if found is not None:
            return direct.summary(x, b, bias, found)
    else:
        given = given_polynomial(polynomial, scale)
        if given is not None:
            x, b, bias, call, plain = planned(x, b, bias, False, given)
            q = as_tensors(given, x, centre=call.plan.engine == "eager")
            if plain and not call.plan.autograd:
                return direct.polynomial_summary(x, b, bias, q, call)[1]
            return _polynomial.summary(x, b, bias, q, call.plan)
    x, b, bias, call, plain = planned(x, b, bias, False)
    if plain:
        return direct.summary(x, b, bias, call)
    if type(b) not in PLAIN and is_dtensor(b):
        from interp_nn.ops import sharding

        return sharding.summary(x, b, bias)
    return _summary.summary(x, b, bias, call.plan)[0]


def gained_summary(
    x: Tensor, b: Tensor, bias: Tensor | None, c: tuple[float, ...], scale: float | Tensor, gain: Tensor
) -> Tensor:
    """Return gain (a X b q(a² bᵀb)) + bias of a layer.

    The eager engine's gradient of the gain is one inner product: the sum of those of the coefficients gain c_i would cancel. In
    16 bits, as under autocast, the gain multiplies the coefficients, which rounds no product twice.
    """
    x, b, bias, call, plain = planned(x, b, bias, False, (gain.expand(len(c)), scale))  # as many learned coefficients
    plan = call.plan
    exact = linalg.accumulation_dtype(x.dtype) == x.dtype
    if not exact or plan.engine != "eager" or not (plan.autograd or plan.order == "(Xb)q"):
        c, shift = linalg.centred(c) if plan.engine == "eager" else (c, 0.0)
        q = as_tensors((gain * constant(c, x), scale), x)._replace(shift=shift)
        if plain and not plan.autograd:
            return direct.polynomial_summary(x, b, bias, q, call)[1]
        return _polynomial.summary(x, b, bias, q, plan)
    learned = isinstance(scale, Tensor) and scale.requires_grad
    if plain and plan.autograd and plan.order == "(Xb)q" and x.is_cpu and len(c) > 1 and not learned:
        number = float(scale)
        if 0.01 < number < 100:  # or powers of bᵀb, which is not scaled, could overflow
            return _polynomial.few_rows(x, b, bias, c, number, gain)
    q = as_tensors((c, scale), x, centre=True)
    if plain and not plan.autograd:
        y = gain * direct.polynomial_summary(x, b, None, q, call)[1]
        return y if bias is None else y + bias
    return _polynomial.summary(x, b, bias, q, plan, gain)


def summary_and_gram(x: Tensor, b: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return `summary`, and the smaller of bᵀb and bbᵀ, without gradient, if its launch has formed that; else None."""
    x, b, bias, call, _ = planned(x, b, bias, False)
    y, saved = _summary.summary(x, b, bias, call.plan)
    return y, _summary.small_gram(call.plan, saved, b)


def summary_pair(
    x: Tensor, b: Tensor, *, polynomial: Sequence[float] | Tensor = SUMMARY, scale: float | Tensor = ONE
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
    if scale is ONE and polynomial is SUMMARY:
        found = latest(x, b, None, True)
        if found is not None:
            return SummaryPair(*direct.summary_pair(x, b, found))
    else:
        given = given_polynomial(polynomial, scale)
        if given is not None:
            x, b, _, call, plain = planned(x, b, None, True, given)
            q = as_tensors(given, x, centre=call.plan.engine == "eager")
            if plain and not call.plan.autograd:
                projection, y = direct.polynomial_summary(x, b, None, q, call)
                assert projection is not None
                return SummaryPair(projection, y)
            return SummaryPair(*_polynomial.summary_pair(x, b, q, call.plan))
    x, b, _, call, plain = planned(x, b, None, True)
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
    polynomial: Sequence[float] | Tensor = SUMMARY,
    scale: float | Tensor = ONE,
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
    given = None if scale is ONE and polynomial is SUMMARY else given_polynomial(polynomial, scale)
    key = None
    if given is None:
        found, key = loss_call(x, b, None, None, target, weights, ignore_index, reduction)
        if found is not None:
            return direct.cross_entropy(x, b, None, None, target, found)
    x, b = matrices(x, b)
    options = loss_options(x, target, b.shape[1], weights, ignore_index, reduction)
    return loss(x, b, None, None, target, options, given, key)


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
    polynomial: Sequence[float] | Tensor = SUMMARY,
    scale: float | Tensor = ONE,
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
    given = None if scale is ONE and polynomial is SUMMARY else given_polynomial(polynomial, scale)
    a, c = output_weight, output_bias
    key = None
    if given is None and a is not None:
        found, key = loss_call(x, b, a, c, target, weights, ignore_index, reduction)
        if found is not None:
            return direct.cross_entropy(x, b, a, c, target, found)
    x, b = matrices(x, b)
    _, a, c = operands(b, "b", output_weight=output_weight, output_bias=output_bias)
    if a is None or a.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"output_weight: got shape {shape_of(a)}, want (classes, {b.shape[1]}) for b of shape {shape_of(b)}"
        )
    if c is not None and (c.dim() != 1 or c.shape[0] != a.shape[0]):
        raise ValueError(f"output_bias: got shape {shape_of(c)}, want ({a.shape[0]},) for output_weight {shape_of(a)}")
    options = loss_options(x, target, a.shape[0], weights, ignore_index, reduction)
    return loss(x, b, a, c, target, options, given, key)


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
    return linalg.gram(matrix(b, sharded=True))


def effective_weight(
    b: Tensor, *, polynomial: Sequence[float] | Tensor = SUMMARY, scale: float | Tensor = ONE
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
    given = given_polynomial(polynomial, scale)
    b = matrix(b, sharded=True)
    return (
        linalg.effective_weight(b) if given is None else _polynomial.weight(b, as_tensors(given, b, "b", centre=True))
    )


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
    check_tensor("b", b)
    with linalg.autocast_off(b.device):
        return linalg.orthogonalize(matrix(b), tolerance, max_iterations)


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
    x, b = matrices(x, b)
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
    check_tensor("x", x)
    check_tensor("b", b)
    wide = linalg.accumulation_dtype(x.dtype)
    if b.dtype not in (x.dtype, wide):
        raise TypeError(f"b: got dtype {b.dtype}, want {x.dtype}, the dtype of x" + f", or {wide}" * (wide != x.dtype))
    if b.dim() != 2 or x.dim() == 0 or x.shape[-1] != b.shape[0]:
        raise ValueError(f"x, b: got shapes {shape_of(x)} and {shape_of(b)}, want (..., d) and (d, k)")
    if b.device != x.device:
        raise ValueError(f"b: got device {b.device}, want {x.device}, the device of x")
    kept = None
    if target is not None:
        loss_options(x, target, 1, (0, 0, 0), ignore_index, reduction)
        # Where no row is left out, which a CPU can read at once, there is less to compute.
        if not (target.is_cpu and type(target) is Tensor and ordinary()) or any_ignored(target, ignore_index):
            kept = target != ignore_index
    elif reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, want one of {REDUCTIONS}")
    return _reconstruction.missed_share(x, b, kept, reduction)


def reconstruction_weight(value: float) -> float:
    """Return the weight of a loss's reconstruction term, checked."""
    wanted = "want a finite number >= 0, the weight of the reconstruction"
    if (weight := finite("reconstruction", value, value, wanted)) < 0:
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
