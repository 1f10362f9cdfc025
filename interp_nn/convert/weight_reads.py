"""Find layers whose `weight` a module around them reads, outside of their own forward."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

# Attributes and functions of a weight that give the same for a summary layer as for a plain layer.
_FACTS = {"device", "dim", "dtype", "is_cuda", "is_meta", "layout", "ndim", "numel", "requires_grad", "shape", "size"}
_QUESTIONS = {"hasattr", "id", "isinstance", "len", "type"}


def read_past_forward(model: nn.Module) -> dict[str, str]:
    """Map the paths of layers whose `weight` a module above them reads to that module's class.

    A summary layer in such a place would give its b to code that wants an effective weight. The search reads the source of
    `forward`, of `loss` and of the methods that they call. It finds expressions like `self.qkv.weight`, except those that ask
    for a shape or a dtype. It does not find a weight that is reached by an index, a local name, getattr or compiled code.
    """
    reads: dict[str, str] = {}
    classes: dict[type, set[str]] = {}
    for name, module in model.named_modules():
        cls = type(module)
        if cls not in classes:
            classes[cls] = set(_reads(cls))
        for path in classes[cls]:
            reads[f"{name}.{path}" if name else path] = cls.__name__
    return reads


def _reads(cls: type) -> Iterator[str]:
    """Yield the paths p of each `self.p.weight` in a class's forward, its loss and the methods that they call."""
    seen, ahead = set(), ["forward", "loss"]
    while ahead:
        method = ahead.pop()
        if method in seen:
            continue
        seen.add(method)
        for owner in cls.__mro__:
            if owner is not nn.Module and inspect.isfunction(vars(owner).get(method)):
                for chain in _chains(vars(owner)[method]):
                    if len(chain) == 1:
                        ahead.append(chain[0])
                    elif "weight" in chain[1:]:
                        end = chain.index("weight", 1)
                        if not _FACTS.intersection(chain[end + 1 : end + 2]):
                            yield ".".join(chain[:end])


def _chains(function: object) -> Iterator[list[str]]:
    """Yield the names after `self` in each `self.a.b.c` of a method; nothing if its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return
    passed = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
    }  # the inside of a longer chain
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS:
            passed.update(map(id, node.args))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in passed:
            continue
        chain, owner = [], node
        while isinstance(owner, ast.Attribute):
            chain.append(owner.attr)
            owner = owner.value  # type: ignore[assignment]
        if isinstance(owner, ast.Name) and owner.id == "self":
            yield chain[::-1]
