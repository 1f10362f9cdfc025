"""Convert whole models in place: `summarize` makes plain layers summary layers, `fold` makes them plain again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interp_nn.convert.eligible import Convertible, Select, memory
from interp_nn.display import html_table, track
from interp_nn.engines.problem import Plan
from interp_nn.engines.select import plan
from interp_nn.nn import diagnosis
from interp_nn.nn.base import LinearForm, as_matrix
from interp_nn.nn.conv import SummaryConv2d
from interp_nn.nn.linear import SummaryLinear
from interp_nn.nn.polynomial_layer import Normalize, Options, PolynomialLayer, Solved, options_of, solved_weight
from interp_nn.nn.weights import check_preserve, own_name, remove_parametrizations, solved_from

_SUMMARY: dict[type, type] = {nn.Linear: SummaryLinear, nn.Conv2d: SummaryConv2d}
_PLAIN: dict[type, type] = {summary: plain for plain, summary in _SUMMARY.items()}


class Converted(NamedTuple):
    """Describe a converted layer in a `Report`.

    Attributes:
        name: Path of the layer, the first one of a shared module.
        was: Name of its class before.
        now: Name of its class after.
        shape: Shape (d, k) of b, or of each group's b if groups > 1.
        groups: The number of groups of a convolution, else 1.
        parameters: Number of entries of weight and bias.
        plan: The plan of a SummaryLinear. None for convolutions, which form their effective weight once a call, for plain
            layers, and if the engine that was requested by name cannot compute the layer.
        error: ‖W - W'‖ / ‖W‖ (Frobenius, in float64) of the effective weights W before and W' after. None if the weights
            have no values (the meta device).

    Example:
        >>> row = summarize(nn.Sequential(nn.Linear(4, 3))).converted[0]
        >>> row.name, row.was, row.now, row.shape
        ('0', 'Linear', 'SummaryLinear', (4, 3))
    """

    name: str
    was: str
    now: str
    shape: tuple[int, int]
    groups: int
    parameters: int
    plan: Plan | None
    error: float | None


class Skipped(NamedTuple):
    """Describe a layer in a `Report` that was not converted.

    Attributes:
        name: Path of the layer.
        kind: Name of its class.
        reason: Why it cannot be converted.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4))
        >>> summarize(model).skipped
        (Skipped(name='1', kind='Bilinear', reason='neither Linear nor Conv2d'),)
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Describe what `summarize` or `fold` did, or would do on a dry run. Prints as a table.

    Attributes:
        title: First words of the table.
        converted: The converted layers.
        skipped: The layers that were not converted, with the reasons.
        notes: What is slower or approximate in the converted model, and what training it needs; a sentence each.

    Example:
        >>> print(fold(nn.Sequential(SummaryLinear(4, 3))))
        fold: 1 layers, 15 parameters
        layer  was            now     b      parameters  plan  error
        0      SummaryLinear  Linear  4 x 3  15          -     ...
    """

    title: str
    converted: tuple[Converted, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Return the largest error of a converted layer; 0 if no layer has one."""
        return max((row.error for row in self.converted if row.error is not None), default=0.0)

    def __str__(self) -> str:
        lines = [self._head()]
        lines += _columns(self._cells()) if self.converted else []
        lines += ["skipped:"] if self.skipped else []
        lines += _columns([(r.name or "(model)", r.kind, r.reason) for r in self.skipped])
        lines += ["notes:", *self.notes] if self.notes else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        skipped = [f"skipped: {r.name or '(model)'} {r.kind}, {r.reason}" for r in self.skipped]
        return html_table(header, rows, above=[self._head()], below=[*skipped, *self.notes])

    def _head(self) -> str:
        parameters = sum(row.parameters for row in self.converted)
        return f"{self.title}: {len(self.converted)} layers, {parameters:,} parameters"

    def _cells(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("layer", "was", "now", "b", "parameters", "plan", "error")]
        for r in self.converted:
            shape = f"{r.shape[0]} x {r.shape[1]}" + (f", {r.groups} groups" if r.groups > 1 else "")
            how = f"{r.plan.engine} {r.plan.order}" if r.plan else "-"
            error = "-" if r.error is None else f"{r.error:.1e}"
            rows.append((r.name or "(model)", r.was, r.now, shape, f"{r.parameters:,}", how, error))
        return rows


