"""Record a model at an input, and replay it with frozen gates: an affine function."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from interp_nn.explain.following import operations
from interp_nn.explain.following.calls import UnsupportedOperation, map_tensors
from interp_nn.explain.following.recorder import DerivativesKept, Layers, Recorder, UnseenCalls
from interp_nn.explain.following.replayer import ConstantFinder, Replayer, SampleScaledReplayer, ScaledReplayer
from interp_nn.functional import calls_followed
from interp_nn.gates.jvp import jvp
from interp_nn.gates.record import place_of

Inputs = tuple[Tensor, ...]
Select = Callable[[Any], Any]
_LAYERS_AT_ONCE, _ROWS_AT_ONCE = 8, 16
_LOCK, _stance, _holders = threading.Lock(), ExitStack(), 0  # of `_forced_eager`
_hooks_of: dict[int, tuple[Any, ...]] = {}  # by a module's id: threads that follow it, and its backward hooks


@dataclass(frozen=True)
class Recording:
    """One run of a model under a recorder.

    Attributes:
        model: The model.
        inputs: Leaf tensors. If the recorder is differentiable, autograd can differentiate the output by them.
        recorder: The recorder.
        output: The selected output of the model.
    """

    model: nn.Module
    inputs: Inputs
    recorder: Recorder
    output: Any

    def check_affine(self, gate_call: int | None = None) -> None:
        """Check that the output, or a gate call's preactivation, is affine given its gates.

        Raises UnsupportedOperation otherwise.
        """
        before = [call for index, call in self.recorder.unsupported if gate_call is None or index <= gate_call]
        call = before[0] if before else None if gate_call is not None else self.recorder.non_affine(self.output)
        if call is not None:
            raise UnsupportedOperation(
                f"{call}; want a model whose output is affine given its gates, or mode='tangent'"
            )

    def check_complete(self) -> None:
        """Check that the model was run to its end. Raises UnsupportedOperation otherwise."""
        if self.recorder.stopped:
            raise UnsupportedOperation(str(self.recorder.unsupported[-1][1]))

    def check_stays_in_torch(self) -> None:
        """Check that no value that depends on the input left PyTorch. Raises UnsupportedOperation otherwise."""
        self.check_complete()
        for _, call in self.recorder.unsupported:
            if call.operation in operations.TO_PYTHON:
                raise UnsupportedOperation(f"{call}; no derivative sees it")

    def gate_call(self, layer: str | int) -> int:
        """Return the index of a gate call that is given by name or index. Raises ValueError for another one."""
        return place_of([call.name for call in self.recorder.gate_calls], layer)


def run_recorded(
    model: nn.Module,
    x: Tensor | Inputs,
    select: Select = lambda output: output,
    *,
    strict: bool = True,
    differentiable: bool = False,
    keep_preactivations: bool = False,
    held: str = "activated",
) -> Recording:
    """Record select(model(x)); the options are those of `Recorder`."""
    check_model(model)
    inputs = tuple(t.detach() for t in check_inputs(x))
    layers = Layers(model)
    recorder = Recorder(layers, strict, differentiable, keep_preactivations, held=held)
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        if differentiable:
            inputs = tuple(t.clone().requires_grad_() for t in inputs)
        given = tuple(t.clone() for t in inputs)
    recorder.mark_inputs(given)
    output: Any = None
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(differentiable),
        _state_restored(model, recorder),
        layers.tracked(),
        _eager(model),
        _errors_named(model, inputs, recorder),
        UnseenCalls(recorder),
        recorder,
    ):
        output = select(model(*given))
        if (reason := recorder.unrecorded_reason(output)) is not None:
            recorder.note_unsupported_model(reason)
    return Recording(model, inputs, recorder, output)


def replay_at(model: nn.Module, x: Tensor | Inputs, held: str = "activated") -> Replay:
    """Return the replay of a model with the gates of x frozen."""
    recording = run_recorded(model, x, differentiable=True, held=held)
    recording.check_affine()
    return Replay(recording)


class Replay(nn.Module):
    """A model with the gates of recorded inputs frozen: an affine function R.

    It works under torch.func's transforms. It uses the model and does not copy it: R has the model's weights at the time of
    the call and the recorded gates. `train()` and `to()` of the replay do not change the model.

    Args:
        recording: The recording, whose output is affine given its gates.
        select: Selects the output to compute from the model's output.
    """

    def __init__(self, recording: Recording, select: Select = lambda output: output) -> None:
        super().__init__()
        recorder = recording.recorder
        self._model = (recording.model,)  # in a tuple, so that it is not a submodule
        self._select, self._steps = select, tuple(recorder.steps)
        self._gate_calls = tuple((call.name, call.step) for call in recorder.gate_calls)
        self.shapes = tuple(t.shape for t in recording.inputs)
        rows = ((name, layer) for name, layer, treatment in recorder.rows if treatment not in ("affine", "gate"))
        self.inexact = tuple(dict.fromkeys(rows))  # (operation, layer) of secants, and of pieces that are no gates
        self._like = tuple(t.detach().new_zeros(()) for t in recording.inputs)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the calls with on/off gates, in call order."""
        return tuple(name for name, _ in self._gate_calls)

    def forward(self, *v: Tensor) -> Any:
        """Compute R(v).

        Args:
            v: For each input a tensor of its recorded shape (n, ...), or (r n, ...): r stacked copies of the batch. Each
                sample has its own gates.

        Returns:
            The output, (n, ...) or (r n, ...).

        Raises:
            ValueError: Other shapes.
        """
        if tuple(t.shape for t in v) == self.shapes:
            return self._follow(v)[0]
        n = self.shapes[0][0]
        copies = v[0].shape[0] // n if v and v[0].dim() else 0
        if [tuple(t.shape) for t in v] != [(copies * shape[0], *shape[1:]) for shape in self.shapes] or not copies:
            got, want = [tuple(t.shape) for t in v], [tuple(shape) for shape in self.shapes]
            raise ValueError(f"v: got shapes {got}, want {want}, or several copies stacked")
        stacked = [t.unflatten(0, (copies, n)) for t in v]
        out = over_copies(lambda *each: self._follow(each)[0], *stacked)
        return map_tensors(out, lambda t: t.flatten(0, 1))

    def preactivations(self, v: Sequence[Tensor], gate_call: int) -> Tensor:
        """Return the preactivations of one gate call in R(v), for v of the recorded shapes."""
        step = self._gate_calls[gate_call][1]
        return self._follow(v, [step])[1].preactivations[step]

    def all_preactivations(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Return the preactivations of every gate call in R(v), for v of the recorded shapes."""
        steps = [step for _, step in self._gate_calls]
        found = self._follow(v, steps)[1].preactivations
        return [found[step] for step in steps]

    def constants_by_layer(self, gate_call: int | None = None) -> dict[str, Tensor]:
        """Return the part of R(0), or of a gate call's preactivations there, that comes from each layer's constants.

        Constants are biases, shifts, paddings and the offsets of gates.
        """
        wanted = [] if gate_call is None else [self._gate_calls[gate_call][1]]
        parts = None if wanted else self._parts_by_rows()
        return self._parts_by_layers(wanted) if parts is None else parts

    def _parts_by_rows(self) -> dict[str, Tensor] | None:
        """Return each layer's part of the constants by reverse mode, for all samples at once.

        Each sample has its own scale of a layer's constants. Returns None if there are more outputs than layers, or the
        constants are not by sample: then the parts do not add up.
        """
        n = self.shapes[0][0]
        with torch.inference_mode(False), torch.enable_grad():
            zeros = [t.new_zeros(shape) for t, shape in zip(self._like, self.shapes, strict=True)]
            mode = SampleScaledReplayer(self._steps, n)
            output, _ = self._follow(zeros, mode=mode)
        layers, rows = list(mode.scales), output.shape[1:].numel()
        if not output.requires_grad or not mode.by_sample or rows > len(layers):
            return None
        found = []
        for start in range(0, rows, _ROWS_AT_ONCE):
            count = min(_ROWS_AT_ONCE, rows - start)
            u = output.new_zeros(count, n, rows)
            u[torch.arange(count), :, torch.arange(start, start + count)] = 1
            scales = [mode.scales[layer] for layer in layers]
            grads = torch.autograd.grad(
                output, scales, u.view(count, *output.shape), True, is_grads_batched=True, materialize_grads=True
            )
            found.append(torch.stack([grad.expand(count, n) for grad in grads]))  # materialized zeros are not batched
        parts = torch.cat(found, 1).transpose(1, 2).reshape(len(layers), *output.shape)  # (layers, n, *output)
        size = max(float(output.detach().abs().max()), float(parts.abs().max()))
        if float((parts.sum(0) - output.detach()).abs().max()) > torch.finfo(parts.dtype).eps ** (1 / 3) * size:
            return None
        return dict(zip(layers, parts, strict=True))

    def _parts_by_layers(self, wanted: Sequence[int]) -> dict[str, Tensor]:
        """Return each layer's part of the constants by forward mode, one layer after another."""
        with torch.no_grad():
            zeros = [t.new_zeros(shape) for t, shape in zip(self._like, self.shapes, strict=True)]
            finder = ConstantFinder(self._steps, wanted)
            self._follow(zeros, mode=finder)
        constants = {step: c for step, c in finder.constants.items() if not wanted or step < wanted[0]}
        layers = list(dict.fromkeys(self._steps[step].layer for step in constants))

        def scaled(scales: Tensor) -> Tensor:
            by_layer = dict(zip(layers, scales.unbind(), strict=True))
            mode = ScaledReplayer(self._steps, wanted, constants, by_layer)
            # The inputs depend on the scales, so that forward mode allows writes in place.
            output, _ = self._follow([t + 0 * scales.sum() for t in zeros], mode=mode)
            return mode.preactivations[wanted[0]] if wanted else output

        none = zeros[0].new_zeros(len(layers))
        with torch.no_grad():
            parts = {}
            if layers:
                one_by_one = torch.eye(len(layers), dtype=none.dtype, device=none.device)
                alone = _in_chunks(lambda d: jvp(scaled, (none,), (d,))[1], one_by_one)
                parts = dict(zip(layers, alone, strict=True))
            if wanted:  # the gate's own breakpoint
                own, rest = self._steps[wanted[0]].layer, scaled(none)
                parts[own] = parts[own] + rest if own in parts else rest
        return parts

    def _follow(
        self, v: Sequence[Tensor], wanted_steps: Sequence[int] = (), mode: Replayer | None = None
    ) -> tuple[Any, Replayer]:
        check_model(self._model[0])
        mode = mode or Replayer(self._steps, wanted_steps)
        given = [t.clone() for t in v]
        mode.mark_inputs(given)
        with _eager(self._model[0]), mode:
            output = self._select(self._model[0](*given))
            mode.finish()
        return output, mode


def _in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor) -> list[Tensor]:
    """Apply a function to each row: several at a time by vmap, or one by one if it has no rule for a call."""
    try:
        return list(torch.vmap(function, chunk_size=_LAYERS_AT_ONCE)(rows))
    except RuntimeError:
        return [function(row) for row in rows]


