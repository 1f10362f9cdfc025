"""JSON lines, one for each measurement or check, written as they come and read back."""

from __future__ import annotations

import json
import math
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import environment, files

SCHEMA = 2
# "wrong": not equal to the fp64 reference within `benchmarks.timing.tolerances`. "skipped": over a limit that the note names.
STATUSES = ("ok", "wrong", "unsupported", "oom", "skipped", "failed")

Row = dict[str, Any]

_TEXT, _WHOLE, _NUMBER = (str,), (int,), (int, float)
_NONE = (type(None),)
# A timing has every field; docs/howto/read_a_record.md says what each is, and its unit.
FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("schema", "samples", "n", "d", "k"), _WHOLE),
    **dict.fromkeys(("run_id", "utc", "device", "torch", "python", "interp_nn", "op", "provider", "mode"), _TEXT),
    **dict.fromkeys(("dtype", "timer", "l2", "status"), _TEXT),
    **dict.fromkeys(("git_sha", "driver", "cuda", "triton", "plan", "about", "note"), _TEXT + _NONE),
    "dirty": (bool, *_NONE),
    **dict.fromkeys(("m", "parameters", "launches"), _WHOLE + _NONE),
    **dict.fromkeys(("paths", "ms_groups"), (list, *_NONE)),
    **dict.fromkeys(("ms_p50", "ms_p20", "ms_p80", "peak_delta_mb", "saved_mb", "err_fro", "err_ratio"), _NUMBER + _NONE),
    **dict.fromkeys(("gflop", "least_mb", "sol_frac", "gbps", "tflops"), _NUMBER + _NONE),
}  # fmt: skip
_SINCE_2 = ("about", "parameters", "paths", "ms_groups")  # fields that schema 1 had not
_OF_THE_JOB = frozenset(("part", "name", "at_s", "share", "table", "cuda_library"))  # what a GPU job adds to a timing


def common(device: str = "cpu", revision: str | None = None) -> Row:
    """Return the fields that all rows of a run share: its identity and `environment.facts`."""
    return {"schema": SCHEMA, "run_id": uuid.uuid4().hex[:12], **environment.facts(device, revision)}


class Writer:
    """Append rows with `shared` fields to a file as they come, so that an interrupted run keeps them; keep them in memory too."""

    def __init__(self, path: Path | None, shared: Mapping[str, Any]) -> None:
        self.path, self.rows, self._shared = path, list[Row](), dict(shared)
        if path is not None:
            files.check_writable(path)

    def share(self, **fields: Any) -> None:
        """Give the rows from now on these fields too."""
        self._shared |= fields

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
            files.append_line(self.path, json.dumps(row, allow_nan=False))


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as one JSON file, in one step, and make its folder; where that fails, print it, so that it is not lost."""
    text = json.dumps(plain(record, digits=17), indent=1, allow_nan=False) + "\n"
    try:
        files.write_text(path, text)
    except OSError:
        print(text)
        raise


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
    """Read all rows of a file; lines that an interrupted process cut short are left out, and named on stderr."""
    return [row for _, row in _numbered(path)]


def _numbered(path: Path) -> list[tuple[int, Row]]:
    """Return the rows of a file with the numbers of their lines."""
    found, cut = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                found.append((number, row))
            else:
                cut.append(str(number))
    if cut:
        more = f" and {len(cut) - 5} others" if len(cut) > 5 else ""
        print(f"{path}, line {', '.join(cut[:5])}{more}: skipped, not a whole row in JSON", file=sys.stderr)
    return found


def read(paths: Iterable[Path]) -> list[Row]:
    """Read the timings of files, with today's names for the engines and orders of older records.

    Raises:
        ValueError: A line is not of the schema, or a file has no timing. The message names file and line.
    """
    found: list[Row] = []
    for path in paths:
        before = len(found)
        for number, row in _numbered(path):
            if "op" not in row and "part" in row:
                continue  # a check of a GPU job
            old = row.get("schema") == 1
            try:
                validate(row := {**dict.fromkeys(_SINCE_2), **row, "schema": SCHEMA} if old else row)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if old and row["op"].startswith("train_") and row["provider"] == "linear":
                row["provider"] = "base-head"  # with ten times the parameters of today's
            found.append(_renamed(row))
        if len(found) == before:
            raise ValueError(f"{path}: has no timings")
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
