"""`plot`: records as figures, in PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records.report import COLUMNS, Column, Problems, ratio
from benchmarks.records.rows import Row, grouped

_MODES = ("infer", "fwd", "bwd", "fwdbwd")
_COLOURS = {
    "ours": "#0b5fa5", "ours-triton": "#4c9be8", "ours-cuda": "#7fc6a4", "linear": "#222222", "unfused": "#d1495b",
    "best-eager": "#edae49", "compile": "#8d6a9f", "inverse-cholesky": "#a0a0a0", "orthogonal": "#c8b6a6",
}  # fmt: skip


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw latency over n, the ratios to nn.Linear and to the unfused expression, the share of the speed of light, and memory.

    A figure without data is left out. Returns the files.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problems = grouped(rows)
    figures: dict[str, Callable[[Any], bool]] = {
        "latency": lambda axis: _latency(axis, problems),
        "to-linear": lambda axis: _ratios(axis, problems, COLUMNS[0]),
        "to-unfused": lambda axis: _ratios(axis, problems, COLUMNS[1]),
        "speed-of-light": lambda axis: _fields(axis, problems, "sol_frac", "share of the measured speed of light"),
        "memory": lambda axis: _fields(axis, problems, "peak_delta_mb", "MB held besides the inputs, at most"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    device = ", ".join(dict.fromkeys(row["device"] for row in rows))
    for name, draw_on in figures.items():
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
        if draw_on(axis):
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            figure.legend(loc="outside right upper", fontsize=8, frameon=False)
            figure.suptitle(device, fontsize=9)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written


def _of(problems: Problems, mode: str) -> Problems:
    """Return the summary's problems that were timed in a mode."""
    return {
        key: found
        for key, found in problems.items()
        if key[:2] == ("summary", mode) and any(row["ms_p50"] for row in found.values())
    }


def _latency(axis: Any, problems: Problems) -> bool:
    """Draw milliseconds of forward and backward over n; lines join the points of one d and k."""
    timed = _of(problems, "fwdbwd")
    widths = list(dict.fromkeys((key[2], *key[4:6]) for key in timed))
    for name, colour in _COLOURS.items():
        label: str | None = name
        for width in widths:
            points = sorted(
                (key[3], *(found[name][f"ms_{quantile}"] for quantile in ("p50", "p20", "p80")))
                for key, found in timed.items()
                if (key[2], *key[4:6]) == width and name in found and found[name]["ms_p50"]
            )
            if points:
                n, p50, p20, p80 = zip(*points, strict=True)
                axis.plot(n, p50, "-o", markersize=4, linewidth=1.2, color=colour, label=label)
                axis.vlines(n, p20, p80, color=colour, linewidth=1)
                label = None
    for dtype, d, k in widths:
        n, top = max(
            (key[3], max(row["ms_p50"] or 0 for name, row in found.items() if name in _COLOURS))
            for key, found in timed.items()
            if (key[2], *key[4:6]) == (dtype, d, k)
        )
        several = len({width[0] for width in widths}) > 1
        text = f"{d}, {k}{f' {dtype}' * several}"
        axis.annotate(text, (n, top), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    axis.set(
        xscale="log", yscale="log", xlabel="rows n", ylabel="ms", title="Summary, forward + backward (points: d, k)"
    )
    return bool(timed)


def _bars(axis: Any, keys: Sequence[tuple[Any, ...]], heights: dict[str, list[float]]) -> None:
    """Draw a group of bars for each problem, (dtype, n, d, k, m, ...), a bar for each name."""
    for i, (name, values) in enumerate(heights.items()):
        at = [j + 0.84 * (i + 0.5) / len(heights) - 0.42 for j in range(len(keys))]
        axis.bar(at, values, 0.84 / len(heights), label=name, color=_COLOURS.get(name, f"C{i}"))
    sizes = [", ".join(str(size) for size in key[1:5] if size is not None) for key in keys]
    several = len({key[0] for key in keys}) > 1
    labels = [f"{size}{chr(10)}{key[0]}" if several else size for size, key in zip(sizes, keys, strict=True)]
    axis.set_xticks(range(len(keys)), labels, fontsize=8)


def _ratios(axis: Any, problems: Problems, column: Column) -> bool:
    """Draw a ratio for every problem, a bar for each mode."""
    by_mode = {mode: {key[2:]: ratio(f, column) for key, f in _of(problems, mode).items()} for mode in _MODES}
    keys = list(dict.fromkeys(key for found in by_mode.values() for key in found))
    _bars(axis, keys, {mode: [found.get(key) or 0 for key in keys] for mode, found in by_mode.items() if found})
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(ylabel=column.title, title=f"Summary: {column.title} ({'less' if column.below_one else 'more'} is better)")
    return bool(keys)


def _fields(axis: Any, problems: Problems, field: str, title: str) -> bool:
    """Draw a field of every provider's rows of forward and backward."""
    timed = _of(problems, "fwdbwd")
    heights = {name: [found.get(name, {}).get(field) or 0 for found in timed.values()] for name in _COLOURS}
    heights = {name: values for name, values in heights.items() if any(values)}
    _bars(axis, [key[2:] for key in timed], heights)
    axis.set(ylabel=title, title="Summary, forward + backward")
    if field == "peak_delta_mb":
        axis.set_yscale("log")
    return bool(heights)
