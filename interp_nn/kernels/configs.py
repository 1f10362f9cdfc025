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

from interp_nn.chips import Chip

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
    for table in (_user_table(os.environ.get("INTERP_NN_TABLE")), _own_table()):
        for entry in table.get(bucket.kernel, ()):
            if _matches(entry, chip, bucket):
                tiles = tuple(entry["tiles"])
                return Config(tiles, entry["warps"], entry["stages"], entry["parked"], entry["resident"])
    sizes = _SIZES[bucket.kernel]
    fitting = (config for config in sizes if estimated_shared(config, bucket) <= chip.shared)
    return next(fitting, sizes[-1])


def _matches(entry: dict[str, Any], chip: Chip, bucket: Bucket) -> bool:
    return (
        list(chip.capability) in entry["capabilities"]
        and entry["itemsize"] == bucket.itemsize
        and bucket.columns <= entry["columns"]
        and bucket.classes <= entry["classes"]
        and bucket.rows >= entry["rows"]
    )


Table = dict[str, list[dict[str, Any]]]


@functools.cache
def _own_table() -> Table:
    return _read(Path(__file__).with_name("table.json"))


@functools.cache
def _user_table(path: str | None) -> Table:
    return {} if not path else _read(Path(path))


def _read(path: Path) -> Table:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["kernels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"INTERP_NN_TABLE: cannot read a table of kernel configurations from {path}: {error!r}") from error
    for kernel, entries in table.items():
        for entry in entries:
            missing = {"capabilities", "itemsize", "columns", "classes", "rows", "tiles", "warps", "stages"} - set(entry)
            if kernel not in TILES or missing or len(entry["tiles"]) != len(TILES[kernel]):
                raise ValueError(f"{path}: a bad entry for kernel {kernel!r}: {entry}")
            entry.setdefault("parked", False)
            entry.setdefault("resident", 1)
    return dict(table)
