"""Select the layers of a model that can change between plain and summary layers in place, with reasons for the others."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interp_nn.nn.base import LinearForm
from interp_nn.nn.heads import SummaryClassifier, SummaryHead, SummaryLayer
from interp_nn.nn.polynomial_layer import PolynomialLayer
from interp_nn.nn.weights import own_name

Select = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Convertible:
    """Find the layers of a model that `select` chooses, and those of them that cannot be converted.

    Args:
        model: The model.
        select: As in `summarize`.
        classes: Maps each class that can be converted to its new class.
        values: True if the conversion computes with the values of the weights.

    Attributes:
        layers: The chosen layers, in the order of `model.named_modules()`.
        paths: All paths of each module.
        unsupported: Maps each chosen layer that cannot be converted to the reason.

    Raises:
        ValueError: `select` chooses no layer, or gives the exact path of a layer that cannot be converted.
    """

    def __init__(self, model: nn.Module, select: Select, classes: Mapping[type, type], values: bool) -> None:
        self.paths: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, []).append(name)
        summaries = any(issubclass(c, LinearForm) for c in classes)
        layers = [m for m in self.paths if isinstance(m, LinearForm) is summaries and (summaries or _has_matrix(m))]
        self.layers, named = self._selected(select, layers)
        self.unsupported = {m: why for m in self.layers if (why := _unsupported_reason(m, classes, values)) is not None}
        self._tied()
        refused = [
            f"{self.paths[m][0]}: {self.unsupported[m]}" for m in self.layers if m in named & set(self.unsupported)
        ]
        if refused:
            raise ValueError(f"select: cannot convert {'; '.join(refused)}")

    def _selected(self, select: Select, layers: list[nn.Module]) -> tuple[list[nn.Module], set[nn.Module]]:
        """Return the chosen layers, and the set of those that are named by their exact path."""
        if select is None:
            return layers, set()
        if not callable(select) and not isinstance(select, Iterable):
            raise TypeError(
                f"select: got {type(select).__name__}, want a path, several, or a function of (path, module)"
            )
        if callable(select):
            chosen = {m for m in layers if any(select(path, m) for path in self.paths[m])}
            if not chosen:
                raise ValueError("select: chooses none of the model's layers")
            return [m for m in layers if m in chosen], set()
        chosen, named = set(), set()
        for pattern in [select] if isinstance(select, str) else select:
            if not isinstance(pattern, str):
                raise TypeError(f"select: got {type(pattern).__name__}, want a path or a pattern of paths")
            found = {m for m in layers if any(fnmatchcase(path, pattern) for path in self.paths[m])}
            if not found:
                raise ValueError(f"select: {pattern!r} {self._unknown(pattern, layers)}")
            chosen |= found
            named |= {m for m in found if pattern in self.paths[m]}
        if not chosen:
            raise ValueError("select: got no path, want at least one (None selects all layers)")
        return [m for m in layers if m in chosen], named

    def _unknown(self, pattern: str, layers: list[nn.Module]) -> str:
        for module, paths in self.paths.items():
            if pattern in paths:
                return f"is a {type(module).__name__}, not a layer to convert (those in it are {pattern + '.*'!r})"
        near = difflib.get_close_matches(pattern, [path for m in layers for path in self.paths[m]])
        names = [self.paths[m][0] for m in layers]
        known = (
            f"; it has {', '.join(names[:10])}{', ...' * (len(names) > 10)}" if names else ", which has none to convert"
        )
        return "is no layer of the model" + (f"; near it: {', '.join(near)}" if near else known)

    def _tied(self) -> None:
        """Mark layers that are tied to a parameter that stays, or whose weight or b overlaps another parameter in memory."""
        owners: dict[object, list[tuple[nn.Module, str]]] = {}
        for module in self.paths:
            for name, p in module._parameters.items():
                if p is not None:
                    owners.setdefault(memory(p), []).append((module, name))
        for key, other in _overlaps(owners):
            for module, name in owners[key]:
                if module in self.layers and name == own_name(module):
                    self.unsupported.setdefault(
                        module, f"its {name} overlaps {self._name(*owners[other][0])} in memory"
                    )
        for shared in owners.values():
            # One b with another polynomial, gain or norm is another weight.
            kinds = {
                (type(m), getattr(m, "groups", 1), m._weight_key() if isinstance(m, PolynomialLayer) else ())
                for m, _ in (shared if len(shared) > 1 else ())
            }
            stays = next(((m, n) for m, n in shared if m not in self.layers or m in self.unsupported), None)
            for module, name in shared:
                other = stays or (next(s for s in shared if s[0] is not module) if len(kinds) > 1 else None)
                if module in self.layers and name == own_name(module) and other is not None and other[0] is not module:
                    self.unsupported.setdefault(module, f"its {name} is tied to {self._name(*other)}")

    def _name(self, module: nn.Module, parameter: str) -> str:
        return ".".join(filter(None, (self.paths[module][0], parameter)))


def memory(p: Tensor) -> object:
    """Return a value that two parameters share if they are the same entries; a matrix and its transpose share it too."""
    if type(p) is not nn.Parameter or p.layout is not torch.strided or p.is_meta or not p.numel():
        return id(p)
    order = [(stride, size) for stride, size in zip(p.stride(), p.shape, strict=True) if size > 1 or p.dim() != 2]
    return p.device, p.data_ptr(), _end(p), tuple(sorted(order) if p.dim() == 2 else order)


def _end(p: Tensor) -> int:
    """Return the address after that of a tensor's last entry."""
    last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
    return p.data_ptr() + (last + 1) * p.element_size()