def summarize(
    model: nn.Module,
    *,
    select: Select = None,
    preserve: str = "function",
    polynomial: str | Sequence[float] = "summary",
    normalize: Normalize | None = None,
    gain: bool | None = None,
    dry_run: bool = False,
    rows: int = 1024,
    progress: bool | None = None,
) -> Report:
    """Make each nn.Linear of a model a SummaryLinear and each nn.Conv2d a SummaryConv2d, in place.

    To train a whole network, take `polynomial="newton-schulz"` and call `interp_nn.nn.follow(optimizer, model)`: the summary
    diverges at some learning rates at which plain layers train. It is for heads.

    The layer's class changes, and its parameter `weight` is renamed `b` and gets the values of b; a linear layer's also gets b's
    shape (in, out), in the same memory, and loses its gradient. Parameters are the same objects, so tied weights stay tied. An
    optimizer stays attached if it has taken no step and there are no gains; else make a new one, because its moments are those of
    the old weight and it has no gains.
    Hooks, flags, dtype and device do not change. To convert a copy, pass `copy.deepcopy(model)`. `fold` is the inverse.

    Code that reads a converted layer's `weight` gets the effective weight. Code that writes it raises ValueError when it runs.

    Skipped, with the reason in the report, are subclasses; parametrized, pruned, quantized, sharded, lazy and non-finite
    layers; and layers tied to a parameter that stays, or that share a part of their memory with one.

    All new weights are computed before the first is written. For a while there are two of each, and a conversion that fails
    changes nothing.

    A weight that is zero, as an adapter's may be at its start, gets b = 0, where the summary's gradient is zero: the layer would
    never train. `summarize` warns of such layers by name.

    Args:
        model: The model.
        select: The layers to convert: a path ("blocks.0.mlp.fc1"), a pattern ("blocks.*.fc?", where * matches dots too),
            several of these, or a function of (path, module). None selects all.
        preserve: "function" keeps the model's outputs: each b, and gain, is solved for in float64 and rounded to the weight's
            dtype. "weight" takes the (transposed) weights as b, and changes the outputs wherever a weight is not orthonormal.
        polynomial: As in `SummaryLinear`, for all converted layers.
        normalize: As in `SummaryLinear`.
        gain: As in `SummaryLinear`.
        dry_run: Compute the same report and change nothing.
        rows: Number of rows (batch times positions) that the report's plans are for.
        progress: Show a progress bar. None shows one in a terminal or a notebook, where tqdm is installed.

    Returns:
        A report of the converted and skipped layers, with notes on what will be slower and on training.

    Raises:
        TypeError: `model` is not an nn.Module, or `select` or an option is of another type.
        ValueError: `select` chooses no layer, or gives the exact path of a layer that cannot be converted; `preserve`, `rows` or
            an option is something else; no b gives a layer's weight, which the message names.

    Example:
        >>> model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 4)
        >>> before, report = model(x), summarize(model, select="0")
        >>> [type(layer).__name__ for layer in model], torch.allclose(model(x), before, atol=1e-5)
        (['SummaryLinear', 'ReLU', 'Linear'], True)
    """
    check_preserve(preserve)
    if not isinstance(rows, int) or rows < 0:
        raise ValueError(f"rows: got {rows!r}, want an integer >= 0")
    options = options_of(polynomial, normalize, gain)
    return _convert(f"summarize, {preserve} kept", model, select, _SUMMARY, preserve, dry_run, rows, options, progress)


