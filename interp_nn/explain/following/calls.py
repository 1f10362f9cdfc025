"""One call of a torch function on values that depend on a network's input, and what becomes of it once gates are frozen.

A value that depends on the input is either affine in it, given the gates, or it is not; one that is not may still multiply,
mask or index one that is, and is then frozen as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Replay = Callable[["Call"], Any]
Rule = Callable[["Call"], "Treatment"]

RANDOM = "it draws random numbers; want a model without randomness (model.eval())"


class UnsupportedOperation(NotImplementedError):  # noqa: N818 - like NotImplemented, it says what is missing
    """An operation through which no affine map is known: the message names it and its layer."""


class RefusedError(Exception):
    """Raised by a rule for a call that it cannot treat, with the reason."""


@dataclass(frozen=True)
class Source:
    """The call at which a value ceased to be affine in the input."""

    operation: str
    layer: str
    reason: str = "its result is not affine in the input, even where its value is frozen"

    def __str__(self) -> str:
        return f"{self.operation} in layer {self.layer!r}: {self.reason}"


@dataclass(frozen=True)
class Kind:
    """How a tensor depends on the input: affinely (no source), or not.

    factor: its value may be frozen where it multiplies. step: it is piecewise constant, so that freezing it is exact.
    """

    source: Source | None = None
    factor: bool = False
    step: bool = False


@dataclass
class Call:
    """One call of a torch function. kinds holds the arguments that depend on the input, by id."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inplace: bool = False
    layer: str = ""
    kinds: dict[int, Kind] = field(default_factory=dict)

    def run(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def argument(self, place: int, *names: str, default: Any = None) -> Any:
        """An argument by its place or by one of its names."""
        if place < len(self.args):
            return self.args[place]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def input(self) -> Tensor:
        return self.argument(0, "input", "self", "x", "query")

    def kind(self, value: object) -> Kind | None:
        """How an argument depends on the input; None for one that does not."""
        return self.kinds.get(id(value))

    def affine(self, value: object) -> bool:
        kind = self.kind(value)
        return kind is not None and kind.source is None

    def source(self, value: object) -> Source | None:
        kind = self.kind(value)
        return None if kind is None else kind.source

    def here(self, reason: str | None = None) -> Source:
        return Source(self.name, self.layer, reason) if reason else Source(self.name, self.layer)

    def tensors(self) -> Iterator[Tensor]:
        return tensors((self.args, self.kwargs))


@dataclass(frozen=True)
class Treatment:
    """What becomes of a call.

    how: 'affine', 'gate' (exactly piecewise linear), 'secant' or 'frozen'. replay: what computes it in the replay. source:
    set for a value that is not affine, which is replayed as it was recorded. factor, step: see `Kind`. preactivations: of the
    on/off gates, which are on where they are positive.
    """

    how: str
    replay: Replay | None = None
    source: Source | None = None
    factor: bool = False
    step: bool = False
    preactivations: Callable[[Call], Tensor] | None = None


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with each of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(replaced(item, change) for item in value)
    if isinstance(value, tuple):  # torch.return_types
        return type(value)([replaced(item, change) for item in value])
    if type(value) is dict:
        return {key: replaced(item, change) for key, item in value.items()}
    return value


def same(call: Call) -> Any:
    """The call itself: it is affine. Only what is affine in the input gets a gradient."""

    def constant(t: Tensor) -> Tensor:
        return t.detach() if t.requires_grad and not call.affine(t) else t

    return call.function(*replaced(call.args, constant), **replaced(call.kwargs, constant))


def of_input(rule: Rule) -> Rule:
    """A rule for calls of which no argument but the first depends on the input."""

    def checked(call: Call) -> Treatment:
        if set(call.kinds) != {id(call.input)}:
            raise RefusedError("an argument beside the first depends on the input")
        return rule(call)

    return checked


def frozen(call: Call, source: Source | None = None) -> Treatment:
    """A value that is not affine, which is replayed as it was recorded."""
    return Treatment("frozen", source=source or call.here())


def stepped(call: Call) -> Treatment:
    """A value that is piecewise constant: a comparison, a rounding, an index."""
    return Treatment("gate", source=call.here(), step=True)
