"""JSON lines, one for each measurement or check, written as they come and read back."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import environment

SCHEMA = 1
# "wrong": not equal to the fp64 reference within `benchmarks.timing.tolerances`. "skipped": over a limit that the note names.
STATUSES = ("ok", "wrong", "unsupported", "oom", "skipped", "failed")

Row = dict[str, Any]

_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_NONE = (type(None),)
# A timing has every field. ms: milliseconds of a call. launches: of kernels, on a GPU. peak_delta_mb: the most memory that a
# call holds besides its inputs; saved_mb: the memory that it keeps for a backward (both 10^6 bytes). err_fro: the largest
# relative Frobenius error of its results against fp64; err_ratio: the largest ratio to the error of the same expression in
# PyTorch at the same precision. gflop, least_mb: operations of the cheapest order, fewest bytes moved; sol_frac: the time that
# they need at the rates measured on the device, as a share of the median. gbps, tflops: the rates of a "ceiling" row.
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("schema", "samples", "n", "d", "k"), _WHOLE),
    **dict.fromkeys(("run_id", "utc", "device", "torch", "python", "interp_nn", "op", "provider", "mode"), _TEXT),
    **dict.fromkeys(("dtype", "timer", "l2", "status"), _TEXT),
    **dict.fromkeys(("git_sha", "driver", "cuda", "triton", "plan", "note"), _TEXT + _NONE),
    "dirty": (bool, *_NONE),
    **dict.fromkeys(("m", "launches"), _WHOLE + _NONE),
    **dict.fromkeys(("ms_p50", "ms_p20", "ms_p80", "peak_delta_mb", "saved_mb", "err_fro", "err_ratio"), _NUMBER + _NONE),
    **dict.fromkeys(("gflop", "least_mb", "sol_frac", "gbps", "tflops"), _NUMBER + _NONE),
}  # fmt: skip
_OF_THE_JOB = frozenset(("part", "name", "at_s", "share", "table", "cuda_library"))  # what a GPU job adds to a timing


def common(device: str = "cpu", revision: str | None = None) -> Row:
    """Return the fields that all rows of a run share: its identity and `environment.facts`."""
    return {"schema": SCHEMA, "run_id": uuid.uuid4().hex[:12], **environment.facts(device, revision)}


class Writer:
    """Append rows with `shared` fields to a file as they come, so that an interrupted run keeps them; keep them in memory too."""

    def __init__(self, path: Path | None, shared: Mapping[str, Any]) -> None:
        self.path, self.rows, self._shared = path, list[Row](), dict(shared)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n"):
                path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")  # drops an interrupted line

    def write(self, **fields: Any) -> None:
        """Write a row. One with an `op` is a timing: missing fields are null, and `validate` checks it."""
        row = {**self._shared, **fields}
        if "op" in row:
            row = {**dict.fromkeys(FIELDS), "samples": 0, **row}
        row = plain(row)
        if "op" in row:
            validate(row)
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as one JSON file and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(record, digits=17), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any, digits: int = 5) -> Any:
    """Return the value in the types of JSON: null for NaN and infinity, text for other types, numbers rounded to `digits`."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, digits) for item in value]
    return value if isinstance(value, (str, int, type(None))) else str(value)


def validate(row: Row) -> None:
    """Check a timing: the names and types of its fields, and the fields that its status requires.

    Raises:
        ValueError: A field is missing, unknown or of another type. The message names it.
    """
    missing, unknown = sorted(FIELDS.keys() - row.keys()), sorted(row.keys() - FIELDS.keys() - _OF_THE_JOB)
    if missing or unknown:
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
        raise ValueError(f"row: status is {row['status']!r} without a note with the reason")


def lines(path: Path) -> list[Row]:
    """Read all rows of a file, without a last one that an interrupted process left unfinished.

    Raises:
        ValueError: Another line is not JSON. The message names file and line.
    """
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        try:
            found.append(json.loads(text))
        except ValueError as error:
            if text.endswith("\n"):
                raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def read(paths: Iterable[Path]) -> list[Row]:
    """Read the timings of files, with today's names for the engines and orders of older records.

    Raises:
        ValueError: A line is not of the schema. The message names file and line.
    """
    found = []
    for path in paths:
        for number, row in enumerate(lines(path), 1):
            if "op" not in row and "part" in row:
                continue  # a check of a GPU job
            try:
                validate(row)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            found.append(_renamed(row))
    return found


# The orders of records that were made before 0.2.0, by the label that they had.
_ORDERS = {
    "A": "(Xb)G", "B": "X(bG)", "C": "((Xb)bᵀ)b", "D": "(X(bbᵀ))b", "E": "X((bbᵀ)b)", "flat": "logits_from_x",
    "latent": "logits_from_latent",
}  # fmt: skip


def _renamed(row: Row) -> Row:
    """Return a row in today's words: the engine `reference` is `eager`, orders are products, "*" is autograd."""
    row = row | {"provider": row["provider"].replace("ours-reference", "ours-eager")}
    engine, _, label = (row["plan"] or "").partition(" ")
    order = _ORDERS.get(label.rstrip("+*"))
    if order is None:
        return row
    autograd = " by autograd" if label.endswith("*") else ""
    return row | {"plan": f"{engine.replace('reference', 'eager')} {order}{autograd}"}


def grouped(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Group timings by what they measure, then by provider, without ceilings; the last of equal ones stays."""
    out: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] != "ceiling":
            key = tuple(row[name] for name in ("op", "mode", "dtype", "n", "d", "k", "m", "timer", "l2"))
            out.setdefault(key, {})[row["provider"]] = row
    return out
