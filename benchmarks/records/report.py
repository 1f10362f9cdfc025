"""`table`: records as Markdown, on the terminal or in a page between two marks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from benchmarks.records import files
from benchmarks.records.rows import Row, grouped, read

BEGIN, END = "<!-- begin: python -m benchmarks", "<!-- end -->"
_MODE = {
    "fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward", "infer": "inference", "loss": "loss and gradients",
    "step": "training step", "update": "after a step",
}  # fmt: skip
_OP = {
    "cross_entropy": "cross entropy of the pair", "train_cnn": "small CNN", "train_vgg11": "vgg11",
    "linearize_cnn": "linearize the small CNN", "linearize_vgg11": "linearize vgg11",
    "group_patterns": "group activation patterns",
}  # fmt: skip

Problems = dict[tuple[Any, ...], dict[str, Row]]  # as `grouped` returns them


class Column(NamedTuple):
    """A ratio of medians, `over` to `under`; below_one: a ratio below 1 is in favour of interp_nn."""

    title: str
    over: str
    under: str
    below_one: bool = False


COLUMNS = (
    Column("ours / linear", "ours", "linear", True), Column("unfused / ours", "unfused", "ours"),
    Column("best-eager / ours", "best-eager", "ours"), Column("compile / ours", "compile", "ours"),
    Column("inverse / ours", "inverse", "ours"), Column("orthogonal / ours", "orthogonal", "ours"),
    Column("spectral-norm / ours", "spectral-norm", "ours"), Column("pc-layer / ours", "pc-layer", "ours"),
    Column("compile-ours / linear", "compile-ours", "linear", True),
    Column("ours-cached / linear", "ours-cached", "linear", True),
    Column("ours / backwards", "ours", "backwards", True), Column("jacrev / ours", "jacrev", "ours"),
    Column("unique / ours", "unique", "ours"),
)  # fmt: skip


def ratio(found: dict[str, Row], column: Column) -> float | None:
    """Return a column's ratio for one problem and mode, None where one of the two has no correct result."""
    over, under = (_median(found, name) for name in (column.over, column.under))
    return None if over is None or under is None else over / under


def _median(found: dict[str, Row], provider: str) -> float | None:
    """Return the median of a provider; "inverse" is the fastest of the inverse-based forms."""
    names = [name for name in found if name == provider or (provider == "inverse" and name.startswith("inverse-"))]
    return min((found[name]["ms_p50"] for name in names if found[name]["status"] == "ok"), default=None)


def markdown(rows: Sequence[Row], brief: bool = False) -> str:
    """Return all tables: means with worst cases, each op and mode (`brief`: with a backward), and what was not timed."""
    problems = grouped(rows)
    kinds = list(dict.fromkeys((key[0], key[1]) for key in problems))
    halves = [[kind for kind in kinds if (kind[1] == "explain") is explaining] for explaining in (False, True)]
    parts = [_overview(problems, some) for some in halves if some]
    for op, mode in kinds:
        if not brief or mode in ("fwdbwd", "loss"):
            of = {key: found for key, found in problems.items() if key[:2] == (op, mode)}
            parts.append(f"**{_title(op, mode)}**\n\n{_details(of)}")
    parts += [text for text in (_wrong(rows), _skipped(rows), _where(rows)) if text]
    return "\n\n".join(parts)


def _title(op: str, mode: str) -> str:
    name = _OP.get(op, op)
    return name if mode == "explain" else f"{name}, {_MODE.get(mode, mode)}"


