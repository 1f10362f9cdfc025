"""`plot`: records as figures, in PNG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.records import files
from benchmarks.records.report import CHEAPER, COLUMNS, Column, Problems, columns, noise, noise_floor, ratio
from benchmarks.records.rows import Row, grouped
from interp_nn.explain.plots.canvas import PALETTE

_MODES = ("infer", "fwd", "bwd", "fwdbwd", "loss")  # of the summary; the last one is of the loss of a pair
# A user's provider has the next colour of _OWN (Paul Tol's muted scheme).
_COLOURS = {
    "ours": PALETTE[0], "ours-triton": PALETTE[4], "ours-cuda": PALETTE[2], "linear": PALETTE[6], "unfused": PALETTE[5],
    "best-eager": PALETTE[1], "compile": PALETTE[3], "inverse-cholesky": "#999999", "orthogonal": "#bbaa88",
}  # fmt: skip
_OWN = ("#882255", "#44aa99", "#ddcc77", "#332288", "#117733", "#aa4499", "#661100", "#6699cc")
_ACROSS = 3  # panels in a line
_ONE_PANEL = 12  # problems with a label each


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw time over rows n, the roofline, the ratios with their intervals, and memory; a figure without data is left out.

    Args:
        rows: Rows of records.
        folder: Folder of the figures.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problems, known = _right(grouped(rows)), columns(rows)
    ratios = [column for column in known if column.title in ("ours / linear", "unfused / ours", "ours / best-plan")]
    ratios += [column for column in known if column not in COLUMNS]
    figures: dict[str, Callable[[], Any]] = {}
    for before, mode in (("", _longest(problems)), ("loss-", "loss")):
        timed = _of(problems, mode)
        figures |= {
            f"{before}latency": partial(_latency, plt, timed, mode, _colours(rows)),
            f"{before}roofline": partial(_roofline, plt, rows, timed, mode, _colours(rows)),
            f"{before}memory": partial(_memory, plt, timed, mode, _colours(rows)),
        }
    for column in ratios:
        over, under = column.title.split(" / ")
        name = f"to-{over if under == 'ours' else under}"
        figures[name] = partial(_ratios, plt, problems, column)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, make in figures.items():
        if (figure := make()) is None:
            continue
        figure.supxlabel(_conditions(rows), fontsize=7, color="#555555", x=0.01, ha="left")
        written.append(folder / f"{name}.png")
        with files.replacing(written[-1]) as part:
            figure.savefig(part, dpi=110)
        plt.close(figure)
    return written


def _right(problems: Problems) -> Problems:
    """Return problems without the providers that are not right; one that was wrong after the timing has a time."""
    return {key: {name: row for name, row in found.items() if row["status"] == "ok"} for key, found in problems.items()}


def _conditions(rows: Sequence[Row]) -> str:
    """Return device with its threads, dtypes, PyTorch, clock and commit, and the providers that are not right."""
    timed = [row for row in rows if row["ms_p50"]] or rows
    said = [
        " and ".join(dict.fromkeys(str(row[name]) for row in timed)) for name in ("device", "dtype", "torch", "timer")
    ]
    commits = " and ".join(
        dict.fromkeys(f"{(row['git_sha'] or 'unknown')[:7]}{' with changes' if row['dirty'] else ''}" for row in timed)
    )
    left = dict.fromkeys(
        f"{row['provider']} ({row['status']})"
        for row in rows
        if row["status"] in ("wrong", "failed", "oom") or (row["status"] == "unsupported" and row["about"])
    )
    missing = f"; not drawn: {', '.join(left)}" if left else ""
    return f"{said[0]}; {said[1]}; torch {said[2]}; {said[3]} clock; commit {commits}{missing}"


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    """Return the colours of the providers that are drawn, in the order of the legend."""
    own = [column.over for column in columns(rows) if column not in COLUMNS]
    return {**_COLOURS, **{name: _OWN[i % len(_OWN)] for i, name in enumerate(own)}}


def _of(problems: Problems, mode: str) -> Problems:
    """Return the problems of the summary, or of the loss of a pair, that were timed in a mode."""
    op = "cross_entropy" if mode == "loss" else "summary"
    return {
        key: found
        for key, found in problems.items()
        if key[:2] == (op, mode) and any(row["ms_p50"] for row in found.values())
    }


def _longest(problems: Problems) -> str:
    """Return the mode of the summary to draw: forward and backward, or the first other one that was timed."""
    return next((mode for mode in reversed(_MODES[:-1]) if _of(problems, mode)), "fwdbwd")


def _what(mode: str) -> str:
    return "the loss of a pair" if mode == "loss" else f"the summary ({mode})"


def _panels(plt: Any, count: int, title: str) -> tuple[Any, list[Any]]:
    across = min(count, _ACROSS)
    down = -(-count // across)
    figure, axes = plt.subplots(
        down, across, figsize=(max(7.5, 2 + 3 * across), 1.5 + 2.7 * down), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    for axis in flat:
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, flat[:count]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)


def _latency(plt: Any, timed: Problems, mode: str, colours: dict[str, str]) -> Any:
    """Draw milliseconds over n, a panel for each dtype, d and k with several n; bars are 20 % and 80 % quantiles."""
    counts = Counter((key[2], *key[4:6]) for key in timed)
    widths = [width for width, count in counts.items() if count > 1 or max(counts.values()) == 1]
    if not widths:
        return None
    figure, axes = _panels(plt, len(widths), f"Time of {_what(mode)} over rows n, at fixed d and k")
    for axis, (dtype, d, k) in zip(axes, widths, strict=True):
        for name, colour in colours.items():
            points = sorted(
                tuple([key[3], *(found[name][f"ms_{quantile}"] for quantile in ("p50", "p20", "p80"))])
                for key, found in timed.items()
                if (key[2], *key[4:6]) == (dtype, d, k) and name in found and found[name]["ms_p50"]
            )
            if points:
                n, p50, p20, p80 = zip(*points, strict=True)
                axis.plot(n, p50, "-o", markersize=3.5, linewidth=1.2, color=colour, label=name)
                axis.vlines(n, p20, p80, color=colour, linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="rows n", ylabel="ms")
        axis.set_title(f"d = {d}, k = {k}, {dtype}", fontsize=9)
    _legend(figure, axes)
    return figure


def _roofline(plt: Any, rows: Sequence[Row], timed: Problems, mode: str, colours: dict[str, str]) -> Any:
    """Draw operations a second over operations a byte, below the rates that were measured; a panel for each dtype."""
    rates = {row["dtype"]: (row["gbps"], 1e3 * row["tflops"]) for row in rows if row["op"] == "ceiling"}
    dtypes = [dtype for dtype in dict.fromkeys(key[2] for key in timed) if dtype in rates]
    if not dtypes:
        return None
    figure, axes = _panels(plt, len(dtypes), f"Roofline of {_what(mode)}: the cheapest order's operations")
    for axis, dtype in zip(axes, dtypes, strict=True):
        bandwidth, flops = rates[dtype]
        seen = [flops / bandwidth]
        for name, colour in colours.items():
            found = [row[name] for key, row in timed.items() if key[2] == dtype and name in row]
            points = [
                (row["gflop"] / row["least_mb"] * 1e3, 1e3 * row["gflop"] / row["ms_p50"])
                for row in found
                if row["ms_p50"] and row["gflop"] and row["sol_frac"] and name not in CHEAPER
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), s=18, color=colour, label=name)
                seen += [x for x, _ in points]
        reach = [min(seen) / 2, flops / bandwidth, max(seen) * 2]
        axis.plot(reach, [min(flops, bandwidth * x) for x in reach], color="#555555", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
        axis.set_title(f"{dtype}: {bandwidth:.3g} GB/s, {flops:.3g} GFLOP/s measured", fontsize=9)
    _legend(figure, axes)
    return figure


def _labels(axis: Any, keys: Sequence[tuple[Any, ...]]) -> None:
    """Name the problems (dtype, n, d, k, m, ...) below an axis."""
    sizes = [", ".join(str(size) for size in key[1:5] if size is not None) for key in keys]
    several = len({key[0] for key in keys}) > 1
    labels = [f"{size}, {key[0]}" if several else size for size, key in zip(sizes, keys, strict=True)]
    axis.set_xticks(range(len(keys)), labels, fontsize=8, rotation=30, ha="right")


def _ratios(plt: Any, problems: Problems, column: Column) -> Any:
    """Draw a ratio for every problem, a point with its 95 % interval for each mode; many over n, a panel for each d and k."""
    by_mode = {mode: {key[2:]: ratio(found, column) for key, found in _of(problems, mode).items()} for mode in _MODES}
    shown = {mode: {key: one for key, one in found.items() if one} for mode, found in by_mode.items()}
    shown = {mode: found for mode, found in shown.items() if found}
    keys = list(dict.fromkeys(key for found in shown.values() for key in found))
    if not keys:
        return None
    better = "less" if column.below_one else "more"
    widths = list(dict.fromkeys((key[0], *key[2:4]) for key in keys)) if len(keys) > _ONE_PANEL else [None]
    title = f"{column.title} with 95 % intervals ({better} is better for interp_nn)"
    figure, axes = _panels(plt, len(widths), title)
    for axis, width in zip(axes, widths, strict=True):
        for i, (mode, found) in enumerate(shown.items()):
            of = {key: one for key, one in found.items() if width in (None, (key[0], *key[2:4]))}
            aside = 0.6 * ((i + 0.5) / len(shown) - 0.5)
            at = [keys.index(key) + aside if width is None else key[1] * 2**aside for key in of]
            colour = PALETTE[(0, 5, 1, 2, 3)[i]]
            axis.scatter(at, [one.value for one in of.values()], s=20, color=colour, label=mode)
            for x, one in zip(at, of.values(), strict=True):
                if one.ends is not None:
                    axis.vlines(x, *one.ends, color=colour, linewidth=1.5)
        axis.axhline(1, color="black", linewidth=0.8)
        if floor := noise_floor(noise(problems)):
            axis.axhspan(1 / (1 + floor), 1 + floor, color="#dddddd", label="noise floor", zorder=0)
        axis.set(ylabel=column.title)
        if width is None:
            figure.set_size_inches(max(7.5, 2 + 0.8 * len(keys)), 4.5)
            axis.set_xlabel("n, d, k")
            _labels(axis, keys)
        else:
            axis.set(xscale="log", xlabel="rows n")
            axis.set_title(f"d = {width[1]}, k = {width[2]}, {width[0]}", fontsize=9)
    _legend(figure, axes)
    return figure


def _memory(plt: Any, timed: Problems, mode: str, colours: dict[str, str]) -> Any:
    """Draw the memory that a call holds besides its inputs, for every problem."""
    heights = {
        name: [found.get(name, {}).get("peak_delta_mb") or math.nan for found in timed.values()] for name in colours
    }
    heights = {name: values for name, values in heights.items() if not all(map(math.isnan, values))}
    if not heights:
        return None
    figure, (axis,) = _panels(plt, 1, f"Memory of {_what(mode)} besides its inputs, at most")
    figure.set_size_inches(max(7.5, 3 + len(timed)), 4.5)
    for i, (name, values) in enumerate(heights.items()):
        at = [j + 0.84 * (i + 0.5) / len(heights) - 0.42 for j in range(len(timed))]
        axis.bar(at, values, 0.84 / len(heights), label=name, color=colours[name])
    axis.set(yscale="log", ylabel="MB", xlabel="n, d, k")
    _labels(axis, [key[2:] for key in timed])
    _legend(figure, [axis])
    return figure
