"""The launch of each kernel for a problem: its tiles, constants, programs and workspace."""

from __future__ import annotations

from typing import Any

import torch

from interp_nn.engines.devices import DeviceSpec, fp32_precision, spec_of
from interp_nn.engines.limits import output_layer_fits, padded, single_tf32_fits
from interp_nn.engines.problem import Config, Order
from interp_nn.engines.triton import backward as backward_kernels
from interp_nn.engines.triton import configs, cross_entropy, head, phased
from interp_nn.engines.triton import forward as forward_kernels
from interp_nn.engines.triton.configs import Bucket
from interp_nn.engines.triton.launcher import Constants, Launch

_ROWS_A_SPLIT = 256
# Column tiles for each place on the GPU that need no parts; most parts for the sake of balance.
_MANY_TURNS, _MOST_TURNS = 4, 8

Tuned = tuple[tuple[str, Config], ...]  # `Plan.tiles`


def spec_on(device: torch.device) -> DeviceSpec:
    """Return the spec of the device that kernels are launched on."""
    spec = spec_of(device)
    assert spec is not None, f"the triton engine was given a tensor on {device}"
    return spec


# Classes of a head in 16 bits up to which fp32 sums are rounded before they are multiplied: beyond, rounding takes registers
# that the kernels do not have, and cutting the sums off shrinks db by less than its own rounding to 16 bits.
_MOST_ROUNDED = 16


def precision_of(dtype: torch.dtype) -> str:
    """Return the rounding of fp32 operands in products. fp32 sums of 16-bit products may always go through tf32."""
    return "tf32x3" if dtype == torch.float32 and fp32_precision("cuda", "matmul") != "tf32" else "tf32"


def _options(config: Config, cooperative: bool, checked: bool = False) -> dict[str, Any]:
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
    if cooperative:
        options["launch_cooperative_grid"] = True
    if checked:
        options |= {"debug": True, "sanitize_overflow": False}
    return options


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def config_and_tiles(
    tuned: Tuned, dtype: torch.dtype, n: int, d: int, k: int, kernel: str, spec: DeviceSpec, m: int = 1
) -> tuple[Config, dict[str, int]]:
    """Return (the config of a kernel, its tiles by name with BK): the plan's own config, else the table's."""
    config = dict(tuned).get(kernel) or configs.choose(spec, Bucket(kernel, dtype.itemsize, padded(k), padded(m), n))
    return config, {"BK": padded(k), **configs.tiles_of(kernel, config)}


def _even(d: int, tiles: dict[str, int]) -> bool:
    """Return True if every tile of features is full."""
    return all(d % tiles[name] == 0 for name in ("BD_A", "BD", "BC") if name in tiles)


def splits_of(spec: DeviceSpec, config: Config, n: int, d: int, depth: int) -> int:
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


def programs_of(spec: DeviceSpec, config: Config, *jobs: int) -> int:
    """Return the number of programs: as many as fit at once, and no more than the largest number of jobs."""
    return max(1, min(spec.multiprocessors * config.blocks_per_sm, max(jobs)))


