"""Arguments of a torch call by one set of names, however the call spells them.

PyTorch's parser accepts NumPy's names beside its own (`axis` for `dim`), a method has no name for its tensor, and an aten
operator calls it `self`. Here it is always `input`.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
_FIRST = ("input", "self", "x", "a", "x1")
_REQUIRED = object()


class _Parameter(NamedTuple):
    name: str
    type: str  # of the operator's schema, or "" if any value fits
    default: Any
    keyword_only: bool


_Signature = tuple[_Parameter, ...]


def respelled(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with PyTorch's own names for NumPy's, and with the first one by position."""
    if not kwargs or (args and not _NUMPY.keys() & kwargs):
        return args, kwargs
    if isinstance(function, types.FunctionType):  # it has names of its own
        return args, kwargs
    signatures = _signatures(function, name)
    own = {parameter.name for signature in signatures for parameter in signature}
    kwargs = {key if key in own else _NUMPY.get(key, key): value for key, value in kwargs.items()}
    if not args and any(signature and signature[0].name == "input" for signature in signatures):
        found = next((key for key in _FIRST if key in kwargs), None)
        if found is not None:
            return (kwargs[found],), {key: value for key, value in kwargs.items() if key != found}
    return args, kwargs


def bound(
    function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], frozenset[str]] | None:
    """Return all arguments of a call by name, in the order of its signature, and the names whose values are defaults.

    Returns None for arguments that no known signature of the function takes.
    """
    for signature in _signatures(function, name):
        if (found := _bound_to(signature, args, kwargs)) is not None:
            return found
    return None


def writes_first(function: Callable[..., Any]) -> bool | None:
    """Return True if an aten operator writes to its first argument, and None for another function."""
    if isinstance(function, torch._ops.OpOverload):
        first = next(iter(function._schema.arguments), None)
        return first is not None and first.alias_info is not None and first.alias_info.is_write
    return None


def _bound_to(
    signature: _Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], frozenset[str]] | None:
    positional = [parameter for parameter in signature if not parameter.keyword_only]
    if len(args) > len(positional):
        return None
    given = {parameter.name: value for parameter, value in zip(positional, args, strict=False)}
    if given.keys() & kwargs or not kwargs.keys() <= {parameter.name for parameter in signature}:
        return None
    given.update(kwargs)
    values, defaults = {}, []
    for name, type_, default, _ in signature:
        if name not in given:
            if default is _REQUIRED:
                return None
            values[name] = default
            defaults.append(name)
        elif _fits(type_, given[name]):
            values[name] = given[name]
            if not isinstance(given[name], Tensor) and (given[name] is default or given[name] == default):
                defaults.append(name)
        else:
            return None
    return values, frozenset(defaults)


def _fits(type_: str, value: Any) -> bool:
    if type_.startswith("Optional["):
        return value is None or _fits(type_[len("Optional[") : -1], value)
    if type_ in ("int", "SymInt"):
        return isinstance(value, (int, torch.SymInt)) or (hasattr(value, "__index__") and not isinstance(value, Tensor))
    if type_ == "bool":
        return isinstance(value, bool)
    if type_ in ("number", "float"):
        return not isinstance(value, (str, tuple, list)) and (not isinstance(value, Tensor) or value.dim() == 0)
    if type_ in ("List[int]", "List[SymInt]"):
        return _fits("int", value) or (isinstance(value, (tuple, list)) and all(_fits("int", item) for item in value))
    if type_ == "Tensor":
        return isinstance(value, Tensor)
    return type_ != "Dimname"  # names of dimensions are not followed


def _signatures(function: Callable[..., Any], name: str) -> tuple[_Signature, ...]:
    if isinstance(function, types.FunctionType):
        return _of_python(getattr(F, f"_{name}", function) if "pool" in name else function)
    if isinstance(function, torch._ops.OpOverload):
        return _of_schemas((function._schema,))
    return _of_operator(name) or _of_operator(getattr(function, "__name__", name))


@cache
def _of_python(function: types.FunctionType) -> tuple[_Signature, ...]:
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return ()
        default = _REQUIRED if parameter.default is parameter.empty else parameter.default
        name = "input" if parameter.name == "self" else parameter.name
        parameters.append(_Parameter(name, "", default, parameter.kind == parameter.KEYWORD_ONLY))
    return (tuple(parameters),)


@cache
def _of_operator(name: str) -> tuple[_Signature, ...]:
    return _of_schemas(torch._C._jit_get_schemas_for_operator(f"aten::{name}"))


def _of_schemas(schemas: Iterable[Any]) -> tuple[_Signature, ...]:
    found = []
    for schema in schemas:
        arguments = schema.arguments
        out = any(a.kwarg_only and a.alias_info is not None and a.alias_info.is_write for a in arguments)
        if not arguments or out or str(arguments[0].type) not in ("Tensor", "Optional[Tensor]"):
            continue
        found.append(
            tuple(
                _Parameter(
                    "input" if a.name == "self" else a.name,
                    str(a.type),
                    a.default_value if a.has_default_value() else _REQUIRED,
                    a.kwarg_only,
                )
                for a in arguments
            )
        )
    return tuple(found)
