"""Trace a network's calls with torch.fx, and classify each node by its meaning.

A layer has one meaning as a module, a function or a method (`nn.ReLU()`, `F.relu(x)`, `x.relu_()`). `_NAMES` is the table.
`trace` normalizes two things. A call that writes in place becomes the call that returns a new tensor. A call that computes
a ReLU in another way (`x.clamp(min=0)`, `x * (x > 0)`, ...) becomes `torch.relu`.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn  # which importing torch has loaded

# The meaning of the modules (of torch.nn and of this library), functions and methods of these names.
_NAMES = {
    "linear": "Linear SummaryLinear linear",
    "matmul": "matmul mm",
    "conv": "Conv1d Conv2d Conv3d SummaryConv2d conv1d conv2d conv3d",
    "conv_transpose": "ConvTranspose1d ConvTranspose2d ConvTranspose3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "batch_norm": "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm batch_norm",
    "relu": "ReLU relu",
    "max_pool": "MaxPool1d MaxPool2d MaxPool3d max_pool1d max_pool2d max_pool3d",
    "avg_pool": "AvgPool1d AvgPool2d AvgPool3d avg_pool1d avg_pool2d avg_pool3d",
    "adaptive_avg_pool": "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    "mean": "mean",
    "flatten": "Flatten flatten",
    "reshape": "Unflatten reshape view unflatten",
    "rearrange": "PixelShuffle PixelUnshuffle ChannelShuffle permute transpose squeeze unsqueeze chunk split expand "
    "getitem pixel_shuffle pixel_unshuffle channel_shuffle",
    "pad": "ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d "
    "ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d pad",
    "upsample": "Upsample UpsamplingNearest2d UpsamplingBilinear2d interpolate",
    "add": "add iadd",
    "sub": "sub isub",
    "cat": "cat concat concatenate",
    "scale": "mul imul div truediv itruediv neg",
    "dropout": "Dropout Dropout1d Dropout2d Dropout3d dropout dropout1d dropout2d dropout3d",
    "identity": "Identity contiguous clone",
    "shape": "size dim numel getattr",
    "gate": "apply_gates",
    "route": "routed",
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_OURS = ("torch.nn.", "interp_nn.nn.")
_MIXED = ("add", "sub", "cat", "gate", "route")  # kinds whose arguments may all depend on the input
_VIEWS = ("identity", "dropout", "flatten", "reshape", "rearrange")  # kinds whose result may be their argument's memory
_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "int", "long")
_COMPARISONS = ("gt", "ge", "greater", "greater_equal", "lt", "le", "less", "less_equal")
_SIZES = ("shape", "ndim", "device", "dtype")
_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def apply_gates(z: torch.Tensor, gates: torch.Tensor, layer: str = "") -> torch.Tensor:
    """Multiply z by given gates, in place of a ReLU.

    Args:
        z: Preactivations of shape (m, *shape); m may be 1.
        gates: Gates of shape (n, *shape).
        layer: Name of the layer, for the message.

    Raises:
        ValueError: The shapes differ after the first dimension, so that the gates would broadcast.
    """
    if z.shape[1:] != gates.shape[1:]:
        raise ValueError(f"gates: got shape {tuple(gates.shape)} for layer {layer!r}, want (n, *{tuple(z.shape[1:])})")
    return z * gates


def routed(z: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pool z (n, c, *positions) by given choices: the entries at flat positions `index` (n, c, *pooled)."""
    return z.flatten(2).gather(2, index.flatten(2)).view_as(index)


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a model's calls into a graph on the model's own parameters and buffers.

    The leaves are layers of torch.nn and of this library. Python that runs while tracing (`if self.training`, loops) is fixed
    as it ran. Arguments of `forward` after the first that have a default keep it. In-place calls and ReLU spellings are
    normalized, see the module's docstring.

    Raises:
        TypeError: `model` is not an nn.Module written in Python.
        ValueError: The model has several inputs. A layer cannot be traced, or writes in place and has no equivalent that does
            not. The message names the inputs, or the layer and the reason.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module of Python")
    model = _of_one_argument(model)
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        layer, module = tracer.running[-1] if tracer.running else ("", model)
        raise ValueError(
            f"model: layer {layer!r} ({type(module).__name__}) cannot be traced: {error}; "
            "want a model whose calls do not depend on the values of its input"
        ) from error
    graph_module = fx.GraphModule(model, graph, type(model).__name__)
    for node in graph.nodes:
        _make_out_of_place(model, graph_module, node)
    for node in list(graph.nodes):
        _normalize_relu(graph_module, node)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs[1:]:
        if not node.users:
            graph.erase_node(node)
            inputs.remove(node)
    if len(inputs) != 1:
        raise ValueError(f"model: takes inputs {[str(node.target) for node in inputs]}, want one")
    graph_module.recompile()
    return graph_module


