"""Table of PyTorch's operations: how each is replayed with frozen gates.

A call on values that are affine in the input gets one of five treatments:

- 'affine': the call is replayed as it is.
- 'gate': a slope and offset, or a selection by index; exact around the input.
- 'piece': the same, but its pieces (for example those of a rounding) are not gates of the pattern.
- 'secant': a slope and offset, or a product with all but one factor held; exact at the input.
- 'frozen': the recorded value, which is not affine. It may only multiply, mask or index affine values.

An operation that is not in the table is not supported.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from interp_nn.explain.following import piecewise_linear, secants
from interp_nn.explain.following.arguments import writes_first
from interp_nn.explain.following.calls import (
    Call,
    CallFunction,
    Dependence,
    Mask,
    Rule,
    RuleResult,
    UnsupportedCallError,
    continuous,
    of_first_argument,
    piecewise_constant,
    reads,
    recorded_value,
    rerun,
)
from interp_nn.explain.following.dependence import overlap, storage_of

_SCALE = "a scale depends on the input"

# Affine operations


def rearrangement(call: Call) -> RuleResult:
    """Rule of views, sums and concatenations: affine in all floating-point arguments; masks and indices may vary."""
    if call.kwargs.get("reduce") not in (None, "add", "sum"):
        raise UnsupportedCallError("it multiplies or compares the values that it scatters")
    if call.dependence(call.kwargs.get("alpha")) is not None:
        raise UnsupportedCallError(_SCALE)
    values = [dependence for t in call.tensors() if continuous(t) and (dependence := call.dependence(t)) is not None]
    return _sum_of(call, values)


def view(call: Call) -> RuleResult:
    """Rule of view: a shape, not another dtype of the same memory."""
    given = [value for value in (*call.args[1:], *call.kwargs.values()) if isinstance(value, torch.dtype)]
    if given and given[0] != call.input.dtype:
        raise UnsupportedCallError(f"it reads the memory as {given[0]}")
    return rearrangement(call)


def parts(call: Call) -> RuleResult:
    """Rule of chunk, split and unbind. Each part is a view by itself, as autograd refuses writes to views made together."""
    treated = rearrangement(call)
    if treated.non_affine is not None:
        return treated
    dim, sizes = (
        call.argument("dim"),
        [] if call.name == "unbind" else [t.shape[call.argument("dim")] for t in call.run()],
    )

    def replay(now: Call) -> Any:
        if not sizes:
            return tuple(now.input.select(dim, i) for i in range(now.input.shape[dim]))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return tuple(now.input.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True))

    return replace(treated, replay=replay)


def addition(call: Call) -> RuleResult:
    """Rule of sums: affine if each argument is affine or piecewise constant."""
    scales = (*call.args[2:], *(value for key, value in call.kwargs.items() if key != "other"))
    if any(call.dependence(value) is not None for value in scales):
        raise UnsupportedCallError(_SCALE)
    return _sum_of(call, list(call.dependences.values()))


def _sum_of(call: Call, values: Sequence[Dependence]) -> RuleResult:
    varying = [value for value in values if not value.piecewise_constant]
    if (non_affine := next((v.non_affine for v in varying if v.non_affine is not None), None)) is not None:
        return recorded_value(call, non_affine)
    factor = min((v.factor for v in varying), default=2)
    return RuleResult("affine", rerun, factor=factor, piecewise_constant=not varying)


def product(factors: Sequence[int], addends: Sequence[int] = (), elementwise: bool = False) -> Rule:
    """Return the rule of a product plus addends; it is affine if at most one factor and every addend is affine.

    Of several affine factors, all but one are held, see `_holding`.

    Args:
        factors: Position of each factor in the signature.
        addends: Position of each addend.
        elementwise: Each entry of the result is a product of one entry of each factor.
    """

    def rule(call: Call) -> RuleResult:
        values = list(call.named.values())
        added = [values[i] for i in addends if i < len(values)]
        operands = [values[i] for i in factors]
        if not set(call.dependences) <= {id(value) for value in (*added, *operands)}:
            raise UnsupportedCallError("an argument other than its factors depends on the input")
        if (non_affine := next((c for value in added if (c := call.non_affine(value)) is not None), None)) is not None:
            return recorded_value(call, non_affine)
        used = {i: d for i in factors if (d := call.dependence(values[i])) is not None}
        affine = {i: d for i, d in used.items() if d.non_affine is None}
        if used and not affine:
            return recorded_value(call)  # gate * constant + affine
        linear = all(value is None for value in added)
        if len(affine) > 1:
            return replace(_holding(call, affine, elementwise), linear=linear)
        factor = min((d.factor for d in affine.values()), default=0) if elementwise else 0
        return RuleResult(_product_treatment([*used.values()]), rerun, factor=factor, linear=linear)

    return rule


def _holding(call: Call, factors: dict[int, Dependence], elementwise: bool = False) -> RuleResult:
    """Return the treatment of a product of several affine factors: all but one are held at their recorded values.

    Factors that are piecewise constant are held first, because that is exact. Then `call.held` decides. "activated" leaves a
    factor free that the least of activations made, the last one of several.

    Args:
        call: The call.
        factors: By position in the signature, the affine factors' dependences.
        elementwise: The product of an activation and another value is itself an activation.
    """
    free = [i for i, d in factors.items() if not d.piecewise_constant] or [*factors]
    if call.held == "activated":
        least = min(factors[i].factor for i in free)
        free = [i for i in free if factors[i].factor == least]
    kept = {i: d for i, d in factors.items() if i != free[0 if call.held == "right" else -1]}
    treatment = "gate" if all(d.piecewise_constant for d in kept.values()) else "secant"
    activated = elementwise and any(d.factor for d in kept.values())
    return RuleResult(treatment, _with_arguments(call, [*kept]), factor=int(activated))


def _with_arguments(recorded: Call, places: Sequence[int]) -> CallFunction:
    """Return the replay of a call with the arguments at some places of its signature as they were recorded."""
    if recorded.inplace:
        written = recorded.input
        for t in recorded.tensors():
            same = (t.shape, t.stride(), t.data_ptr()) == (written.shape, written.stride(), written.data_ptr())
            if not same and storage_of(t) == storage_of(written) and overlap(t, written) != "none":
                raise UnsupportedCallError("it reads memory that it writes to; want a copy")
    names = [*recorded.named] if recorded.kwargs else []
    args = {i: recorded.args[i].detach().clone() for i in places if i < len(recorded.args)}
    kwargs = {names[i]: recorded.kwargs[names[i]].detach().clone() for i in places if i >= len(recorded.args)}

    def replay(call: Call) -> Any:
        if call.inplace and 0 in args:  # mul_, whose other factor may lie in the memory that it writes to
            return call.input.copy_(call.argument("other") * args[0])
        given = tuple(args.get(i, value) for i, value in enumerate(call.args))
        return rerun(replace(call, args=given, kwargs={**call.kwargs, **kwargs}))

    return replay


def detach(call: Call) -> RuleResult:
    """Rule of detach and data: they do not change the value, so the replay ignores them."""
    return RuleResult("affine", lambda now: now.input if now.inplace else now.input.view_as(now.input))


def einsum(call: Call) -> RuleResult:
    """Rule of einsum: a product of its operands."""
    flat = _of_operands(call)
    used = {i: d for i, value in enumerate(flat.args) if (d := call.dependence(value)) is not None}
    affine = {i: d for i, d in used.items() if d.non_affine is None}
    if len(affine) <= 1:
        return RuleResult(_product_treatment([*used.values()]), rerun)
    treated = _holding(flat, affine)
    replay = treated.replay
    assert replay is not None
    return replace(treated, replay=lambda now: replay(_of_operands(now)))


def _of_operands(call: Call) -> Call:
    """Return a call of einsum with its operands as arguments, not in a list."""
    operands = call.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    return replace(call, args=(*call.args[:1], *operands))


def _product_treatment(used: Sequence[Dependence]) -> str:
    """Return the treatment of a product with one affine factor; `used` are the factors that depend on the input."""
    if len(used) <= 1:
        return "affine"
    return "gate" if all(d.piecewise_constant for d in used if d.non_affine is not None) else "secant"


def lerp(call: Call) -> RuleResult:
    """Rule of lerp: a weight that depends on the input is held."""
    weight = call.dependence(call.argument("weight"))
    ends = [d for name in ("input", "end") if (d := call.dependence(call.argument(name))) is not None]
    if weight is None or not ends:
        return _sum_of(call, ends or [*call.dependences.values()])
    treated = _sum_of(call, ends)
    if treated.non_affine is not None:
        return treated
    replay = rerun if weight.non_affine is not None else _with_arguments(call, [2])
    return RuleResult("gate" if weight.piecewise_constant else "secant", replay)


def division(call: Call) -> RuleResult:
    """Rule of a quotient: affine in the numerator. A denominator that depends on the input is held."""
    top, bottom = (call.dependence(call.argument(name)) for name in ("input", "other"))
    if call.argument("rounding_mode") is not None:
        return recorded_value(call)
    if bottom is None or bottom.non_affine is not None:
        return _ELEMENTWISE_PRODUCT(call)
    if top is None or top.non_affine is not None:
        return recorded_value(call)
    treatment = "gate" if bottom.piecewise_constant else "secant"
    return RuleResult(treatment, _with_arguments(call, [1]), factor=top.factor, linear=True)


def batch_norm(call: Call) -> RuleResult:
    """Rule of batch norm by running statistics."""
    if call.argument("training"):
        reason = "it uses the statistics of the batch, which couple its samples; want running statistics, model.eval()"
        raise UnsupportedCallError(reason)
    return rearrangement(call)


_PRODUCT = product([0, 1])
_ELEMENTWISE_PRODUCT = product([0, 1], elementwise=True)
_LINEAR = product([0, 1], [2])
_BILINEAR = product([0, 1, 2], [3])
_PRODUCT_AND_ADDEND = product([1, 2], [0])


def _names(text: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(text.split(), rule)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DROPOUTS = _set("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout")

# The arguments that the gates' and secants' rules read, or that do not matter to them; any other one is refused.
_ACTIVATIONS = {
    "leaky_relu": "negative_slope",
    "prelu": "weight",
    "rrelu": "lower upper training generator",
    "hardtanh": "min_val max_val",
    "threshold": "threshold value",
    "hardshrink": "lambd",
    "softshrink": "lambd",
    "gelu": "approximate",
    "elu": "alpha scale input_scale",
    "celu": "alpha",
}
_SELECTIONS = {
    "max": "dim keepdim other",
    "min": "dim keepdim other",
    "topk": "k dim largest sorted",
    "sort": "dim descending stable",
    "median": "dim keepdim",
    "kthvalue": "k dim keepdim",
}
_NORMS: dict[str, tuple[str, Rule]] = {
    "layer_norm": ("normalized_shape weight bias eps cudnn_enable", secants.layer_normalized),
    "rms_norm": ("normalized_shape weight eps", secants.rms_normalized),
    "group_norm": ("num_groups weight bias eps cudnn_enabled", secants.group_normalized),
    "instance_norm": (
        "running_mean running_var weight bias use_input_stats momentum eps cudnn_enabled",
        secants.instance_normalized,
    ),
}
_POOLING = "kernel_size stride padding dilation ceil_mode output_size return_indices"

TABLE: dict[str, Rule] = {
    # Views, copies and other rearrangements; sums within a tensor; resampling.
    **_names(
        "reshape flatten unflatten ravel squeeze unsqueeze permute transpose t T mT H mH adjoint swapaxes"
        " swapdims movedim moveaxis expand broadcast_to contiguous clone float double half bfloat16 type cpu cuda"
        " unsafe_chunk unsafe_split narrow select slice __getitem__"
        " index_select gather take_along_dim masked_select roll flip fliplr flipud rot90 repeat tile repeat_interleave diagonal"
        " diag_embed tril triu unfold fold pixel_shuffle pixel_unshuffle channel_shuffle alias positive"
        " cat concat concatenate stack hstack vstack dstack column_stack where masked_fill masked_scatter scatter scatter_add"
        " index_add index_copy index_put index_fill select_scatter slice_scatter diagonal_scatter __setitem__ copy fill zero"
        " sum mean cumsum diff nansum pad constant_pad_nd zero_pad2d"
        " avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
        " interpolate upsample upsample_nearest upsample_bilinear max_unpool1d max_unpool2d max_unpool3d"
        " real imag complex view_as_real view_as_complex conj conj_physical resolve_conj resolve_neg",
        rearrangement,
    ),
    "view": view,
    **_names("chunk split split_with_sizes tensor_split unbind", parts),
    **_names("add sub subtract rsub __rsub__ neg negative", addition),
    # Products.
    **_names("mul multiply", _ELEMENTWISE_PRODUCT),
    **_names("matmul mm bmm mv dot inner outer ger kron tensordot __rmatmul__ __matmul__", _PRODUCT),
    **_names("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d", _LINEAR),
    "bilinear": _BILINEAR,
    "einsum": einsum,
    "addcmul": _PRODUCT_AND_ADDEND,
    "lerp": lerp,
    **_names("detach data", detach),
    **_names("view_as reshape_as expand_as type_as to", rearrangement),
    **_names("addmm addmv baddbmm addbmm", _PRODUCT_AND_ADDEND),
    **_names("div divide true_divide", division),
    **dict.fromkeys(_DROPOUTS, rearrangement),  # in evaluation mode; `draws_random_numbers` finds the others
    "batch_norm": of_first_argument(batch_norm),
    # Gates.
    **{
        name: reads(
            _ACTIVATIONS.get(name, ""),
            of_first_argument(
                piecewise_linear.activation(pieces, 2 if name in ("relu6", "hardtanh", "hardsigmoid") else 1)
            ),
        )
        for name, pieces in piecewise_linear.PIECES.items()
    },
    **_names("clamp clip clamp_min clamp_max", reads("min max", piecewise_linear.clamp)),
    "maximum": reads("other", piecewise_linear.maximum(1)),
    "minimum": reads("other", piecewise_linear.maximum(-1)),
    **_names(
        "gt ge lt le greater greater_equal less less_equal eq ne not_equal",
        reads("other", piecewise_linear.comparison),
    ),
    **{
        f"{kind}max_pool{d}d{end}": reads(_POOLING, of_first_argument(piecewise_linear.max_pooling(d)))
        for kind in ("", "adaptive_")
        for d in (1, 2, 3)
        for end in ("", "_with_indices")
    },
    **{name: reads(names, piecewise_linear.selection) for name, names in _SELECTIONS.items()},
    **_names("amax amin", reads("dim keepdim", of_first_argument(piecewise_linear.amax))),
    **_names("argmax argmin", reads("dim keepdim", of_first_argument(piecewise_linear.argmax))),
    "argsort": reads("dim descending stable", of_first_argument(piecewise_linear.argsort)),
    **_names(
        "sign sgn signbit bool logical_not any all count_nonzero nonzero __bool__ is_nonzero",
        of_first_argument(piecewise_linear.sign),
    ),
    **_names("isnan isinf isfinite", piecewise_linear.constant),
    # Secants.
    **{
        name: reads(
            _ACTIVATIONS.get(name, ""), of_first_argument(secants.elementwise(name, 2 if name == "sigmoid" else 1))
        )
        for name in secants.SLOPES
    },
    "softplus": reads("beta threshold", of_first_argument(secants.softplus)),
    "glu": reads("dim", of_first_argument(secants.glu)),
    **_names("square pow", secants.power),
    **{name: reads(names, of_first_argument(rule)) for name, (names, rule) in _NORMS.items()},
    "scaled_dot_product_attention": reads(
        "query key value attn_mask dropout_p is_causal scale enable_gqa", secants.attention
    ),
    # Not affine: their values may multiply, mask or index affine values.
    **_names(
        "softmax log_softmax softmin exp exp2 expm1 log log2 log10 log1p logsumexp __rpow__ sqrt rsqrt reciprocal"
        " __rdiv__ norm vector_norm linalg_vector_norm linalg_norm var std var_mean std_mean prod cos"
        " cosine_similarity cdist pairwise_distance atan2 remainder fmod cross",
        recorded_value,
    ),
    # Piecewise constant, with more pieces than the pattern holds.
    **_names("floor ceil round trunc long int equal allclose", piecewise_constant),
}

# Of a mask: the mask as it is, and the mask that is true where it is false.
_SAME_MASK = _set(
    "to float double half bfloat16 bool int long type type_as clone contiguous detach"
    " view reshape unsqueeze squeeze expand expand_as flatten unflatten __getitem__"
)
_NEGATIONS = _set("logical_not bitwise_not __invert__")
# The arguments of calls that a mask lets values pass through.
_MASKED_BY = {
    **dict.fromkeys(("mul", "multiply"), ("input", "other")),
    "where": ("condition", "input", "other"),
    **dict.fromkeys(("masked_fill", "__setitem__"), ("input", "mask", "value")),
}
# Their result depends on the shape and dtype of the arguments alone.
_CONSTANTS = _set("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty")
# Their result depends on the values of the first argument alone.
_FIRST_ARGUMENT_ONLY = _set("view_as reshape_as expand_as type_as to")
# They copy values out of PyTorch, from where the values may come back as constants.
TO_PYTHON = _set(
    "item tolist numpy __float__ __int__ __index__ __complex__ __array__ set:data __dlpack__ data_ptr untyped_storage storage"
    " __cuda_array_interface__ _local_scalar_dense"
)
_DRAWS = _set(
    "rand randn randint rand_like randn_like randint_like randperm bernoulli binomial normal uniform multinomial exponential"
    " random cauchy geometric log_normal poisson _standard_gamma _sample_dirichlet kaiming_uniform fractional_max_pool2d"
    " fractional_max_pool3d gumbel_softmax svd_lowrank pca_lowrank"
)
_SOMETIMES_DRAWS = _DROPOUTS | {"rrelu", "scaled_dot_product_attention"}
# They change gradients or look at them, and no value; a recorder and a replay leave them out.
_OF_GRADIENTS = _set("register_hook register_post_accumulate_grad_hook retain_grad set:requires_grad requires_grad")
_SAME_AS = {
    "_threshold": "threshold",
    "absolute": "abs",
    "__abs__": "abs",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "__radd__": "add",
    "__rmul__": "mul",
    "__add__": "add",
    "__mul__": "mul",
    "__matmul__": "matmul",
    "__sub__": "sub",
    "__truediv__": "div",
    "__eq__": "eq",
    "__ne__": "ne",
    "concat": "cat",
}


def operation_name(function: Callable[..., Any]) -> str:
    """Return a torch function's name in the table: 'relu' for F.relu, torch.relu_, Tensor.relu and aten.relu alike."""
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


