"""A model recorded at an input, and replayed with its gates frozen: an affine function."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode

from interp_nn.explain.following.calls import UnsupportedOperation, replaced
from interp_nn.explain.following.recorder import ConstantFinder, Layers, Recorder, Replayer, ScaledReplayer
from interp_nn.gates.jvp import jvp
from interp_nn.gates.record import place_of

Inputs = tuple[Tensor, ...]
Select = Callable[[Any], Any]
_LAYERS_AT_ONCE = 8
_LOCK, _stance, _holders = threading.Lock(), ExitStack(), 0  # of `_forced_eager`


@dataclass(frozen=True)
class Recording:
    """One run of a model under a recorder. inputs are leaves, of which output is a function where it is differentiable."""

    model: nn.Module
    inputs: Inputs
    recorder: Recorder
    output: Any

    def refuse(self, site: int | None = None) -> None:
        """Raises UnsupportedOperation where the output, or the preactivation of a gate site, is not affine given its gates."""
        before = [source for place, source in self.recorder.refusals if site is None or place <= site]
        source = before[0] if before else None if site is not None else self.recorder.blocked(self.output)
        if source is not None:
            raise UnsupportedOperation(
                f"{source}; want a model whose output is affine given its gates, or mode='tangent'"
            )

    def site(self, site: str | int) -> int:
        """The place of a gate site given by name or index."""
        return place_of([s.name for s in self.recorder.sites], site)


def run_recorded(
    model: nn.Module,
    x: Tensor | Inputs,
    select: Select = lambda output: output,
    *,
    strict: bool = True,
    differentiable: bool = False,
    keep: bool = False,
) -> Recording:
    """select(model(x)), recorded. keep: whether the gates' preactivations are kept; the rest as in `Recorder`."""
    check_model(model)
    inputs = tuple(t.detach() for t in check_inputs(x))
    layers = Layers(model)
    recorder = Recorder(layers, strict, differentiable, keep)
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        if differentiable:
            inputs = tuple(t.clone().requires_grad_() for t in inputs)
        given = tuple(t.clone() for t in inputs)
    recorder.enter(given)
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(differentiable),
        _untouched(model, recorder),
        layers.following(),
        _eager(),
        recorder,
    ):
        output = select(model(*given))
        if (reason := recorder.unseen(output)) is not None:
            recorder.refuse(reason)
    return Recording(model, inputs, recorder, output)


def replayed(model: nn.Module, x: Tensor | Inputs) -> Replay:
    """The replay of a model at x."""
    recording = run_recorded(model, x, differentiable=True)
    recording.refuse()
    return Replay(recording)


class Replay(nn.Module):
    """A model with the gates of recorded inputs frozen: an affine function R of inputs of the recorded shapes.

    R(v) takes v of the recorded shape (n, ...), each sample with its own gates, or (r n, ...), meaning r stacked copies of the
    batch. It works under torch.func's transforms. The model is used, not copied: weights are those that it has when R is called,
    with the gates of then, and `train()` and `to()` of the replay do not reach it.
    """

    def __init__(self, recording: Recording, select: Select = lambda output: output) -> None:
        super().__init__()
        recorder = recording.recorder
        self._model = (recording.model,)  # not a submodule
        self._select, self._steps = select, tuple(recorder.steps)
        self._sites = tuple((site.name, site.step) for site in recorder.sites)
        self.shapes = tuple(t.shape for t in recording.inputs)
        self._like = tuple(t.detach().new_zeros(()) for t in recording.inputs)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the calls with on/off gates."""
        return tuple(name for name, _ in self._sites)

    def forward(self, *v: Tensor) -> Any:
        """R(v). Raises ValueError for inputs of other shapes."""
        if tuple(t.shape for t in v) == self.shapes:
            return self._follow(v)[0]
        n = self.shapes[0][0]
        copies = v[0].shape[0] // n if v and v[0].dim() else 0
        if [tuple(t.shape) for t in v] != [(copies * shape[0], *shape[1:]) for shape in self.shapes] or not copies:
            got, want = [tuple(t.shape) for t in v], [tuple(shape) for shape in self.shapes]
            raise ValueError(f"v: got shapes {got}, want {want}, or several copies stacked")
        stacked = [t.unflatten(0, (copies, n)) for t in v]
        out = over_copies(lambda *each: self._follow(each)[0], *stacked)
        return replaced(out, lambda t: t.flatten(0, 1))

    def preactivations(self, v: Sequence[Tensor], site: int) -> Tensor:
        """The preactivations of one gate site in R(v), for v of the recorded shapes."""
        step = self._sites[site][1]
        return self._follow(v, [step])[1].tapped[step]

    def all_preactivations(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The preactivations of every gate site in R(v), for v of the recorded shapes."""
        steps = [step for _, step in self._sites]
        tapped = self._follow(v, steps)[1].tapped
        return [tapped[step] for step in steps]

    def constants_by_layer(self, site: int | None = None) -> dict[str, Tensor]:
        """What each layer's constants (biases, shifts, paddings, offsets of gates) add to R, or to a site's preactivations."""
        taps = [] if site is None else [self._sites[site][1]]
        with torch.no_grad():
            zeros = [t.new_zeros(shape) for t, shape in zip(self._like, self.shapes, strict=True)]
            finder = ConstantFinder(self._steps, taps)
            self._follow(zeros, mode=finder)
        constants = {place: c for place, c in finder.constants.items() if not taps or place < taps[0]}
        layers = list(dict.fromkeys(self._steps[place].layer for place in constants))

        def scaled(scales: Tensor) -> Tensor:
            by_layer = dict(zip(layers, scales.unbind(), strict=True))
            mode = ScaledReplayer(self._steps, taps, constants, by_layer)
            # Every value is made to depend on the scales, so that what is written in place may.
            output, _ = self._follow([t + 0 * scales.sum() for t in zeros], mode=mode)
            return mode.tapped[taps[0]] if taps else output

        none = zeros[0].new_zeros(len(layers))
        with torch.no_grad():
            parts = {}
            if layers:
                one_by_one = torch.eye(len(layers), dtype=none.dtype, device=none.device)
                alone = torch.vmap(lambda d: jvp(scaled, (none,), (d,))[1], chunk_size=_LAYERS_AT_ONCE)
                parts = dict(zip(layers, alone(one_by_one), strict=True))
            if taps:  # a kink's own place
                own, rest = self._steps[taps[0]].layer, scaled(none)
                parts[own] = parts[own] + rest if own in parts else rest
        return parts

    def _follow(
        self, v: Sequence[Tensor], taps: Sequence[int] = (), mode: Replayer | None = None
    ) -> tuple[Any, Replayer]:
        check_model(self._model[0])
        mode = mode or Replayer(self._steps, taps)
        given = [t.clone() for t in v]
        mode.enter(given)
        with _eager(), mode:
            output = self._select(self._model[0](*given))
            mode.finish()
        return output, mode