def _of_one_argument(model: nn.Module) -> nn.Module:
    """Return the model with a forward of one argument, so that the others keep their default values when it is traced."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    needed = [p for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if isinstance(model, fx.GraphModule) or not others or needed:
        return model
    known, own = type(model), copy.copy(model)
    own.__class__ = type(known.__name__, (known,), {"forward": lambda self, x: known.forward(self, x)})
    return own


def kind(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """Return a node's meaning, which does not depend on its spelling.

    Returns:
        One of 'input', 'output', 'constant' (a parameter, a buffer, or a value computed from those alone), 'shape' (a size, or
        arithmetic of sizes); 'linear', 'matmul', 'conv', 'conv_transpose', 'batch_norm', 'relu', 'max_pool', 'avg_pool',
        'adaptive_avg_pool', 'global_avg_pool' (to one position), 'mean', 'flatten' (all but the first dimension), 'reshape',
        'rearrange', 'pad', 'upsample', 'add', 'sub', 'cat', 'scale' (times a constant), 'dropout', 'identity'; 'gate' and
        'route' (see `apply_gates` and `routed`); 'other'. A layer whose weight depends on the input is 'other'. The kind is
        cached in the node's meta.
    """
    if "kind" not in node.meta:
        node.meta["kind"] = _kind(graph_module, node)
    return node.meta["kind"]


def where(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """Describe a node for messages: "Softmax in layer 'head.1'"."""
    called = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return f"{type(called).__name__ if called else name_of(graph_module, node)} in layer {layer_of(node)!r}"


def layer_of(node: fx.Node) -> str:
    """Return the path of the module that a node calls, or in whose code the call is; without torch.compile's wrappers."""
    path = str(node.target) if node.op == "call_module" else node.meta.get("layer", "")
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def name_of(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """Return the name of a method or function, without the underscore of in-place calls, or of a module's class."""
    if node.op != "call_module":
        return str(getattr(node.target, "__name__", node.target)).rstrip("_")
    module = graph_module.get_submodule(str(node.target))
    known = (c.__name__ for c in type(module).__mro__ if c.__module__.startswith(_OURS) and c.__name__ in _KINDS)
    return next(known, type(module).__name__)


def first(node: fx.Node) -> Any:
    """Return the first argument of a call, which most layers transform."""
    return node.args[0] if node.args else node.kwargs.get("input")


def argument(graph_module: fx.GraphModule, node: fx.Node, place: int, name: str) -> Any:
    """Return an argument of a call, or the called module's attribute of that name; None if it is not given."""
    if node.op == "call_module":
        return getattr(graph_module.get_submodule(str(node.target)), name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _kind(graph_module: fx.GraphModule, node: fx.Node) -> str:
    fixed = {"placeholder": "input", "output": "output", "get_attr": "constant"}.get(node.op)
    if fixed is not None:
        return fixed
    sources: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), sources.append)
    varying = [source for source in sources if kind(graph_module, source) not in ("constant", "shape")]
    if not varying and node.op != "call_module":
        return "shape" if any(kind(graph_module, source) == "shape" for source in sources) else "constant"
    name = name_of(graph_module, node)
    found = _KINDS.get(name, "other")
    by_constant = name in ("mul", "imul") and len(varying) == 1
    if found not in _MIXED and not by_constant and varying != [first(node)]:
        return "other"
    if name in ("div", "divide") and node.kwargs.get("rounding_mode") is not None:
        return "other"
    if found == "shape" and name == "getattr" and node.args[1] not in _SIZES:
        return "other"
    if found == "flatten":
        start, end = argument(graph_module, node, 1, "start_dim"), argument(graph_module, node, 2, "end_dim")
        return found if start == 1 and end in (None, -1) else "reshape"
    if found == "reshape" and node.op == "call_method":
        sizes: Any = node.args[1:]
        sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
        return "flatten" if len(sizes) == 2 and sizes[1] == -1 else found
    if found == "adaptive_avg_pool":
        size = argument(graph_module, node, 1, "output_size")
        return "global_avg_pool" if size == 1 or (isinstance(size, (tuple, list)) and set(size) == {1}) else found
    return found


