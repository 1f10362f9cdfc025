"""The CUDA engine: `forward`, `backward` and `loss` in one launch each, by the compiled kernels of csrc.

Plans: a summary is "(Xb)G" (saves G), a pair also saves P, a polynomial is "(Xb)q" (saves q(G) too), the loss of a head is
"logits_from_latent"; all have at most 128 columns and classes. b may have any strides. Products take operands in the inputs'
dtype and accumulate in fp32; fp32 operands are rounded to tf32 where PyTorch's own switch for matrix products allows it, and are
split in two such parts otherwise (below compute capability 8.0, which has no such products, they are multiplied as they are).
Rounded are: P, G, q(G) and W as operands and as results, D = dP + dY q(G) and the logits' gradients as operands, results.

The library has private operators, whose schemas and fake kernels are here; the public operators of `interp_nn.ops` end in
them. They allocate their results and workspaces themselves, and are launched on the current stream. What they count on is
the kernels' own business (see `memory.counter`), so the schemas do not call it changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from interp_nn.engines import eager, eager_polynomial, select
from interp_nn.engines.barrier import counter
from interp_nn.engines.cuda.compiled_library import launch_failures
from interp_nn.engines.devices import sm_carveout
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.linalg import is_column_major

_REDUCTIONS = ("none", "mean", "sum")  # as the library counts them

_LIBRARY = torch.library.Library("interp_nn", "FRAGMENT")


def _define(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define a private operator, whose kernel is in the compiled library."""
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"interp_nn::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.interp_nn, name).default
    return operator


def _matrix_b(b: Tensor, transposed: bool) -> Tensor:
    d, k = b.shape
    return b.new_empty(k, d).mT if transposed else b.new_empty(d, k)


def _fake_forward(
    x: Tensor,
    b: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | None,
    scale: Tensor | None,
    pair: bool,
    tf32: bool,
    carve_out: int = 0,
) -> list[Tensor]:
    n, k = x.shape[0], b.shape[1]
    results = [x.new_empty(n, k), x.new_empty(k, k)]
    results += [x.new_empty(n, k)] if pair else []
    return results if coefficients is None else [*results, x.new_empty(k, k)]


def _fake_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, p: Tensor | None, g: Tensor | None,
    q_of_g: Tensor | None, coefficients: Tensor | None, scale: Tensor | None, counter: Tensor, pair: bool, need_x: bool,
    need_b: bool, need_bias: bool, need_coefficients: bool, transposed: bool, tf32: bool, carve_out: int = 0,
) -> list[Tensor]:  # fmt: skip
    made = x.new_empty(x.shape), _matrix_b(b, transposed), x.new_empty(b.shape[1])
    results = [t for t, need in zip(made, (need_x, need_b, need_bias), strict=True) if need]
    return results + ([torch.empty_like(coefficients)] if need_coefficients and coefficients is not None else [])


def _fake_loss(
    x: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, coefficients: Tensor | None, scale: Tensor | None,
    target: Tensor, upstream: Tensor | None, counter: Tensor, w1: float, w2: float, w3: float, ignore_index: int,
    reduction: int, need_x: bool, need_b: bool, need_weight: bool, need_bias: bool, need_coefficients: bool,
    transposed: bool, tf32: bool, carve_out: int = 0,
) -> list[Tensor]:  # fmt: skip
    value = x.new_empty(target.shape if _REDUCTIONS[reduction] == "none" else (), dtype=torch.float32)
    results = [value]
    results += [x.new_empty(x.shape)] if need_x else []
    results += [_matrix_b(b, transposed)] if need_b else []
    results += [x.new_empty(weight.shape)] if need_weight and weight is not None else []
    results += [x.new_empty(weight.shape[0])] if need_bias and weight is not None else []
    return results + ([torch.empty_like(coefficients)] if need_coefficients and coefficients is not None else [])


def _fake_scale(upstream: Tensor, gradients: list[Tensor], carve_out: int = 0) -> None:
    return None


