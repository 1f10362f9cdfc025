"""Following a model call by call: once to record what becomes of each call, and again to replay it with the gates frozen."""

from __future__ import annotations

import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp_nn.explain.following import operations
from interp_nn.explain.following.calls import (
    RANDOM,
    Call,
    Kind,
    RefusedError,
    Replay,
    Source,
    Treatment,
    UnsupportedOperation,
    replaced,
    stepped,
    tensors,
)
from interp_nn.explain.following.maxima import Contested


class Step(NamedTuple):
    """A call on affine values: its operation and layer, what replays it, and its gates' preactivations if it has any."""

    name: str
    layer: str
    replay: Replay
    affine: bool
    preactivations: Callable[[Call], Tensor] | None


class Site(NamedTuple):
    """A call with on/off gates: its name, its operation, its step on the tape and its preactivations at the recorded input.

    zero: of a contest, which of its windows have 0 as their largest.
    """

    name: str
    operation: str
    step: int
    preactivations: Tensor
    zero: Tensor | None = None


class DivergedError(RuntimeError):
    """A replay that made other calls than the recording did."""


class _Ledger:
    """How tensors depend on the input. Views share the entry of their base, so that writing through one is seen in all.

    The tensors are kept alive, since they are known by their identity.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Tensor, Kind]] = {}

    def get(self, t: Tensor) -> Kind | None:
        entry = self._entries.get(id(t)) or (self._entries.get(id(t._base)) if t._base is not None else None)
        return None if entry is None else entry[1]

    def set(self, value: Any, kind: Kind | None) -> None:
        for t in tensors(value):
            for alias in (t,) if t._base is None else (t, t._base):
                if kind is None:
                    self._entries.pop(id(alias), None)
                else:
                    self._entries[id(alias)] = (alias, kind)

    def kinds(self, args: Any, kwargs: Any) -> dict[int, Kind]:
        found = {}
        for value in (*args, *kwargs.values()):
            for t in tensors(value):
                if (kind := self.get(t)) is not None:
                    found[id(t)] = kind
        return found


_AFFINE = Kind()


class Recorder(TorchFunctionMode):
    """Runs a model as it is, and writes down what becomes of each call: `steps`, `sites`, and `rows` for the report.

    strict: whether an operation that the table does not name raises at once. differentiable: whether each call is replayed
    as it is recorded, so that autograd sees the gates frozen. keep: whether preactivations are kept. observe: leaves the calls
    and their gradients as they are.
    """

    def __init__(
        self,
        layers: Layers,
        strict: bool = True,
        differentiable: bool = False,
        keep: bool = False,
        observe: bool = False,
    ) -> None:
        super().__init__()
        self.layers, self.strict, self.differentiable = layers, strict, differentiable
        self.keep, self.observe = keep, observe
        self.steps: list[Step] = []
        self.sites: list[Site] = []
        self.rows: list[tuple[str, str, str]] = []
        self.refusals: list[tuple[int, Source]] = []  # with the number of gate sites before
        self.generators: list[tuple[torch.Generator, Tensor]] = []  # as they were before the model first drew
        self._ledger = _Ledger()
        self._site_calls: dict[str, int] = {}
        self._constants: dict[int, Tensor] = {}  # what was computed from parameters alone

    def enter(self, inputs: Sequence[Tensor]) -> None:
        for t in inputs:
            self._ledger.set(t, _AFFINE)

    def blocked(self, output: Any) -> Source | None:
        """Why an output is not affine in the input; None where it is."""
        for t in tensors(output):
            kind = self._ledger.get(t)
            if kind is not None and kind.source is not None:
                return kind.source
        return None

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operations.operation_name(func)
        kinds = operations.that_matter(self._ledger.kinds(args, kwargs), name, args)
        inplace = operations.writes_to_input(func, args, kwargs)
        call = Call(func, name, args, kwargs, inplace, self.layers.path, kinds)
        if (reason := self.unseen((args, kwargs))) is not None:
            return self._refuse(call, reason)
        if operations.draws(call):
            if not self.strict and not self.generators:
                seen = (torch.default_generator, *torch.cuda.default_generators)
                self.generators = [(generator, generator.get_state()) for generator in seen]
            return self._refuse(call, RANDOM)
        if not kinds:
            return self._constant(func(*args, **kwargs))
        if name in operations.LEAVES:
            return self._refuse(call, "it takes values that depend on the input out of PyTorch")
        if kwargs.get("out") is not None:
            return self._refuse(call, "it writes to out=")
        if all(kind.source is not None for kind in kinds.values()):
            result = call.run()
            kind = Kind(next(iter(kinds.values())).source, step=all(kind.step for kind in kinds.values()))
            self._ledger.set((result, args[0]) if inplace else result, kind)
            return result
        rule = operations.TABLE.get(name)
        if rule is None:
            return self._unknown(call)
        try:
            with torch.no_grad():
                treatment = rule(call)
        except RefusedError as reason:
            return self._refuse(call, str(reason))
        with torch.set_grad_enabled(torch.is_grad_enabled() if self.observe else self.differentiable):
            return self._record(call, treatment)

    def unseen(self, value: Any) -> str | None:
        """What is wrong with values whose gradient is not that of the calls that were seen, where it is known."""
        for t in tensors(value) if self.differentiable else ():
            node = t.grad_fn
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                function = node._forward_cls
                if not function.__module__.startswith("interp_nn."):
                    return (
                        f"the autograd.Function {function.__qualname__} has a gradient of its own; want torch functions"
                    )
            elif node is not None and self._ledger.get(t) is None and id(t) not in self._constants:
                return "it is given what comes from calls that are not seen, in TorchScript or an extension"
        return None

    def _constant(self, result: Any) -> Any:
        for t in tensors(result):
            if t.grad_fn is not None:
                self._constants[id(t)] = t
        return result

    def _unknown(self, call: Call) -> Any:
        if isinstance(call.function, types.FunctionType) and call.function.__module__.startswith("torch"):
            with self:
                return operations.opened(call.function)(*call.args, **call.kwargs)
        result = call.run()
        if not call.inplace and next(tensors(result), None) is None:
            return result  # a shape, a dtype, a device
        return self._refuse(call, "it is not in the table of operations", result)

    def _refuse(self, call: Call, reason: str, *result: Any) -> Any:
        source = call.here(reason)
        if self.strict:
            raise UnsupportedOperation(str(source))
        self.refusals.append((len(self.sites), source))
        self.rows.append((call.name, call.layer, "not treated"))
        value = result[0] if result else _detached(call)
        self._ledger.set((value, call.args[0]) if call.inplace else value, Kind(source))
        return value

    def refuse(self, reason: str) -> None:
        """Notes what is wrong with the whole run."""
        source = Source("forward", "", reason)
        if self.strict:
            raise UnsupportedOperation(str(source))
        self.refusals.append((0, source))
        self.rows.append((source.operation, source.layer, "not treated"))

    def _record(self, call: Call, treatment: Treatment) -> Any:
        if treatment.preactivations is not None:
            z, zero = torch.empty(0), None
            if self.keep:
                z = treatment.preactivations(call)
                z = z.clone() if z is call.input else z  # which a later call may overwrite
                if isinstance(treatment.preactivations, Contested):
                    zero = treatment.preactivations.contest.zero
            self.sites.append(Site(self._site_name(call), call.name, len(self.steps), z, zero))
        source, replay = treatment.source, treatment.replay
        if self.differentiable:
            with torch.set_grad_enabled(replay is not None):
                result = replay(call) if replay is not None else call.run()
        else:
            result = call.run()
        floating = all(t.dtype.is_floating_point for t in tensors(result))
        if source is None and not floating and not isinstance(result, (tuple, list)):
            treatment = stepped(call)
            source = treatment.source
        if source is not None or replay is None:
            replay = _recorded(replaced(result, lambda t: t.detach().clone()))
        self.steps.append(Step(call.name, call.layer, replay, source is None, treatment.preactivations))
        self.rows.append((call.name, call.layer, treatment.how))
        if call.inplace:
            self._ledger.set(call.args[0], Kind(source, treatment.factor, treatment.step))
        for t in tensors(result):
            indices = source is None and not t.dtype.is_floating_point
            where = call.here("it is an index") if indices else source
            self._ledger.set(t, Kind(where, treatment.factor, treatment.step or indices))
        return result

    def _site_name(self, call: Call) -> str:
        module = self.layers.module
        own = module is not None and type(module).__module__.startswith("torch.nn.modules.") and not module._modules
        stem = (call.layer or call.name) if own else f"{call.layer}:{call.name}"
        count = self._site_calls.get(stem, 0)
        self._site_calls[stem] = count + 1
        return stem if own and count == 0 else f"{stem}#{count}"


def _detached(call: Call) -> Any:
    """The call's result, without a gradient."""

    def kept(t: Tensor) -> Tensor:
        return t if call.inplace and t is call.args[0] else t.detach()

    with torch.no_grad():
        return call.function(*replaced(call.args, kept), **replaced(call.kwargs, kept))


