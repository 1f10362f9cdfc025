"""Record a model call by call, and decide how each call is replayed."""

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
from torch.utils._python_dispatch import TorchDispatchMode

from interp_nn.explain.following import operations, recurrent
from interp_nn.explain.following.argmax_gates import LazyGates, positive_on_ties
from interp_nn.explain.following.arguments import respelled
from interp_nn.explain.following.calls import (
    RANDOM,
    Call,
    CallFunction,
    Dependence,
    Mask,
    NonAffineCall,
    RuleResult,
    UnsupportedCallError,
    UnsupportedOperation,
    continuous,
    map_tensors,
    piecewise_constant,
    tensors,
)
from interp_nn.explain.following.dependence import AFFINE, UNSEEN, DependencyMap, storage_of


class Step(NamedTuple):
    """One recorded call on affine values.

    Attributes:
        name: The operation's name in the table.
        layer: Path of the layer that made the call.
        replay: Computes the call's result in the replay.
        affine: True if the result is affine in the input.
        linear: True if it is known to be 0 for values of 0.
        preactivations: Computes the preactivations of the call's gates, or None for a call without gates.
    """

    name: str
    layer: str
    replay: CallFunction
    affine: bool
    linear: bool
    preactivations: Callable[[Call], Tensor] | None


class GateCall(NamedTuple):
    """One recorded call with on/off gates.

    Attributes:
        name: The gates' name, as in `GateSite`.
        operation: The operation's name in the table.
        step: Index of the call among the recorder's steps.
        preactivations: At the recorded input.
        zero: For an argmax, True for each window whose largest value is 0; else None.
    """

    name: str
    operation: str
    step: int
    preactivations: Tensor
    zero: Tensor | None = None


