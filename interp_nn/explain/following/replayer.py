"""Replay a recorded model with frozen gates: its calls are followed again, and each takes the recorded step."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from interp_nn.explain.following import operations, recurrent
from interp_nn.explain.following.arguments import respelled
from interp_nn.explain.following.calls import (
    Call,
    Dependence,
    continuous,
    map_tensors,
    tensors,
)
from interp_nn.explain.following.dependence import AFFINE, NOT_AFFINE, DependencyMap
from interp_nn.explain.following.recorder import Step, outside_inference_mode


class DivergedError(RuntimeError):
    """The replay made other calls than the recording."""


class Replayer(TorchFunctionMode):
    """Runs a model with each call on affine values replaced by its recorded step.

    Args:
        steps: The recorded steps.
        wanted_steps: Indices of the steps whose preactivations are kept.

    Attributes:
        preactivations: By index, those of the wanted steps.
    """

    def __init__(self, steps: Sequence[Step], wanted_steps: Sequence[int] = ()) -> None:
        super().__init__()
        self._steps, self._next, self._dependences = steps, 0, DependencyMap()
        self._grad = torch.is_grad_enabled()
        self._wanted_steps, self.preactivations = frozenset(wanted_steps), dict[int, Tensor]()

    def mark_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Mark tensors as the network's inputs."""
        for t in inputs:
            self._dependences.set(t, AFFINE)

    def finish(self) -> None:
        """Check that all steps were replayed. Raises DivergedError otherwise."""
        if self._next != len(self._steps):
            raise self._diverged(None)

    def __torch_function__(
        self, func: Callable[..., Any], types_: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with outside_inference_mode():
            return self._handle(func, args, kwargs or {})

    def _handle(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = operations.operation_name(func)
        args, kwargs = respelled(func, name, args, kwargs)
        dependences = operations.relevant(self._dependences.of_arguments(args, kwargs), name, args)
        if not dependences:
            with torch.set_grad_enabled(self._grad):
                return operations.run_constant(Call(func, name, args, kwargs))
        inplace = operations.writes_to_input(func, args, kwargs)
        affine = {key: dependence for key, dependence in dependences.items() if dependence.non_affine is None}
        call = Call(func, name, args, kwargs, inplace, "", affine)
        left_out, result = operations.without_gradients(call)
        if left_out:
            return result
        if any(dependence.mixed for dependence in dependences.values()):
            result = call.run()
            self._set(call, result, next(d for d in dependences.values() if d.mixed))
            return result
        if not affine:
            result = call.run()
            self._set(call, result, NOT_AFFINE)
            return result
        if name in recurrent.KERNELS:
            with self:
                return recurrent.unrolled(call)()
        if name not in operations.TABLE:
            if isinstance(func, types.FunctionType) and func.__module__.startswith("torch"):
                with self:
                    return operations.without_dispatch(func)(*args, **kwargs)
            return func(*args, **kwargs)
        if self._next == len(self._steps) or self._steps[self._next].name != name:
            raise self._diverged(name)
        index, step = self._next, self._steps[self._next]
        self._next += 1
        # The model may run under no_grad; the replay keeps the gradient mode of its caller.
        with torch.set_grad_enabled(self._grad):
            if index in self._wanted_steps:
                z = step.preactivations(call) if step.preactivations is not None else call.input
                self.preactivations[index] = z.clone()
            result = self._run_step(index, step, call)
        dependence = AFFINE if step.affine else NOT_AFFINE
        if inplace:
            self._dependences.write(args[0], dependence)
        for t in tensors(result):
            self._dependences.set(t, dependence if continuous(t) else NOT_AFFINE)
        return result

    def _set(self, call: Call, result: Any, dependence: Dependence) -> None:
        if call.inplace:
            self._dependences.write(call.args[0], dependence)
        self._dependences.set(result, dependence)

    def _run_step(self, index: int, step: Step, call: Call) -> Any:
        return step.replay(call)

    def _diverged(self, name: str | None) -> DivergedError:
        wanted = self._steps[self._next] if self._next < len(self._steps) else None
        return DivergedError(
            f"model: the replay's call {self._next} is {name or 'the end'}, the recording's was "
            f"{f'{wanted.name} in layer {wanted.layer!r}' if wanted else 'the end'}; "
            "want a model that makes the same calls every time"
        )


class ConstantFinder(Replayer):
    """A replay that also runs each step on zeros, and keeps its result where it is not zero.

    Attributes:
        constants: By index of the step, its results on zeros.
    """

    def __init__(self, steps: Sequence[Step], wanted_steps: Sequence[int] = ()) -> None:
        super().__init__(steps, wanted_steps)
        self.constants: dict[int, list[Tensor]] = {}

    def _run_step(self, index: int, step: Step, call: Call) -> Any:
        if (constants := self._on_zeros(step, call)) is not None:
            self.constants[index] = constants
        return step.replay(call)

    def _on_zeros(self, step: Step, call: Call) -> list[Tensor] | None:
        """Return an affine step's results on zeros, or None if they are zero."""
        if not step.affine or step.linear:
            return None
        dependences: dict[int, Dependence] = {}

        def zeros(t: Tensor) -> Tensor:
            if not call.is_affine(t):
                return t
            zero = torch.zeros_like(t)
            dependences[id(zero)] = AFFINE
            return zero

        with torch.no_grad():
            args, kwargs = map_tensors(call.args, zeros), map_tensors(call.kwargs, zeros)
            result = step.replay(Call(call.function, call.name, args, kwargs, call.inplace, call.layer, dependences))
            constants = list(tensors(args[0] if call.inplace else result))
            found = any(bool(c.any()) for c in constants if continuous(c))
            return [c.clone() for c in constants] if found else None


class SampleScaledReplayer(ConstantFinder):
    """A replay that multiplies each layer's constants by a scale of 1 for each sample, which autograd follows.

    Args:
        steps: The recorded steps.
        n: Number of samples.

    Attributes:
        scales: By layer, in call order, its scales (n,).
        by_sample: False if there is a constant whose first dimension is not a multiple of n. It is not scaled.
    """

    def __init__(self, steps: Sequence[Step], n: int) -> None:
        super().__init__(steps)
        self._n, self.scales, self.by_sample = n, dict[str, Tensor](), True

    def _run_step(self, index: int, step: Step, call: Call) -> Any:
        constants = self._on_zeros(step, call)
        result = step.replay(call)
        if constants is None:
            return result
        if any(continuous(c) and (c.dim() == 0 or len(c) % self._n) for c in constants):
            self.by_sample = False
            return result
        like = next(filter(continuous, constants)).real
        if step.layer not in self.scales:
            self.scales[step.layer] = like.new_ones(self._n).requires_grad_()
        change, rest = self.scales[step.layer] - 1, iter(constants)

        def more(c: Tensor) -> Tensor:
            return change.repeat_interleave(len(c) // self._n).view(-1, *[1] * (c.dim() - 1)) * c

        if call.inplace:
            call.args[0].add_(more(next(rest)))
            return result
        return map_tensors(result, lambda t: t + more(c) if continuous(c := next(rest)) else t)


class ScaledReplayer(Replayer):
    """A replay that multiplies the constants of each layer's steps by scales[layer]."""

    def __init__(
        self,
        steps: Sequence[Step],
        wanted_steps: Sequence[int],
        constants: dict[int, list[Tensor]],
        scales: dict[str, Tensor],
    ) -> None:
        super().__init__(steps, wanted_steps)
        self._constants, self._scales = constants, scales

    def _run_step(self, index: int, step: Step, call: Call) -> Any:
        result = step.replay(call)
        if index not in self._constants:
            return result
        constants, change = iter(self._constants[index]), self._scales[step.layer] - 1

        if call.inplace:
            call.args[0].add_(change * next(constants))
            return result
        return map_tensors(result, lambda t: t + change * c if continuous(c := next(constants)) else t)