def over_copies(function: Callable[..., Any], *stacked: Tensor) -> Any:
    """Apply a function to each of r stacked copies: by vmap, or one by one if the model writes into its own tensors."""
    try:
        return torch.vmap(function)(*stacked)
    except RuntimeError:
        each = [function(*(t[i] for t in stacked)) for i in range(len(stacked[0]))]
        if isinstance(each[0], Tensor):
            return torch.stack(each)
        return type(each[0])(torch.stack(parts) for parts in zip(*each, strict=True))


class ModelFunction:
    """A model without frozen gates: select(model(v)), or the preactivations of a gate call of the model at v."""

    def __init__(self, model: nn.Module, select: Select = lambda output: output, gate_call: int | None = None) -> None:
        self._model, self._select, self._gate_call = model, select, gate_call

    def __call__(self, *v: Tensor) -> Any:
        """Compute the function at v."""
        given = tuple(t.clone() for t in v)
        with _eager(self._model), sdpa_kernel(SDPBackend.MATH):  # the backend that implements forward mode
            if self._gate_call is None:
                with DerivativesKept():
                    return self._select(self._model(*given))
            recorder = Recorder(Layers(self._model), strict=False, keep_preactivations=True, observe_only=True)
            recorder.mark_inputs(given)
            with DerivativesKept(), recorder:
                self._model(*given)
            return recorder.gate_calls[self._gate_call].preactivations


