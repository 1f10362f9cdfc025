"""`table`: records as Markdown, on the terminal or in a page between two marks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import files
from benchmarks.records.intervals import ENOUGH, interval, resampled
from benchmarks.records.rows import Row, grouped, read

_BRIEF = 12  # lines of a table in a page that people read
_FEW = 8  # providers, which have a column each
REPEAT = "repeat"  # a provider that is another one once more
_NEAR = "≈"  # a ratio that the run does not tell from 1
_LOST = 1.02  # a larger regret is listed
PLAN = "plan-"  # begins the providers that are ours by another plan; far slower ones have few samples
BEST_PLAN = "best-plan"  # the fastest of ours and of these
CHEAPER = ("linear", "cached")  # they need fewer operations than the summary, and so no share of the speed of light
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
    Column("ours / best-plan", "ours", BEST_PLAN, True),
    Column("best-eager / ours", "best-eager", "ours"), Column("compile / ours", "compile", "ours"),
    Column("inverse / ours", "inverse", "ours"), Column("orthogonal / ours", "orthogonal", "ours"),
    Column("spectral-norm / ours", "spectral-norm", "ours"), Column("pc-layer / ours", "pc-layer", "ours"),
    Column("compile-ours / linear", "compile-ours", "linear", True),
    Column("ours-cached / linear", "ours-cached", "linear", True),
    Column("ours / base-head", "ours", "base-head", True),
    Column("ours / backwards", "ours", "backwards", True), Column("jacrev / ours", "jacrev", "ours"),
    Column("unique / ours", "unique", "ours"),
)  # fmt: skip


class Ratio(NamedTuple):
    """A ratio of medians, and the same of rounds drawn with replacement; None for a record without its rounds."""

    value: float
    draws: NDArray[np.float64] | None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.ends is None else " [{:.2f}, {:.2f}]".format(*self.ends))

    @property
    def ends(self) -> tuple[float, float] | None:
        """Return the 95 % interval; it is wider where few rounds far apart would leave the ratio itself outside."""
        if self.draws is None:
            return None
        low, high = interval(self.draws)
        return min(low, self.value), max(high, self.value)


def ratio(found: dict[str, Row], column: Column) -> Ratio | None:
    """Return a column's ratio for one problem and mode, None where one of the two has no correct result of five samples."""
    over, under = (_fastest(found, name) for name in (column.over, column.under))
    if over is None or under is None:
        return None
    rounds = over["ms_groups"], under["ms_groups"]
    if not all(one and len(one) >= ENOUGH for one in rounds):
        return Ratio(over["ms_p50"] / under["ms_p50"], None)
    above, below = map(np.median, rounds)  # as `resampled` does
    return Ratio(float(above / below), resampled(*rounds))


def own_columns(rows: Iterable[Row]) -> list[Column]:
    """Return the columns of the providers of a user's file."""
    names = dict.fromkeys(row["provider"] for row in rows if row["status"] == "ok" and row["about"])
    return [Column(f"{name} / ours", name, "ours") for name in names]


def mean(ratios: Sequence[Ratio]) -> Ratio:
    """Return the geometric mean."""
    draws = [one.draws for one in ratios if one.draws is not None]
    together = np.exp(np.mean(np.log(draws), axis=0)) if len(draws) == len(ratios) else None
    return Ratio(geometric_mean([one.value for one in ratios]), together)


def _fastest(found: dict[str, Row], provider: str) -> Row | None:
    """Return the row of a provider; "inverse" is the fastest of the inverse-based forms."""
    names = [name for name in found if name == provider or (provider == "inverse" and name.startswith("inverse-"))]
    right = [found[name] for name in names if found[name]["status"] == "ok" and found[name]["samples"] >= ENOUGH]
    return min(right, key=lambda row: row["ms_p50"], default=None)


def columns(rows: Iterable[Row]) -> list[Column]:
    """Return the columns, with one for each provider of a user's file, and for each other one where few were timed."""
    timed = {row["provider"]: row for row in rows if row["status"] == "ok" and row["op"] != "ceiling"}
    shown = {name for column in COLUMNS for name in (column.over, column.under)} | {REPEAT}
    covered = ("inverse-", "assoc-") if "best-eager" in timed else ("inverse-",)  # by a column of the fastest
    others = {name for name in timed if name not in shown and not name.startswith(covered)}
    more = [name for name, row in timed.items() if row["about"] or (name in others and len(timed) <= _FEW)]
    return [*COLUMNS, *(Column(f"{name} / ours", name, "ours") for name in more)]


