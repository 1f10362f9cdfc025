"""Gates of a network at an input: recorded as the model runs, and frozen in a replay that is affine in its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.explain.calls import UnsupportedOperation
from interp_nn.explain.patterns import ActivationPatterns
from interp_nn.explain.tracing import Layers, Recorder, Replayer

__all__ = [
    "GateRecord",
    "GateSite",
    "OperationReport",
    "Replay",
    "UnsupportedOperation",
    "frozen",
    "record",
    "supported_ops",
]

MODES = ("secant", "tangent")
Select = Callable[[Any], Any]


class GateSite(NamedTuple):
    """A call with on/off gates. name: the module's path ('features.3', 'relu#1' for its second call), or path, operation and
    count of a functional call ('layer1.0:relu#0'). shape: of one sample's gates.
    """

    name: str
    operation: str
    shape: torch.Size


class GateRecord:
    """What `record` saw: `output`, the model's own result, and `sites`, the calls with on/off gates in call order."""

    def __init__(self, output: Any, sites: Sequence[GateSite], preactivations: Sequence[Tensor], samples: int) -> None:
        self.output, self.sites = output, tuple(sites)
        self._preactivations, self._samples = tuple(preactivations), samples

    def preactivations(self, site: str | int | GateSite) -> Tensor:
        """What a site's gates look at, (n, *shape): ReLU's input, say. With several kinks a unit, one slice for each."""
        return self._preactivations[self._index(site)]

    def gates(self, site: str | int | GateSite) -> Tensor:
        """Which of a site's gates are on, (n, *shape) bool: those whose preactivation is positive."""
        return self.preactivations(site) > 0

    def patterns(self, sites: Sequence[str | int | GateSite] | None = None) -> ActivationPatterns:
        """The patterns over the units of some sites (default: all), concatenated in the order given (of the calls)."""
        chosen = range(len(self.sites)) if sites is None else [self._index(site) for site in sites]
        return ActivationPatterns.from_preactivations([self._preactivations[i] for i in chosen])

    def margin(self) -> Tensor:
        """The smallest |preactivation| of each sample, (n,); infinite without gates. Patterns are unstable where it is tiny."""
        smallest = [z.flatten(1).abs().amin(1) for z in self._preactivations if z.numel()]
        return torch.stack(smallest).amin(0) if smallest else torch.full((self._samples,), torch.inf)

    def __repr__(self) -> str:
        units = sum(site.shape.numel() for site in self.sites)
        return f"GateRecord({self._samples} samples, {len(self.sites)} sites, {units} gates)"

    def _index(self, site: str | int | GateSite) -> int:
        return find_site([s.name for s in self.sites], site.name if isinstance(site, GateSite) else site)


def find_site(names: Sequence[str], site: str | int) -> int:
    """The index of a gate site given by index or name. Raises ValueError that lists the sites."""
    if isinstance(site, int) and -len(names) <= site < len(names):
        return site % len(names)
    if isinstance(site, str) and site in names:
        return names.index(site)
    raise ValueError(f"site: got {site!r}, want an index below {len(names)} or one of {', '.join(names)}")