class TangentReplay(nn.Module):
    """The tangent R(v) = F(x) + J (v - x) of a model F, with its Jacobian J at x.

    Args:
        function: The model F.
        inputs: The inputs x.
    """

    def __init__(self, function: ModelFunction, inputs: Inputs) -> None:
        super().__init__()
        self._function, self._inputs = function, tuple(t.detach() for t in inputs)

    def forward(self, *v: Tensor) -> Tensor:
        """Compute R(v).

        Args:
            v: For each input a tensor of its shape at x.

        Returns:
            The output (n, ...).

        Raises:
            ValueError: Other shapes.
        """
        got, want = [tuple(t.shape) for t in v], [tuple(t.shape) for t in self._inputs]
        if got != want:
            raise ValueError(f"v: got shapes {got}, want {want}")
        steps = tuple(t - x for t, x in zip(v, self._inputs, strict=True))
        return torch.add(*jvp(self._function, self._inputs, steps))


def parameter_check(model: nn.Module) -> Callable[[], None]:
    """Return a function that raises RuntimeError if a model's parameters are no longer those of now."""
    then = [(p, _version(p)) for p in model.parameters()]

    def check() -> None:
        now = [*model.parameters()]
        same = len(now) == len(then) and all(
            p is q and _version(p) == version for p, (q, version) in zip(now, then, strict=True)
        )
        if not same:
            raise RuntimeError(
                "model: its parameters have changed since it was linearized, so the gates no longer fit the weights; "
                "read the map before the change, or linearize the model again"
            )

    return check