def mask_of(call: Call) -> Mask | None:
    """Return the comparison whose result a call on a mask passes on: cast, negated or seen in another shape."""
    mask = _mask(call, call.args[0]) if call.args and len(call.dependences) == 1 else None
    if mask is None or call.name in _SAME_MASK:
        return mask
    one_less = call.name in ("rsub", "__rsub__") and [v for v in call.args[1:] if not isinstance(v, Tensor)] == [1]
    negated = call.name in _NEGATIONS or (one_less and not call.kwargs)
    return mask._replace(true_on=not mask.true_on) if negated else None


def masked_use(call: Call) -> tuple[Mask, bool] | None:
    """Return the mask of a call that lets a value depending on the input pass on one side only, and True for its true side."""
    if call.name not in _MASKED_BY:
        return None
    names = ("input", "condition", "other") if call.function is Tensor.where else _MASKED_BY[call.name]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    a, b = given.get("input"), given.get("other")
    if call.name == "where":
        choices = [(given.get("condition"), a, b)]
    elif "mask" in names:
        choices = [(given.get("mask"), given.get("value"), a)]
    else:
        choices = [(a, b, None), (b, a, None)]
    for mask, on, off in choices:
        passes = call.dependence(on) is not None
        if (found := _mask(call, mask)) is not None and passes != (call.dependence(off) is not None):
            return found, passes
    return None


