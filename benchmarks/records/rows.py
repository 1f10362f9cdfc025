"""The rows of a benchmark's record: JSON lines, one a measurement, each with all that is needed to believe it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import subprocess
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import environment

SCHEMA = 1
# "wrong": not what fp64 says, within the law of `benchmarks.law`. "skipped": over a limit that the note names.
STATUSES = ("ok", "wrong", "unsupported", "oom", "skipped", "failed")

Row = dict[str, Any]

_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_NONE = (type(None),)
# Every row has every field. ms: milliseconds of a call. launches: of kernels, on a GPU. peak_delta_mb: the most that a call
# holds besides its inputs; saved_mb: what it keeps for a backward (both 10^6 bytes). err_fro: the largest relative Frobenius
# error of its results against fp64; err_ratio: the largest ratio to that of the same expression in PyTorch at the same
# precision. gflop, least_mb: operations of the cheapest order, bytes moved at least; sol_frac: the time that they need at the
# rates measured on the device, as a share of the median. gbps, tflops: the rates of a "ceiling" row.
FIELDS: dict[str, tuple[type, ...]] = {
    "schema": _WHOLE,
    "run_id": _TEXT,
    "utc": _TEXT,
    "git_sha": _TEXT + _NONE,
    "dirty": (bool, *_NONE),
    "device": _TEXT,
    "driver": _TEXT + _NONE,
    "cuda": _TEXT + _NONE,
    "torch": _TEXT,
    "triton": _TEXT + _NONE,
    "python": _TEXT,
    "interp_nn": _TEXT,
    "op": _TEXT,
    "provider": _TEXT,
    "plan": _TEXT + _NONE,
    "mode": _TEXT,
    "dtype": _TEXT,
    "n": _WHOLE,
    "d": _WHOLE,
    "k": _WHOLE,
    "m": _WHOLE + _NONE,
    "timer": _TEXT,
    "l2": _TEXT,
    "samples": _WHOLE,
    "ms_p50": _NUMBER + _NONE,
    "ms_p20": _NUMBER + _NONE,
    "ms_p80": _NUMBER + _NONE,
    "launches": _WHOLE + _NONE,
    "peak_delta_mb": _NUMBER + _NONE,
    "saved_mb": _NUMBER + _NONE,
    "err_fro": _NUMBER + _NONE,
    "err_ratio": _NUMBER + _NONE,
    "gflop": _NUMBER + _NONE,
    "least_mb": _NUMBER + _NONE,
    "sol_frac": _NUMBER + _NONE,
    "gbps": _NUMBER + _NONE,
    "tflops": _NUMBER + _NONE,
    "status": _TEXT,
    "note": _TEXT + _NONE,
}


class Writer:
    """Appends rows to a file as they come, so that a run that is broken off leaves what it has; keeps them too."""

    def __init__(
        self, path: Path | None, device: torch.device, timer: str, l2: str, revision: str | None = None
    ) -> None:
        self.path, self.rows = path, list[Row]()
        self._common = {**common(device, revision), "timer": timer, "l2": l2}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **fields: Any) -> None:
        """A row of these fields and of what all rows of a run share; fields that are missing are null, samples 0."""
        if unknown := fields.keys() - FIELDS.keys():
            raise ValueError(f"row: unknown fields {sorted(unknown)}")
        row = {name: fields.get(name, self._common.get(name)) for name in FIELDS}
        row["samples"] = row["samples"] or 0
        row |= {name: _digits(value) for name, value in row.items()}
        validate(row)
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")


def common(device: torch.device, revision: str | None = None) -> Row:
    """What all rows of a run share: when, of which commit, on which device, with which versions.

    revision: the commit where there is no git.
    """
    told = environment.facts(device.type, revision)
    versions = told["versions"]
    return {
        "schema": SCHEMA,
        "run_id": uuid.uuid4().hex[:12],
        "utc": told["utc"],
        "git_sha": told["git_sha"],
        "dirty": told["git_dirty"],
        "device": told["device"],
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": versions["cuda"],
        "torch": versions["torch"],
        "triton": _version("triton"),
        "python": versions["python"],
        "interp_nn": versions["interp_nn"],
    }


def validate(row: Row) -> None:
    """Raises ValueError where a row is not of the schema: names and types of its fields, and what its status promises."""
    if row.keys() != FIELDS.keys():
        missing, unknown = sorted(FIELDS.keys() - row.keys()), sorted(row.keys() - FIELDS.keys())
        raise ValueError(f"row: missing fields {missing}, unknown fields {unknown}")
    for name, types in FIELDS.items():
        value = row[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(f"row: {name} is {value!r}, want {' or '.join(t.__name__ for t in types)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"row: {name} is {value!r}, which JSON does not have")
    if row["schema"] != SCHEMA:
        raise ValueError(f"row: schema is {row['schema']}, want {SCHEMA}")
    if row["status"] not in STATUSES:
        raise ValueError(f"row: status is {row['status']!r}, want one of {', '.join(STATUSES)}")
    if row["status"] == "ok" and row["op"] != "ceiling" and (row["ms_p50"] is None or row["samples"] < 1):
        raise ValueError("row: status is 'ok' without a time")
    if row["status"] != "ok" and not row["note"]:
        raise ValueError(f"row: status is {row['status']!r} without a note that says why")


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of files. Raises ValueError that names file and line where one is not of the schema."""
    rows = []
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(text)
                validate(row)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            rows.append(row)
    return rows


def key(row: Row) -> tuple[Any, ...]:
    """What a row measures, but for the provider."""
    return tuple(row[name] for name in ("op", "mode", "dtype", "n", "d", "k", "m", "timer", "l2"))


def grouped(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by what they measure, then by provider, without the ceilings; of rows that measure the same the last."""
    out: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] != "ceiling":
            out.setdefault(key(row), {})[row["provider"]] = row
    return out


def ratio(found: dict[str, Row], over: str, under: str) -> float | None:
    """The median of one provider over that of another; None where either has no right result."""
    one, other = found.get(over), found.get(under)
    if one is None or other is None or one["status"] != "ok" or other["status"] != "ok":
        return None
    return float(one["ms_p50"] / other["ms_p50"])


def geomean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _digits(value: Any) -> Any:
    """Numbers to the five digits that a measurement may claim."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