def noise(problems: Problems) -> list[Ratio]:
    """Return the ratios of providers that are the same calls: 1 but for noise."""
    found = []
    for rows in problems.values():
        twin = (rows.get(REPEAT) or {}).get("plan")
        for over, under in ((REPEAT, twin), ("assoc-a", "unfused")):
            if (rows.get(str(under)) or {}).get("plan") == over:
                continue  # one timing under two names
            if (one := ratio(rows, Column("", over, under or ""))) is not None:
                found.append(one)
    return found


def noise_floor(ratios: Sequence[Ratio]) -> float:
    """Return the difference that 95 % of pairs of identical providers keep."""
    return float(np.exp(np.quantile(np.abs(np.log([one.value for one in ratios])), 0.95)) - 1) if ratios else 0.0


def markdown(rows: Sequence[Row], brief: bool = False) -> str:
    """Return all tables: means with worst cases, each op and mode, and what was not timed.

    `brief`: of modes with a backward, and of at most `_BRIEF` lines.
    """
    problems = grouped(rows)
    kinds = list(dict.fromkeys((key[0], key[1]) for key in problems))
    halves = [[kind for kind in kinds if (kind[1] == "explain") is explaining] for explaining in (False, True)]
    parts = [_overview(problems, some) for some in halves if some]
    for op, mode in kinds:
        of = {key: found for key, found in problems.items() if key[:2] == (op, mode)}
        if not brief or (mode in ("fwdbwd", "loss") and len(of) <= _BRIEF):
            parts.append(f"**{_title(op, mode)}**\n\n{_details(of)}")
    if any(_NEAR in part for part in parts):
        parts.append(f"{_NEAR}: the interval holds 1, so the run does not tell the two apart.")
    parts += [
        text
        for text in (_wrong(rows), _unsupported(rows), _few(rows), _too_fast(rows), _skipped(rows), _regret(problems))
        if text
    ]
    parts += [text for text in (_noise(problems), _where(rows)) if text]
    return "\n\n".join(parts)


def _title(op: str, mode: str) -> str:
    name = _OP.get(op, op)
    return name if mode == "explain" else f"{name}, {_MODE.get(mode, mode)}"