def _recorded(value: Any) -> Replay:
    def replay(call: Call) -> Any:
        if call.inplace:
            result = call.input.copy_(value)
            return result if call.name != "__setitem__" else None
        return replaced(value, Tensor.clone)

    return replay


class Replayer(TorchFunctionMode):
    """Runs a model with each call on affine values replaced by what the recording made of it.

    taps: the steps whose preactivations are wanted, which come to lie in `tapped`.
    """

    def __init__(self, steps: Sequence[Step], taps: Sequence[int] = ()) -> None:
        super().__init__()
        self._steps, self._next, self._ledger = steps, 0, _Ledger()
        self._grad = torch.is_grad_enabled()
        self._taps, self.tapped = frozenset(taps), dict[int, Tensor]()

    def enter(self, inputs: Sequence[Tensor]) -> None:
        for t in inputs:
            self._ledger.set(t, _AFFINE)

    def finish(self) -> None:
        if self._next != len(self._steps):
            raise self._diverged(None)

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kinds = self._ledger.kinds(args, kwargs)
        name = operations.operation_name(func) if kinds else ""
        kinds = operations.that_matter(kinds, name, args)
        if not kinds:
            return func(*args, **kwargs)
        call = Call(func, name, args, kwargs, operations.writes_to_input(func, args, kwargs), "", kinds)
        if name not in operations.TABLE:
            if isinstance(func, types.FunctionType) and func.__module__.startswith("torch"):
                with self:
                    return operations.opened(func)(*args, **kwargs)
            return func(*args, **kwargs)
        if self._next == len(self._steps) or self._steps[self._next].name != name:
            raise self._diverged(name)
        place, step = self._next, self._steps[self._next]
        self._next += 1
        # A model that stops gradients is no less affine for it.
        with torch.set_grad_enabled(self._grad):
            if place in self._taps:
                z = step.preactivations(call) if step.preactivations is not None else call.input
                self.tapped[place] = z.clone()
            result = self._replayed(place, step, call)
        kind = _AFFINE if step.affine else None
        if call.inplace:
            self._ledger.set(args[0], kind)
        for t in tensors(result):
            self._ledger.set(t, kind if t.dtype.is_floating_point else None)
        return result

    def _replayed(self, place: int, step: Step, call: Call) -> Any:
        return step.replay(call)

    def _diverged(self, name: str | None) -> DivergedError:
        wanted = self._steps[self._next] if self._next < len(self._steps) else None
        return DivergedError(
            f"model: the replay's call {self._next} is {name or 'the end'}, the recording's was "
            f"{f'{wanted.name} in layer {wanted.layer!r}' if wanted else 'the end'}; "
            "want a model that makes the same calls every time"
        )