def _overview(problems: Problems, kinds: Sequence[tuple[str, str]]) -> str:
    columns = _present([found for key, found in problems.items() if key[:2] in kinds])
    lines = [
        f"| geometric mean (worst) | {' | '.join(column.title for column in columns)} |",
        "|---|" + "--:|" * len(columns),
    ]
    for op, mode in kinds:
        of = [found for key, found in problems.items() if key[:2] == (op, mode)]
        cells = []
        for column in columns:
            found = [value for value in (ratio(one, column) for one in of) if value is not None]
            worst = (max if column.below_one else min)(found, default=None)
            cells.append(f"{geometric_mean(found):.2f} ({worst:.2f})" if worst is not None else "-")
        lines.append(f"| {_title(op, mode)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _present(problems: Sequence[dict[str, Row]]) -> list[Column]:
    """Return the columns that have a ratio for any of the problems."""
    return [column for column in COLUMNS if any(ratio(found, column) is not None for found in problems)]


def _details(problems: Problems) -> str:
    """Return a line for each problem that was timed: the milliseconds of ours, and the ratios."""
    columns = _present(list(problems.values()))
    several = len({key[2] for key in problems}) > 1
    lines = [
        f"| {'dtype | ' * several}n, d, k | plan | ours, ms | {' | '.join(column.title for column in columns)} |",
        f"|{'---|' * (2 + several)}" + "--:|" * (1 + len(columns)),
    ]
    for key, found in problems.items():
        ours = _median(found, "ours")
        if ours is None:
            continue
        sizes = ", ".join(str(size) for size in key[3:7] if size is not None)
        ratios = ["-" if value is None else f"{value:.2f}" for value in (ratio(found, column) for column in columns)]
        dtype = f"{key[2]} | " * several
        lines.append(f"| {dtype}{sizes} | {found['ours']['plan'] or '-'} | {ours:.3g} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _wrong(rows: Sequence[Row]) -> str:
    bad = [
        f"- {row['provider']}, {_title(row['op'], row['mode'])}, ({row['n']}, {row['d']}, {row['k']}) {row['dtype']}: "
        f"{row['status']}: {row['note']}"
        for row in rows
        if row["status"] in ("wrong", "failed", "oom")
    ]
    return "\n".join(["Not right, and so not in the ratios:", "", *bad]) if bad else ""


def _skipped(rows: Sequence[Row]) -> str:
    """Return what was left out over a limit: shapes with every provider, or single providers."""
    notes = Counter(((row["n"], row["d"], row["k"]), row["note"]) for row in rows if row["status"] == "skipped")
    lines = [f"- ({', '.join(map(str, shape))}): {note} ({count} rows)" for (shape, note), count in notes.items()]
    return "\n".join(["Skipped:", "", *lines]) if lines else ""


def _where(rows: Sequence[Row]) -> str:
    """Return the device and its measured rates, the versions, the commit, and the clock."""
    heads = {
        name: " and ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in ("device", "torch", "timer", "l2")
    }
    commits = dict.fromkeys(
        f"{(row['git_sha'] or 'unknown')[:7]}{' with changes' if row['dirty'] else ''}" for row in rows
    )
    rates = [
        f"{row['dtype']} at the {row['mode']}: {row['gbps']:.3g} GB/s copied, {row['tflops']:.3g} TFLOP/s"
        for row in rows
        if row["op"] == "ceiling"
    ]
    where = (
        f"{heads['device']}; torch {heads['torch']}; commit {' and '.join(commits)}; "
        f"{heads['timer']} clock, {heads['l2']} cache; medians of interleaved rounds."
    )
    return where + (f" Measured rates: {'; '.join(rates)}." if rates else "")


def fill(page: Path, record: Path, root: Path) -> None:
    """Write a record's brief tables into a page, between the marks that name the record.

    Raises:
        ValueError: The page has no such marks.
    """
    between(page, f"table {record.resolve().relative_to(root).as_posix()}", markdown(read([record]), brief=True))


def between(page: Path, command: str, text: str) -> None:
    """Write a text into a page, between the mark that names its command and the end mark.

    Raises:
        ValueError: The page has no such marks.
    """
    whole = page.read_text(encoding="utf-8")
    begin = f"{BEGIN} {command} -->"
    head, found, rest = whole.partition(begin)
    _, ended, tail = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{page}: has no lines '{begin}' and '{END}' to write between")
    files.write_text(page, f"{head}{begin}\n\n{text}\n\n{END}{tail}")