def _mask(call: Call, value: object) -> Mask | None:
    dependence = call.dependence(value)
    return None if dependence is None else dependence.mask


@cache
def _index_of_inplace(function: Callable[..., Any]) -> int | None:
    if not isinstance(function, types.FunctionType):
        return None
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return names.index("inplace") if "inplace" in names else None


def draws_random_numbers(call: Call) -> bool:
    """Return True if a call draws random numbers, by its name and arguments."""
    if call.name not in _SOMETIMES_DRAWS:
        return call.name in _DRAWS
    try:
        if call.name in _DROPOUTS:
            return call.argument("training", call.argument("train")) and call.argument("p") > 0
        if call.name == "rrelu":
            return call.argument("training")
        return call.argument("dropout_p") > 0
    except UnsupportedCallError:
        return True


def relevant(dependences: dict[int, Dependence], name: str, args: Sequence[Any]) -> dict[int, Dependence]:
    """Return the dependences of the arguments whose values the result depends on."""
    if name in _CONSTANTS and args:
        return {key: dependence for key, dependence in dependences.items() if key != id(args[0])}
    if name in _FIRST_ARGUMENT_ONLY and args:
        return {key: dependence for key, dependence in dependences.items() if key == id(args[0])}
    return dependences


def writes_to_input(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return True if a call changes its first argument in place."""
    if (by_schema := writes_first(function)) is not None:
        return by_schema
    name = getattr(function, "__name__", "")
    if name == "__setitem__" or (
        name.startswith("__i") and name not in ("__invert__", "__int__", "__index__", "__iter__")
    ):
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    if kwargs.get("inplace", False):
        return True
    index = _index_of_inplace(function)
    return index is not None and index < len(args) and bool(args[index])


def without_gradients(call: Call) -> tuple[bool, Any]:
    """Return True and the result for a call that only concerns gradients, which is left out; else False and None."""
    if call.name not in _OF_GRADIENTS or getattr(call.function, "__name__", "") == "__get__":
        return False, None
    if call.name.startswith("register"):
        return True, RemovableHandle(OrderedDict())
    return True, call.input if call.name == "requires_grad" else None


def run_constant(call: Call) -> Any:
    """Run a call on constants; autograd follows a later write through the memory that detach shares."""
    if call.name in ("detach", "data") and not call.inplace and call.args and not call.args[0].requires_grad:
        return call.args[0].view_as(call.args[0])
    return call.run()


def differentiates(function: Callable[..., Any]) -> bool:
    """Return True for a function that calls autograd's engine, whose calls cannot be recorded."""
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", None) or ""
    return module.startswith("torch.autograd") or (name == "backward" and module.startswith("torch"))


@cache
def without_dispatch(function: types.FunctionType) -> Callable[..., Any]:
    """Return a Python function of PyTorch without its own call of __torch_function__, so that its inner calls are recorded."""
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