_forward = _define(
    "cuda_forward(Tensor x, Tensor b, Tensor? bias, Tensor? coefficients, Tensor? scale, bool pair, bool tf32, "
    "int carve_out=0) -> Tensor[]",
    _fake_forward,
)
_backward = _define(
    "cuda_backward(Tensor? dp, Tensor? dy, Tensor x, Tensor b, Tensor? p, Tensor? g, Tensor? q_of_g, "
    "Tensor? coefficients, Tensor? scale, Tensor counter, bool pair, bool need_x, bool need_b, bool need_bias, "
    "bool need_coefficients, bool transposed, bool tf32, int carve_out=0) -> Tensor[]",
    _fake_backward,
)
_loss = _define(
    "cuda_loss(Tensor x, Tensor b, Tensor? weight, Tensor? bias, Tensor? coefficients, Tensor? scale, Tensor target, "
    "Tensor? upstream, Tensor counter, float w1, float w2, float w3, int ignore_index, int reduction, bool need_x, "
    "bool need_b, bool need_weight, bool need_bias, bool need_coefficients, bool transposed, bool tf32, "
    "int carve_out=0) -> Tensor[]",
    _fake_loss,
)
_scale = _define("cuda_scale(Tensor upstream, Tensor(a!)[] gradients, int carve_out=0) -> ()", _fake_scale)


class LaunchError(RuntimeError):
    """CUDA, or the library, refused a launch."""


_LAUNCH_ERROR = "not launched: "  # as csrc/binding.cpp begins it