def _overview(problems: Problems, kinds: Sequence[tuple[str, str]]) -> str:
    shown = _present([found for key, found in problems.items() if key[:2] in kinds])
    lines = [
        f"| geometric mean (worst) | {' | '.join(column.title for column in shown)} |",
        "|---|" + "--:|" * len(shown),
    ]
    for op, mode in kinds:
        of = [found for key, found in problems.items() if key[:2] == (op, mode)]
        cells = []
        for column in shown:
            found = [value for value in (ratio(one, column) for one in of) if value is not None]
            worst = (max if column.below_one else min)((one.value for one in found), default=None)
            cells.append(f"{_cell(mean(found))} ({worst:.2f})" if worst is not None else "-")
        lines.append(f"| {_title(op, mode)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _present(problems: Sequence[dict[str, Row]]) -> list[Column]:
    """Return the columns that have a ratio for any of the problems."""
    known = columns(row for found in problems for row in found.values())
    return [column for column in known if any(ratio(found, column) is not None for found in problems)]


def _details(problems: Problems) -> str:
    """Return a line for each problem that was timed: the milliseconds of ours, and the ratios."""
    shown = _present(list(problems.values()))
    several = len({key[2] for key in problems}) > 1
    lines = [
        f"| {'dtype | ' * several}n, d, k | plan | ours, ms | {' | '.join(column.title for column in shown)} |",
        f"|{'---|' * (2 + several)}" + "--:|" * (1 + len(shown)),
    ]
    for key, found in problems.items():
        ours = _fastest(found, "ours")
        if ours is None:
            continue
        sizes = ", ".join(str(size) for size in key[3:7] if size is not None)
        ratios = ["-" if value is None else _cell(value) for value in (ratio(found, column) for column in shown)]
        dtype = f"{key[2]} | " * several
        lines.append(f"| {dtype}{sizes} | {ours['plan'] or '-'} | {ours['ms_p50']:.3g} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _cell(one: Ratio) -> str:
    """Return a ratio, with a mark where its interval holds 1."""
    return f"{_NEAR * (one.ends is not None and one.ends[0] <= 1 <= one.ends[1])}{one}"


def _problem(row: Row) -> str:
    return f"{_title(row['op'], row['mode'])}, ({row['n']}, {row['d']}, {row['k']}) {row['dtype']}"


def _named(row: Row) -> str:
    return f"{row['provider']}, {_problem(row)}"


def _listed(heading: str, lines: Sequence[str]) -> str:
    return "\n".join([heading, "", *lines]) if lines else ""


def _unsupported(rows: Sequence[Row]) -> str:
    """Return why a user's provider was not timed."""
    left = [row for row in rows if row["status"] == "unsupported" and row["about"]]
    return _listed("Not timed:", [f"- {_named(row)}: {row['note']}" for row in left])


def _few(rows: Sequence[Row]) -> str:
    """Return which providers have too few samples for a ratio, a line for each problem and mode."""
    few: dict[str, list[str]] = {}
    for row in rows:
        enough = row["op"] == "ceiling" or row["samples"] >= ENOUGH or row["provider"].startswith(PLAN)
        if row["status"] == "ok" and not enough:
            few.setdefault(_problem(row), []).append(row["provider"])
    lines = [
        f"- {problem}: {', '.join(names[:3])}{f' and {len(names) - 3} others' if len(names) > 3 else ''}"
        for problem, names in few.items()
    ]
    return _listed(f"Fewer than {ENOUGH} samples, and so not in the ratios:", lines)


def _too_fast(rows: Sequence[Row]) -> str:
    """Return which timings are shorter than the device's measured rates allow."""
    fast: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "ok" and (row["sol_frac"] or 0) > 1 and row["provider"] not in CHEAPER:
            fast.setdefault(_problem(row), []).append(f"{row['provider']} {row['sol_frac']:.2f}")
    lines = [f"- {problem}: {', '.join(found)}" for problem, found in fast.items()]
    heading = (
        "Above 1 of the speed of light, so a measured rate, a count of operations or a clock is wrong, "
        "or the machine was busy while the rates were measured:"
    )
    return _listed(heading, lines)


def _noise(problems: Problems) -> str:
    """Return how far providers that make the same calls are apart."""
    if not (found := noise(problems)):
        return ""
    off = np.exp(np.abs(np.log([one.value for one in found]))) - 1
    ends = [one.ends for one in found if one.ends is not None]
    inside = f"; {sum(low <= 1 <= high for low, high in ends)} of {len(ends)} intervals hold 1" if ends else ""
    return (
        f"Noise floor: identical providers differ by {np.median(off):.1%} at the median, {noise_floor(found):.1%} at the 95th "
        f"percentile and {off.max():.1%} at most ({len(found)} pairs{inside}). A smaller difference says nothing."
    )


def _regret(problems: Problems) -> str:
    """Return what the choice of a plan costs: ours over its fastest plan, for the summary."""
    column = Column("", "ours", BEST_PLAN)
    found = {key: one for key, rows in problems.items() if (one := ratio(rows, column)) is not None}
    if not found:
        return ""
    lows = {key: one.ends[0] if one.ends else one.value for key, one in found.items()}
    lines = [
        f"- {_problem(problems[key]['ours'])}: {one}, {problems[key]['ours']['plan']}; fastest {problems[key][BEST_PLAN]['plan']}"
        for key, one in found.items()
        if lows[key] > _LOST
    ]
    text = (
        f"Regret of the choice of a plan: ours / best-plan {mean(list(found.values()))} as geometric mean of {len(found)} "
        f"problems and modes, with the fastest plan in {sum(one.value == 1 for one in found.values())}; "
        f"the lower end of the worst interval is {max(lows.values()):.2f}."
    )
    return _listed(f"{text} Lower ends above {_LOST:.2f}:", lines) or text


def _wrong(rows: Sequence[Row]) -> str:
    bad: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["status"] in ("wrong", "failed", "oom"):
            bad.setdefault(tuple(row[name] for name in ("provider", "op", "dtype", "d", "k", "status")), []).append(row)
    lines = [
        f"- {_named(row)}: {row['status']}: {row['note']}" + f" (also {_elsewhere([row, *more])})" * bool(more)
        for row, *more in bad.values()
    ]
    return _listed("Not right, and so not in the ratios:", lines)


def _elsewhere(rows: Sequence[Row]) -> str:
    """Return in how many more modes and sizes a provider is not right."""
    modes, sizes = (len({row[name] for row in rows}) - 1 for name in ("mode", "n"))
    said = [f"in {modes} more mode{'s' * (modes > 1)}"] * bool(modes) + [f"at {sizes} more n"] * bool(sizes)
    return " and ".join(said) or f"{len(rows) - 1} more times"


def _skipped(rows: Sequence[Row]) -> str:
    """Return what was left out over a limit: shapes with every provider, or single providers."""
    notes = Counter(((row["n"], row["d"], row["k"]), row["note"]) for row in rows if row["status"] == "skipped")
    lines = [f"- ({', '.join(map(str, shape))}): {note} ({count} rows)" for (shape, note), count in notes.items()]
    return _listed("Skipped:", lines)


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
        f"{heads['timer']} clock, {heads['l2']} cache; medians of interleaved rounds with "
        f"95 % intervals of a bootstrap over rounds."
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
