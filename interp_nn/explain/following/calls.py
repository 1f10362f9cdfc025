"""One call of a torch function on values that depend on a network's input, and how it is replayed with frozen gates.

With frozen gates, a value is either affine in the input or not. A value that is not affine may still multiply, mask or
index an affine one. It is then replayed as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

CallFunction = Callable[["Call"], Any]
Rule = Callable[["Call"], "RuleResult"]

RANDOM = "it draws random numbers; want a model without randomness (model.eval())"


class UnsupportedOperation(NotImplementedError):  # noqa: N818 - like NotImplemented, it says what is missing
    """An operation has no known affine map; the message names the operation and its layer.

    Example:
        >>> import torch
        >>> from interp_nn.explain import linearize
        >>> try:
        ...     linearize(torch.nn.Softmax(-1), torch.ones(1, 2))
        ... except UnsupportedOperation as error:
        ...     print(str(error).split(":")[0])
        softmax in layer ''
    """


class UnsupportedCallError(Exception):
    """A rule cannot replay a call; the message is the reason."""


@dataclass(frozen=True)
class NonAffineCall:
    """The call from which on a value is not affine in the input, and the reason."""

    operation: str
    layer: str
    reason: str = "its result is not affine in the input, even with frozen gates"

    def __str__(self) -> str:
        return f"{self.operation} in layer {self.layer!r}: {self.reason}"


@dataclass(frozen=True)
class Dependence:
    """The dependence of a tensor on the input.

    Attributes:
        non_affine: The call that made it not affine in the input, or None for an affine tensor.
        factor: True if its value may be frozen where it multiplies another value.
        piecewise_constant: True if freezing its value is exact.
    """

    non_affine: NonAffineCall | None = None
    factor: bool = False
    piecewise_constant: bool = False


@dataclass
class Call:
    """One call of a torch function.

    Attributes:
        function: The torch function.
        name: Its name in the table of operations.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inplace: True if the call writes to its first argument.
        layer: Path of the layer that makes the call.
        dependences: By id, the arguments that depend on the input.
    """

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inplace: bool = False
    layer: str = ""
    dependences: dict[int, Dependence] = field(default_factory=dict)

    def run(self) -> Any:
        """Call the function."""
        return self.function(*self.args, **self.kwargs)

    def argument(self, index: int, *names: str, default: Any = None) -> Any:
        """Return an argument by its position or by one of its names."""
        if index < len(self.args):
            return self.args[index]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return self.argument(0, "input", "self", "x", "query")

    def dependence(self, value: object) -> Dependence | None:
        """Return how an argument depends on the input, or None if it does not."""
        return self.dependences.get(id(value))

    def is_affine(self, value: object) -> bool:
        """Return True for an argument that depends on the input and is affine in it."""
        dependence = self.dependence(value)
        return dependence is not None and dependence.non_affine is None

    def non_affine(self, value: object) -> NonAffineCall | None:
        """Return the call that made an argument not affine, or None."""
        dependence = self.dependence(value)
        return None if dependence is None else dependence.non_affine

    def as_non_affine(self, reason: str | None = None) -> NonAffineCall:
        """Return this call as the one whose result is not affine."""
        return NonAffineCall(self.name, self.layer, reason) if reason else NonAffineCall(self.name, self.layer)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors among the arguments."""
        return tensors((self.args, self.kwargs))


@dataclass(frozen=True)
class RuleResult:
    """The result of a rule: how one call is replayed.

    Attributes:
        treatment: 'affine', 'gate' (exactly piecewise linear), 'secant' or 'frozen'.
        replay: Computes the call's result in the replay.
        non_affine: Set for a result that is not affine; the replay returns its recorded value.
        factor: As in `Dependence`.
        piecewise_constant: As in `Dependence`.
        preactivations: Computes the preactivations of the call's gates. A gate is on where its preactivation is positive.
    """

    treatment: str
    replay: CallFunction | None = None
    non_affine: NonAffineCall | None = None
    factor: bool = False
    piecewise_constant: bool = False
    preactivations: Callable[[Call], Tensor] | None = None


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with `change` applied to each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, tuple):  # torch.return_types
        return type(value)([map_tensors(item, change) for item in value])
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def rerun(call: Call) -> Any:
    """Run an affine call again; only arguments that are affine in the input get a gradient."""

    def constant(t: Tensor) -> Tensor:
        return t.detach() if t.requires_grad and not call.is_affine(t) else t

    return call.function(*map_tensors(call.args, constant), **map_tensors(call.kwargs, constant))


def of_first_argument(rule: Rule) -> Rule:
    """Return a rule that accepts a call only if no argument but the first depends on the input."""

    def checked(call: Call) -> RuleResult:
        if set(call.dependences) != {id(call.input)}:
            raise UnsupportedCallError("an argument other than the first depends on the input")
        return rule(call)

    return checked


def recorded_value(call: Call, non_affine: NonAffineCall | None = None) -> RuleResult:
    """Replay a value that is not affine as it was recorded."""
    return RuleResult("frozen", non_affine=non_affine or call.as_non_affine())


def piecewise_constant(call: Call) -> RuleResult:
    """Replay a piecewise constant value as it was recorded: a comparison, a rounding, an index."""
    return RuleResult("gate", non_affine=call.as_non_affine(), piecewise_constant=True)
