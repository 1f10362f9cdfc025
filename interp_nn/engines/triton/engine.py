"""The Triton engine: `forward`, `backward` and `loss` in one launch each, by the kernels beside this file.

Plans: up to 128 columns a summary is "(Xb)G" (saves G) and a pair also saves P. Beyond, a pair is "(Xb)G" with P, and a
summary the same for n <= d, else "X(bG)" (saves G and W). A polynomial is "(Xb)q" (saves G and q(G), and P for a pair), up to
128 columns. Losses need at most 128 columns and classes. Products take operands in the inputs' dtype and accumulate in fp32; the
products of a polynomial's derivative take them in fp32. fp32 operands are rounded to tf32 where PyTorch's own switch for matrix
products allows it. Otherwise, and in the widest heads, they are split in two such parts ("tf32x3"). Rounded are: P, G and W as
operands and as results, D = dP + dY G and the logits' gradients as operands, results.

Workspaces come from PyTorch's allocator. Kernels with phases wait at a barrier counter of their own (see `barrier.counter`). They
are launched cooperatively: a grid that does not fit fails instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.engines import eager
from interp_nn.engines.barrier import allocator, counter, workspace
from interp_nn.engines.devices import DeviceSpec, fp32_precision, sm_carveout, spec_of
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.limits import MOST_COLUMNS, output_layer_fits, padded, single_tf32_fits, triton_version
from interp_nn.engines.problem import (
    Config,
    LossOptions,
    Order,
    Plan,
    PreparedBackward,
    PreparedForward,
    PreparedLoss,
    PreparedScale,
)
from interp_nn.engines.triton import backward as backward_kernels
from interp_nn.engines.triton import configs, cross_entropy, head, phased
from interp_nn.engines.triton import forward as forward_kernels
from interp_nn.engines.triton.configs import Bucket

_ROWS_A_SPLIT = 256
_MANY_TURNS, _MOST_TURNS = (
    4,
    8,
)  # column tiles for each place on the GPU that need no parts; most parts for the sake of balance

Tuned = tuple[tuple[str, Config], ...]  # `Plan.tiles`


class Launch(NamedTuple):
    """One launch of a kernel: its grid, its constants and options by name, and its compiled kernels."""

    kernel: Any
    programs: int
    splits: int
    constants: Constants
    scratch: bool = False


class Constants(dict[str, Any]):
    """The constants and options of a launch by name, and its compiled kernels by what else Triton specialises on.

    Attributes:
        handles: Compiled kernels by device, integers, and the dtype of each pointer or None.
        pointers: Number of arguments that are tensors or None, which come first; 0 before the first launch.
        integers: Number of arguments up to the last integer, which come next.
    """

    __slots__ = ("handles", "integers", "pointers")

    def __init__(self, *parts: dict[str, Any]) -> None:
        super().__init__()
        for part in parts:
            self.update(part)
        self.handles: dict[tuple[Any, ...], _Handle] = {}
        self.pointers = self.integers = 0


class _Handle(NamedTuple):
    """A compiled kernel, its launcher, the first arguments of that, and its last ones, which are the constants."""

    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    stream: Any
    hooks: Any
    compiled: Any  # Triton 3.8 and newer unload the function of a kernel that nothing holds


def launch(made: Launch, device: torch.device, *arguments: Any) -> None:
    """Launch a kernel on a device, and return at once. All launches of this engine go through this function.

    Triton's own call finds the compiled kernel by parsing all arguments and constants. A launch on the current device whose
    tensors are aligned to 16 bytes finds it in the constants' handles, in less time.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            made.kernel[(made.programs,)](*arguments, **made.constants)
        return
    kept, key = made.constants, None
    if type(kept) is Constants and kept.pointers:
        tensors = arguments[: kept.pointers]
        given = [0 if t is None else t.data_ptr() for t in tensors]
        if not reduce(or_, given) & 15:
            kinds = [t if t is None else t.dtype if t.is_cuda is on_gpu else _ELSEWHERE for t in tensors]
            key = (device, *arguments[kept.pointers : kept.integers], *kinds)
            handle = kept.handles.get(key)
            if handle is not None:
                run, function, metadata, constants, stream, hooks, _ = handle
                if not (hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls):
                    rest = arguments[kept.pointers :]
                    at = stream(device.index or 0)
                    run(made.programs, 1, 1, at, function, metadata, None, None, None, *given, *rest, *constants)
                    return
    compiled = made.kernel[(made.programs,)](*arguments, **kept)
    if _TESTED and type(kept) is Constants and compiled is not None:
        _keep(made, key, compiled, arguments)


_ELSEWHERE = "on another device"  # where Triton's own launch raises
_TESTED = (3, 6) <= triton_version() <= (3, 9)  # whose launchers take what `launch` gives them