def check_inputs(x: Tensor | Inputs) -> Inputs:
    """Return x as a tuple. Raises TypeError or ValueError unless it is a batch of finite floating-point inputs."""
    inputs = x if isinstance(x, tuple) else (x,)
    if not inputs:
        raise ValueError("x: got no inputs, want at least one")
    for t in inputs:
        if not isinstance(t, Tensor):
            raise TypeError(f"x: got {type(t).__name__}, want a torch.Tensor or a tuple of them")
        if not t.dtype.is_floating_point:
            raise TypeError(f"x: got {t.dtype}, want floating-point inputs")
        if t.dim() == 0 or t.shape[0] == 0 or t.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"x: got shapes {[tuple(i.shape) for i in inputs]}, want (n, ...) with one n > 0")
    n = len(inputs[0])
    finite = torch.stack([t.isfinite().reshape(n, t[0].numel()).all(1).cpu() for t in inputs]).all(0)
    if not bool(finite.all()):
        raise ValueError(
            f"x: {int((~finite).sum())} of its {n} samples have values that are not finite, want finite samples"
        )
    return inputs


def check_independence(function: Callable[..., Tensor], x: Inputs, output: Tensor) -> None:
    """Check that the first and the last sample's output is the same without the other samples.

    Raises ValueError otherwise. The sample is run alone, and, if its output then differs or there is none, in a batch that
    consists of its copies.
    """
    n, rounding = len(x[0]), torch.finfo(output.dtype).eps ** 0.5
    for i in (0, n - 1) if n > 1 else ():
        differs = coupling(function, x, output, i, alone=True) > rounding
        if differs and (error := coupling(function, x, output, i)) > rounding:
            with torch.no_grad():
                scale, own = output.abs().max(), function(*x)
            if float((own - output).abs().max()) > rounding * float(scale):
                raise RuntimeError(
                    "model: the replay is not the model: their outputs differ at x. A comparison or rounding in the model may be "
                    "on a tie, or the model may be random; else this is a fault of interp_nn"
                )
            raise ValueError(
                f"model: the output for sample {i} changes by {error:.2g} of its size if the other samples change: the model "
                "lets samples depend on one another or reorders them; want one sample at a time"
            )


def coupling(function: Callable[..., Tensor], x: Inputs, output: Tensor, i: int, alone: bool = False) -> float:
    """Return by how much sample i's output changes without the other samples, relative to the largest output.

    Args:
        function: The function.
        x: Its inputs (n, ...).
        output: Its output (n, ...) at x.
        i: Index of the sample.
        alone: Run the sample alone, instead of with copies of it in place of the others. If it fails, the result is infinite.
    """
    n = len(x[0])
    with torch.no_grad():
        try:
            out = function(*(t[i : i + 1] if alone else t[i : i + 1].expand(t.shape).clone() for t in x))
        except Exception:
            if alone:
                return torch.inf
            raise
        if not isinstance(out, Tensor) or out.shape != (1 if alone else n, *output.shape[1:]):
            return torch.inf
        scale = output.abs().max().double()
        error = (out[0 if alone else i] - output[i]).abs().max().double() / torch.where(scale > 0, scale, 1)
    return float(error)


