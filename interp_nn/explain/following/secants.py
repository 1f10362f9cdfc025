"""Replace smooth operations by their secant y = g z + c, which is exact at the recorded point.

The slope g = (act(z) - c) / z is frozen, with c = act(0). At z = 0 it is the limit, the derivative. Normalizations freeze
the scale; their centring is linear. Attention freezes its weights and is linear in the values. Products of several values
that depend on the input are in `operations`.

Source: the detached Jacobian of Golden (TMLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.following.calls import Call, Rule, RuleResult, map_tensors, recorded_value, rerun
from interp_nn.explain.following.piecewise_linear import scale_and_shift


def _ratio(values: Tensor, z: Tensor, limit: float) -> Tensor:
    """Return values / z, and the limit where z is 0."""
    zero = z == 0
    return torch.where(zero, limit, values / torch.where(zero, 1, z))


def _gelu(call: Call) -> Tensor:
    z = call.input
    if call.argument("approximate") == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def _elu(z: Tensor, alpha: float, scale: float = 1, input_scale: float = 1) -> Tensor:
    below = alpha * _ratio(torch.expm1(z.clamp(max=0) * input_scale), z, input_scale)
    return scale * torch.where(z > 0, 1, below)


def _softplus(z: Tensor) -> Tensor:
    """Return the slope (softplus(z) - log 2) / z = 1/2 + log cosh(z/2) / z."""
    a = z.abs()
    return 0.5 + _ratio(a / 2 - math.log(2) + torch.log1p(torch.exp(-a)), z, 0).where(
        a > 1, _ratio(torch.log1p(2 * torch.sinh(z.clamp(-1, 1) / 4).square()), z, 0)
    )


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_LOG2 = math.log(2)

# Of each activation at the recorded input: slope, and offset c or None for 0.
SLOPES: dict[str, Callable[[Call], tuple[Tensor, float | None]]] = {
    "gelu": lambda call: (_gelu(call), None),
    "silu": lambda call: (torch.sigmoid(call.input), None),
    "mish": lambda call: (torch.tanh(F.softplus(call.input)), None),
    "hardswish": lambda call: (F.hardsigmoid(call.input), None),
    "sigmoid": lambda call: (_ratio(torch.tanh(call.input / 2) / 2, call.input, 0.25), 0.5),
    "tanh": lambda call: (_ratio(torch.tanh(call.input), call.input, 1), None),
    "tanhshrink": lambda call: (1 - _ratio(torch.tanh(call.input), call.input, 1), None),
    "softsign": lambda call: (1 / (1 + call.input.abs()), None),
    "erf": lambda call: (_ratio(torch.erf(call.input), call.input, 2 / math.sqrt(math.pi)), None),
    "sin": lambda call: (_ratio(torch.sin(call.input), call.input, 1), None),
    "elu": lambda call: (
        _elu(call.input, call.argument("alpha"), call.argument("scale", 1), call.argument("input_scale", 1)),
        None,
    ),
    "celu": lambda call: (_elu(call.input, call.argument("alpha"), 1, 1 / call.argument("alpha")), None),
    "selu": lambda call: (_elu(call.input, _SELU_ALPHA, _SELU_SCALE), None),
    "log_sigmoid": lambda call: (_softplus(-call.input), -_LOG2),
}


def _raised(call: Call) -> Call:
    """Return the call with its tensors of 16 bits in fp32, in which PyTorch computes their activations and norms."""
    return Call(call.function, call.name, map_tensors(call.args, _fp32), map_tensors(call.kwargs, _fp32), call.inplace)


def _fp32(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def elementwise(name: str, factor: int = 1) -> Rule:
    """Return the rule of an activation in SLOPES."""

    def rule(call: Call) -> RuleResult:
        slope, offset = SLOPES[name](_raised(call))
        return RuleResult("secant", scale_and_shift(slope.to(call.input.dtype), offset), factor=factor)

    return rule


def softplus(call: Call) -> RuleResult:
    """Rule of softplus: log(1 + exp(β z)) / β, and z itself above a threshold of β z."""
    beta, threshold = call.argument("beta"), call.argument("threshold")
    z = beta * _fp32(call.input)
    slope = torch.where(z > threshold, 1 - _ratio(torch.full_like(z, _LOG2), z, 0), _softplus(z))
    return RuleResult("secant", scale_and_shift(slope.to(call.input.dtype), _LOG2 / beta), factor=1)


def power(call: Call) -> RuleResult:
    """Rule of square and pow: zᵖ for a number p >= 1 is z times zᵖ⁻¹, which is frozen."""
    p = 2 if call.name == "square" else call.args[1] if len(call.args) > 1 else call.kwargs.get("exponent")
    z = call.args[0]
    base = call.dependence(z)
    if not isinstance(p, (int, float)) or p < 1 or base is None or base.non_affine is not None or z.is_complex():
        return recorded_value(call)
    return RuleResult("secant", scale_and_shift(z ** (p - 1), None), factor=base.factor, linear=True)


def glu(call: Call) -> RuleResult:
    """Rule of glu, a sigmoid(b) for the halves a and b of the input: the sigmoid is frozen, or a to hold the left factor."""
    dim = call.argument("dim")
    left, right = call.input.chunk(2, dim)
    if call.held != "left":
        gate = right.sigmoid()
        return RuleResult("secant", lambda now: now.input.chunk(2, dim)[0] * gate, factor=1)
    slope, left = (_ratio(torch.tanh(_fp32(right) / 2) / 2, _fp32(right), 0.25)).to(left.dtype), left.clone()
    return RuleResult("secant", lambda now: left * (now.input.chunk(2, dim)[1] * slope + 0.5), factor=1)


# Normalizations: the centring is linear, the scale is frozen


def layer_normalized(call: Call) -> RuleResult:
    """Rule of layer_norm."""
    dims = tuple(range(-len(_shape(call)), 0))
    return _normalized(call, call.argument("eps"), lambda z: z, dims, lambda t: t)


def rms_normalized(call: Call) -> RuleResult:
    """Rule of rms_norm."""
    eps, dims = call.argument("eps"), tuple(range(-len(_shape(call)), 0))
    eps = default_rms_eps(call.input.dtype, call.input.device) if eps is None else eps
    return _normalized(call, eps, lambda z: z, dims, lambda t: t, centred=False)


def group_normalized(call: Call) -> RuleResult:
    """Rule of group_norm."""
    return _by_group(call, call.argument("num_groups"))


def instance_normalized(call: Call) -> RuleResult:
    """Rule of instance_norm, which is affine if it uses running statistics."""
    if not call.argument("use_input_stats"):
        return RuleResult("affine", rerun)
    return _by_group(call, call.input.shape[1])


@cache
def default_rms_eps(dtype: torch.dtype, device: torch.device) -> float:
    """Return the eps of rms_norm(eps=None), which depends on PyTorch's version: that of the dtype or of its sums' dtype."""
    with torch.inference_mode(False), torch.no_grad():
        t = 2.0**-10
        probe = float(F.rms_norm(torch.full((4,), t, dtype=dtype, device=device), (4,))[0]) / t
    own, wide = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return min((own, wide), key=lambda eps: abs(probe - (t * t + eps) ** -0.5))


def _shape(call: Call) -> tuple[int, ...]:
    shape = call.argument("normalized_shape")
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _by_group(call: Call, groups: int) -> RuleResult:
    channels = (-1, *[1] * (call.input.dim() - 2))
    return _normalized(
        call,
        call.argument("eps"),
        lambda z: z.unflatten(1, (groups, -1)).flatten(2),
        (-1,),
        lambda t: t.view(channels),
    )


def _normalized(
    call: Call,
    eps: float,
    view: Callable[[Tensor], Tensor],
    dims: tuple[int, ...],
    per_entry: Callable[[Tensor], Tensor],
    centred: bool = True,
) -> RuleResult:
    """Return the replay of a normalization.

    Args:
        call: The call, whose weight and bias are read again in each replay.
        eps: Added to the mean square.
        view: Brings the input to a shape whose `dims` are normalized.
        dims: Those dimensions.
        per_entry: Brings the weight or bias to a shape that broadcasts to the input.
        centred: Subtract the mean.
    """

    def centre(z: Tensor) -> Tensor:
        z = view(_fp32(z))
        return z - z.mean(dims, keepdim=True) if centred else z

    scale = torch.rsqrt(centre(call.input).square().mean(dims, keepdim=True) + eps)

    def replay(now: Call) -> Tensor:
        weight, bias = (None if t is None else per_entry(t.detach()) for t in _weights(now))
        out = (centre(now.input) * scale).view(now.input.shape)
        out = out if weight is None else out * weight
        return (out if bias is None else out + bias).to(now.input.dtype)

    return RuleResult("secant", replay)


def _weights(call: Call) -> tuple[Tensor | None, Tensor | None]:
    return call.argument("weight"), call.argument("bias")


# Attention: the weights are frozen


def attention(call: Call) -> RuleResult:
    """Rule of scaled_dot_product_attention."""
    query, key, value = (call.argument(name) for name in ("query", "key", "value"))
    mask, causal = call.argument("attn_mask"), call.argument("is_causal")
    scale, grouped = call.argument("scale"), call.argument("enable_gqa", False)
    if not call.is_affine(value):
        return recorded_value(call, call.non_affine(value))
    groups = query.shape[-3] // key.shape[-3] if grouped else 1

    def shared(heads: Tensor) -> Tensor:
        return heads.repeat_interleave(groups, -3) if groups > 1 else heads

    scores = _fp32(query) @ shared(_fp32(key)).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        triangle = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~triangle, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A query whose keys are all masked gives zeros, as in PyTorch.
    weights = scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0).to(value.dtype)
    fixed = all(d is None or d.piecewise_constant for d in map(call.dependence, (query, key, mask)))
    depends = any(call.dependence(t) is not None for t in (query, key, mask))
    treatment = "secant" if not fixed else "gate" if depends else "affine"
    return RuleResult(treatment, lambda now: weights @ shared(now.argument("value")))
