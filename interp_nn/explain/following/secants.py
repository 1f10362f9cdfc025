"""Replace smooth operations by their secant y = g z + c, which is exact at the recorded point.

The slope g = (act(z) - c) / z is frozen, with c = act(0). At z = 0 it is the limit, the derivative. Normalizations freeze
the scale; their centring is linear. Attention freezes its weights and is linear in the values.

Source: the detached Jacobian of Golden (TMLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.following.calls import Call, Rule, RuleResult, recorded_value, rerun
from interp_nn.explain.following.piecewise_linear import scale_and_shift


def _ratio(values: Tensor, z: Tensor, limit: float) -> Tensor:
    """Return values / z, and the limit where z is 0."""
    zero = z == 0
    return torch.where(zero, limit, values / torch.where(zero, 1, z))


def _gelu(call: Call) -> Tensor:
    z = call.input
    if call.argument(1, "approximate", default="none") == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def _elu(z: Tensor, alpha: float, scale: float = 1, width: float = 1) -> Tensor:
    below = alpha * _ratio(torch.expm1(z.clamp(max=0) / width), z, 1 / width)
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
    "sin": lambda call: (_ratio(torch.sin(call.input), call.input, 1), None),
    "elu": lambda call: (
        _elu(call.input, call.argument(1, "alpha", default=1.0)),
        None,
    ),
    "celu": lambda call: (
        _elu(call.input, call.argument(1, "alpha", default=1.0), width=call.argument(1, "alpha", default=1.0)),
        None,
    ),
    "selu": lambda call: (_elu(call.input, _SELU_ALPHA, _SELU_SCALE), None),
    "log_sigmoid": lambda call: (_softplus(-call.input), -_LOG2),
}


def elementwise(name: str, factor: bool = False) -> Rule:
    """Return the rule of an activation in SLOPES."""

    def rule(call: Call) -> RuleResult:
        slope, offset = SLOPES[name](call)
        return RuleResult("secant", scale_and_shift(slope, offset), factor=factor)

    return rule


def softplus(call: Call) -> RuleResult:
    """Rule of softplus: log(1 + exp(β z)) / β, and z itself above a threshold of β z."""
    beta, threshold = call.argument(1, "beta", default=1), call.argument(2, "threshold", default=20)
    z = beta * call.input
    slope = torch.where(z > threshold, 1 - _ratio(torch.full_like(z, _LOG2), z, 0), _softplus(z))
    return RuleResult("secant", scale_and_shift(slope, _LOG2 / beta))


def glu(call: Call) -> RuleResult:
    """Rule of glu, a sigmoid(b) for the halves a and b of the input: the sigmoid is frozen."""
    dim = call.argument(1, "dim", default=-1)
    gate = call.input.chunk(2, dim)[1].sigmoid()
    return RuleResult("secant", lambda now: now.input.chunk(2, dim)[0] * gate)


# Normalizations: the centring is linear, the scale is frozen


def layer_normalized(call: Call) -> RuleResult:
    """Rule of layer_norm."""
    shape, weight, bias = (call.argument(i, n) for i, n in ((1, "normalized_shape"), (2, "weight"), (3, "bias")))
    dims = tuple(range(-len(shape), 0))
    return _normalized(call, call.argument(4, "eps", default=1e-5), weight, bias, lambda z: z, dims)


def rms_normalized(call: Call) -> RuleResult:
    """Rule of rms_norm."""
    shape, weight, eps = (call.argument(i, n) for i, n in ((1, "normalized_shape"), (2, "weight"), (3, "eps")))
    eps = torch.finfo(call.input.dtype).eps if eps is None else eps
    return _normalized(call, eps, weight, None, lambda z: z, tuple(range(-len(shape), 0)), centred=False)


def group_normalized(call: Call) -> RuleResult:
    """Rule of group_norm."""
    groups, weight, bias = (call.argument(i, n) for i, n in ((1, "num_groups"), (2, "weight"), (3, "bias")))
    return _by_group(call, groups, call.argument(4, "eps", default=1e-5), weight, bias)


def instance_normalized(call: Call) -> RuleResult:
    """Rule of instance_norm, which is affine if it uses running statistics."""
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    if not call.argument(5, "use_input_stats", default=True):
        return RuleResult("affine", rerun)
    return _by_group(call, call.input.shape[1], call.argument(7, "eps", default=1e-5), weight, bias)


def _by_group(call: Call, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None) -> RuleResult:
    channels = (-1, *[1] * (call.input.dim() - 2))
    weight, bias = (None if t is None else t.view(channels) for t in (weight, bias))
    return _normalized(call, eps, weight, bias, lambda z: z.unflatten(1, (groups, -1)).flatten(2), (-1,))


def _normalized(
    call: Call,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    view: Callable[[Tensor], Tensor],
    dims: tuple[int, ...],
    centred: bool = True,
) -> RuleResult:
    def centre(z: Tensor) -> Tensor:
        z = view(z)
        return z - z.mean(dims, keepdim=True) if centred else z

    scale = torch.rsqrt(centre(call.input).square().mean(dims, keepdim=True) + eps)
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))

    def replay(now: Call) -> Tensor:
        out = (centre(now.input) * scale).view(now.input.shape)
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    return RuleResult("secant", replay)


# Attention: the weights are frozen


def attention(call: Call) -> RuleResult:
    """Rule of scaled_dot_product_attention."""
    query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
    mask, causal = call.argument(3, "attn_mask"), call.argument(5, "is_causal")
    scale, grouped = call.argument(6, "scale"), call.argument(7, "enable_gqa", default=False)
    if not call.is_affine(value):
        return recorded_value(call, call.non_affine(value))
    groups = query.shape[-3] // key.shape[-3] if grouped else 1

    def shared(heads: Tensor) -> Tensor:
        return heads.repeat_interleave(groups, -3) if groups > 1 else heads

    scores = query @ shared(key).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # A query whose keys are all masked gives zeros, as in PyTorch.
    weights = scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
    treatment = "affine" if call.dependence(query) is None and call.dependence(key) is None else "secant"
    return RuleResult(treatment, lambda now: weights @ shared(now.argument(2, "value")))
