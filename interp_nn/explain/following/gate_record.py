"""Record the gates of a network at an input, and freeze them in a replay that is affine in its input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from interp_nn.display import html_table
from interp_nn.explain.following.calls import tensors
from interp_nn.explain.following.recorder import GateCall
from interp_nn.explain.following.replay import (
    Inputs,
    ModelFunction,
    Recording,
    Replay,
    TangentReplay,
    replay_at,
    run_recorded,
)
from interp_nn.explain.following.token_ids import FromEmbeddings, from_embeddings
from interp_nn.gates.record import GateRecord, GateSite

_MODES = ("secant", "tangent")
_HELD = ("activated", "left", "right")


class OperationReport:
    """A table of all operations on values that depend on the input, with their layer and treatment.

    Args:
        rows: (operation, layer, treatment, calls) of each operation.

    Attributes:
        rows: As given. The treatment is one of 'affine', 'gate' (piecewise linear), 'piece' (piecewise linear, but its pieces
            are not gates of the pattern: a rounding, or a sort of more than 64 entries), 'secant', 'frozen' (a value that
            multiplies or masks, and keeps its recorded value) and 'not treated'.

    Example:
        >>> from interp_nn.explain import supported_ops
        >>> report = supported_ops(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(1, 2))
        >>> print(report)
        operation  layer  treatment  calls
        linear     0      affine     1
        relu       1      gate       1
    """

    def __init__(self, rows: Sequence[tuple[str, str, str, int]]) -> None:
        self.rows = tuple(rows)

    @property
    def exact(self) -> bool:
        """True if all operations are affine or gates: the affine map then holds in the whole region, and is no secant.

        With an operation of treatment 'piece' this is False. The map is then exact near the input, but the region and the
        pattern do not show where it ends.
        """
        return all(treatment in ("affine", "gate") for _, _, treatment, _ in self.rows)

    @property
    def supported(self) -> bool:
        """True if `frozen` and `linearize` accept the model in secant mode."""
        return all(treatment != "not treated" for _, _, treatment, _ in self.rows)

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        return html_table(header, rows)

    def _cells(self) -> list[tuple[str, str, str, str]]:
        head = ("operation", "layer", "treatment", "calls")
        return [head, *((a, b or "(model)", c, str(d)) for a, b, c, d in self.rows)]


def record(
    model: nn.Module, x: Tensor | Inputs, *, mode: str = "secant", check: bool = False, embedding: str | None = None
) -> GateRecord:
    """Record the gates of a model at each sample of x.

    The model's buffers, hooks and training flags, and PyTorch's random state, do not change.

    A gate is on where its unit passes: for relu(z), where(z < 0, 0, z), maximum(0, z) and z * (z > 0), where z is positive; for
    minimum(z, 0), -relu(-z) and z * (z < 0), where z is negative. In detail:

    - a kink between a flat and another piece: on at the other piece; the kink of an abs or a leaky ReLU: on above it. relu6 and
      other functions with several kinks have a gate for each.
    - maximum and minimum: on where the argument that depends on x wins, or the first argument if both do.
    - a comparison: on where the argument that depends on x, or the first one if both do, is the larger one. If a product,
      where, masked_fill or a write masks a value by it so that x passes at one side only: on where x passes.
    - other choices have a gate for each candidate, pair or side.

    At z = 0 exactly, the gate is that of the spelling: it is on for z * (z >= 0), and off for relu(z).

    Args:
        model: The network, in evaluation mode.
        x: Samples (n, ...) of a floating-point dtype, a tuple of inputs with n samples each, or token ids (n, ...).
        mode: 'secant': each operation must be one that `frozen` can replay. 'tangent': all operations are accepted, and only
            their gates are recorded; gates of a value that no secant replays, such as a softmax's, are left out.
        check: Also record a batch of three samples, the last one twice and the first one, and compare their gates and outputs,
            to find models whose samples depend on one another. It sees the first and the last sample, and differences above
            a third of the digits. If a call has several gates in a row for a sample, in its first dimension, it is always done,
            and never for a model that draws random numbers. False runs the model once, and does not see such models otherwise.
        embedding: For token ids, the path of the layer that looks them up, see `linearize`.

    Returns:
        The gates, preactivations and output of the model.

    Raises:
        UnsupportedOperation: An operation without an affine map. The message names the operation and its layer.
        ValueError: A batch norm or dropout in training mode, no samples, samples that are not finite, or gates that are not
            one after another by sample. With `check`, also a model that reorders samples or lets them depend on one another.
            Give such models one sample at a time.
        TypeError: Inputs that are not floating-point, or a model that is not an nn.Module.

    Example:
        >>> network = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> _ = nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
        >>> gates = record(network, torch.tensor([[2.0], [-3.0]]))
        >>> gates.gates(0).tolist(), gates.margin().tolist()
        ([[True], [False]], [2.0, 3.0])
    """
    secant = check_mode(mode) == "secant"
    model, x = from_embeddings(model, x, embedding)
    recording = run_recorded(model, x, strict=secant, keep_preactivations=True)
    recording.check_complete()
    if secant:
        recording.check_affine()
    n, calls = len(recording.inputs[0]), recording.recorder.gate_calls
    zs = [_by_sample(call, call.preactivations, n) for call in calls]
    zeros = [None if call.zero is None else _by_sample(call, call.zero, n) for call in calls]
    check = check or any(len(call.preactivations) != n for call in calls if call.preactivations.dim())
    if check and n > 1 and not recording.recorder.generators:
        _check_independence(recording, zs, secant)
    sites = [GateSite(call.name, call.operation, z.shape[1:]) for call, z in zip(calls, zs, strict=True)]
    return GateRecord(recording.output, sites, zs, n, zeros)


def frozen(
    model: nn.Module,
    x: Tensor | Inputs,
    *,
    mode: str = "secant",
    held: str = "activated",
    embedding: str | None = None,
) -> Replay | TangentReplay:
    """Return the replay R of a model with the gates of x frozen: affine everywhere, and equal to the model at x.

    For token ids, R is a function of their embeddings.

    Args:
        model: The network, in evaluation mode.
        x: Samples (n, ...) of a floating-point dtype, a tuple of inputs with n samples each, or token ids (n, ...).
        mode: 'secant': R keeps the gates and secants of x. 'tangent': R(v) = F(x) + J (v - x), with the Jacobian J at x.
        held: In mode 'secant', the factor of a product of two values that depend on x which R keeps at its value at x: 'left',
            'right', or 'activated': the one that an activation made, a gate such as a sigmoid before others, and the left one if
            this does not decide. R is equal to the model at x for each. A factor that is piecewise constant in x,
            a factor without a secant such as a softmax, and a denominator are always kept.
        embedding: For token ids, the path of the layer that looks them up, see `linearize`.

    Returns:
        A module that maps inputs of the shapes of x, or of its embeddings, to the model's output.

    Raises:
        UnsupportedOperation: An operation without an affine map, in 'secant' mode; in either mode, a value that leaves PyTorch.
        ValueError: A `held` that does not exist or is not for the mode, or as `record` raises it.
        TypeError: As `record` raises it.

    Example:
        >>> replay = frozen(nn.ReLU(), torch.tensor([[1.0, -1.0]]))
        >>> replay(torch.tensor([[-5.0, 5.0]]))
        tensor([[-5.,  0.]])
    """
    tangent = check_mode(mode, held) == "tangent"
    model, x = from_embeddings(model, x, embedding)
    if tangent:
        recording = run_recorded(model, x, strict=False)
        recording.check_stays_in_torch()
        return TangentReplay(ModelFunction(model), recording.inputs)
    return replay_at(model, x, held)


def supported_ops(model: nn.Module, x: Tensor | Inputs, *, embedding: str | None = None) -> OperationReport:
    """Report how each operation of a model is treated at x.

    Args:
        model: The network, in evaluation mode.
        x: Samples (n, ...) of a floating-point dtype, a tuple of inputs with n samples each, or token ids (n, ...).
        embedding: For token ids, the path of the layer that looks them up, see `linearize`.

    Returns:
        A table that lists every operation on values that depend on the input.

    Raises:
        ValueError: As `record` raises it.
        TypeError: As `record` raises it.

    Example:
        >>> report = supported_ops(nn.Sequential(nn.Linear(2, 2), nn.GELU()), torch.ones(1, 2))
        >>> report.supported, report.exact
        (True, False)
    """
    model, x = from_embeddings(model, x, embedding)
    recording = run_recorded(model, x, strict=False, differentiable=True)
    rows = recording.recorder.rows
    if (call := recording.recorder.non_affine(recording.output)) is not None:
        rows = [(o, at, "not treated" if (o, at) == (call.operation, call.layer) else how) for o, at, how in rows]
    return OperationReport([(*row, count) for row, count in Counter(rows).items()])


def check_mode(mode: str, held: str = "activated") -> str:
    """Return the mode. Raises ValueError for a mode or a held factor that does not exist, or that do not fit each other."""
    if mode not in _MODES:
        raise ValueError(f"mode: got {mode!r}, want one of {_MODES}")
    if held not in _HELD:
        raise ValueError(f"held: got {held!r}, want one of {_HELD}")
    if mode == "tangent" and held != "activated":
        raise ValueError(f"held: got {held!r} in mode 'tangent', which holds no factors; want mode='secant'")
    return mode


def _by_sample(call: GateCall, z: Tensor, n: int) -> Tensor:
    """Return gates with the samples first; a first axis of n times r entries is split into (n, r)."""
    if z.dim() and z.shape[0] == n:
        return z
    if z.dim() and z.shape[0] % n == 0:
        return z.unflatten(0, (n, -1))
    raise ValueError(
        f"model: the gates of {call.name} have shape {tuple(z.shape)}, want the {n} samples first, "
        "or one sample at a time (chunk_size=1)"
    )


def _check_independence(recording: Recording, zs: Sequence[Tensor], strict: bool) -> None:
    """Check that the first and the last sample have the same gates and outputs in another batch."""
    n, calls = len(recording.inputs[0]), recording.recorder.gate_calls
    for m in (3, n):  # n for a model that takes this number of samples only
        places = [n - 1, n - 1, *[0] * (m - 2)]
        try:
            x, model = tuple(t[places] for t in recording.inputs), recording.model
            model = model.of_samples(places) if isinstance(model, FromEmbeddings) else model
            other = run_recorded(model, x, strict=strict, keep_preactivations=True)
            break
        except Exception:
            if m == n:
                raise
    names = [f"the gates of {call.name}" for call in calls]
    same_calls = [call.name for call in calls] == [call.name for call in other.recorder.gate_calls]
    found = [call.preactivations for call in other.recorder.gate_calls] if same_calls else [None] * len(calls)
    outputs = [[t for t in tensors(run.output) if t.is_floating_point() and t.dim()] for run in (recording, other)]
    for z, own in zip(*outputs, strict=False):
        if len(z) == n:
            names, zs, found = [*names, "the outputs"], [*zs, z], [*found, own]
    for name, z, own in zip(names, zs, found, strict=True):
        wanted = z[places]
        if own is not None and own.numel() == wanted.numel():
            scale = z.where(z.isfinite(), 0).abs().amax() if z.numel() else 0.0
            rounding = float(scale) * torch.finfo(z.dtype).eps ** (1 / 3)
            if torch.allclose(wanted, own.reshape(wanted.shape), rtol=0, atol=rounding, equal_nan=True):
                continue
        raise ValueError(
            f"model: {name} change with the rest of the batch: the model reorders samples or lets them depend on one another; "
            "want one sample at a time (chunk_size=1)"
        )
