"""EffectiveWeight: a weight computed from b that can be read and differentiated, and refuses to be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from interp_nn.ops.library import is_wrapped

READ_ONLY = (
    "weight: is computed from b at each read and cannot be written or assigned; call `layer.set_weight_(W)` for the b whose "
    "weight is W, `layer.reset_parameters()` to draw b anew, or `layer.fold()` for a plain layer"
)

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITES = {"__set__", "__setitem__", "__delitem__", *(f"__i{operator}__" for operator in _OPERATORS)}


class EffectiveWeight(Tensor):
    """Hold an effective weight. Results are plain tensors; views of it refuse in-place operations as it does."""

    @classmethod
    def of(cls, weight: Tensor) -> Tensor:
        """Return `weight` as an EffectiveWeight; unchanged if it has another type, or is compiled or transformed."""
        if torch.compiler.is_compiling() or type(weight) is not Tensor or is_wrapped(weight):
            return weight
        return weight.as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on plain tensors. Raises ValueError where it would write to an effective weight."""
        kwargs = kwargs or {}
        if any(isinstance(t, cls) for t in tree_leaves(_written(getattr(func, "__name__", ""), args, kwargs))):
            raise ValueError(READ_ONLY)  # numpy's choice too; PyTorch turns a TypeError in `w += 1` into `w = w + 1`
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            own = [t for t in tree_leaves((args, kwargs)) if isinstance(t, cls)]
            if isinstance(out, (tuple, list)) and any(isinstance(t, Tensor) for t in out):
                return type(out)([_guarded(t, own) for t in out])
            return _guarded(out, own)

    def plain(self) -> Tensor:
        """Return the same memory as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a plain tensor with a copy of the values."""
        return self.plain().__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain tensor, which loads without this package."""
        return self.plain().__reduce_ex__(protocol)


def _written(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what a call writes to, as far as its name and arguments say."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    writes = name in _WRITES or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    return kwargs.get("out"), first if writes else None


def _guarded(out: Any, own: Sequence[Tensor]) -> Any:
    if type(out) in (Tensor, EffectiveWeight) and out.layout is torch.strided and not is_wrapped(out):
        shared = any(torch._C._is_alias_of(out, t) for t in own)  # type: ignore[attr-defined] # not in the stubs
        return out.as_subclass(EffectiveWeight if shared else Tensor)
    return out