class _Proxy(fx.Proxy):
    """A proxy that records `x += y` as a write to x; torch.fx's own records x + y."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """A tracer that stores each call's module, and knows the module that was running when tracing failed."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(apply_gates, routed))
        self.running: list[tuple[str, nn.Module]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m.__module__.startswith(_OURS) and not isinstance(m, nn.Sequential)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        compiled = getattr(m, "_orig_mod", None)
        if compiled is not None:
            return self.call_module(compiled, compiled.forward, args, kwargs)
        self.running.append((self.path_of_module(m), m))
        result = super().call_module(m, forward, args, kwargs)
        self.running.pop()  # not after an exception: then the last module is the one that failed
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["layer"] = self.running[-1][0] if self.running else ""
        return node


def _make_out_of_place(model: nn.Module, graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a call that writes in place by one that does not; later readers of the written value read its result."""
    target, name = node.target, str(getattr(node.target, "__name__", node.target))
    refusal = f"model: {where(graph_module, node)} writes in place; want a call that returns a new tensor"
    if node.op == "call_module":
        module = model.get_submodule(str(target))
        if not getattr(module, "inplace", False):
            return
        module = copy.copy(module)  # the model's own module is not changed
        module.inplace = False  # type: ignore[assignment]
        graph_module.set_submodule(str(target), module)
    elif target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[target]
    elif node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__"):
        other = getattr(torch.Tensor if node.op == "call_method" else torch, name[:-1], None)
        if other is None:
            raise ValueError(refusal)
        node.target = name[:-1] if node.op == "call_method" else other
    elif target is operator.setitem or node.kwargs.get("out") is not None:
        raise ValueError(refusal)
    elif not _cleared(node):
        return
    written, nodes = first(node), list(node.graph.nodes)
    earlier = set(nodes[: nodes.index(node) + 1])
    aliases = _aliases(graph_module, written, nodes[: nodes.index(node)])
    late = [user for alias in aliases - {written} for user in alias.users if user not in earlier]
    if late:
        raise ValueError(f"{refusal}, since {where(graph_module, late[0])} reads what shares its memory")
    written.replace_all_uses_with(node, lambda user: user not in earlier)


def _aliases(graph_module: fx.GraphModule, node: fx.Node, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return those of `nodes` that may share memory with `node`."""
    base = node
    while kind(graph_module, base) in _VIEWS:
        base = first(base)
    found = {base}
    for other in nodes:
        if kind(graph_module, other) in _VIEWS and first(other) in found:
            found.add(other)
    return found


def _normalize_relu(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a call that computes a ReLU by torch.relu, and erase the comparisons and zeros that only it used.

    `meta["spelling"]` of the new node is the operation that `explain.record` names the gate by.
    """
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if isinstance(module, nn.Threshold) and module.threshold == module.value == 0:
            graph_module.set_submodule(str(node.target), nn.ReLU())
    if node.op not in ("call_function", "call_method"):
        return
    z, name = _relu_input(graph_module, node)
    if z is None:
        return
    with node.graph.inserting_before(node):
        relu = node.graph.call_function(torch.relu, (z,))
    relu.meta = {"layer": node.meta.get("layer", ""), "spelling": name}
    node.replace_all_uses_with(relu)
    unused = [node]
    for other in unused:
        if not other.users and other.op != "placeholder":
            unused += [source for source in other.all_input_nodes if source not in unused]
            node.graph.erase_node(other)


def _relu_input(graph_module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node | None, str]:
    """Return (z, operation) for a call that computes max(z, 0), else (None, ""). The operation is the one with the gate."""
    name, a = name_of(graph_module, node).lstrip("_"), first(node)  # F.threshold's own name is _threshold

    def given(place: int, argument_name: str) -> Any:
        return argument(graph_module, node, place, argument_name)

    def zero(value: Any, z: Any) -> bool:
        return _is_zero(graph_module, value, z)

    if name in ("clamp", "clip"):
        found = zero(given(1, "min"), a) and given(2, "max") is None
    elif name == "clamp_min":
        found = zero(given(1, "min"), a)
    else:
        found = name == "threshold" and zero(given(1, "threshold"), a) and zero(given(2, "value"), a)
    if found:
        return a, name
    if name in ("maximum", "max"):  # with a number, max is along that dimension
        b = given(1, "other")
        both = isinstance(a, fx.Node) and isinstance(b, fx.Node)
        return next(((z, name) for z, other in ((a, b), (b, a)) if both and zero(other, z)), (None, ""))
    choices: list[tuple[Any, Any, Any]] = []  # (mask, the value where it is True, the value where it is False)
    if name == "where":
        place = 1 if node.op == "call_method" else 0
        choices = [(given(place, "condition"), given(1 - place, "input"), given(2, "other"))]
    elif name == "masked_fill":
        choices = [(given(1, "mask"), given(2, "value"), a)]
    elif name in ("mul", "multiply"):
        b = given(1, "other")
        choices = [(b, a, 0), (a, b, 0)]
    for mask, on, off in choices:
        z, positive, compared = _comparison(graph_module, mask)
        kept, other = (on, off) if positive else (off, on)
        if z is not None and z is kept and zero(other, z):
            return z, compared
    return None, ""


def _comparison(graph_module: fx.GraphModule, mask: Any) -> tuple[fx.Node | None, bool, str]:
    """Return (z, whether it is z > 0 rather than z < 0, name) for a comparison of z with 0, strict or not, cast or not."""
    while isinstance(mask, fx.Node) and mask.op == "call_method" and name_of(graph_module, mask) in _CASTS:
        mask = first(mask)
    name = name_of(graph_module, mask) if isinstance(mask, fx.Node) else ""
    if name not in _COMPARISONS:
        return None, True, name
    a, b = first(mask), argument(graph_module, mask, 1, "other")
    greater = name.startswith("g")
    if isinstance(a, fx.Node) and _is_zero(graph_module, b, a):
        return a, greater, name
    if isinstance(b, fx.Node) and _is_zero(graph_module, a, b):
        return b, not greater, name
    return None, True, name


def _is_zero(graph_module: fx.GraphModule, value: Any, z: Any) -> bool:
    """Return whether a value is 0 and does not broadcast z: a number, one entry, or zeros of z's shape. No parameter is."""
    if isinstance(value, (int, float)):
        return value == 0
    if not isinstance(value, fx.Node):
        return False
    if value.op == "get_attr":
        held = operator.attrgetter(str(value.target))(graph_module)
        constant = isinstance(held, torch.Tensor) and not isinstance(held, nn.Parameter) and not held.is_meta
        return constant and held.numel() == 1 and held.dim() <= 1 and not bool(held.any())
    name = name_of(graph_module, value)
    if name not in ("zeros_like", "new_zeros") or first(value) is not z:
        return False
    size = argument(graph_module, value, 1, "size") if name == "new_zeros" else ()
    if isinstance(size, fx.Node):
        return name_of(graph_module, size) in ("size", "getattr") and size.args in ((z,), (z, "shape"))
    return size in (1, (), (1,), [], [1])


def _cleared(node: fx.Node) -> bool:
    """Set `inplace=True` of a torch.nn.functional call to False; return whether it was True."""
    if node.op != "call_function" or not inspect.isfunction(node.target):
        return False
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except TypeError:
        return False
    if given.arguments.get("inplace") is not True:
        return False
    given.arguments["inplace"] = False
    node.args, node.kwargs = given.args, given.kwargs
    return True