def _overlaps(memories: Iterable[object]) -> Iterator[tuple[object, object]]:
    """Yield each memory whose range overlaps that of another one, with that other one."""
    ranges = sorted((m for m in memories if isinstance(m, tuple)), key=lambda m: (str(m[0]), m[1]))
    reaching = None  # of the memories so far, the one with the highest end
    for m in ranges:
        if reaching is not None and m[0] == reaching[0] and m[1] < reaching[2]:
            yield m, reaching
            yield reaching, m
        if reaching is None or m[0] != reaching[0] or m[2] > reaching[2]:
            reaching = m


def _has_matrix(module: nn.Module) -> bool:
    weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
    lazy = isinstance(weight, nn.UninitializedParameter)
    return isinstance(module, nn.Linear | nn.Conv2d) or (weight is not None and not lazy and weight.dim() > 1)


def _unsupported_reason(layer: nn.Module, classes: Mapping[type, type], values: bool) -> str | None:
    """Return the reason why a layer cannot be converted, apart from the modules around it; None if it can."""
    kind: type = parametrize.type_before_parametrizations(layer)
    if kind not in classes:
        base = next((c for c in kind.__mro__ if c in classes), None)
        if isinstance(getattr(layer, own_name(layer), None), nn.UninitializedParameter):
            return "its weight is uninitialized (a lazy module); run the model once first"
        if base is None:
            reason = f"neither {' nor '.join(c.__name__ for c in classes)}"
            if isinstance(layer, SummaryLayer) and nn.Linear not in classes:
                if isinstance(layer, SummaryHead | SummaryClassifier):
                    reason += "; its own fold() returns the plain layers of evaluation mode"
                else:
                    reason += "; an nn.Linear with weight b.T and no bias computes its projection"
            return reason
        return f"a subclass of {base.__name__}, which may compute something else"
    parametrized = parametrize.is_parametrized(layer)
    if parametrized and not issubclass(kind, LinearForm):
        return "parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    if "forward" in vars(layer):
        return "its forward was replaced by another on this very module"
    name = own_name(layer)
    weight: Any = getattr(layer, name)
    if not parametrized and name not in layer._parameters:
        return f"its {name} is computed from other parameters (by pruning, or a weight norm of hooks); make it permanent first"
    if not parametrized and type(weight) is not nn.Parameter:
        return f"its {name} is a {type(weight).__name__} (sharded or quantized?); convert before"
    if weight.dtype not in _DTYPES or weight.layout is not torch.strided:
        return f"its {name} is {weight.dtype}, {weight.layout}; want dense float64, float32, bfloat16 or float16"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return f"its {name} is an inference tensor; convert under torch.inference_mode"
    if not weight.is_meta and weight.numel() * weight.element_size() > _end(weight) - weight.data_ptr():
        return f"its {name}'s entries share memory with each other (an expanded tensor?)"
    if values and weight.is_meta:
        return f"its {name} is on the meta device and has no values"
    if values and not bool(torch.isfinite(weight.detach()).all()):
        return f"its {name} is not finite"
    return None