def over_copies(function: Callable[..., Any], *stacked: Tensor) -> Any:
    """The function of each of r copies, stacked: by vmap, or one by one where a model writes into tensors of its own."""
    try:
        return torch.vmap(function)(*stacked)
    except RuntimeError:
        each = [function(*(t[i] for t in stacked)) for i in range(len(stacked[0]))]
        if isinstance(each[0], Tensor):
            return torch.stack(each)
        return type(each[0])(torch.stack(parts) for parts in zip(*each, strict=True))


class Tangent:
    """A model as it is: select(model(v)), or the preactivations of a gate site as the model computes them."""

    def __init__(self, model: nn.Module, select: Select = lambda output: output, site: int | None = None) -> None:
        self._model, self._select, self._site = model, select, site

    def __call__(self, *v: Tensor) -> Any:
        given = tuple(t.clone() for t in v)
        with _eager(), sdpa_kernel(SDPBackend.MATH):  # whose forward mode is implemented
            if self._site is None:
                with BaseTorchFunctionMode():  # without the fast paths of transformers, which have no derivative
                    return self._select(self._model(*given))
            recorder = Recorder(Layers(self._model), strict=False, keep=True, observe=True)
            recorder.enter(given)
            with recorder:
                self._model(*given)
            return recorder.sites[self._site].preactivations


class TangentReplay(nn.Module):
    """R(v) = F(x) + J (v - x) for v of the recorded shapes, with the Jacobian J of the model at x."""

    def __init__(self, function: Tangent, inputs: Inputs) -> None:
        super().__init__()
        self._function, self._inputs = function, tuple(t.detach() for t in inputs)

    def forward(self, *v: Tensor) -> Tensor:
        """R(v). Raises ValueError for inputs of other shapes."""
        got, want = [tuple(t.shape) for t in v], [tuple(t.shape) for t in self._inputs]
        if got != want:
            raise ValueError(f"v: got shapes {got}, want {want}")
        steps = tuple(t - x for t, x in zip(v, self._inputs, strict=True))
        return torch.add(*jvp(self._function, self._inputs, steps))


def unchanged(model: nn.Module) -> Callable[[], None]:
    """What raises RuntimeError where a model's parameters are not those of now, or have been written to."""
    then = [(p, _version(p)) for p in model.parameters()]

    def check() -> None:
        now = [*model.parameters()]
        same = len(now) == len(then) and all(
            p is q and _version(p) == version for p, (q, version) in zip(now, then, strict=True)
        )
        if not same:
            raise RuntimeError(
                "model: its parameters have changed since it was linearized, and gates and weights would be of two models; "
                "read the map before, or linearize it again"
            )

    return check


def check_inputs(x: Tensor | Inputs) -> Inputs:
    """x as a tuple. Raises TypeError and ValueError for what is not a batch of finite floating-point inputs."""
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
        raise ValueError(f"x: {int((~finite).sum())} of its {n} samples have values that are not finite")
    return inputs


def check_model(model: nn.Module) -> None:
    """Raises TypeError for what is not an nn.Module of Python, ValueError for layers in training mode that it would matter to."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"model: layer {name!r} is a ScriptModule, whose calls are not seen; want an nn.Module")
        if module.training and (
            isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.RReLU))
            or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        ):
            raise ValueError(
                f"model: layer {name!r} ({type(module).__name__}) is in training mode, where it couples samples or draws "
                "random numbers; want model.eval()"
            )


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled models run as Python, where their calls are seen; checkpointed ones would run again where they are not."""
    hooks = torch.autograd.graph.disable_saved_tensors_hooks(
        "a replay keeps what it saves; want no activation checkpointing"
    )
    with _forced_eager(), hooks:
        yield


@contextmanager
def _forced_eager() -> Iterator[None]:
    """torch.compiler's stance is the whole process's: what it was comes back with the last thread that is done here."""
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
def _untouched(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Leaves buffers as they were, and refuses a model that changed them; and the generators that the model was seen to draw
    from: another thread may be drawing from those of the process.
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
            same = module._buffers.get(name) is buffer  # written back as it was by PyTorch 2.10's instance_norm
            if not same or (_version(buffer) != version and not torch.equal(buffer, value)):
                changed.append(path)
                module._buffers[name] = buffer
                with torch.no_grad():
                    buffer.copy_(value)
    if changed:
        recorder.refuse(f"it changes the buffers {', '.join(changed)}; want a model without memory")


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version
