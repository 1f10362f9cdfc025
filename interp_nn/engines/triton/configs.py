"""Tiles, warps and stages of every kernel: a table by compute capability and shape bucket, and a rule for what it lacks.

The table is `table.json` beside this file, and whatever file INTERP_NN_TABLE names, which comes first; `python -m interp_nn
tune` writes that format. An entry holds for a kernel, a capability, an element size, up to `columns` columns (padded) and
`classes` classes, and from `rows` rows on; the first that matches is taken. Pure arithmetic: nothing here needs Triton.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from interp_nn.engines.devices import Chip, family

# Which tiles a kernel has: BN_A rows and BD_A features in its first phase, BN and BD in its strips, BC features in its last.
TILES = {
    "stream": ("BN", "BD"),
    "pair_backward": ("BN_A", "BN", "BD", "BC"),
    "summary_backward": ("BN", "BD", "BC"),
    "pair_loss": ("BN_A", "BD_A", "BN", "BD", "BC"),
    "latent_loss": ("BN_A", "BD_A", "BN", "BD", "BC"),
    "flat_loss": ("BN_A", "BD_A", "BN", "BD", "BC"),
    "phased_forward": ("BN", "BK", "BD"),
    "phased_backward": ("BN", "BK", "BD"),
}


class Config(NamedTuple):
    """Tile sizes in the order of TILES, warps, stages, whether a loss parks its rows, and programs a multiprocessor."""

    tiles: tuple[int, ...]
    warps: int = 8
    stages: int = 3
    parked: bool = False
    resident: int = 1

    def __str__(self) -> str:
        return "x".join(map(str, self.tiles)) + f", {self.warps} warps, {self.stages} stages"


class Bucket(NamedTuple):
    """What a config is looked up by."""

    kernel: str
    itemsize: int
    columns: int
    classes: int
    rows: int


def padded(size: int) -> int:
    """The power of two, at least 16, that holds `size` columns or classes."""
    return max(16, 1 << (size - 1).bit_length())


# From the largest to the smallest; the rule takes the first whose estimated shared memory fits.
_SIZES = {
    "stream": (Config((128, 64)), Config((128, 32)), Config((64, 32))),
    "pair_backward": (
        Config((64, 64, 128, 16)),
        Config((64, 64, 64, 16)),
        Config((32, 32, 64, 16), stages=2),
        Config((16, 16, 32, 16), stages=2),
    ),
    "summary_backward": (
        Config((64, 128, 16)),
        Config((64, 64, 16)),
        Config((32, 64, 16), stages=2),
        Config((16, 32, 16), stages=2),
    ),
    "pair_loss": (
        Config((64, 64, 64, 128, 16), parked=True),
        Config((32, 64, 32, 64, 16), stages=2, parked=True),
        Config((16, 32, 16, 32, 16), stages=2, parked=True),
    ),
    "latent_loss": (
        Config((64, 64, 64, 128, 16)),
        Config((32, 64, 32, 64, 16), stages=2, parked=True),
        Config((16, 32, 16, 32, 16), stages=2, parked=True),
    ),
    "flat_loss": (
        Config((128, 64, 64, 128, 16)),
        Config((64, 64, 32, 64, 16), stages=2),
        Config((32, 32, 16, 32, 16), stages=2),
    ),
    "phased_forward": (Config((128, 128, 64)), Config((128, 128, 32)), Config((64, 64, 32))),
    "phased_backward": (Config((128, 128, 64)), Config((128, 128, 32)), Config((64, 64, 32))),
}


def estimated_shared(config: Config, bucket: Bucket) -> int:
    """An upper estimate of a block's shared memory in bytes: its staged tiles, and one square to change layouts through."""
    tiles = dict(zip(TILES[bucket.kernel], config.tiles, strict=True))
    columns = tiles.get("BK", bucket.columns)
    rows, depth = tiles["BN"], tiles["BD"]
    staged = (rows * depth + max(rows, depth) * columns) * bucket.itemsize
    if "BD_A" in tiles:
        staged = max(staged, (tiles["BN_A"] + columns) * tiles["BD_A"] * bucket.itemsize)
    return config.stages * staged + 2 * columns * columns * bucket.itemsize


def choose(chip: Chip, bucket: Bucket) -> Config:
    """The config of a kernel: the table's, or the rule's. Its row tile is halved while programs would lack rows."""
    for entry in _user_table(os.environ.get("INTERP_NN_TABLE")).kernels + _own_table().kernels:
        if entry["kernel"] == bucket.kernel and _matches(entry, chip, bucket):
            return Config(tuple(entry["tiles"]), entry["warps"], entry["stages"], entry["parked"], entry["resident"])
    sizes = _SIZES[bucket.kernel]
    fitting = (config for config in sizes if estimated_shared(config, bucket) <= chip.shared)
    return next(fitting, sizes[-1])


def measured_engine(chip: Chip, bucket: Bucket) -> str | None:
    """The engine that a tuned table found faster for a "summary", "pair", "pair_loss" or "head_loss"; None without one."""
    for entry in _user_table(os.environ.get("INTERP_NN_TABLE")).engines + _own_table().engines:
        if entry["problem"] == bucket.kernel and _matches(entry, chip, bucket):
            return str(entry["engine"])
    return None


def _matches(entry: dict[str, Any], chip: Chip, bucket: Bucket) -> bool:
    return (
        list(family(chip.capability) or ()) in entry["capabilities"]
        and entry["itemsize"] == bucket.itemsize
        and bucket.columns <= entry["columns"]
        and bucket.classes <= entry["classes"]
        and bucket.rows >= entry["rows"]
    )


class Table(NamedTuple):
    """Configs of kernels, and which engine was measured faster."""

    kernels: tuple[dict[str, Any], ...] = ()
    engines: tuple[dict[str, Any], ...] = ()


_BUCKET = {"capabilities", "itemsize", "columns", "classes", "rows"}


@functools.cache
def _own_table() -> Table:
    return _read(Path(__file__).with_name("table.json"))


@functools.cache
def _user_table(path: str | None) -> Table:
    return _read(Path(path)) if path else Table()


def _read(path: Path) -> Table:
    """The table in a file; ValueError that names the file, and the entry, where it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kernels, found = tuple(content["kernels"]), tuple(content.get("engines", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"INTERP_NN_TABLE: {path} is not a table of kernel configurations: {error!r}") from error
    for entry in kernels:
        entry.setdefault("parked", False)
        entry.setdefault("resident", 1)
        missing = _BUCKET | {"kernel", "tiles", "warps", "stages"}
        tiles = TILES.get(entry.get("kernel"), ())
        if not missing <= set(entry) or len(entry["tiles"]) != len(tiles):
            raise ValueError(f"INTERP_NN_TABLE: a bad entry of {path}: {entry}")
    for entry in found:
        if not _BUCKET | {"problem", "engine"} <= set(entry):
            raise ValueError(f"INTERP_NN_TABLE: a bad entry of {path}: {entry}")
    return Table(kernels, found)