def _keep(made: Launch, key: tuple[Any, ...] | None, compiled: Any, arguments: tuple[Any, ...]) -> None:
    """Remember a compiled kernel for later launches; at the first one, find which arguments are pointers and integers."""
    kept = made.constants
    if not kept.pointers:
        pointers = next(i for i, a in enumerate(arguments) if not (a is None or isinstance(a, Tensor)))
        kept.integers = next(
            (i for i in range(pointers, len(arguments)) if type(arguments[i]) is not int), len(arguments)
        )
        kept.pointers = pointers
    elif key is not None and _ELSEWHERE not in key and hasattr(compiled, "packed_metadata"):
        from triton import knobs
        from triton.runtime import driver

        names = made.kernel.arg_names[len(arguments) :]
        if all(name in kept for name in names) and not made.kernel.pre_run_hooks:
            constants = tuple(kept[name] for name in names)
            stream, hooks = driver.active.get_current_stream, knobs.runtime
            run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
            kept.handles[key] = _Handle(run, function, metadata, constants, stream, hooks, compiled)


def _spec(device: torch.device) -> DeviceSpec:
    spec = spec_of(device)
    assert spec is not None, f"the triton engine was given a tensor on {device}"
    return spec


# Classes of a head in 16 bits up to which fp32 sums are rounded before they are multiplied: beyond, rounding takes registers
# that the kernels do not have, and cutting the sums off shrinks db by less than its own rounding to 16 bits.
_MOST_ROUNDED = 16


def _precision(dtype: torch.dtype) -> str:
    """Return the rounding of fp32 operands in products. fp32 sums of 16-bit products may always go through tf32."""
    return "tf32x3" if dtype == torch.float32 and fp32_precision("cuda", "matmul") != "tf32" else "tf32"


def _options(config: Config, cooperative: bool, checked: bool = False) -> dict[str, Any]:
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    if cooperative:
        options["launch_cooperative_grid"] = True
    if checked:
        options |= {"debug": True, "sanitize_overflow": False}
    return options


def _matrix(b: Tensor) -> tuple[Tensor, bool]:
    """Return (b, True if it is column-major), copied if it is neither that nor contiguous."""
    if b.is_contiguous():
        return b, False
    return (b, True) if b.mT.is_contiguous() else (b.contiguous(), False)


def _like(b: Tensor, transposed: bool) -> Tensor:
    """Return an empty matrix with b's shape and memory order."""
    d, k = b.shape
    return workspace((d, k), b.dtype, b.device, (1, d) if transposed else None)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _common(
    tuned: Tuned, dtype: torch.dtype, n: int, d: int, k: int, kernel: str, spec: DeviceSpec, m: int = 1
) -> tuple[Config, dict[str, int]]:
    """Return (the config of a kernel, its tiles by name with BK): the plan's own config, else the table's."""
    config = dict(tuned).get(kernel) or configs.choose(spec, Bucket(kernel, dtype.itemsize, padded(k), padded(m), n))
    return config, {"BK": padded(k), **configs.tiles_of(kernel, config)}