class ConstantFinder(Replayer):
    """A replay that notes what each step makes of zeros, by the step's place, where that is not zero."""

    def __init__(self, steps: Sequence[Step], taps: Sequence[int] = ()) -> None:
        super().__init__(steps, taps)
        self.constants: dict[int, list[Tensor]] = {}

    def _replayed(self, place: int, step: Step, call: Call) -> Any:
        if step.affine:
            kinds: dict[int, Kind] = {}

            def zeros(t: Tensor) -> Tensor:
                if not call.affine(t):
                    return t
                zero = torch.zeros_like(t)
                kinds[id(zero)] = _AFFINE
                return zero

            args, kwargs = replaced(call.args, zeros), replaced(call.kwargs, zeros)
            result = step.replay(Call(call.function, call.name, args, kwargs, call.inplace, call.layer, kinds))
            constants = list(tensors(args[0] if call.inplace else result))
            if any(bool(c.any()) for c in constants if c.dtype.is_floating_point):
                self.constants[place] = [c.clone() for c in constants]
        return step.replay(call)


class ScaledReplayer(Replayer):
    """A replay whose steps' constants are multiplied: by scales[layer] those of a layer."""

    def __init__(
        self,
        steps: Sequence[Step],
        taps: Sequence[int],
        constants: dict[int, list[Tensor]],
        scales: dict[str, Tensor],
    ) -> None:
        super().__init__(steps, taps)
        self._constants, self._scales = constants, scales

    def _replayed(self, place: int, step: Step, call: Call) -> Any:
        result = step.replay(call)
        if place not in self._constants:
            return result
        constants, change = iter(self._constants[place]), self._scales[step.layer] - 1
        if call.inplace:
            call.args[0].add_(change * next(constants))
            return result
        return replaced(result, lambda t: t + change * c if (c := next(constants)).dtype.is_floating_point else t)


class Layers:
    """The module whose forward is running, and its path, while `following` it. The model itself is left alone."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): _path(name) for name, module in model.named_modules()}
        self._stack: list[nn.Module] = []

    @property
    def module(self) -> nn.Module | None:
        return self._stack[-1] if self._stack else None

    @property
    def path(self) -> str:
        """The innermost running module that the model owns."""
        return next((self._names[id(m)] for m in reversed(self._stack) if id(m) in self._names), "")

    @contextmanager
    def following(self) -> Iterator[None]:
        thread = threading.get_ident()

        def entered(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self._stack.append(module)

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread and self._stack:
                self._stack.pop()

        before = nn.modules.module.register_module_forward_pre_hook(entered)
        after = nn.modules.module.register_module_forward_hook(left, always_call=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # of hooks that are called twice
                yield
        finally:
            before.remove()
            after.remove()
            self._stack.clear()


def _path(name: str) -> str:
    """A module's path, whether it is compiled or not."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