def launch(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Call an operator of the library, with PyTorch's own error where memory is short. Every launch passes here.

    Kernels leave the multiprocessors of PyTorch's carve-out to other work, such as NCCL's.
    """
    try:
        return operator(*arguments, sm_carveout() or 0)
    except RuntimeError as error:
        if _LAUNCH_ERROR in str(error):
            raise LaunchError(str(error).partition(_LAUNCH_ERROR)[2].partition("\n")[0]) from error
        if "aoti_torch_empty_strided" not in str(error):
            raise
        # The stable ABI tells the library that an allocation failed, and neither why nor by which kind of error.
        raise torch.OutOfMemoryError(
            f"CUDA out of memory: no room for the results or workspaces of {operator}"
        ) from error


def _asked_for() -> bool:
    # A backward runs in a thread of autograd's, where no engine was requested.
    return "cuda" in (select.requested(), select._latest)


def _given_up(device: torch.device) -> bool:
    """Return True if `auto` leaves a device to the eager engine since a launch failed there."""
    return device in launch_failures and not _asked_for()


def _give_up(device: torch.device, error: LaunchError) -> None:
    """Leave a device to the eager engine from now on, with one warning. An engine that was asked for raises the error."""
    if _asked_for():
        raise error
    launch_failures[device] = str(error)
    warnings.warn(
        f"the cuda engine could not launch a kernel on {device}: {error}. The eager engine computes there from now on "
        "(interp_nn.use_engine('eager') avoids the attempt)",
        RuntimeWarning,
        stacklevel=3,
    )


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _on_device(q: Polynomial | None) -> tuple[Tensor | None, Tensor | None]:
    """The coefficients and the scale as the kernels read them."""
    if q is None:
        return None, None
    assert not q.shift, "the kernels take powers of G itself"
    return q.coefficients.float().contiguous(), None if q.scale is None else q.scale.float()


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool, q: Polynomial | None = None
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute `Engine.forward`."""
    if x.numel() * b.shape[1] == 0 or _given_up(x.device):
        if q is None:
            return eager.forward(x, b, bias, plan, pair)
        p, y, kept = eager_polynomial.forward(x, b, bias, q, plan, pair)
        kept[2].diagonal().add_(q.coefficients[0])  # the eager engine saves q(G) without it
        return (p, y, kept) if plan.saves else (None, y, kept[1:])
    try:
        y, g, *more = launch(
            _forward, x.contiguous(), b, _contiguous(bias), *_on_device(q), plan.saves, _tf32(x.dtype)
        )  # fmt: skip
    except LaunchError as error:
        _give_up(x.device, error)
        return forward(x, b, bias, plan, pair, q)
    projection = more.pop(0) if plan.saves else None
    return projection, y, [g, *more] if projection is None else [projection, g, *more]


def backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: Plan,
    need_x: bool,
    need_b: bool,
    need_bias: bool = False,
    need_c: bool = False,
    q: Polynomial | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute `Engine.backward`."""
    needs = need_x, need_b, need_bias, need_c
    empty = x.numel() * b.shape[1] == 0 or not (need_x or need_b or need_c)
    if empty or _given_up(x.device):
        if q is None:
            return eager.backward(dp, dy, x, b, saved, plan, need_x, need_b, need_bias)
        if not empty:
            saved = eager_polynomial.forward(x, b, None, q, eager_polynomial.SAVING, True)[2]
            return eager_polynomial.backward(dp, dy, x, b, q, saved, eager_polynomial.SAVING, (*needs, False))[:4]
        dbias = x.new_zeros(b.shape[1]) if dy is None else dy.sum(0)
        zeros = torch.zeros_like(x), torch.zeros_like(b), dbias, torch.zeros_like(q.coefficients, dtype=torch.float32)
        return tuple(t if need else None for t, need in zip(zeros, needs, strict=True))
    p, *squares = saved if plan.saves else (None, *saved)
    g, q_of_g = squares if q is not None else (*squares, None)
    try:
        made = launch(
            _backward, _contiguous(dp), _contiguous(dy), x.contiguous(), b, _contiguous(p), _contiguous(g),
            _contiguous(q_of_g), *_on_device(q), counter(x.device), plan.saves, *needs, is_column_major(b),
            _tf32(x.dtype),
        )  # fmt: skip
    except LaunchError as error:
        _give_up(x.device, error)
        return backward(dp, dy, x, b, saved, plan, *needs, q)
    found = iter(made)
    gradients = tuple(next(found) if need else None for need in needs)
    return gradients[:3] if q is None else gradients


def loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    upstream: Tensor | None = None,
    needs: Sequence[bool] | None = None,
    q: Polynomial | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute `Engine.loss`. A target out of range stops the kernel, as it stops PyTorch's own losses."""
    if x.numel() * b.shape[1] == 0 or _given_up(x.device):
        if q is None:
            return eager.loss(x, b, a, c, target, options, plan, upstream, needs)
        return _loss_by_autograd(x, b, a, c, q, target, options, plan, upstream, needs)
    if upstream is not None:
        upstream = upstream.float().contiguous()
    try:
        value, *grads = launch(
            _loss, x.contiguous(), b, _contiguous(a), _contiguous(c), *_on_device(q), target.contiguous(), upstream,
            counter(x.device), *options.weights, options.ignore_index, _REDUCTIONS.index(options.reduction),
            *(*(needs or ()), *(False,) * 5)[:5], is_column_major(b), _tf32(x.dtype),
        )  # fmt: skip
    except LaunchError as error:
        _give_up(x.device, error)
        return loss(x, b, a, c, target, options, plan, upstream, needs, q)
    return value, grads


def _loss_by_autograd(
    x: Tensor, b: Tensor, a: Tensor | None, c: Tensor | None, q: Polynomial, target: Tensor, options: LossOptions,
    plan: Plan, upstream: Tensor | None, needs: Sequence[bool] | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The loss of a polynomial without rows, features or columns, or without kernels, by autograd."""
    given = [None if t is None else t.detach() for t in (x, b, a, c, q.coefficients.float())]
    wanted = [t.requires_grad_() for t, need in zip(given, needs or (), strict=False) if need and t is not None]
    x, b, a, c, coefficients = given  # type: ignore[assignment]
    with torch.enable_grad():
        q = Polynomial(coefficients, q.scale)  # type: ignore[arg-type]
        if a is None:
            o1, o2, _ = eager_polynomial.forward(x, b, None, q, eager_polynomial.SAVING, True)
            assert o1 is not None
        else:
            o1, o2 = eager_polynomial.logits(x, b, a, c, q, plan)
        eager.check_target(target, o1.shape[1], options.ignore_index)
        value = eager.three_terms(o1.float(), o2.float(), target, options, True)
        start = torch.ones_like(value) if upstream is None else upstream.float().view(value.shape)
        grads = torch.autograd.grad(value, wanted, start, allow_unused=True, materialize_grads=True) if wanted else ()
    return value.detach(), list(grads)


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Compute `Engine.scale` in place.

    The kernel reads the upstream on the device, and returns early when it is 1: no host sync.
    """
    if _given_up(upstream.device):
        return eager.scale(grads, upstream)
    try:
        launch(_scale, upstream.float(), list(grads))
    except LaunchError as error:
        _give_up(upstream.device, error)
        return eager.scale(grads, upstream)
    return list(grads)
