"""The Triton engine: `forward`, `backward` and `loss` in one launch each, by the kernels of `interp_nn.engines.triton`.

Forms: up to 128 columns a summary is "A" (keeps G) and a pair "A+" (keeps P and G); beyond, a pair is "A+", and a summary "A+"
for n <= d, else "B" (keeps G and W). Losses need at most 128 columns and classes. Products take operands in the inputs' dtype
and accumulate in fp32; fp32 operands are rounded to tf32 where PyTorch's own switch for matrix products allows it, and are
split in two such parts otherwise, and in the widest heads ("tf32x3"). What is rounded: P, G and W as operands and as results,
D = dP + dY G and the logits' gradients as operands, results.

Workspaces come from PyTorch's allocator. Kernels with phases wait for one another on a word of their own (see
`memory.counter`). They are launched cooperatively: a grid that does not fit fails instead of waiting for ever.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.engines import MOST_COLUMNS, eager
from interp_nn.engines.barrier import counter, workspace
from interp_nn.engines.devices import Chip, chip_of
from interp_nn.engines.eager import LossOptions
from interp_nn.engines.triton import backward as backward_kernels
from interp_nn.engines.triton import configs, cross_entropy, head, phased
from interp_nn.engines.triton import forward as forward_kernels
from interp_nn.engines.triton.configs import Bucket, Config, padded

_ROWS_A_SPLIT = 256


class Launch(NamedTuple):
    """One launch of a kernel: its grid, and its constants and options by name."""

    kernel: Any
    programs: int
    splits: int
    constants: dict[str, Any]
    parked: bool = False


def launch(plan: Launch, device: torch.device, *arguments: Any) -> None:
    """Run a kernel on its device: every launch of this engine passes here."""
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():
        plan.kernel[(plan.programs,)](*arguments, **plan.constants)


def _chip(device: torch.device) -> Chip:
    chip = chip_of(device)
    assert chip is not None, f"the triton engine was given a tensor on {device}"
    return chip


def _precision(dtype: torch.dtype) -> str:
    """How products of fp32 operands round them; fp32 sums of 16-bit products may always go through tf32."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


def _options(config: Config, cooperative: bool, checked: bool = False) -> dict[str, Any]:
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    if cooperative:
        options["launch_cooperative_grid"] = True
    if checked:
        options |= {"debug": True, "sanitize_overflow": False}
    return options


def _matrix(b: Tensor) -> tuple[Tensor, bool]:
    """(b, whether its memory is that of a contiguous bᵀ), copied if it is neither that nor contiguous."""
    if b.is_contiguous():
        return b, False
    if b.stride() == (1, b.shape[0]):
        return b, True
    return b.contiguous(), False


def _like(b: Tensor, transposed: bool) -> Tensor:
    """An empty matrix with b's shape and memory order."""
    d, k = b.shape
    return workspace((d, k), b.dtype, b.device, (1, d) if transposed else None)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _common(
    dtype: torch.dtype, n: int, d: int, k: int, kernel: str, chip: Chip, m: int = 1
) -> tuple[Config, dict[str, int]]:
    """(the config, its tiles by name with BK)."""
    config = configs.choose(chip, Bucket(kernel, dtype.itemsize, padded(k), padded(m), n))
    return config, {"BK": padded(k), **dict(zip(configs.TILES[kernel], config.tiles, strict=True))}


def _even(d: int, tiles: dict[str, int]) -> bool:
    """Whether every tile of features is full."""
    return all(d % tiles[name] == 0 for name in ("BD_A", "BD", "BC") if name in tiles)