def _numbers(q: Polynomial | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the coefficients and the scale as kernels read them, on the device."""
    if q is None:
        return None, None
    return q.coefficients.float().contiguous(), None if q.scale is None else q.scale.float()


def _even(d: int, tiles: dict[str, int]) -> bool:
    """Return True if every tile of features is full."""
    return all(d % tiles[name] == 0 for name in ("BD_A", "BD", "BC") if name in tiles)


def _splits(spec: DeviceSpec, config: Config, n: int, d: int, depth: int) -> int:
    """Return the number of parts that the rows of a column tile are split into: enough to occupy the GPU, each with some rows.

    Where as many parts as fit at once leave part of the GPU idle, more parts in several turns occupy more of it.
    """
    strips, slots, most = _cdiv(d, depth), spec.multiprocessors * config.blocks_per_sm, _cdiv(n, _ROWS_A_SPLIT)
    fewest = max(1, slots // strips)
    if fewest >= most or strips > _MANY_TURNS * slots:
        return min(fewest, most)
    candidates = range(fewest, min(most, max(fewest, _MOST_TURNS)) + 1)

    def occupied(splits: int) -> float:
        return strips * splits / (_cdiv(strips * splits, slots) * slots)

    return next((splits for splits in candidates if occupied(splits) >= 0.9), max(candidates, key=occupied))


def _programs(spec: DeviceSpec, config: Config, *jobs: int) -> int:
    return max(1, min(spec.multiprocessors * config.blocks_per_sm, max(jobs)))


@configs.remembered
def _stream_launch(
    tuned: Tuned, spec: DeviceSpec, dtype: torch.dtype, n: int, d: int, k: int, transposed: bool, precision: str,
    degree: int | None,
) -> Launch:  # fmt: skip
    config, tiles = _common(tuned, dtype, n, d, k, "stream", spec)
    constants = {"K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision, "DEGREE": degree}
    programs = _programs(spec, config, _cdiv(n, tiles["BN"]))
    return Launch(forward_kernels.stream, programs, 1, Constants(constants, tiles, _options(config, False)))


@configs.remembered
def _phased_launch(
    tuned: Tuned,
    spec: DeviceSpec,
    dtype: torch.dtype,
    n: int,
    d: int,
    k: int,
    order: Order,
    precision: str,
    phases: int,
    back: bool,
) -> Launch:
    kernel = phased.phased_backward if back else phased.phased_forward
    config, tiles = _common(tuned, dtype, n, d, k, "phased_backward" if back else "phased_forward", spec)
    rows, columns = tiles["BN"], tiles["BK"]
    tn, tk, td = _cdiv(n, rows), _cdiv(k, columns), _cdiv(d, rows)
    jobs = (tn * tk, td * tk, tn * _cdiv(d, columns) if back else 0)
    constants = {"FORM": "A" if order == "(Xb)G" else "B", "PRECISION": precision, "PHASES": phases}
    programs = _programs(spec, config, *jobs)
    return Launch(kernel, programs, 1, Constants(constants, tiles, _options(config, True)))


def _of_zeros(plan: Plan, q: Polynomial | None) -> Plan:
    """Return the plan of the summary, which computes a polynomial of empty tensors too: P is zero, whatever q is."""
    return plan if q is None or plan.order != "(Xb)q" else plan._replace(order="(Xb)G")


def _zeros(q: Polynomial) -> Tensor:
    return torch.zeros(q.degree + 1, dtype=torch.float32, device=q.coefficients.device)


def forward(
    x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool, q: Polynomial | None = None
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Compute `Engine.forward`."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0:
        p, y, saved = eager.forward(x, b, bias, _of_zeros(plan, q), pair)
        return p, y, saved if q is None else [*saved, saved[-1]]
    device, spec, precision = x.device, _spec(x.device), _precision(x.dtype)
    x, (b, transposed) = x.contiguous(), _matrix(b)
    bias = None if bias is None else bias.contiguous()
    y, g = workspace((n, k), x.dtype, device), workspace((k, k), x.dtype, device)
    if k <= MOST_COLUMNS:
        p = workspace((n, k), x.dtype, device) if plan.saves else None
        made = _stream_launch(
            plan.tiles, spec, x.dtype, n, d, k, transposed, precision, None if q is None else q.degree
        )  # fmt: skip
        if q is None:
            launch(made, device, x, b, bias, p, y, g, None, None, None, n, d)
            return p, y, [g] if p is None else [p, g]
        qg = workspace((k, k), x.dtype, device)
        launch(made, device, x, b, bias, p, y, g, qg, *_numbers(q), n, d)
        return p, y, [g, qg] if p is None else [p, g, qg]
    p = workspace((n, k), x.dtype, x.device) if plan.saves or pair else None
    w = workspace((d, k), x.dtype, x.device) if plan.order == "X(bG)" else None
    phases = 7 if plan.order == "X(bG)" else 3
    made = _phased_launch(plan.tiles, spec, x.dtype, n, d, k, plan.order, precision, phases, False)
    launch(made, device, x, b, bias, p, y, g, w, counter(device), n, d, k, *b.stride())
    if w is not None:
        return p, y, [g, w]
    assert p is not None
    return p, y, [p, g]


def backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: Plan,
    need_x: bool,
    need_b: bool,
    need_bias: bool = False,
    need_c: bool = False,
    q: Polynomial | None = None,
) -> tuple[Tensor | None, ...]:
    """Compute `Engine.backward`."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0 or not (need_x or need_b or need_c):
        grads = eager.backward(
            dp, dy, x, b, saved if q is None else saved[:-1], _of_zeros(plan, q), need_x, need_b, need_bias
        )
        return grads if q is None else (*grads, _zeros(q) if need_c else None)
    x, (b, transposed) = x.contiguous(), _matrix(b)
    dp, dy = (None if g is None else g.contiguous() for g in (dp, dy))
    dx = workspace((n, d), x.dtype, x.device) if need_x else None
    db = _like(b, transposed) if need_b or need_c else None  # the phase of db forms dc too
    dbias = workspace((k,), b.dtype, b.device) if need_bias else None
    dc = workspace((q.degree + 1,), torch.float32, x.device) if q is not None and need_c else None
    if k > MOST_COLUMNS:
        _phased_backward(dp, dy, x, b, saved, plan, dx, db, dbias)
    elif not plan.saves:
        assert dy is not None
        _summary_backward(dy, x, b, saved, plan.tiles, transposed, dx, db, dbias, q, dc)
    else:
        assert dbias is None
        _pair_backward(dp, dy, x, b, saved, plan.tiles, transposed, dx, db, q, dc)
    if q is None:
        return dx, db, dbias
    return dx, db if need_b else None, dbias, dc


@configs.remembered
def _summary_backward_launch(
    tuned: Tuned,
    spec: DeviceSpec,
    dtype: torch.dtype,
    n: int,
    d: int,
    k: int,
    transposed: bool,
    precision: str,
    phases: int,
    degree: int | None,
) -> tuple[Launch, int]:
    config, tiles = _common(tuned, dtype, n, d, k, "summary_backward", spec)
    bk, tiles_of_d, splits = tiles["BK"], _cdiv(d, tiles["BD"]), _splits(spec, config, n, d, tiles["BD"])
    programs = _programs(spec, config, tiles_of_d * splits, _cdiv(d, tiles["BC"]) if phases & 4 else 1)
    constants = {
        "K": k,
        "B_T": transposed,
        "EVEN_D": _even(d, tiles),
        "PRECISION": precision,
        "PHASES": phases,
        "DEGREE": degree,
    }
    parts = min(programs, tiles_of_d * splits)
    work = backward_kernels.summary_backward_workspace.fn(0, splits, d, parts, bk)[-1]
    return Launch(
        backward_kernels.summary_backward, programs, splits, Constants(constants, tiles, _options(config, True))
    ), work


def _squares(saved: Sequence[Tensor], q: Polynomial | None) -> tuple[Tensor | None, Tensor]:
    """Return (G or None, q(G)) of the saved tensors, contiguous; (None, G) of the summary."""
    *_, gram, last = (None, *(t.contiguous() for t in saved))
    assert last is not None
    return None if q is None else gram, last


def _summary_backward(
    dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor], tuned: Tuned, transposed: bool,
    dx: Tensor | None, db: Tensor | None, dbias: Tensor | None, q: Polynomial | None, dc: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    phases = 7 if db is not None else 3 if dbias is not None else 1
    made, size = _summary_backward_launch(
        tuned, _spec(device), x.dtype, n, d, k, transposed, _precision(x.dtype), phases, None if q is None else q.degree
    )  # fmt: skip
    g, qg = _squares(saved, q)
    work = workspace((size,), torch.float32, device)
    given = x, b, qg, dy, dx, db, dbias, g, *_numbers(q), dc
    launch(made, device, *given, work, counter(device), n, d, made.splits)


@configs.remembered
def _pair_backward_launch(
    tuned: Tuned,
    spec: DeviceSpec,
    dtype: torch.dtype,
    n: int,
    d: int,
    k: int,
    transposed: bool,
    precision: str,
    phases: int,
    degree: int | None,
) -> tuple[Launch, int]:
    config, tiles = _common(tuned, dtype, n, d, k, "pair_backward", spec)
    bk, tiles_of_d, splits = tiles["BK"], _cdiv(d, tiles["BD"]), _splits(spec, config, n, d, tiles["BD"])
    jobs = (
        _cdiv(n, tiles["BN_A"]) if phases & 1 else 1,
        tiles_of_d * splits,
        _cdiv(d, tiles["BC"]) if phases & 4 else 1,
    )
    programs = _programs(spec, config, *jobs)
    constants = {
        "K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision, "PHASES": phases,
        "DEGREE": degree, "WIDTH": _width(k) if phases & 1 else k,
    }  # fmt: skip
    work = backward_kernels.pair_backward_workspace.fn(0, splits, d, programs, bk)[-1]
    return Launch(
        backward_kernels.pair_backward, programs, splits, Constants(constants, tiles, _options(config, True))
    ), work


def _width(k: int) -> int:
    """Return the row length of a workspace with k columns: whole 16-byte words of 16-bit numbers."""
    return (k + 7) // 8 * 8


def _pair_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, saved: Sequence[Tensor], tuned: Tuned,
    transposed: bool,
    dx: Tensor | None, db: Tensor | None, q: Polynomial | None, dc: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    p, (g, qg) = saved[0].contiguous(), _squares(saved, q)
    phases = (2 if dy is None else 3) | (0 if db is None else 4)
    degree = None if q is None else q.degree
    made, size = _pair_backward_launch(
        tuned, _spec(device), x.dtype, n, d, k, transposed, _precision(x.dtype), phases, degree
    )
    rows = dp if dy is None else workspace((n, _width(k)), x.dtype, device)
    work = workspace((size,), torch.float32, device)
    if dy is None and dc is not None:
        dc.zero_()
    given = x, b, p, qg, dp, dy, dx, db, g, *_numbers(q), None if dy is None else dc
    launch(made, device, *given, rows, work, counter(device), n, d, made.splits)


def _phased_backward(
    dp: Tensor | None, dy: Tensor | None, x: Tensor, b: Tensor, saved: Sequence[Tensor], plan: Plan,
    dx: Tensor | None, db: Tensor | None, dbias: Tensor | None,
) -> None:  # fmt: skip
    (n, d), k, device = x.shape, b.shape[1], x.device
    p, g, w, rows, s, t = None, None, None, dp, None, None
    need_t = dy is not None and (db is not None or dbias is not None)
    if plan.order == "X(bG)":
        g, w = saved
        phases = 7 if db is not None else 1
        s = workspace((d, k), torch.float32, device) if need_t else None
    else:
        p, g = (m.contiguous() for m in saved)
        phases = 2 if dy is None else 3
        rows = dp if dy is None else workspace((n, k), x.dtype, device)
    if need_t:
        t = workspace((k, k), torch.float32, device)
    made = _phased_launch(
        plan.tiles, _spec(device), x.dtype, n, d, k, plan.order, _precision(x.dtype), phases, True
    )  # fmt: skip
    launch(made, device, x, b, p, g, w, dp, dy, dx, db, dbias, rows, s, t, counter(device), n, d, k, *b.stride())


@configs.remembered
def _loss_launch(
    tuned: Tuned, spec: DeviceSpec, dtype: torch.dtype, n: int, d: int, k: int, m: int | None, order: Order, transposed: bool,
    precision: str, reduction: str, gradients: bool, parameters: bool, degree: int | None,
) -> tuple[Launch, int]:  # fmt: skip
    """Return (launch, numbers in its fp32 workspace) of the loss of a pair (m None) or of a head."""
    name = configs.LOSS_KERNELS[order]
    kernel = getattr(cross_entropy if name == "pair_loss" else head, name)
    config, tiles = _common(tuned, dtype, n, d, k, name, spec, m or 1)
    bk, bm, tiles_of_d = tiles["BK"], padded(m or 1), _cdiv(d, tiles["BD"])
    if dtype == torch.float32 and not single_tf32_fits(spec, bk, bm):
        precision = "tf32x3"
    if dtype.itemsize == 2 and bm > _MOST_ROUNDED:
        precision = "tf32 cut"
    splits = _splits(spec, config, n, d, tiles["BD"])
    jobs = [_cdiv(n, tiles["BN_A"])]
    if gradients:
        jobs.append(tiles_of_d * splits)
    if parameters or order == "logits_from_x":
        jobs.append(_cdiv(d, tiles["BC"]))
    programs = _programs(spec, config, *jobs)
    last = gradients or reduction != "none"
    constants = {
        "K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision, "REDUCTION": reduction, "BATCH": 32,
        "DEGREE": degree, "STAGES_A": config.stages_a or config.stages,
    }  # fmt: skip
    if m is not None:
        constants |= {"M": m, "BM": bm}
    if order == "logits_from_x":
        constants["PHASES"] = 3 | (4 if last else 0) | (24 if parameters else 0)
        parts = min(programs, tiles_of_d * splits)
        work = head.flat_loss_workspace.fn(0, splits, d, parts, programs, bk, bm)[-1]
    else:
        constants["PHASES"] = 1 | (2 if last else 0) | (4 if parameters else 0)
        constants["WIDTH"] = _width(k)
        if m is not None:
            fits = output_layer_fits(spec, bk, bm, dtype.itemsize, precision == "tf32x3")
            constants["RELOAD_OPERANDS"] = not fits and not (config.scratch and parameters)
        if m is None:
            work = cross_entropy.pair_loss_workspace.fn(0, splits, d, programs, bk)[-1]
        else:
            work = head.latent_loss_workspace.fn(0, splits, d, programs, bk, bm)[-1]
    return Launch(
        kernel, programs, splits, Constants(constants, tiles, _options(config, True, True)), config.scratch
    ), work


def loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    upstream: Tensor | None = None,
    needs: Sequence[bool] | None = None,
    q: Polynomial | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute `Engine.loss`. On a GPU a target out of range stops the kernel, as it stops PyTorch's own losses."""
    (n, d), k = x.shape, b.shape[1]
    if n * d * k == 0:
        wanted = None if needs is None else needs[:4]
        value, grads = eager.loss(x, b, a, c, target, options, _of_zeros(plan, q), upstream, wanted)
        return value, grads if q is None or needs is None or not needs[4] else [*grads, _zeros(q)]
    device, spec = x.device, _spec(x.device)
    m = None if a is None else a.shape[0]
    if device.type == "cpu":
        eager.check_target(target, m or k, options.ignore_index)
    need_x, need_b, need_a, need_c, need_q = (*(needs or ()), *(False,) * 5)[:5]
    x, (b, transposed), target = x.contiguous(), _matrix(b), target.contiguous()
    if upstream is not None:
        upstream = upstream.contiguous()
    parameters = need_b or need_a or need_q
    made, size = _loss_launch(
        plan.tiles, spec, x.dtype, n, d, k, m, plan.order, transposed, _precision(x.dtype), options.reduction,
        need_x or parameters or need_c, parameters, None if q is None else q.degree,
    )  # fmt: skip
    value = workspace((n,) if options.reduction == "none" else (), torch.float32, device)
    dx = workspace((n, d), x.dtype, x.device) if need_x else None
    db = _like(b, transposed) if need_b or need_q else None  # the phase of db forms dq too
    dq = workspace((q.degree + 1,), torch.float32, device) if q is not None and need_q else None
    numbers = (*_numbers(q), dq)
    work = workspace((size,), torch.float32, device)
    tail = (work, counter(device), n, d, made.splits, options.ignore_index, *options.weights)
    sizes = _loss_spaces(made, plan.order, n, d, k, m, need_x or need_b or need_q, parameters)
    spaces = [None if size is None else workspace((size,), x.dtype, device) for size in sizes]
    if a is None or m is None:
        launch(made, device, x, b, target, upstream, value, dx, db, *numbers, *spaces, *tail)
        return value, [g for g in (dx, db if need_b else None, dq) if g is not None]
    a, c = a.contiguous(), None if c is None else c.contiguous()
    da = workspace((m, k), a.dtype, device) if need_a else None
    dc = workspace((m,), a.dtype, device) if need_c else None
    launch(made, device, x, b, a, c, target, upstream, value, dx, db, da, dc, *numbers, *spaces, *tail)
    return value, [g for g in (dx, db if need_b else None, da, dc, dq) if g is not None]


def _loss_spaces(
    made: Launch, order: Order, n: int, d: int, k: int, m: int | None, through_d: bool, parameters: bool
) -> list[int | None]:
    """Return the number of elements of each workspace that a loss has in X's dtype; None for one without use."""
    width, both, scratch = _width(k), 2 * padded(m or 1), made.scratch and parameters
    if order == "logits_from_x":
        return [d * both, n * both if through_d or parameters else None]
    own = n * width if scratch else None
    return [n * width if through_d else None, own, own if m is None or not scratch else n * both]


_SCALE_BLOCK = 4096


def scale(grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Compute `Engine.scale` in place.

    The kernel reads the upstream on the device, and returns early when it is 1: no host sync.
    """
    sizes = [g.numel() for g in grads]
    device = upstream.device
    rest = 5 - len(sizes)
    launch(
        _scale_launch(_spec(device), max(sizes)), device, upstream, *grads, *(None,) * rest, *sizes, *(0,) * rest
    )  # fmt: skip
    return list(grads)


@configs.remembered
def _scale_launch(spec: DeviceSpec, size: int) -> Launch:
    programs = max(1, min(4 * spec.multiprocessors, _cdiv(size, _SCALE_BLOCK)))
    options = {"BLOCK": _SCALE_BLOCK, "num_warps": 8, "enable_fp_fusion": True}
    return Launch(cross_entropy.scale_gradients, programs, 1, Constants(options))


# Prepared calls: `forward`, `backward`, `loss` and `scale` of tensors whose layouts are known, by kernels that are compiled


def _ready(made: Launch, device: torch.device, kinds: Sequence[torch.dtype | None], *rest: Any) -> Any:
    """Return `launch` as a function of the bitwise or of all addresses, and of each (0 for None); None before it is compiled.

    That returns False, and launches nothing, where `launch` has to look: an address that is not aligned to 16 bytes, hooks,
    another current device, table of tiles or carve-out of multiprocessors.

    Args:
        made: The launch.
        device: Device of the tensors.
        kinds: Dtype of each tensor among the kernel's arguments, or None.
        rest: The kernel's other arguments.
    """
    kept, on_gpu = made.constants, device.type == "cuda"
    handle = kept.handles.get((device, *rest[: kept.integers - kept.pointers], *kinds)) if kept.pointers else None
    if handle is None:
        return None
    run, _, metadata, constants, stream, hooks, _ = handle
    programs, index, last = made.programs, device.index or 0, (*rest, *constants)
    table, kept_back = configs.generation, sm_carveout()

    def launched(bits: int, *addresses: int) -> bool:
        if (
            bits & 15
            or hooks.launch_enter_hook.calls
            or hooks.launch_exit_hook.calls
            or (on_gpu and torch.cuda.current_device() != index)
            or table != configs.generation
            or kept_back != sm_carveout()
        ):
            return False
        run(programs, 1, 1, stream(index), handle.function, metadata, None, None, None, *addresses, *last)
        return True

    return launched


def _in_place(x: Tensor, b: Tensor, *others: Tensor | None) -> bool:
    """Return True if kernels read the tensors where they are: none is empty, and none has to be copied first."""
    dense = b.is_contiguous() or b.mT.is_contiguous()
    return bool(dense and x.numel() and b.numel()) and all(t is None or t.is_contiguous() for t in (x, *others))


def _sizes(x: Tensor, b: Tensor) -> tuple[int, int, int, bool]:
    """Return n, d and k, and True if b is column-major."""
    d, k = b.shape
    return x.shape[0], d, k, not b.is_contiguous()


def _one_allocation(numbers: int, *sizes: int | None) -> tuple[tuple[int], list[int | None]]:
    """Return the shape of an allocation in fp32 numbers: so many, and then spaces of so many bytes; and their offsets.

    Offsets are multiples of 16 bytes. A space that is None has none.
    """
    end, offsets = 4 * numbers, list[int | None]()
    for size in sizes:
        if size is not None:
            end = _cdiv(end, 16) * 16
        offsets.append(None if size is None else end)
        end += size or 0
    return (_cdiv(end, 4),), offsets


def prepared_forward(x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan) -> PreparedForward | None:
    """Compute `Engine.prepared_forward`."""
    if b.shape[1] > MOST_COLUMNS or not _in_place(x, b, bias):
        return None
    n, d, k, transposed = _sizes(x, b)
    device, dtype, saves, empty = x.device, x.dtype, plan.saves, allocator(x.device)
    made = _stream_launch(plan.tiles, _spec(device), dtype, n, d, k, transposed, _precision(dtype), None)
    kinds = (dtype, dtype, None if bias is None else dtype, dtype if saves else None, dtype, dtype, None, None, None)
    launched = _ready(made, device, kinds, n, d)
    if launched is None:
        return None
    rows, square, by_row = (n, k), (k, k), (k, 1)

    def call(x: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor, list[Tensor]] | None:
        y, g, p = empty(rows, by_row, dtype), empty(square, by_row, dtype), None
        at_x, at_b, at_bias, at_p = x.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), 0
        if saves:
            p = empty(rows, by_row, dtype)
            at_p = p.data_ptr()
        at_y, at_g = y.data_ptr(), g.data_ptr()
        if launched(at_x | at_b | at_bias | at_p | at_y | at_g, at_x, at_b, at_bias, at_p, at_y, at_g, 0, 0, 0):
            return p, y, [g] if p is None else [p, g]
        return None

    return call


def prepared_backward(
    dp: Tensor | None,
    dy: Tensor | None,
    x: Tensor,
    b: Tensor,
    saved: Sequence[Tensor],
    plan: Plan,
    needs: tuple[bool, bool, bool],
) -> PreparedBackward | None:
    """Compute `Engine.prepared_backward`."""
    need_x, need_b, need_bias = needs
    if b.shape[1] > MOST_COLUMNS or dy is None or not (need_x or need_b) or not _in_place(x, b, dp, dy, *saved):
        return None
    n, d, k, transposed = _sizes(x, b)
    device, dtype, saves, empty = x.device, x.dtype, plan.saves, allocator(x.device)
    problem = plan.tiles, _spec(device), dtype, n, d, k, transposed, _precision(dtype)
    of_x, of_b, of_bias = (dtype if need else None for need in needs)
    kinds: tuple[torch.dtype | None, ...]
    if saves:
        made, size = _pair_backward_launch(*problem, 7 if need_b else 3, None)
        kinds = (*(dtype,) * 4, None if dp is None else dtype, dtype, of_x, of_b, *(None,) * 4, dtype)
        spaces = [n * _width(k) * dtype.itemsize]
    else:
        made, size = _summary_backward_launch(*problem, 7 if need_b else 3 if need_bias else 1, None)
        kinds, spaces = (*(dtype,) * 4, of_x, of_b, of_bias, *(None,) * 4), []
    launched = _ready(made, device, (*kinds, torch.float32, torch.int32), n, d, made.splits)
    if launched is None:
        return None
    scratch, offsets = _one_allocation(size, *spaces)
    at_rows = offsets[0] or 0 if saves else 0
    by_row, stride = (d, 1), (1, d) if transposed else (k, 1)

    def call(
        dp: Tensor | None, dy: Tensor, x: Tensor, b: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...] | None:
        dx = db = dbias = None
        at_dx = at_db = at_dbias = 0
        if need_x:
            dx = empty((n, d), by_row, dtype)
            at_dx = dx.data_ptr()
        if need_b:
            db = empty((d, k), stride, dtype)
            at_db = db.data_ptr()
        if need_bias:
            dbias = empty((k,), (1,), dtype)
            at_dbias = dbias.data_ptr()
        work, given = empty(scratch, (1,), torch.float32), tuple[int, ...]()
        at_x, at_b, at_dy, at_work, at_counter = (
            x.data_ptr(), b.data_ptr(), dy.data_ptr(), work.data_ptr(), counter(device).data_ptr()
        )  # fmt: skip
        bits = at_x | at_b | at_dy | at_dx | at_db | at_dbias | at_work | at_counter
        if saves:
            at_p, at_g, at_dp = saved[0].data_ptr(), saved[1].data_ptr(), 0 if dp is None else dp.data_ptr()
            given = at_x, at_b, at_p, at_g, at_dp, at_dy, at_dx, at_db, 0, 0, 0, 0, at_work + at_rows
            bits |= at_p | at_g | at_dp
        else:
            at_g = saved[0].data_ptr()
            given = at_x, at_b, at_g, at_dy, at_dx, at_db, at_dbias, 0, 0, 0, 0
            bits |= at_g
        if launched(bits, *given, at_work, at_counter):
            return dx if dx is None or x.dim() == 2 else dx.view(x.shape), db, dbias
        return None

    return call


def prepared_loss(
    x: Tensor,
    b: Tensor,
    a: Tensor | None,
    c: Tensor | None,
    target: Tensor,
    options: LossOptions,
    plan: Plan,
    needs: tuple[bool, bool, bool, bool],
) -> PreparedLoss | None:
    """Compute `Engine.prepared_loss`."""
    if options.reduction == "none" or not _in_place(x, b, a, c, target):
        return None
    n, d, k, transposed = _sizes(x, b)
    m = None if a is None else a.shape[0]
    need_x, need_b, need_a, need_c = needs
    device, dtype, empty, parameters = x.device, x.dtype, allocator(x.device), need_b or need_a
    made, size = _loss_launch(
        plan.tiles, _spec(device), dtype, n, d, k, m, plan.order, transposed, _precision(dtype), options.reduction,
        any(needs), parameters, None,
    )  # fmt: skip
    sizes = _loss_spaces(made, plan.order, n, d, k, m, need_x or need_b, parameters)
    kinds = [dtype, dtype, torch.int64, None, torch.float32, *(dtype if need else None for need in needs[:2])]
    if a is not None:
        kinds[2:2] = a.dtype, None if c is None else c.dtype
        kinds += [a.dtype if need else None for need in needs[2:]]
    kinds += [None, None, None, *(None if size is None else dtype for size in sizes), torch.float32, torch.int32]
    last = n, d, made.splits, options.ignore_index, *options.weights
    launched = _ready(made, device, kinds, *last)
    if launched is None:
        return None
    scratch, offsets = _one_allocation(size, *(None if s is None else s * dtype.itemsize for s in sizes))
    by_row, stride = (d, 1), (1, d) if transposed else (k, 1)
    of_a = torch.float32 if a is None else a.dtype
    head = a is not None

    def call(
        x: Tensor, b: Tensor, a: Tensor | None, c: Tensor | None, target: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        value, work = empty((), (), torch.float32), empty(scratch, (1,), torch.float32)
        at_x, at_b, at_target, at_value, at_work, at_counter = (
            x.data_ptr(), b.data_ptr(), target.data_ptr(), value.data_ptr(), work.data_ptr(), counter(device).data_ptr()
        )  # fmt: skip
        grads, given, at_dx, at_db = [], tuple[int, ...](), 0, 0
        if need_x:
            dx = empty((n, d), by_row, dtype)
            at_dx = dx.data_ptr()
            grads.append(dx if x.dim() == 2 else dx.view(x.shape))
        if need_b:
            db = empty((d, k), stride, dtype)
            at_db = db.data_ptr()
            grads.append(db)
        bits = at_x | at_b | at_target | at_value | at_work | at_counter | at_dx | at_db
        spaces = [0 if offset is None else at_work + offset for offset in offsets]
        if not head:
            given = at_x, at_b, at_target, 0, at_value, at_dx, at_db, 0, 0, 0
        else:
            assert a is not None and m is not None
            at_a, at_c, at_da, at_dc = a.data_ptr(), 0 if c is None else c.data_ptr(), 0, 0
            if need_a:
                da = empty((m, k), (k, 1), of_a)
                at_da = da.data_ptr()
                grads.append(da)
            if need_c:
                dc = empty((m,), (1,), of_a)
                at_dc = dc.data_ptr()
                grads.append(dc)
            bits |= at_a | at_c | at_da | at_dc
            given = at_x, at_b, at_a, at_c, at_target, 0, at_value, at_dx, at_db, at_da, at_dc, 0, 0, 0
        return (value, grads) if launched(bits, *given, *spaces, at_work, at_counter) else None

    return call


def prepared_scale(grads: Sequence[Tensor], upstream: Tensor) -> PreparedScale | None:
    """Compute `Engine.prepared_scale`."""
    sizes, device = [g.numel() for g in grads], upstream.device
    rest = 5 - len(sizes)
    kinds = (upstream.dtype, *(g.dtype for g in grads), *(None,) * rest)
    launched = _ready(_scale_launch(_spec(device), max(sizes)), device, kinds, *sizes, *(0,) * rest)
    if launched is None:
        return None
    none = (0,) * rest

    def call(grads: Sequence[Tensor], upstream: Tensor) -> Sequence[Tensor] | None:
        at = [g.data_ptr() for g in grads]
        bits = first = upstream.data_ptr()
        for one in at:
            bits |= one
        return grads if launched(bits, first, *at, *none) else None

    return call
