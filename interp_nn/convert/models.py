"""Whole models in and out: `summarize` turns their plain layers into summary layers, `fold` turns them back, both in place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interp_nn.convert.eligible import Convertible, Select, memory
from interp_nn.engines.problem import Plan
from interp_nn.engines.select import plan
from interp_nn.nn.base import LinearForm, check_preserve, exact_effective, root
from interp_nn.nn.conv import SummaryConv2d
from interp_nn.nn.linear import SummaryLinear

_SUMMARY: dict[type, type] = {nn.Linear: SummaryLinear, nn.Conv2d: SummaryConv2d}
_PLAIN: dict[type, type] = {summary: plain for plain, summary in _SUMMARY.items()}


class Converted(NamedTuple):
    """A layer in a `Report`.

    name: its path; of a shared module the first. was, now: its classes. shape: (d, k) of b, of each group's where groups > 1.
    parameters: of weight and bias. plan: how a SummaryLinear computes; None where the engine asked for by name cannot, for a
    convolution, which forms its effective weight once a call, and for plain layers. error: ‖W - W'‖ / ‖W‖ (Frobenius, fp64) of
    the effective weights W before and W' after; None where they have no values (the meta device).
    """

    name: str
    was: str
    now: str
    shape: tuple[int, int]
    groups: int
    parameters: int
    plan: Plan | None
    error: float | None


class Left(NamedTuple):
    """A layer in a `Report` that stays as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `summarize` or `fold` did, or on a dry run would do. Prints as a table."""

    title: str
    converted: tuple[Converted, ...]
    left: tuple[Left, ...]

    @property
    def error(self) -> float:
        """The largest error of a converted layer; 0 where none has one."""
        return max((row.error for row in self.converted if row.error is not None), default=0.0)

    def __str__(self) -> str:
        parameters = sum(row.parameters for row in self.converted)
        lines = [f"{self.title}: {len(self.converted)} layers, {parameters:,} parameters"]
        rows = [("layer", "was", "now", "b", "parameters", "plan", "error")]
        for r in self.converted:
            shape = f"{r.shape[0]} x {r.shape[1]}" + (f", {r.groups} groups" if r.groups > 1 else "")
            how = f"{r.plan.engine} {r.plan.order}" if r.plan else "-"
            error = "-" if r.error is None else f"{r.error:.1e}"
            rows.append((r.name or "(model)", r.was, r.now, shape, f"{r.parameters:,}", how, error))
        lines += _columns(rows) if self.converted else []
        lines += ["left as they are:"] if self.left else []
        lines += _columns([(r.name or "(model)", r.kind, r.reason) for r in self.left])
        return "\n".join(lines)


def summarize(
    model: nn.Module, *, select: Select = None, preserve: str = "function", dry_run: bool = False, rows: int = 1024
) -> Report:
    """Make each nn.Linear of a model a SummaryLinear and each nn.Conv2d a SummaryConv2d, in place; `fold` is the way back.

    select: which of them: a path ("blocks.0.mlp.fc1"), a pattern ("blocks.*.fc?", where * matches dots too), several of these,
    or a function of (path, module); None takes all. preserve: "function" keeps the model's outputs, as each b gets the cube
    roots of its weight's singular values; they are computed in fp64, and rounding them to the weight's dtype is all of the
    report's errors. "weight" keeps the parameters and changes the outputs wherever a weight is not orthonormal. dry_run:
    compute the same report and change nothing. rows: how many rows (batch times positions) the report's plans are for.

    A layer changes its class and the values of its weight, and is otherwise the same: its parameters are the same objects, so
    tied weights stay tied and optimizers attached (but their moments were those of the old weight), and hooks, flags, dtype and
    device are untouched. For a copy, convert `copy.deepcopy(model)`.

    Left as they are, with the reason in the report: subclasses; parametrized, pruned, quantized, sharded, lazy and non-finite
    layers; ones tied to something that stays, or that share only part of their memory with another parameter; ones whose weight
    a module above takes for itself, as nn.TransformerEncoderLayer does. The last are found in the source of its forward
    (`self.fc.weight`); code that reads a weight in another way goes unseen, so compare outputs where that may be.

    Raises ValueError where `select` takes no layer, or names by its very path one that must stay. All new weights are computed
    before the first is written (for a while there are two of each), so a conversion that fails has changed nothing.
    """
    check_preserve(preserve)
    if not isinstance(rows, int) or rows < 0:
        raise ValueError(f"rows: got {rows!r}, want an integer >= 0")
    return _convert(f"summarize, {preserve} kept", model, select, _SUMMARY, preserve, dry_run, rows)


def fold(model: nn.Module) -> Report:
    """Make each SummaryLinear of a model an nn.Linear and each SummaryConv2d an nn.Conv2d, in place; the outputs are the same.

    The effective weight is formed in fp64 and rounded once, into the parameter that was b; what `summarize` was given comes
    back to rounding. A parametrization of b ends here. Layers that give pairs (SummaryLayer, SummaryHead) have no plain equal:
    they stay, as do subclasses and layers tied to something that stays, with the reason in the report.
    """
    return _convert("fold", model, None, _PLAIN, "function", False, 0)


def _convert(
    title: str, model: nn.Module, select: Select, classes: dict[type, type], preserve: str, dry_run: bool, rows: int
) -> Report:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want a torch.nn.Module")
    found = Convertible(model, select, classes, values=preserve == "function")
    left = [Left(found.paths[m][0], type(m).__name__, found.obstacles[m]) for m in found.layers if m in found.obstacles]
    layers: list[Any] = [m for m in found.layers if m not in found.obstacles]
    converted, written = [], {}
    errors: dict[object, float | None] = {}  # of tied weights the first alone is computed, and written
    for layer in layers:  # all that can fail, before anything changes
        name, weight = found.paths[layer][0], layer.weight
        tie = layer if parametrize.is_parametrized(layer) else memory(weight)
        if tie not in errors:
            written[layer], errors[tie] = _other_weight(name, layer, weight, preserve)
        converted.append(_row(name, layer, weight, classes[_kind(layer)], errors[tie], rows))
    for layer in layers if not dry_run else ():
        if parametrize.is_parametrized(layer):
            for parameter in list(layer.parametrizations):
                parametrize.remove_parametrizations(layer, parameter)
        if layer in written:
            with torch.no_grad():
                layer.weight.copy_(written.pop(layer))
        if isinstance(layer, LinearForm):
            layer._drop_square()
        for state in ("_frozen", "_square", "constraint"):
            vars(layer).pop(state, None)
        layer.__class__ = classes[type(layer)]
        # Compiled models are to be compiled again: the guards of PyTorch 2.10 look at classes only where a dict has changed.
        vars(layer)["converted"] = True
        del vars(layer)["converted"]
    return Report(title + ", dry run" * dry_run, tuple(converted), tuple(left))


def _kind(layer: nn.Module) -> type:
    kind: type = parametrize.type_before_parametrizations(layer)
    return kind


def _other_weight(name: str, layer: nn.Module, weight: Tensor, preserve: str) -> tuple[Tensor, float | None]:
    """The weight of the layer's other kind, and the relative change of the effective weight."""
    groups = getattr(layer, "groups", 1)
    if _kind(layer) in _PLAIN:
        before = exact_effective(weight, groups)
        new = before.to(weight.dtype)
        after = new.double()
    else:
        before = weight.detach().double()
        new = root(name, weight, preserve, groups)
        after = exact_effective(new, groups)
    if new.is_meta:
        return new, None
    size = float(torch.linalg.vector_norm(before))
    return new, float(torch.linalg.vector_norm(after - before)) / size if size else 0.0


def _row(name: str, layer: Any, weight: Tensor, now: type, error: float | None, rows: int) -> Converted:
    groups = getattr(layer, "groups", 1)
    d, k = weight.shape[1:].numel(), len(weight) // groups
    how = None
    if now is SummaryLinear:
        with suppress(RuntimeError):  # of an engine that was asked for and cannot
            how = plan(rows, d, k, dtype=weight.dtype, device=weight.device)
    parameters = weight.numel() + (0 if layer.bias is None else layer.bias.numel())
    return Converted(name, _kind(layer).__name__, now.__name__, (d, k), groups, parameters, how, error)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