@configs.remembered
def stream_launch(
    tuned: Tuned, spec: DeviceSpec, dtype: torch.dtype, n: int, d: int, k: int, transposed: bool, precision: str,
    degree: int | None,
) -> Launch:  # fmt: skip
    """Return the launch of a forward up to 128 columns; of a polynomial if there is a degree."""
    config, tiles = config_and_tiles(tuned, dtype, n, d, k, "stream", spec)
    constants = {"K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision, "DEGREE": degree}
    programs = programs_of(spec, config, _cdiv(n, tiles["BN"]))
    return Launch(forward_kernels.stream, programs, 1, Constants(constants, tiles, _options(config, False)))


@configs.remembered
def phased_launch(
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
    """Return the launch of a forward, or `back` of a backward, of more than 128 columns."""
    kernel = phased.phased_backward if back else phased.phased_forward
    config, tiles = config_and_tiles(tuned, dtype, n, d, k, "phased_backward" if back else "phased_forward", spec)
    rows, columns = tiles["BN"], tiles["BK"]
    tn, tk, td = _cdiv(n, rows), _cdiv(k, columns), _cdiv(d, rows)
    jobs = (tn * tk, td * tk, tn * _cdiv(d, columns) if back else 0)
    constants = {"FORM": "A" if order == "(Xb)G" else "B", "PRECISION": precision, "PHASES": phases}
    programs = programs_of(spec, config, *jobs)
    return Launch(kernel, programs, 1, Constants(constants, tiles, _options(config, True)))


@configs.remembered
def summary_backward_launch(
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
    """Return (launch, numbers in its fp32 workspace) of the backward without a saved projection."""
    config, tiles = config_and_tiles(tuned, dtype, n, d, k, "summary_backward", spec)
    bk, tiles_of_d, splits = tiles["BK"], _cdiv(d, tiles["BD"]), splits_of(spec, config, n, d, tiles["BD"])
    programs = programs_of(spec, config, tiles_of_d * splits, _cdiv(d, tiles["BC"]) if phases & 4 else 1)
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


@configs.remembered
def pair_backward_launch(
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
    """Return (launch, numbers in its fp32 workspace) of the backward with a saved projection."""
    config, tiles = config_and_tiles(tuned, dtype, n, d, k, "pair_backward", spec)
    bk, tiles_of_d, splits = tiles["BK"], _cdiv(d, tiles["BD"]), splits_of(spec, config, n, d, tiles["BD"])
    jobs = (
        _cdiv(n, tiles["BN_A"]) if phases & 1 else 1,
        tiles_of_d * splits,
        _cdiv(d, tiles["BC"]) if phases & 4 else 1,
    )
    programs = programs_of(spec, config, *jobs)
    constants = {
        "K": k, "B_T": transposed, "EVEN_D": _even(d, tiles), "PRECISION": precision, "PHASES": phases,
        "DEGREE": degree, "WIDTH": row_length(k) if phases & 1 else k,
    }  # fmt: skip
    work = backward_kernels.pair_backward_workspace.fn(0, splits, d, programs, bk)[-1]
    return Launch(
        backward_kernels.pair_backward, programs, splits, Constants(constants, tiles, _options(config, True))
    ), work


def row_length(k: int) -> int:
    """Return the row length of a workspace with k columns: whole 16-byte words of 16-bit numbers."""
    return (k + 7) // 8 * 8


@configs.remembered
def loss_launch(
    tuned: Tuned, spec: DeviceSpec, dtype: torch.dtype, n: int, d: int, k: int, m: int | None, order: Order, transposed: bool,
    precision: str, reduction: str, gradients: bool, parameters: bool, degree: int | None,
) -> tuple[Launch, int]:  # fmt: skip
    """Return (launch, numbers in its fp32 workspace) of the loss of a pair (m None) or of a head."""
    name = configs.LOSS_KERNELS[order]
    kernel = getattr(cross_entropy if name == "pair_loss" else head, name)
    config, tiles = config_and_tiles(tuned, dtype, n, d, k, name, spec, m or 1)
    bk, bm, tiles_of_d = tiles["BK"], padded(m or 1), _cdiv(d, tiles["BD"])
    if dtype == torch.float32 and not single_tf32_fits(spec, bk, bm):
        precision = "tf32x3"
    if dtype.itemsize == 2 and bm > _MOST_ROUNDED:
        precision = "tf32 cut"
    splits = splits_of(spec, config, n, d, tiles["BD"])
    jobs = [_cdiv(n, tiles["BN_A"])]
    if gradients:
        jobs.append(tiles_of_d * splits)
    if parameters or order == "logits_from_x":
        jobs.append(_cdiv(d, tiles["BC"]))
    programs = programs_of(spec, config, *jobs)
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
        constants["WIDTH"] = row_length(k)
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


def loss_spaces(
    made: Launch, order: Order, n: int, d: int, k: int, m: int | None, through_d: bool, parameters: bool
) -> list[int | None]:
    """Return the number of elements of each workspace that a loss has in X's dtype; None for one without use."""
    width, both, scratch = row_length(k), 2 * padded(m or 1), made.scratch and parameters
    if order == "logits_from_x":
        return [d * both, n * both if through_d or parameters else None]
    own = n * width if scratch else None
    return [n * width if through_d else None, own, own if m is None or not scratch else n * both]


SCALE_BLOCK = 4096


@configs.remembered
def scale_launch(spec: DeviceSpec, size: int) -> Launch:
    """Return the launch that scales gradients, the largest of that size."""
    programs = max(1, min(4 * spec.multiprocessors, _cdiv(size, SCALE_BLOCK)))
    options = {"BLOCK": SCALE_BLOCK, "num_warps": 8, "enable_fp_fusion": True}
    return Launch(cross_entropy.scale_gradients, programs, 1, Constants(options))