def _splits(chip: Chip, config: Config, n: int, d: int, depth: int) -> int:
    """Into how many parts the rows of a strip are split: enough to occupy the chip, each with some rows to do."""
    return max(1, min(chip.multiprocessors * config.resident // _cdiv(d, depth), _cdiv(n, _ROWS_A_SPLIT)))


def _programs(chip: Chip, config: Config, *jobs: int) -> int:
    return max(1, min(chip.multiprocessors * config.resident, max(jobs)))


@functools.lru_cache(4096)
def _plan_stream(chip: Chip, dtype: torch.dtype, n: int, d: int, k: int, transposed: bool, precision: str) -> Launch:
    config, tiles = _common(dtype, n, d, k, "stream", chip)
    constants = {"K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision}
    programs = _programs(chip, config, _cdiv(n, tiles["BN"]))
    return Launch(forward_kernels.stream, programs, 1, constants | tiles | _options(config, False))


@functools.lru_cache(4096)
def _plan_phased(
    chip: Chip, dtype: torch.dtype, n: int, d: int, k: int, form: str, precision: str, phases: int, back: bool
) -> Launch:
    kernel = phased.phased_backward if back else phased.phased_forward
    config, tiles = _common(dtype, n, d, k, "phased_backward" if back else "phased_forward", chip)
    rows, columns = tiles["BN"], tiles["BK"]
    tn, tk, td = _cdiv(n, rows), _cdiv(k, columns), _cdiv(d, rows)
    jobs = (tn * tk, td * tk, tn * _cdiv(d, columns) if back else 0)
    constants = {"FORM": form[0], "PRECISION": precision, "PHASES": phases}
    programs = _programs(chip, config, *jobs)
    return Launch(kernel, programs, 1, constants | tiles | _options(config, True))


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, form: str, pair: bool
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """As `reference.forward`."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0:
        return eager.forward(x, b, bias, form, pair)
    device, chip = x.device, _chip(x.device)
    x, (b, transposed) = x.contiguous(), _matrix(b)
    bias = None if bias is None else bias.contiguous()
    y, g = workspace((n, k), x.dtype, x.device), workspace((k, k), x.dtype, x.device)
    if k <= MOST_COLUMNS:
        p = workspace((n, k), x.dtype, x.device) if form == "A+" else None
        plan = _plan_stream(chip, x.dtype, n, d, k, transposed, _precision(x.dtype))
        launch(plan, device, x, b, bias, p, y, g, n, d)
        return p, y, [g] if p is None else [p, g]
    p = workspace((n, k), x.dtype, x.device) if form == "A+" or pair else None
    w = workspace((d, k), x.dtype, x.device) if form == "B" else None
    plan = _plan_phased(chip, x.dtype, n, d, k, form, _precision(x.dtype), 3 if form == "A+" else 7, False)
    launch(plan, device, x, b, bias, p, y, g, w, counter(device), n, d, k, *b.stride())
    if w is not None:
        return p, y, [g, w]
    assert p is not None
    return p, y, [p, g]


def backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    kept: Sequence[Tensor],
    form: str,
    need_x: bool,
    need_b: bool,
    need_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.backward`."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0 or not (need_x or need_b):
        return eager.backward(dp, dy, x, b, kept, form, need_x, need_b, need_bias)
    x, (b, transposed) = x.contiguous(), _matrix(b)
    dp, dy = (None if g is None else g.contiguous() for g in (dp, dy))
    dx = workspace((n, d), x.dtype, x.device) if need_x else None
    db = _like(b, transposed) if need_b else None
    dbias = workspace((k,), b.dtype, b.device) if need_bias else None
    if k > MOST_COLUMNS:
        _phased_backward(dp, dy, x, b, kept, form, dx, db, dbias)
    elif form == "A":
        assert dy is not None
        _summary_backward(dy, x, b, kept[0], transposed, dx, db, dbias)
    else:
        assert dbias is None
        _pair_backward(dp, dy, x, b, kept, transposed, dx, db)
    return dx, db, dbias


@functools.lru_cache(4096)
def _plan_summary_backward(
    chip: Chip, dtype: torch.dtype, n: int, d: int, k: int, transposed: bool, precision: str, phases: int
) -> tuple[Launch, int]:
    config, tiles = _common(dtype, n, d, k, "summary_backward", chip)
    bk, strips, splits = tiles["BK"], _cdiv(d, tiles["BD"]), _splits(chip, config, n, d, tiles["BD"])
    programs = _programs(chip, config, strips * splits, _cdiv(d, tiles["BC"]) if phases & 4 else 1)
    constants = {
        "K": k,
        "B_T": transposed,
        "EVEN_D": _even(d, tiles),
        "PRECISION": precision,
        "PHASES": phases,
        "BATCH": 32,
    }
    work = splits * d * bk + min(programs, strips * splits) * bk * bk + splits * bk + bk * bk
    return Launch(backward_kernels.summary_backward, programs, splits, constants | tiles | _options(config, True)), work


def _summary_backward(
    dy: Tensor, x: Tensor, b: Tensor, g: Tensor, transposed: bool,
    dx: Tensor | None, db: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    phases = 7 if db is not None else 3 if dbias is not None else 1
    plan, size = _plan_summary_backward(_chip(device), x.dtype, n, d, k, transposed, _precision(x.dtype), phases)
    work = workspace((size,), torch.float32, device)
    launch(plan, device, x, b, g, dy, dx, db, dbias, work, counter(device), n, d, plan.splits)


@functools.lru_cache(4096)
def _plan_pair_backward(
    chip: Chip, dtype: torch.dtype, n: int, d: int, k: int, transposed: bool, precision: str, phases: int
) -> tuple[Launch, int]:
    config, tiles = _common(dtype, n, d, k, "pair_backward", chip)
    bk, strips, splits = tiles["BK"], _cdiv(d, tiles["BD"]), _splits(chip, config, n, d, tiles["BD"])
    jobs = (
        _cdiv(n, tiles["BN_A"]) if phases & 1 else 1,
        strips * splits,
        _cdiv(d, tiles["BC"]) if phases & 4 else 1,
    )
    programs = _programs(chip, config, *jobs)
    constants = {
        "K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision, "PHASES": phases,
        "WIDTH": _width(k) if phases & 1 else k, "BATCH": 32,
    }  # fmt: skip
    work = splits * d * bk + (programs + 1) * bk * bk
    return Launch(backward_kernels.pair_backward, programs, splits, constants | tiles | _options(config, True)), work


def _width(k: int) -> int:
    """The row length of a workspace with k columns: whole 16-byte words of 16-bit numbers."""
    return (k + 7) // 8 * 8


def _pair_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, kept: Sequence[Tensor], transposed: bool,
    dx: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    p, g = (t.contiguous() for t in kept)
    phases = (2 if dy is None else 3) | (0 if db is None else 4)
    plan, size = _plan_pair_backward(_chip(device), x.dtype, n, d, k, transposed, _precision(x.dtype), phases)
    rows = dp if dy is None else workspace((n, _width(k)), x.dtype, device)
    work = workspace((size,), torch.float32, device)
    launch(plan, device, x, b, p, g, dp, dy, dx, db, rows, work, counter(device), n, d, plan.splits)


def _phased_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, kept: Sequence[Tensor], form: str,
    dx: Tensor | None, db: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    p, g, w, rows, s, t = None, None, None, dp, None, None
    need_t = dy is not None and (db is not None or dbias is not None)
    if form == "B":
        g, w = kept
        phases = 7 if db is not None else 1
        s = workspace((d, k), torch.float32, device) if need_t else None
    else:
        p, g = (m.contiguous() for m in kept)
        phases = 2 if dy is None else 3
        rows = dp if dy is None else workspace((n, k), x.dtype, device)
    if need_t:
        t = workspace((k, k), torch.float32, device)
    plan = _plan_phased(_chip(device), x.dtype, n, d, k, form, _precision(x.dtype), phases, True)
    launch(plan, device, x, b, p, g, w, dp, dy, dx, db, dbias, rows, s, t, counter(device), n, d, k, *b.stride())


@functools.lru_cache(4096)
def _plan_loss(
    chip: Chip, dtype: torch.dtype, n: int, d: int, k: int, m: int | None, form: str, transposed: bool,
    precision: str, reduction: str, gradients: bool, parameters: bool,
) -> tuple[Launch, int]:  # fmt: skip
    """The launch and its fp32 workspace, of the pair's loss (m None) or of a head's in its latent or flat form."""
    kernel = {"flat": head.flat_loss, "latent": head.latent_loss}.get(form, cross_entropy.pair_loss)
    name = kernel.__name__
    config, tiles = _common(dtype, n, d, k, name, chip, m or 1)
    bk, bm, strips = tiles["BK"], padded(m or 1), _cdiv(d, tiles["BD"])
    if dtype == torch.float32 and 18 * bk * bm > chip.shared:  # what Triton's compiler takes for a wide head in tf32
        precision = "tf32x3"  # it takes less then: 12 bytes in place of 18
    splits = _splits(chip, config, n, d, tiles["BD"])
    jobs = [_cdiv(n, tiles["BN_A"])]
    if gradients:
        jobs.append(strips * splits)
    if parameters or form == "flat":
        jobs.append(_cdiv(d, tiles["BC"]))
    programs = _programs(chip, config, *jobs)
    last = gradients or reduction != "none"
    constants = {
        "K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision, "REDUCTION": reduction, "BATCH": 32,
    }  # fmt: skip
    if m is not None:
        constants |= {"M": m, "BM": bm}
    if form == "flat":
        constants["PHASES"] = 3 | (4 if last else 0) | (24 if parameters else 0)
        work = 2 * splits * d * bm + (min(programs, strips * splits) + 1) * 2 * bm * bk + bk * bk
    else:
        constants["PHASES"] = 1 | (2 if last else 0) | (4 if parameters else 0)
        constants["WIDTH"] = _width(k)
        if m is not None:  # A, H and their transposes, each in two parts where products are exact
            operands = 4 * bk * bm * dtype.itemsize * (2 if precision == "tf32x3" else 1)
            constants["RELOAD_OPERANDS"] = operands > chip.shared and not (config.parked and parameters)
        work = splits * d * bk
        work += (programs + 1) * bk * bk if m is None else (programs + 1) * 2 * bm * bk + bk * bk
    work += programs * (2 if m is None else 2 + bm)
    return Launch(kernel, programs, splits, constants | tiles | _options(config, True, True), config.parked), work


def loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    form: str,
    upstream: Tensor | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """As `reference.loss`; a target out of range stops the kernel on a GPU, as it stops PyTorch's own losses."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0:
        return eager.loss(x, b, a, c, target, options, form, upstream, needs)
    device, chip = x.device, _chip(x.device)
    m = None if a is None else a.shape[0]
    if device.type == "cpu":
        eager.check_target(target, m or k, options.ignore_index)
    need_x, need_b, need_a, need_c = needs or (False,) * 4
    x, (b, transposed), target = x.contiguous(), _matrix(b), target.contiguous()
    if upstream is not None:
        upstream = upstream.contiguous()
    parameters = need_b or need_a
    plan, size = _plan_loss(
        chip, x.dtype, n, d, k, m, form, transposed, _precision(x.dtype), options.reduction,
        need_x or parameters or need_c, parameters,
    )  # fmt: skip
    value = workspace((n,) if options.reduction == "none" else (), torch.float32, device)
    dx = workspace((n, d), x.dtype, x.device) if need_x else None
    db = _like(b, transposed) if need_b else None
    work = workspace((size,), torch.float32, device)
    tail = (work, counter(device), n, d, plan.splits, options.ignore_index, *options.weights)

    def rows(width: int, wanted: bool) -> Tensor | None:
        return workspace((n, width), x.dtype, device) if wanted else None

    width, parked = _width(k), plan.parked and parameters
    through_d = need_x or need_b
    if a is None or m is None:
        spaces = rows(width, through_d), rows(width, parked), rows(width, parked)
        launch(plan, device, x, b, target, upstream, value, dx, db, *spaces, *tail)
        return value, [g for g in (dx, db) if g is not None]
    a, c = a.contiguous(), None if c is None else c.contiguous()
    da = workspace((m, k), a.dtype, device) if need_a else None
    dc = workspace((m,), a.dtype, device) if need_c else None
    both = 2 * padded(m)
    own: tuple[Tensor | None, ...]
    if form == "flat":
        own = workspace((2, d, padded(m)), x.dtype, device), rows(both, need_x or parameters)
    else:
        own = rows(width, through_d), rows(width, parked), rows(both, parked)
    launch(plan, device, x, b, a, c, target, upstream, value, dx, db, da, dc, *own, *tail)
    return value, [g for g in (dx, db, da, dc) if g is not None]


_SCALE_BLOCK = 4096


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """As `reference.scale`, but in place, and where upstream is 1 without touching them; the device alone knows."""
    sizes = [g.numel() for g in grads]
    device = upstream.device
    programs = max(1, min(4 * _chip(device).multiprocessors, _cdiv(max(sizes), _SCALE_BLOCK)))
    options = {"BLOCK": _SCALE_BLOCK, "num_warps": 8, "enable_fp_fusion": True}
    plan = Launch(cross_entropy.scale_gradients, programs, 1, options)
    rest = 4 - len(sizes)
    launch(plan, device, upstream, *grads, *(None,) * rest, *sizes, *(0,) * rest)
    return list(grads)
