"""Gates of a network at an input: recorded as the model runs, and frozen in a replay that is affine in its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.recorder import Site
from interp_nn.explain.following.replay import Inputs, Replay, Tangent, TangentReplay, replayed, run_recorded
from interp_nn.gates.record import GateRecord, GateSite

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

_MODES = ("secant", "tangent")


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


def record(model: nn.Module, x: Tensor | Inputs, *, mode: str = "secant") -> GateRecord:
    """The gates of a model at each sample of x (n, ...), or of a tuple of inputs with n samples each.

    The model runs once, as it is; buffers, hooks, training flags and random state are as before. In 'secant' mode every
    operation must be one that `frozen` can replay; in 'tangent' mode any is accepted, and only its gates are recorded.

    The first and the last of several samples are recorded alone too: a model that puts samples beside one another in an order
    of its own (one network for two halves, say, with steps or halves first), or in which they depend on one another, has no
    gates by sample, and is refused.

    Raises UnsupportedOperation that names operation and layer; ValueError for a batch norm or dropout in training mode, for
    gates that do not lie by sample, or an x without samples; TypeError for inputs that are not floating-point, or a model that
    is not an nn.Module.
    """
    secant = check_mode(mode) == "secant"
    recording = run_recorded(model, x, strict=secant, keep=True)
    if secant:
        recording.refuse()
    n, seen = len(recording.inputs[0]), recording.recorder.sites
    zs = [_by_sample(site, site.preactivations, n) for site in seen]
    zeros = [None if site.zero is None else _by_sample(site, site.zero, n) for site in seen]
    for i in (0, n - 1) if n > 1 else ():
        alone = run_recorded(model, tuple(t[i : i + 1] for t in recording.inputs), strict=secant, keep=True)
        _check_alone(seen, [z[i] for z in zs], alone.recorder.sites)
    sites = [GateSite(site.name, site.operation, z.shape[1:]) for site, z in zip(seen, zs, strict=True)]
    return GateRecord(recording.output, sites, zs, n, zeros)


def frozen(model: nn.Module, x: Tensor | Inputs, *, mode: str = "secant") -> Replay | TangentReplay:
    """The replay R of a model with the gates of x frozen: affine in its input everywhere, and equal to the model at x.

    Arguments and errors are `record`'s. In 'tangent' mode R(v) = F(x) + J (v - x) with the Jacobian J at x.
    """
    if check_mode(mode) == "tangent":
        return TangentReplay(Tangent(model), run_recorded(model, x, strict=False).inputs)
    return replayed(model, x)


def supported_ops(model: nn.Module, x: Tensor | Inputs) -> OperationReport:
    """How each operation of a model is treated at x; nothing that depends on the input is left out."""
    recording = run_recorded(model, x, strict=False, differentiable=True)
    rows = recording.recorder.rows
    if (source := recording.recorder.blocked(recording.output)) is not None:
        rows = [(o, at, "not treated" if (o, at) == (source.operation, source.layer) else how) for o, at, how in rows]
    return OperationReport([(*row, count) for row, count in Counter(rows).items()])


def check_mode(mode: str) -> str:
    """Raises ValueError for a mode that does not exist."""
    if mode not in _MODES:
        raise ValueError(f"mode: got {mode!r}, want one of {_MODES}")
    return mode


def _by_sample(site: Site, z: Tensor, n: int) -> Tensor:
    """Gates with the samples first; where one axis holds n samples times something, it is taken apart."""
    if z.dim() and z.shape[0] == n:
        return z
    if z.dim() and z.shape[0] % n == 0:
        return z.unflatten(0, (n, -1))
    raise ValueError(
        f"model: the gates of {site.name} have shape {tuple(z.shape)}, want the {n} samples first, "
        "or one sample at a time (batch_size=1)"
    )


def _check_alone(sites: Sequence[Site], zs: Sequence[Tensor], alone: Sequence[Site]) -> None:
    """Raises ValueError where a sample's gates in a batch are not those that it has alone, to a third of the digits."""
    same_calls = [site.name for site in sites] == [site.name for site in alone]
    for place, (site, z) in enumerate(zip(sites, zs, strict=True)):
        own = _by_sample(site, alone[place].preactivations, 1)[0] if same_calls else None
        scale = float(z.where(z.isfinite(), 0).abs().amax()) if z.numel() else 0.0
        rounding = scale * torch.finfo(z.dtype).eps ** (1 / 3)
        if own is None or own.shape != z.shape or not torch.allclose(z, own, rtol=0, atol=rounding, equal_nan=True):
            raise ValueError(
                f"model: the gates of {site.name} are not those that a sample has alone, since the model reorders samples or "
                "lets them depend on one another; want one sample at a time (batch_size=1)"
            )