def check_model(model: nn.Module) -> None:
    """Check that a model can be followed.

    Raises TypeError if it is not an nn.Module or contains a ScriptModule, and ValueError for a batch norm, dropout or
    RReLU in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model: layer {name!r} is a ScriptModule, whose calls cannot be recorded; want an nn.Module"
            )
        if module.training and (
            isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.RReLU))
            or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        ):
            raise ValueError(
                f"model: layer {name!r} ({type(module).__name__}) is in training mode, in which it couples samples or draws "
                "random numbers; want model.eval()"
            )


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Run compiled models as Python, so that their calls are recorded, and raise RuntimeError for activation checkpointing."""
    hooks = torch.autograd.graph.disable_saved_tensors_hooks(
        "a replay keeps what it saves; want no activation checkpointing"
    )
    with _forced_eager(), _without_backward_hooks(model), hooks, calls_followed():
        yield


@contextmanager
def _without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Take the backward hooks off a model's modules, which may change gradients; the last thread that leaves restores them."""
    modules = list(model.modules())
    with _LOCK:
        for module in modules:
            if module._backward_hooks or module._backward_pre_hooks:
                _hooks_of[id(module)] = (0, module._backward_hooks, module._backward_pre_hooks)
                module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        taken = [module for module in modules if id(module) in _hooks_of]
        for module in taken:
            count, *kept = _hooks_of[id(module)]
            _hooks_of[id(module)] = (count + 1, *kept)
    try:
        yield
    finally:
        with _LOCK:
            for module in taken:
                count, *kept = _hooks_of[id(module)]
                _hooks_of[id(module)] = (count - 1, *kept)
                if count == 1:
                    module._backward_hooks, module._backward_pre_hooks = kept
                    del _hooks_of[id(module)]


@contextmanager
def _errors_named(model: nn.Module, inputs: Inputs, recorder: Recorder) -> Iterator[None]:
    """Name the cause of three errors in a model.

    Raises TypeError if it fails on inputs of another dtype or device than its parameters, and ValueError if it fails on one
    sample without a batch dimension. A model with a call that takes a tensor for a number, which depends on the input, is
    unsupported.
    """
    try:
        yield
    except UnsupportedOperation:
        if recorder.strict:
            raise
        recorder.stopped = True
    except TypeError as error:
        if "must be Number, not Tensor" not in str(error):
            raise
        recorder.stopped = True
        recorder.note_unsupported_model(f"a scale or another number of a call depends on the input: {error}")
    except (RuntimeError, ValueError) as error:
        known = {(p.dtype, p.device) for p in model.parameters() if p.is_floating_point()}
        got = next(((t.dtype, t.device) for t in inputs if (t.dtype, t.device) not in known), None)
        if isinstance(error, ValueError) or len(known) != 1 or got is None:
            if _takes(model, inputs) or not _takes(model, [t.unsqueeze(0) for t in inputs]):
                raise
            raise ValueError(
                f"x: got shapes {[tuple(t.shape) for t in inputs]}, on which the model fails ({error}); add a batch dimension: "
                "x[None]"
            ) from error
        (dtype, device), (wrong, place) = next(iter(known)), got
        raise TypeError(
            f"x: got {wrong} on {place}, but the model's parameters are {dtype} on {device}; want x.to({device.type!r}, {dtype})"
        ) from error


def _takes(model: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Return True if a model runs on inputs."""
    try:
        with torch.no_grad():
            model(*(t.clone() for t in inputs))
    except Exception:
        return False
    return True


@contextmanager
def _forced_eager() -> Iterator[None]:
    """Force eager mode for the whole process; the last thread that leaves restores torch.compiler's stance."""
    global _holders
    with _LOCK:
        if _holders == 0:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _holders += 1
    try:
        yield
    finally:
        with _LOCK:
            _holders -= 1
            if _holders == 0:
                _stance.close()


@contextmanager
def _state_restored(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Restore the model's buffers, and the random generators that it drew from; a model that changed buffers is unsupported.

    Other generators are not restored, because another thread may draw from them.
    """
    buffers = [
        (f"{path}.{name}".lstrip("."), module, name, buffer, buffer.clone(), _version(buffer))
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    changed = []
    try:
        yield
    finally:
        for generator, state in recorder.generators:
            generator.set_state(state)
        for path, module, name, buffer, value, version in buffers:
            same = module._buffers.get(name) is buffer  # instance_norm of PyTorch 2.10 writes the same values back
            if not same or (_version(buffer) != version and not torch.equal(buffer, value)):
                changed.append(path)
                module._buffers[name] = buffer
                with torch.no_grad():
                    buffer.copy_(value)
    if changed:
        recorder.note_unsupported_model(f"it changes the buffers {', '.join(changed)}; want a model without memory")


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version