class Recorder(TorchFunctionMode):
    """Runs a model unchanged and records how each of its calls is replayed.

    Args:
        layers: Tracks the layer that is running.
        strict: Raise at the first operation that is not supported, instead of noting it in `unsupported`.
        differentiable: Replay each call as soon as it is recorded, so that autograd differentiates with frozen gates.
        keep_preactivations: Keep the preactivations of the gates.
        observe_only: Leave the calls and their gradients as they are.
        held: The factor that a product of two values that depend on the input holds, see `frozen`.

    Attributes:
        steps: The calls on affine values, in call order.
        gate_calls: The calls with gates, in call order.
        rows: (operation, layer, treatment) of each call, for the report.
        unsupported: Each unsupported call, with the number of gate calls before it.
        stopped: True if the model could not be run to its end.
        generators: The random generators and their states before the model first drew from them.
    """

    def __init__(
        self,
        layers: Layers,
        strict: bool = True,
        differentiable: bool = False,
        keep_preactivations: bool = False,
        observe_only: bool = False,
        held: str = "activated",
    ) -> None:
        super().__init__()
        self.layers, self.strict, self.differentiable = layers, strict, differentiable
        self.keep_preactivations, self.observe_only, self.held = keep_preactivations, observe_only, held
        self.steps: list[Step] = []
        self.gate_calls: list[GateCall] = []
        self.rows: list[tuple[str, str, str]] = []
        self.unsupported: list[tuple[int, NonAffineCall]] = []
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        self.stopped = False
        self._dependences = DependencyMap()
        self._name_counts: dict[str, int] = {}
        self._constants: dict[int, Tensor] = {}  # computed from parameters alone
        self._lazy_gates: list[tuple[Tensor, LazyGates]] = []
        self._turned: set[int] = set()  # gate calls of masks whose side is decided
        self._watching = True  # an operator is outside of recorded calls
        self._fault: str | None = None  # why an operator makes the model unsupported, until it is reported

    def mark_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Mark tensors as the network's inputs."""
        for t in inputs:
            self._dependences.set(t, AFFINE)

    def non_affine(self, output: Any) -> NonAffineCall | None:
        """Return the call that made an output not affine in the input, or None for an affine output."""
        for t in tensors(output):
            dependence = self._dependences.get(t)
            if dependence is not None and dependence.non_affine is not None:
                return dependence.non_affine
        return None

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        was_watching, self._watching = self._watching, False
        try:
            with outside_inference_mode():
                return self._handle(func, args, kwargs or {})
        finally:
            self._watching = was_watching

    def _handle(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = operations.operation_name(func)
        if name == "set:_backward_hooks":  # PyTorch's own call on a tensor that an extension returns
            return func(*args, **kwargs)
        args, kwargs = respelled(func, name, args, kwargs)
        dependences = self._dependences.of_arguments(args, kwargs)
        is_input = bool(dependences)
        dependences = operations.relevant(dependences, name, args)
        inplace = operations.writes_to_input(func, args, kwargs)
        call = Call(func, name, args, kwargs, inplace, self.layers.path, dependences, self.held)
        if (reason := self.unrecorded_reason((args, kwargs))) is not None:
            return self._note_unsupported(call, reason)
        if operations.draws_random_numbers(call):
            if not self.strict and not self.generators:
                seen = (torch.default_generator, *torch.cuda.default_generators)
                self.generators = [(generator, generator.get_state()) for generator in seen]
            result = self._note_unsupported(call, RANDOM)
            self._fault = None  # the same draw, which the operators show too
            return result
        if not dependences:
            self._watching = not is_input
            with torch.set_grad_enabled(torch.is_grad_enabled() if self.observe_only else self.differentiable):
                return self._constant(func(*args, **kwargs) if self.observe_only else operations.run_constant(call))
        if operations.differentiates(func):
            return self._differentiated(call)
        if not self.observe_only:
            left_out, result = operations.without_gradients(call)
            if left_out:
                return result
            if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in call.tensors()):
                return self._note_unsupported(call, "it runs inside a transform of torch.func")
        if name in operations.TO_PYTHON:
            return self._note_unsupported(call, "it copies values that depend on the input out of PyTorch")
        if kwargs.get("out") is not None:
            return self._note_unsupported(call, "it writes to out=")
        if any(dependence.mixed for dependence in dependences.values()):
            return self._view_of_mixed(call)
        if inplace:
            self._build_gates_of(args[0])
        if all(dependence.non_affine is not None for dependence in dependences.values()):
            result = call.run()
            dependence = Dependence(
                next(iter(dependences.values())).non_affine,
                piecewise_constant=all(d.piecewise_constant for d in dependences.values()),
                mask=operations.mask_of(call),
            )
            self._set(call, result, dependence)
            return result
        if name in recurrent.KERNELS:
            return self._unrolled(call)
        rule = operations.TABLE.get(name)
        if rule is None:
            return self._unknown(call)
        try:
            with torch.no_grad():
                treated = rule(call)
        except UnsupportedCallError as reason:
            return self._note_unsupported(call, str(reason))
        with torch.set_grad_enabled(torch.is_grad_enabled() if self.observe_only else self.differentiable):
            return self._record(call, treated)

    def _differentiated(self, call: Call) -> Any:
        reason = "it differentiates inside the model"
        if self.strict:
            return self._note_unsupported(call, reason)
        try:
            with torch.enable_grad():
                result = map_tensors(call.run(), Tensor.detach)
        except RuntimeError as error:  # nothing was recorded that autograd can differentiate
            self.note_unsupported_model(str(call.as_non_affine(reason)))
            raise UnsupportedOperation(str(call.as_non_affine(reason))) from error
        return self._note_unsupported(call, reason, result)

    def _set(self, call: Call, result: Any, dependence: Dependence) -> None:
        """Set the dependence of a call's result, and of the memory that it wrote to."""
        if call.inplace:
            self._dependences.write(call.args[0], dependence)
        self._dependences.set(result, dependence)

    def _view_of_mixed(self, call: Call) -> Any:
        """Run a call on memory that holds affine values beside others: a view, or the call is not supported."""
        with torch.set_grad_enabled(self.differentiable):
            result = call.run() if not call.inplace else call.args[0]
        given = [t for t in call.tensors() if (d := call.dependence(t)) is not None and d.mixed]
        if call.inplace or any(all(storage_of(t) != storage_of(other) for other in given) for t in tensors(result)):
            return self._note_unsupported(
                call, "it reads memory that holds values that are affine and others; want copies"
            )
        self._dependences.set(result, next(d for d in call.dependences.values() if d.mixed))
        return result

    def _build_gates_of(self, written: Tensor) -> None:
        """Build the lazy gates of calls whose input a call is about to overwrite."""
        for t, gates in self._lazy_gates:
            if storage_of(t) == storage_of(written):
                _ = gates.gates

    def unrecorded_reason(self, value: Any) -> str | None:
        """Return why the gradient of a value is not that of the recorded calls, or None."""
        if self._fault is not None:
            reason, self._fault = self._fault, None
            return reason
        for t in tensors(value):
            with torch._C.DisableTorchFunction():
                try:
                    node, dependence = t.grad_fn if self.differentiable else None, self._dependences.get(t)
                except RuntimeError as error:
                    return f"autograd cannot follow it: {error}"
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                function = node._forward_cls
                if not function.__module__.startswith("interp_nn."):
                    return (
                        f"the autograd.Function {function.__qualname__} has a gradient of its own; want torch functions"
                    )
            elif (dependence is not None and dependence.unseen) or (
                node is not None and dependence is None and id(t) not in self._constants
            ):
                return _UNRECORDED
        return None

    def see(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an aten operator that drew random numbers, or that ran outside of the recorded calls.

        Outside of them, it is noted if it read values that depend on the input.
        """
        if torch.Tag.nondeterministic_seeded in function.tags and _draws(function, args, kwargs):
            self._fault = f"{function} {RANDOM.removeprefix('it ')}"
        given = (args, kwargs)
        if not self._watching or all(self._dependences.get(t) is None for t in tensors(given)):
            return
        written = list(tensors(given)) if function._schema.is_mutable else []
        if next(tensors(result), None) is None and not written:
            self._fault = f"{function} was called where calls cannot be recorded, in TorchScript or an extension"
        self._watching = False
        try:
            for t in written:
                self._dependences.write(t, UNSEEN)
            self._dependences.set(result, UNSEEN)
        finally:
            self._watching = True

    def _constant(self, result: Any) -> Any:
        for t in tensors(result):
            if t.grad_fn is not None:
                self._constants[id(t)] = t
        return result

    def _unrolled(self, call: Call) -> Any:
        try:
            steps = recurrent.unrolled(call)
        except UnsupportedCallError as reason:
            return self._note_unsupported(call, str(reason))
        with self:
            return steps()

    def _unknown(self, call: Call) -> Any:
        try:
            if isinstance(call.function, types.FunctionType) and call.function.__module__.startswith("torch"):
                with self:
                    return operations.without_dispatch(call.function)(*call.args, **call.kwargs)
            if call.inplace and self.strict:  # autograd may refuse it too, in other words
                return self._note_unsupported(call, "it is not in the table of operations")
            result = call.run()
        except NotImplementedError:  # such as UnsupportedOperation
            raise
        except RuntimeError as error:
            return self._not_followed(call, error)
        if not call.inplace and next(tensors(result), None) is None:
            return result  # a shape, a dtype, a device
        return self._note_unsupported(call, "it is not in the table of operations", result)

    def _not_followed(self, call: Call, error: RuntimeError) -> Any:
        value = _detached(call)  # raises the error of a call that fails in the model itself
        return self._note_unsupported(call, f"autograd cannot follow it: {str(error).splitlines()[0]}", value)

    def _note_unsupported(self, call: Call, reason: str, *result: Any) -> Any:
        non_affine = call.as_non_affine(reason)
        if self.strict:
            raise UnsupportedOperation(str(non_affine))
        self.unsupported.append((len(self.gate_calls), non_affine))
        self.rows.append((call.name, call.layer, "not treated"))
        value = result[0] if result else _detached(call)
        self._set(call, value, Dependence(non_affine))
        return value

    def note_unsupported_model(self, reason: str) -> None:
        """Note, or raise if strict, that the whole model is not supported."""
        non_affine = NonAffineCall("forward", "", reason)
        if self.strict:
            raise UnsupportedOperation(str(non_affine))
        self.unsupported.append((0, non_affine))
        self.rows.append((non_affine.operation, non_affine.layer, "not treated"))

    def _record(self, call: Call, treated: RuleResult) -> Any:
        if treated.preactivations is not None:
            z, zero = torch.empty(0), None
            if self.keep_preactivations:
                z = treated.preactivations(call)
                z = z.clone() if z is call.input else z  # a later call may overwrite the input
                if isinstance(treated.preactivations, LazyGates):
                    zero = treated.preactivations.gates.zero
            elif isinstance(treated.preactivations, LazyGates):
                self._lazy_gates.append((call.input, treated.preactivations))
            self.gate_calls.append(GateCall(self._gate_name(call), call.name, len(self.steps), z, zero))
        non_affine, replay = treated.non_affine, treated.replay
        if self.differentiable:
            with torch.set_grad_enabled(replay is not None):
                try:
                    result = replay(call) if replay is not None else call.run()
                except RuntimeError as error:
                    return self._not_followed(call, error)
        else:
            result = call.run()
        if non_affine is None and not isinstance(result, (tuple, list)) and not all(map(continuous, tensors(result))):
            treated = piecewise_constant(call)
            non_affine = treated.non_affine
        if non_affine is not None or replay is None:
            replay = _recorded(map_tensors(call.args[0] if call.inplace else result, lambda t: t.detach().clone()))
        self.steps.append(
            Step(call.name, call.layer, replay, non_affine is None, treated.linear, treated.preactivations)
        )
        self.rows.append((call.name, call.layer, treated.treatment))
        mask = None if treated.true_on is None else Mask(len(self.gate_calls) - 1, treated.true_on)
        if (use := operations.masked_use(call)) is not None:
            self._turn(*use)
        if call.inplace:
            self._dependences.write(
                call.args[0], Dependence(non_affine, treated.factor, treated.piecewise_constant, mask=mask)
            )
        for t in tensors(result):
            is_index = non_affine is None and not continuous(t)
            origin = call.as_non_affine("it is an index") if is_index else non_affine
            constant = treated.piecewise_constant or is_index
            self._dependences.set(t, Dependence(origin, treated.factor, constant, mask=mask))
        return result

    def _turn(self, mask: Mask, passes_where_true: bool) -> None:
        """Make the gate of a mask the one that is on where the masked value passes."""
        if mask.gate_call in self._turned:
            return
        self._turned.add(mask.gate_call)
        if mask.true_on == passes_where_true:
            return
        call = self.gate_calls[mask.gate_call]
        step = self.steps[call.step]
        before = step.preactivations
        assert before is not None
        self.gate_calls[mask.gate_call] = call._replace(preactivations=positive_on_ties(-call.preactivations))
        self.steps[call.step] = step._replace(preactivations=lambda now: positive_on_ties(-before(now)))

    def _gate_name(self, call: Call) -> str:
        module = self.layers.module
        own = module is not None and type(module).__module__.startswith("torch.nn.modules.") and not module._modules
        stem = (call.layer or call.name) if own else f"{call.layer}:{call.name}"
        count = self._name_counts.get(stem, 0)
        self._name_counts[stem] = count + 1
        return stem if own and count == 0 else f"{stem}#{count}"


class DerivativesKept(TorchFunctionMode):
    """Runs a model's calls outside of inference mode and without detaching, so that forward mode sees them.

    Any mode also turns off the fast paths of transformers, which have no derivative.
    """

    def __init__(self) -> None:
        super().__init__()
        self._grad = torch.is_grad_enabled()

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with outside_inference_mode(), torch.set_grad_enabled(self._grad):
            call = Call(func, operations.operation_name(func), args, kwargs or {})
            if call.name in ("detach", "data") and args:
                return args[0] if operations.writes_to_input(func, args, call.kwargs) else args[0].view_as(args[0])
            left_out, result = operations.without_gradients(call)
            return result if left_out else call.run()


_UNRECORDED = "an argument was computed by calls that cannot be recorded, in TorchScript or an extension"


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode, in which autograd records nothing."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _draws(function: Any, args: Any, kwargs: Any) -> bool:
    """Return True if an operator that may draw random numbers does so with these arguments."""
    known = function._schema.arguments
    given = {a.name: a.default_value for a in known if a.has_default_value()}
    given |= {a.name: value for a, value in zip(known, args, strict=False)} | dict(kwargs)
    switches = [given[name] for name in ("train", "training", "dropout_p", "dropout") if name in given]
    return all(switches)


class UnseenCalls(TorchDispatchMode):
    """Shows a recorder the aten operators of a model, also those that run outside of its calls, for example in TorchScript.

    TorchScript then runs without fusing operators.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder, self._optimized = recorder, True

    def __enter__(self) -> UnseenCalls:
        self._optimized = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_graph_executor_optimize(self._optimized)

    def __torch_dispatch__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # the recorder is a mode of torch functions too
            result = func(*args, **(kwargs or {}))
            self._recorder.see(func, args, kwargs or {}, result)
        return result


def _detached(call: Call) -> Any:
    """Return the call's result without a gradient."""

    def kept(t: Tensor) -> Tensor:
        return t if call.inplace and t is call.args[0] else t.detach()

    with torch.no_grad():
        return call.function(*map_tensors(call.args, kept), **map_tensors(call.kwargs, kept))


def _recorded(value: Any) -> CallFunction:
    """Return the replay that gives a recorded value."""

    def replay(call: Call) -> Any:
        if call.inplace:
            result = call.input.copy_(value)
            return result if call.name != "__setitem__" else None
        return map_tensors(value, Tensor.clone)

    return replay


class Layers:
    """Tracks the running modules by global hooks; the model does not change."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): _path(name) for name, module in model.named_modules()}
        self._stack: list[nn.Module] = []

    @property
    def module(self) -> nn.Module | None:
        """The innermost running module."""
        return self._stack[-1] if self._stack else None

    @property
    def path(self) -> str:
        """Path of the innermost running module that belongs to the model."""
        return next((self._names[id(m)] for m in reversed(self._stack) if id(m) in self._names), "")

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Track the modules that run in this thread."""
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
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # hooks are called twice
                yield
        finally:
            before.remove()
            after.remove()
            self._stack.clear()


def _path(name: str) -> str:
    """Return a module's path without the prefix of compiled modules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