def fold(model: nn.Module) -> Report:
    """Make each SummaryLinear of a model an nn.Linear and each SummaryConv2d an nn.Conv2d, in place. Outputs do not change.

    The effective weight is formed in float64, rounded once, and written into the parameter
    that held b, which is renamed `weight`. After `summarize`
    this gives the original weights up to rounding. A parametrization of b is removed. Layers that return pairs (SummaryLayer,
    SummaryHead), subclasses, and layers tied to a parameter that stays are skipped, with the reason in the report.

    Args:
        model: The model.

    Returns:
        A report of the converted and skipped layers.

    Raises:
        TypeError: `model` is not an nn.Module.

    Example:
        >>> model = nn.Sequential(SummaryLinear(4, 3), nn.ReLU())
        >>> report = fold(model)
        >>> [type(layer).__name__ for layer in model]
        ['Linear', 'ReLU']
    """
    return _convert("fold", model, None, _PLAIN, "function", False, 0)


def _convert(
    title: str,
    model: nn.Module,
    select: Select,
    classes: dict[type, type],
    preserve: str,
    dry_run: bool,
    rows: int,
    options: Options | None = None,
    progress: bool | None = False,
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    found = Convertible(model, select, classes, values=preserve == "function")
    reasons = found.unsupported
    for m in found.layers:
        if isinstance(m, LinearForm):
            diagnosis.look(m, found.paths[m][0])
    skipped = [Skipped(found.paths[m][0], type(m).__name__, reasons[m]) for m in found.layers if m in reasons]
    layers: list[Any] = [m for m in found.layers if m not in reasons]
    converted, written = [], {}
    ties: dict[nn.Module, object] = {}
    errors: dict[object, float | None] = {}  # tied weights are computed and written once
    for layer in track(layers, "converting", progress, "layer"):  # everything that can fail, before anything changes
        name, held = found.paths[layer][0], getattr(layer, own_name(layer))
        tie = ties[layer] = layer if parametrize.is_parametrized(layer) else memory(held)
        if tie not in errors:
            written[layer], errors[tie] = _other_value(name, layer, held, preserve, options)
        converted.append(_row(name, layer, held, classes[_kind(layer)], errors[tie], rows, options))
    notes = () if options is None else _notes(converted, layers, options)
    if options is not None:
        _warn_of_zeros([found.paths[m][0] for m, new in written.items() if _never_trains(m, new.b, options)])
    reshaped: set[int] = set()
    first: dict[object, PolynomialLayer] = {}
    for layer in layers if not dry_run else ():
        if parametrize.is_parametrized(layer):
            for parameter in list(layer.parametrizations):
                remove_parametrizations(layer, parameter)
        if isinstance(layer, PolynomialLayer):
            layer._clear_options()
            layer._drop_gram()
        _rename(layer, reshaped)
        new = written.pop(layer, None)
        if new is not None:
            with torch.no_grad():
                layer._parameters[_other_name(layer)].copy_(new.b)
        for state in ("_frozen", "_gram_cache", "constraint"):
            vars(layer).pop(state, None)
        layer.__class__ = classes[type(layer)]
        if isinstance(layer, PolynomialLayer) and options is not None:
            layer._set_options(options)
            if new is not None:
                layer._write_solved(new)
            layer._share_options(first.setdefault(ties[layer], layer))
        # Compiled models must be compiled again, and PyTorch 2.10's guards check a class only if a dict has changed.
        vars(layer)["converted"] = True
        del vars(layer)["converted"]
    return Report(title + ", dry run" * dry_run, tuple(converted), tuple(skipped), notes)


def _notes(converted: Sequence[Converted], layers: Sequence[nn.Module], options: Options) -> tuple[str, ...]:
    """Say what is slower or approximate in a converted model, and what training it needs."""
    trained = [m for m in layers if m.get_parameter("weight").requires_grad]
    convolutions = sum(row.now == "SummaryConv2d" for row in converted)
    halves = sorted({str(m.weight.dtype) for m in layers if m.get_parameter("weight").itemsize < 4})
    notes = []
    if convolutions:
        notes.append(
            f"slower: each forward of {convolutions} convolutions forms the weight first; freeze() or fold it to infer"
        )
    if halves:
        notes.append(f"approximate: b is rounded to {', '.join(halves)}; convert in float32 for a smaller error")
    if options.gain and trained:
        notes.append(f"training: {len(trained)} new parameters `gain`; make the optimizer after the conversion")
    if options.normalize and trained:
        notes.append("training: call interp_nn.nn.follow(optimizer, model) once, which updates the spectral norms")
    if options.plain and len(trained) > 1:
        notes.append(
            "training: whole networks of summaries diverge at rates at which plain layers train; convert the head alone, or "
            "take polynomial='newton-schulz'"
        )
    if options.plain and trained:
        notes.append(
            "training: at the same rate of Adam a summary's weight moves up to 3 s² times as far as a plain layer's; begin with "
            "the plain layer's rate divided by 3 s², where s is layer.spectrum().max()"
        )
    return tuple(notes)


def _never_trains(layer: nn.Module, b: Tensor, options: Options) -> bool:
    """Return True for a weight to train whose b is zero, if the gradient at 0 is zero."""
    if options.coefficients[0] or options.gain or b.is_meta or not b.numel():
        return False
    return layer.get_parameter("weight").requires_grad and not bool(b.any())


def _warn_of_zeros(names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(name or "(model)" for name in names[:5]) + ", ..." * (len(names) > 5)
        warnings.warn(
            f"{shown}: the weight is zero, so b is, where the summary's gradient is zero: it would never train; take "
            "polynomial='newton-schulz', leave it plain by `select`, or convert after it has trained",
            RuntimeWarning,
            stacklevel=4,
        )


def _kind(layer: nn.Module) -> type:
    kind: type = parametrize.type_before_parametrizations(layer)
    return kind


def _other_name(layer: nn.Module) -> str:
    return "weight" if own_name(layer) == "b" else "b"


def _rename(layer: nn.Module, reshaped: set[int]) -> None:
    """Rename a layer's `weight` to `b` or back. A matrix gets the other's shape in the same memory, once if it is tied."""
    name, other = own_name(layer), _other_name(layer)
    parameter = layer._parameters[name]
    assert parameter is not None
    if parameter.dim() == 2 and id(parameter) not in reshaped:
        reshaped.add(id(parameter))
        rows, columns = parameter.shape
        data, parameter.grad = parameter.data, None
        # PyTorch forgets a live graph's accumulator, which expects the old shape, where the dtype changes.
        parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
        if data.is_contiguous():
            parameter.data = data.view(columns, rows)
        elif data.t().is_contiguous():  # tied to the transpose of another one, whose memory gets the other order too
            parameter.data = data.t().view(rows, columns).t()
        else:
            parameter.data = data.t()
    entries = [(other if n == name else n, p) for n, p in layer._parameters.items()]
    layer._parameters.clear()
    layer._parameters.update(entries)


def _other_value(
    name: str, layer: nn.Module, held: Tensor, preserve: str, options: Options | None
) -> tuple[Solved, float | None]:
    """Compute the weight or b for the layer's other kind, and the relative change of the effective weight."""
    if isinstance(layer, LinearForm):
        before = layer.exact_weight()
        new = Solved(before.to(held.dtype), before.new_ones(1), None)
        after = new.b.double()
    else:
        assert options is not None
        groups = getattr(layer, "groups", 1)
        before = held.detach().double()
        new = solved_from(name, held, preserve, options, groups)
        after = before if held.is_meta else solved_weight(new, groups, options)
    if held.is_meta:
        return new, None
    size = float(torch.linalg.vector_norm(before))
    return new, float(torch.linalg.vector_norm(after - before)) / size if size else 0.0


def _row(
    name: str, layer: Any, held: Tensor, now: type, error: float | None, rows: int, options: Options | None
) -> Converted:
    groups = getattr(layer, "groups", 1)
    rows_of_weight = as_matrix(held, 1).mT if isinstance(layer, LinearForm) else held.flatten(1)
    (k, d), how = rows_of_weight.shape, None
    if now is SummaryLinear and options is not None:
        degree = None if options.plain else len(options.coefficients) - 1
        with suppress(RuntimeError):  # the requested engine cannot compute it
            how = plan(rows, d, k, dtype=held.dtype, device=held.device, degree=degree)
    parameters = held.numel() + (0 if layer.bias is None else layer.bias.numel())
    return Converted(name, _kind(layer).__name__, now.__name__, (d, k // groups), groups, parameters, how, error)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