class OperationReport:
    """Every operation that received values that depend on the input, by layer, and how it is treated; prints as a table.

    rows: (operation, layer, treatment, calls), the treatment one of 'affine', 'gate' (piecewise linear), 'secant', 'frozen'
    (a value that multiplies or masks, held as it is) and 'not treated'. `exact`: whether all are affine or gates, so that the
    affine map is that of the region and not a secant.
    """

    def __init__(self, rows: Sequence[tuple[str, str, str, int]]) -> None:
        self.rows = tuple(rows)

    @property
    def exact(self) -> bool:
        return all(how in ("affine", "gate") for _, _, how, _ in self.rows)

    @property
    def supported(self) -> bool:
        """Whether `frozen` and `linearize` accept the model in secant mode."""
        return all(how != "not treated" for _, _, how, _ in self.rows)

    def __str__(self) -> str:
        head = ("operation", "layer", "treatment", "calls")
        table = [head, *((a, b or "(model)", c, str(d)) for a, b, c, d in self.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )

    __repr__ = __str__


def record(model: nn.Module, x: Tensor | tuple[Tensor, ...], *, mode: str = "secant") -> GateRecord:
    """The gates of a model at each sample of x (n, ...), or of a tuple of inputs with n samples each.

    The model runs once, as it is; buffers, hooks, training flags and random state are as before. In 'secant' mode every
    operation must be one that `frozen` can replay; in 'tangent' mode any is accepted, and only its gates are recorded.

    Raises UnsupportedOperation that names operation and layer; ValueError for a batch norm or dropout in training mode, or an x
    without samples; TypeError for inputs that are not floating-point, or a model that is not an nn.Module.
    """
    inputs, recorder, output = _recorded(model, x, strict=check_mode(mode) == "secant")
    if mode == "secant":
        _refuse_blocked(recorder, output)
    n = inputs[0].shape[0]
    zs = [_by_sample(site.name, site.preactivations, n) for site in recorder.sites]
    sites = [GateSite(site.name, site.operation, z.shape[1:]) for site, z in zip(recorder.sites, zs, strict=True)]
    return GateRecord(output, sites, zs, n)


def frozen(model: nn.Module, x: Tensor | tuple[Tensor, ...], *, mode: str = "secant") -> Replay | TangentReplay:
    """The replay R of a model with the gates of x frozen: affine in its input everywhere, and equal to the model at x.

    Arguments and errors are `record`'s. In 'tangent' mode R(v) = F(x) + J (v - x) with the Jacobian J at x.
    """
    if check_mode(mode) == "tangent":
        inputs = check_inputs(x)
        return TangentReplay(Tangent(model, inputs), inputs)
    return replay_of(model, x)


def replay_of(model: nn.Module, x: Tensor | tuple[Tensor, ...], select: Select = lambda output: output) -> Replay:
    """`frozen`, of select(model(x))."""
    inputs, recorder, output = _recorded(model, x, strict=True, select=select)
    _refuse_blocked(recorder, output)
    return Replay(model, inputs, recorder, output, select)


def supported_ops(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> OperationReport:
    """How each operation of a model is treated at x; nothing that depends on the input is left out."""
    _, recorder, output = _recorded(model, x, strict=False)
    rows = recorder.rows
    if (source := recorder.blocked(output)) is not None:
        rows = [(o, at, "not treated" if (o, at) == (source.operation, source.layer) else how) for o, at, how in rows]
    return OperationReport([(*row, count) for row, count in Counter(rows).items()])


class Replay(nn.Module):
    """A model with the gates of recorded inputs frozen: an affine function R of inputs of the recorded shapes.

    R(v) takes v of the recorded shape (n, ...), each sample with its own gates, or (r n, ...), meaning r stacked copies of the
    batch. It works under torch.func's transforms. The model is used, not copied: its parameters must not change, and
    `train()` and `to()` of the replay do not reach it.
    """

    def __init__(
        self, model: nn.Module, inputs: tuple[Tensor, ...], recorder: Recorder, output: Any, select: Select
    ) -> None:
        super().__init__()
        self.inputs, self.output, self._select = inputs, output, select
        self._model = (model,)  # not a submodule
        self._steps = tuple(recorder.steps)
        self._sites = {site.name: site.step for site in recorder.sites}
        self.shapes = tuple(t.shape for t in inputs)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the calls with on/off gates."""
        return tuple(self._sites)

    def forward(self, *v: Tensor) -> Any:
        return self.run(v)

    def run(self, v: Sequence[Tensor], site: str | None = None) -> Any:
        """R(v); with a site, its preactivations instead."""
        if tuple(t.shape for t in v) == self.shapes:
            return self._run(v, site)
        n = self.shapes[0][0]
        copies = v[0].shape[0] // n if v and v[0].dim() else 0
        if [tuple(t.shape) for t in v] != [(copies * shape[0], *shape[1:]) for shape in self.shapes]:
            raise ValueError(
                f"v: got shapes {[tuple(t.shape) for t in v]}, want {[tuple(s) for s in self.shapes]}, or copies of it"
            )
        stacked = [t.unflatten(0, (copies, n)) for t in v]
        return torch.vmap(lambda *each: self._run(each, site))(*stacked).flatten(0, 1)

    def preactivations(self, v: Sequence[Tensor]) -> dict[str, Tensor]:
        """The preactivations of every gate site in R(v), for v of the recorded shapes."""
        steps = list(self._sites.values())
        mode = self._follow(v, steps)[1]
        return {name: mode.tapped[step] for name, step in self._sites.items()}

    def _run(self, v: Sequence[Tensor], site: str | None) -> Any:
        output, mode = self._follow(v, [] if site is None else [self._sites[site]])
        return output if site is None else mode.tapped[self._sites[site]]

    def _follow(self, v: Sequence[Tensor], taps: Sequence[int]) -> tuple[Any, Replayer]:
        mode = Replayer(self._steps, taps)
        given = [t.clone() for t in v]
        mode.enter(given)
        with torch.compiler.set_stance("force_eager"), mode:
            output = self._select(self._model[0](*given))
            mode.finish()
        return output, mode


class Tangent:
    """A model as it is: select(model(v)), or the preactivations of a gate site as the model computes them."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        select: Select = lambda output: output,
        upto: str | int | None = None,
    ) -> None:
        self._model, self._select, self._step = model, select, None
        _, recorder, _ = _recorded(model, inputs, strict=False)
        if upto is not None:
            names = [site.name for site in recorder.sites]
            self._step = find_site(names, upto)

    def __call__(self, *v: Tensor) -> Any:
        if self._step is None:
            with torch.compiler.set_stance("force_eager"):
                return self._select(self._model(*v))
        recorder = Recorder(Layers(self._model), strict=False)
        given = tuple(t.clone() for t in v)
        recorder.enter(given)
        with torch.compiler.set_stance("force_eager"), recorder:
            self._model(*given)
        return recorder.sites[self._step].preactivations


class TangentReplay(nn.Module):
    """R(v) = F(x) + J (v - x) for v of the recorded shapes, with the Jacobian J of the model at x."""

    def __init__(self, function: Tangent, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._function, self.inputs = function, tuple(t.detach() for t in inputs)

    def forward(self, *v: Tensor) -> Any:
        steps = tuple(t - x for t, x in zip(v, self.inputs, strict=True))
        value, change = torch.func.jvp(self._function, self.inputs, steps)
        return value + change


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, want one of {MODES}")
    return mode


def check_inputs(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = x if isinstance(x, tuple) else (x,)
    for t in inputs:
        if not isinstance(t, Tensor):
            raise TypeError(f"x: got {type(t).__name__}, want a torch.Tensor or a tuple of them")
        if not t.dtype.is_floating_point:
            raise TypeError(f"x: got {t.dtype}, want floating-point inputs, in which the model can be affine")
        if t.dim() == 0 or t.shape[0] == 0 or t.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"x: got shapes {[tuple(i.shape) for i in inputs]}, want (n, ...) with one n > 0")
    if not inputs:
        raise ValueError("x: got no inputs, want at least one")
    return inputs


def _recorded(
    model: nn.Module, x: Tensor | tuple[Tensor, ...], strict: bool, select: Select = lambda output: output
) -> tuple[tuple[Tensor, ...], Recorder, Any]:
    check_model(model)
    inputs = check_inputs(x)
    layers = Layers(model)
    recorder = Recorder(layers, strict)
    given = tuple(t.detach().clone() for t in inputs)
    recorder.enter(given)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(layers.following())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(recorder)
        output = select(model(*given))
    return inputs, recorder, output


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"model: layer {name!r} is a ScriptModule, whose calls are not seen; want an nn.Module")
        if not module.training:
            continue
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)):
            raise ValueError(
                f"model: layer {name!r} ({type(module).__name__}) is in training mode, in which samples are coupled or "
                "random; want model.eval()"
            )


def _refuse_blocked(recorder: Recorder, output: Any) -> None:
    if (source := recorder.blocked(output)) is not None:
        raise UnsupportedOperation(f"{source}; want a model whose output is affine given its gates, or mode='tangent'")


def _by_sample(name: str, z: Tensor, n: int) -> Tensor:
    if z.dim() and z.shape[0] == n:
        return z
    if z.dim() and z.shape[0] % n == 0:
        return z.unflatten(0, (n, -1))
    raise ValueError(f"model: the gates of {name} have shape {tuple(z.shape)}, want the {n} samples first")
