"""The table: what each operation of PyTorch is once the gates of an input are frozen, by the operation's name.

A call on values that are affine in the input becomes one of: itself ('affine'), a slope and offset or a choice by index that
is exact around the input ('gate'), a secant that is exact at the input ('secant'), or a value that is no longer affine and may
only multiply, mask or index what is ('frozen'). What the table does not name is refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from interp_nn.explain.following import piecewise_linear, secants
from interp_nn.explain.following.calls import (
    Call,
    Kind,
    RefusedError,
    Replay,
    Rule,
    Treatment,
    frozen,
    of_input,
    same,
    stepped,
    tensors,
)

_PRODUCT_OF_TWO = "it multiplies two values that both depend on the input"

# Affine operations


def rearranged(call: Call) -> Treatment:
    """Views, sums, concatenations: affine in all floating-point arguments; masks and indices may depend on the input."""
    if call.kwargs.get("reduce") not in (None, "add", "sum"):
        raise RefusedError("it multiplies or compares what it scatters")
    values = [kind for t in call.tensors() if t.dtype.is_floating_point and (kind := call.kind(t)) is not None]
    return _summed(call, values)


def added(call: Call) -> Treatment:
    """Sums: affine where all that depends on the input is, or is piecewise constant."""
    return _summed(call, list(call.kinds.values()))


def _summed(call: Call, values: Sequence[Kind]) -> Treatment:
    smooth = [kind for kind in values if not kind.step]
    if (source := next((kind.source for kind in smooth if kind.source is not None), None)) is not None:
        return frozen(call, source)
    return Treatment("affine", same, factor=all(kind.factor for kind in smooth), step=not smooth)


def multiplied(factors: Sequence[tuple[int, str]], addends: Sequence[tuple[int, str]] = ()) -> Rule:
    """A product of arguments plus others, each given by place and name: affine where one factor is and no addend is not.

    Of two affine factors, one that comes from a gating function (a sigmoid, say) is frozen.
    """

    def rule(call: Call) -> Treatment:
        added = [call.argument(place, name) for place, name in addends]
        operands = [(place, name, call.argument(place, name, "self", "other", "mat2")) for place, name in factors]
        if not set(call.kinds) <= {id(value) for value in (*added, *(value for _, _, value in operands))}:
            raise RefusedError("an argument beside its factors depends on the input")
        if (source := next((s for value in added if (s := call.source(value)) is not None), None)) is not None:
            return frozen(call, source)
        used = [(place, name, value, kind) for place, name, value in operands if (kind := call.kind(value)) is not None]
        affine = [operand for operand in used if operand[3].source is None]
        if used and not affine:
            return frozen(call)  # gate * constant + affine
        if len(affine) <= 1:
            keeps = bool(affine) and affine[0][3].factor and not addends
            return Treatment(_how([kind for *_, kind in used]), same, factor=keeps)
        gates = [operand for operand in affine if operand[3].factor]
        if len(affine) - len(gates) != 1 or len({id(value) for _, _, value, _ in affine}) < len(affine):
            return frozen(call, call.here(_PRODUCT_OF_TWO))
        how = "gate" if all(kind.step for *_, kind in gates) else "secant"
        return Treatment(how, _with_frozen([(place, name, value.detach().clone()) for place, name, value, _ in gates]))

    return rule


def _with_frozen(values: Sequence[tuple[int, str, Tensor]]) -> Replay:
    """The call with some of its arguments as they were recorded."""

    def replay(call: Call) -> Any:
        args, kwargs = list(call.args), dict(call.kwargs)
        for place, name, value in values:
            if place == 0 and call.inplace:
                args[0].copy_(value)
            elif place < len(args):
                args[place] = value
            else:
                kwargs[name] = value
        return same(Call(call.function, call.name, tuple(args), kwargs, call.inplace, call.layer, call.kinds))

    return replay


def passed(call: Call) -> Treatment:
    """detach and data: for the value of a network it makes no difference where gradients stop."""
    return Treatment("affine", lambda now: now.input if now.inplace else now.input.view_as(now.input))


def summed_products(call: Call) -> Treatment:
    """einsum: affine where one operand is."""
    used = [kind for t in tensors(call.args[1:]) if (kind := call.kind(t)) is not None]
    if sum(kind.source is None for kind in used) > 1:
        return frozen(call, call.here(_PRODUCT_OF_TWO))
    return Treatment(_how(used), same)


def _how(used: Sequence[Kind]) -> str:
    """How a product is treated whose factors that depend on the input are these, one of them affine."""
    if len(used) <= 1:
        return "affine"
    return "gate" if all(kind.step for kind in used if kind.source is not None) else "secant"


def interpolated(call: Call) -> Treatment:
    """lerp."""
    if call.kind(call.argument(2, "weight")) is not None:
        return frozen(call, call.here(_PRODUCT_OF_TWO))
    return added(call)


def divided(call: Call) -> Treatment:
    """A quotient: affine in the numerator."""
    if call.kwargs.get("rounding_mode") is not None or call.affine(call.argument(1, "other")):
        return frozen(call)
    return multiplied([(0, "input"), (1, "other")])(call)


def batch_normalized(call: Call) -> Treatment:
    """Batch norm by running statistics."""
    if call.argument(5, "training", default=False):
        reason = "it uses the statistics of the batch, which couple its samples; want running statistics, model.eval()"
        raise RefusedError(reason)
    return rearranged(call)


_PRODUCT = multiplied([(0, "input"), (1, "other")])
_LINEAR = multiplied([(0, "input"), (1, "weight")], [(2, "bias")])
_BILINEAR = multiplied([(0, "input1"), (1, "input2"), (2, "weight")], [(3, "bias")])


def _addmm(call: Call) -> Treatment:
    return multiplied([(1, "mat1"), (2, "mat2")], [(0, "input")])(call)


def _names(text: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(text.split(), rule)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DROPOUTS = _set("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout")

TABLE: dict[str, Rule] = {
    # Views, copies and other rearrangements; sums within a tensor; resampling.
    **_names(
        "view reshape flatten unflatten ravel squeeze unsqueeze permute transpose t T mT H mH swapaxes"
        " swapdims movedim moveaxis expand broadcast_to contiguous clone float double half bfloat16 type cpu cuda"
        " chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind narrow select slice __getitem__"
        " index_select gather take_along_dim masked_select roll flip fliplr flipud rot90 repeat tile repeat_interleave diagonal"
        " diag_embed tril triu unfold fold pixel_shuffle pixel_unshuffle channel_shuffle alias positive"
        " cat concat concatenate stack hstack vstack dstack column_stack where masked_fill masked_scatter scatter scatter_add"
        " index_add index_copy index_put index_fill select_scatter slice_scatter diagonal_scatter __setitem__ copy fill zero"
        " sum mean cumsum diff nansum pad constant_pad_nd zero_pad2d"
        " avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
        " interpolate upsample upsample_nearest upsample_bilinear max_unpool1d max_unpool2d max_unpool3d",
        rearranged,
    ),
    **_names("add sub subtract rsub __rsub__ neg negative", added),
    # Products.
    **_names("mul multiply matmul mm bmm mv dot inner outer ger kron tensordot __rmatmul__ __matmul__", _PRODUCT),
    **_names("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _LINEAR),
    "bilinear": _BILINEAR,
    "einsum": summed_products,
    "addcmul": multiplied([(1, "tensor1"), (2, "tensor2")], [(0, "input")]),
    "lerp": interpolated,
    **_names("detach data", passed),
    **_names("view_as reshape_as expand_as type_as to", rearranged),
    **_names("addmm addmv baddbmm addbmm", _addmm),
    **_names("div divide true_divide", divided),
    **dict.fromkeys(_DROPOUTS, rearranged),  # which drop nothing, or `draws` says so
    "batch_norm": of_input(batch_normalized),
    # Gates.
    **{
        name: of_input(piecewise_linear.gated(pieces, factor=name in ("relu6", "hardtanh", "hardsigmoid")))
        for name, pieces in piecewise_linear.PIECES.items()
    },
    **_names("clamp clip clamp_min clamp_max", piecewise_linear.clamped),
    "maximum": piecewise_linear.larger(1),
    "minimum": piecewise_linear.larger(-1),
    **_names("gt ge lt le greater greater_equal less less_equal", piecewise_linear.compared),
    **{
        f"{kind}max_pool{d}d{end}": of_input(piecewise_linear.pooled(d))
        for kind in ("", "adaptive_")
        for d in (1, 2, 3)
        for end in ("", "_with_indices")
    },
    **_names("max min topk sort median kthvalue", piecewise_linear.selected),
    **_names("amax amin", of_input(piecewise_linear.largest)),
    # Secants.
    **{name: of_input(secants.elementwise(name, factor=name == "sigmoid")) for name in secants.SLOPES},
    "softplus": of_input(secants.softplus),
    "glu": of_input(secants.glu),
    "layer_norm": of_input(secants.layer_normalized),
    "rms_norm": of_input(secants.rms_normalized),
    "group_norm": of_input(secants.group_normalized),
    "instance_norm": of_input(secants.instance_normalized),
    "scaled_dot_product_attention": secants.attention,
    # Not affine: their values may multiply, mask or index.
    **_names(
        "softmax log_softmax softmin exp exp2 expm1 log log2 log10 log1p logsumexp pow __rpow__ square sqrt rsqrt reciprocal"
        " __rdiv__ norm vector_norm linalg_vector_norm linalg_norm var std var_mean std_mean prod cos"
        " cosine_similarity cdist pairwise_distance atan2 remainder fmod cross",
        frozen,
    ),
    **_names(
        "eq ne isnan isinf isfinite signbit sign sgn floor ceil round trunc argmax argmin argsort long int bool any all"
        " logical_not count_nonzero nonzero __bool__ is_nonzero equal allclose",
        stepped,
    ),
}

# What takes only shape or dtype of its arguments, or of all but the first.
_CONSTANTS = _set("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty")
_LIKENESSES = _set("view_as reshape_as expand_as type_as to")
# What takes values out of PyTorch, from where they may come back as constants.
LEAVES = _set("item tolist numpy __float__ __int__ __index__ __complex__ __array__ set:data __dlpack__")
_DRAWS = _set(
    "rand randn randint rand_like randn_like randint_like randperm bernoulli binomial normal uniform multinomial exponential"
    " random cauchy geometric log_normal poisson _standard_gamma _sample_dirichlet kaiming_uniform fractional_max_pool2d"
    " fractional_max_pool3d gumbel_softmax svd_lowrank pca_lowrank"
)
_SAME_AS = {
    "_threshold": "threshold",
    "absolute": "abs",
    "__abs__": "abs",
    "special_expit": "sigmoid",
    "__radd__": "add",
    "__rmul__": "mul",
    "__add__": "add",
    "__mul__": "mul",
    "concat": "cat",
}


def operation_name(function: Callable[..., Any]) -> str:
    """The name by which the table knows a torch function: 'relu' for F.relu, torch.relu_, Tensor.relu and aten.relu alike."""
    name = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__module__", None) or ""
    owner = getattr(function, "__self__", None)
    if name in ("__get__", "__set__") and owner is not None:
        return owner.__name__ if name == "__get__" else f"set:{owner.__name__}"
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name, namespace = name.split(".")[0], module.removeprefix("torch._ops.")
        if namespace != "aten":
            return f"{namespace}::{name}"
    elif module and module.split(".")[0] != "torch":
        return f"{module}.{name}"
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    elif name.startswith("__i") and f"__{name[3:]}" in _SAME_AS:
        name = f"__{name[3:]}"
    return _SAME_AS.get(name, name)


@cache
def _place_of_inplace(function: Callable[..., Any]) -> int | None:
    if not isinstance(function, types.FunctionType):
        return None
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return names.index("inplace") if "inplace" in names else None


def draws(call: Call) -> bool:
    """Whether a call draws random numbers, for what its name and arguments say."""
    if call.name in _DROPOUTS:
        return call.argument(2, "training", "train", default=True) and call.argument(1, "p", default=0.5) > 0
    if call.name == "rrelu":
        return call.argument(3, "training", default=False)
    if call.name == "scaled_dot_product_attention":
        return call.argument(4, "dropout_p", default=0) > 0
    return call.name in _DRAWS


def that_matter(kinds: dict[int, Kind], name: str, args: Sequence[Any]) -> dict[int, Kind]:
    """The kinds of those arguments whose values the result depends on."""
    if name in _CONSTANTS:
        return {}
    if name in _LIKENESSES and args:
        return {key: kind for key, kind in kinds.items() if key == id(args[0])}
    return kinds


def writes_to_input(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first argument in place."""
    name = getattr(function, "__name__", "")
    if name == "__setitem__" or (
        name.startswith("__i") and name not in ("__invert__", "__int__", "__index__", "__iter__")
    ):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    if kwargs.get("inplace", False):
        return True
    place = _place_of_inplace(function)
    return place is not None and place < len(args) and bool(args[place])


@cache
def opened(function: types.FunctionType) -> Callable[..., Any]:
    """A function of PyTorch that is written in Python, without its own hand-over to the mode: its inner calls are seen."""
    never = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    inner = types.FunctionType(
        function.__code__,
        {**function.__globals__, **never},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner
