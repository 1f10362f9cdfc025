"""One call of a torch function on values that depend on a network's input, and how it is replayed with frozen gates.

With frozen gates, a value is either affine in the input or not. A value that is not affine may still multiply, mask or
index an affine one. It is then replayed as it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from interp_nn.explain.following import arguments

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


class Mask(NamedTuple):
    """A comparison's result, as it is, cast, negated or seen in another shape.

    A mask that lets a value that depends on the input pass on one side only, in a product, where, masked_fill or a write, turns
    its gate: the gate is then on where the value passes. So it is for each spelling of a ReLU. The first such use counts.

    Attributes:
        gate_call: Index of the comparison's gates.
        true_on: True if the mask is true where the comparison's gate was on when it was recorded.
    """

    gate_call: int
    true_on: bool


@dataclass(frozen=True)
class Dependence:
    """The dependence of a tensor on the input.

    Attributes:
        non_affine: The call that made it not affine in the input, or None for an affine tensor.
        factor: Of two values that multiply one another, the one with the larger factor is held: 2 for the result of a gating
            function such as a sigmoid, 1 for that of another activation, else 0.
        piecewise_constant: True if freezing its value is exact.
        unseen: True if calls that cannot be recorded computed it.
        mixed: True for memory that holds affine values beside others, so that no recorded value stands for it.
        mask: The comparison whose result it is, or None.
    """

    non_affine: NonAffineCall | None = None
    factor: int = 0
    piecewise_constant: bool = False
    unseen: bool = False
    mixed: bool = False
    mask: Mask | None = None


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
        held: The factor that a product of two values that depend on the input holds, see `frozen`.
    """

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inplace: bool = False
    layer: str = ""
    dependences: dict[int, Dependence] = field(default_factory=dict)
    held: str = "activated"

    def run(self) -> Any:
        """Call the function."""
        return self.function(*self.args, **self.kwargs)

    @cached_property
    def _bound(self) -> tuple[dict[str, Any], frozenset[str]]:
        found = arguments.bound(self.function, self.name, self.args, self.kwargs)
        if found is None:
            names = ", ".join(self.kwargs)
            raise UnsupportedCallError(
                f"its {len(self.args)} arguments{f' and {names}' if names else ''} are those of no known signature"
            )
        return found

    @property
    def named(self) -> dict[str, Any]:
        """All arguments by name, in the order of the signature. Raises UnsupportedCallError for an unknown signature."""
        return self._bound[0]

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by its name, or the default if the signature has no such name."""
        return self.named.get(name, default)

    def check_arguments(self, known: frozenset[str]) -> None:
        """Raise UnsupportedCallError for an argument that is not known and does not have its default value."""
        values, defaults = self._bound
        for name, value in values.items():
            if name not in known and name not in defaults and value is not None:
                got = "a tensor" if isinstance(value, Tensor) else repr(value)
                raise UnsupportedCallError(f"its argument {name} = {got} is not known")

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.named.values()))

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
        treatment: 'affine', 'gate' (exactly piecewise linear), 'piece' (the same, but its pieces are not gates of the
            pattern), 'secant' or 'frozen'.
        replay: Computes the call's result in the replay.
        non_affine: Set for a result that is not affine; the replay returns its recorded value.
        factor: As in `Dependence`.
        piecewise_constant: As in `Dependence`.
        preactivations: Computes the preactivations of the call's gates. A gate is on where its preactivation is positive.
        linear: True if the replay is known to give 0 for 0.
        true_on: For a comparison, True if the result is true where the gate is on, and False if it is so where it is off.
    """

    treatment: str
    replay: CallFunction | None = None
    non_affine: NonAffineCall | None = None
    factor: int = 0
    piecewise_constant: bool = False
    preactivations: Callable[[Call], Tensor] | None = None
    linear: bool = False
    true_on: bool | None = None


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


def continuous(t: Tensor) -> bool:
    """Return True for a tensor of numbers that can vary continuously: floating-point or complex."""
    return t.dtype.is_floating_point or t.dtype.is_complex


def rerun(call: Call) -> Any:
    """Run an affine call again; only arguments that are affine in the input get a gradient."""

    def constant(t: Tensor) -> Tensor:
        if call.is_affine(t):
            return t
        if t.is_inference() and not (call.inplace and t is call.args[0]):
            return t.clone()  # autograd does not save a tensor of inference mode
        return t.detach() if t.requires_grad else t

    return call.function(*map_tensors(call.args, constant), **map_tensors(call.kwargs, constant))


def reads(names: str, rule: Rule) -> Rule:
    """Return a rule that accepts a call only if it has no other argument than the first and the named ones."""
    known = frozenset(("input", "inplace", *names.split()))

    def checked(call: Call) -> RuleResult:
        call.check_arguments(known)
        if any(t.dtype.is_complex for t in call.tensors()):
            raise UnsupportedCallError("it takes complex values")
        return rule(call)

    return checked


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


def piecewise_constant(
    call: Call, preactivations: Callable[[Call], Tensor] | None = None, treatment: str = "piece"
) -> RuleResult:
    """Replay a piecewise constant value as it was recorded: a comparison, a rounding, an index."""
    return RuleResult(
        treatment, non_affine=call.as_non_affine(), piecewise_constant=True, preactivations=preactivations
    )
