"""Tiles, warps and stages of every kernel: a table by compute capability and shape bucket, and a rule for what it lacks.

The table is `table.json` beside this file, and whatever file INTERP_NN_TABLE names, which comes first; `python -m interp_nn
tune` writes that format. An entry holds for a kernel, a capability, an element size, up to `columns` columns (padded) and
`classes` classes, and from `rows` rows on; the first that matches is taken. Pure arithmetic: nothing here needs Triton.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from interp_nn.engines.devices import DeviceSpec, table_capability
from interp_nn.engines.limits import tiles_fit
from interp_nn.engines.problem import ENGINES, Config, Order

Result = TypeVar("Result")

# The tiles of each kernel: BN_A rows and BD_A features in its first phase, BN and BD in its feature tiles, BC features in its
# last.
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


# The kernel of a loss.
LOSS_KERNELS: dict[Order, str] = {
    "(Xb)G": "pair_loss",
    "(Xb)q": "pair_loss",
    "logits_from_latent": "latent_loss",
    "logits_from_x": "flat_loss",
}


class Bucket(NamedTuple):
    """The key of a config in the tables."""

    kernel: str
    itemsize: int
    columns: int
    classes: int
    rows: int


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
        Config((64, 64, 64, 128, 16), scratch=True),
        Config((32, 64, 32, 64, 16), stages=2, scratch=True),
        Config((16, 32, 16, 32, 16), stages=2, scratch=True),
    ),
    "latent_loss": (
        Config((64, 64, 64, 128, 16)),
        Config((32, 64, 32, 64, 16), stages=2, scratch=True),
        Config((16, 32, 16, 32, 16), stages=2, scratch=True),
    ),
    "flat_loss": (
        Config((128, 64, 64, 128, 16)),
        Config((64, 64, 32, 64, 16), stages=2),
        Config((32, 32, 16, 32, 16), stages=2),
    ),
    "phased_forward": (Config((128, 128, 64)), Config((128, 128, 32)), Config((64, 64, 32))),
    "phased_backward": (Config((128, 128, 64)), Config((128, 128, 32)), Config((64, 64, 32))),
}


def tiles_of(kernel: str, config: Config) -> dict[str, int]:
    """Return the tile sizes of a config by name."""
    return dict(zip(TILES[kernel], config.tiles, strict=True))


def fits(spec: DeviceSpec, config: Config, bucket: Bucket) -> bool:
    """Return True if a block should have the shared memory for a config."""
    stages = config.stages, config.stages_a or config.stages
    return tiles_fit(spec, tiles_of(bucket.kernel, config), stages, bucket.columns, bucket.itemsize)


def choose(spec: DeviceSpec, bucket: Bucket) -> Config:
    """Return the config of a kernel: the first entry of the tables that matches, else the largest one that fits."""
    for entry in _user_table(os.environ.get("INTERP_NN_TABLE")).kernels + _own_table().kernels:
        if entry["kernel"] == bucket.kernel and _matches(entry, spec, bucket):
            return Config(tuple(entry["tiles"]), *(entry[name] for name in Config._fields[1:]))
    sizes = _SIZES[bucket.kernel]
    fitting = (config for config in sizes if fits(spec, config, bucket))
    return next(fitting, sizes[-1])


def measured_engine(spec: DeviceSpec, bucket: Bucket) -> str | None:
    """Return the engine that a tuned table found faster for a "summary", "pair", "pair_loss" or "head_loss"; None without one."""
    for entry in _user_table(os.environ.get("INTERP_NN_TABLE")).engines + _own_table().engines:
        if entry["problem"] == bucket.kernel and _matches(entry, spec, bucket):
            return str(entry["engine"])
    return None


def _matches(entry: dict[str, Any], spec: DeviceSpec, bucket: Bucket) -> bool:
    return (
        list(table_capability(spec.capability) or ()) in entry["capabilities"]
        and entry["itemsize"] == bucket.itemsize
        and bucket.columns <= entry["columns"]
        and bucket.classes <= entry["classes"]
        and bucket.rows >= entry["rows"]
    )


class Table(NamedTuple):
    """Configs of kernels, and the engines that were measured faster."""

    kernels: tuple[dict[str, Any], ...] = ()
    engines: tuple[dict[str, Any], ...] = ()


def _whole(low: int, high: float = math.inf) -> tuple[Callable[[Any], bool], str]:
    """Return the test of a whole number, which True and 1.0 are not, and its words."""
    wish = f"a whole number from {low} on" if high == math.inf else f"a whole number, {low} to {high}"
    return lambda value: type(value) is int and low <= value <= high, wish


def _one_of(*known: Any) -> tuple[Callable[[Any], bool], str]:
    names = ", ".join(map(str, known))
    return lambda value: any(type(value) is type(one) and value == one for one in known), f"one of {names}"


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(is_right, value))


# The fields of an entry, each with a test of its value and the words for what passes.
_SIZE = _one_of(*(2**power for power in range(4, 11)))
_CAPABILITY = _list_of(_whole(0)[0])
_BUCKET: dict[str, tuple[Callable[[Any], bool], str]] = {
    "capabilities": (_list_of(lambda value: _CAPABILITY(value) and len(value) == 2), "a list of [major, minor]"),
    "itemsize": _one_of(2, 4),
    "columns": _whole(1),
    "classes": _whole(1),
    "rows": _whole(0),
}
_KERNEL_FIELDS = {
    "kernel": _one_of(*TILES),
    **_BUCKET,
    "tiles": (_list_of(_SIZE[0]), f"a list of sizes, each {_SIZE[1]}"),
    "warps": _one_of(1, 2, 4, 8, 16, 32),
    "stages": _whole(1, 16),
    "scratch": _one_of(False, True),
    "blocks_per_sm": _whole(1, 32),
    "stages_a": _one_of(None, *range(1, 17)),
}
_ENGINE_FIELDS = {
    "problem": _one_of("summary", "pair", "pair_loss", "head_loss"),
    **_BUCKET,
    "engine": _one_of(*ENGINES),
}


_caches: list[Any] = []
generation = 0  # another number whenever another table is used


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """Cache the results of a function that looks configs up, until another table is used."""
    cached = functools.lru_cache(4096)(function)
    _caches.append(cached)
    return cached


@contextlib.contextmanager
def use_table(path: Path) -> Iterator[None]:
    """Use a file as INTERP_NN_TABLE inside the block."""
    before = os.environ.get("INTERP_NN_TABLE")
    os.environ["INTERP_NN_TABLE"] = str(path)
    _forget()
    try:
        yield
    finally:
        del os.environ["INTERP_NN_TABLE"]
        if before is not None:
            os.environ["INTERP_NN_TABLE"] = before
        _forget()


def _forget() -> None:
    global generation
    generation += 1
    for cached in (_user_table, *_caches):
        cached.cache_clear()


@functools.cache
def _own_table() -> Table:
    return _read(Path(__file__).with_name("table.json"))


@functools.cache
def _user_table(path: str | None) -> Table:
    return _read(Path(path)) if path else Table()


def _read(path: Path) -> Table:
    """Read a table. ValueError names the file, the entry that is wrong, and its field."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kernels, found = content["kernels"], content.get("engines", [])
        if not isinstance(kernels, list) or not isinstance(found, list):
            raise TypeError("kernels and engines have to be lists")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"INTERP_NN_TABLE: {path} is not a table of kernel configurations: {error!r}") from error
    for name, entries, wanted in (("kernels", kernels, _KERNEL_FIELDS), ("engines", found, _ENGINE_FIELDS)):
        for place, entry in enumerate(entries):
            where = f"INTERP_NN_TABLE: a bad entry of {path}: {name}[{place}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{where}: got {reprlib.repr(entry)}, want an object")
            if name == "kernels":
                entry.setdefault("scratch", False)
                entry.setdefault("blocks_per_sm", 1)
                entry.setdefault("stages_a", None)
            for field, (is_right, wish) in wanted.items():
                if field not in entry:
                    raise ValueError(f"{where}: has no {field}")
                if not is_right(entry[field]):
                    raise ValueError(f"{where}: {field} is {reprlib.repr(entry[field])}, want {wish}")
            if name == "kernels" and len(entry["tiles"]) != len(TILES[entry["kernel"]]):
                raise ValueError(f"{where}: {len(entry['tiles'])} tiles, want {', '.join(TILES[entry['kernel']])}")
    return Table(tuple(kernels), tuple(found))
