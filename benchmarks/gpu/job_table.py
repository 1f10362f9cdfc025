"""The tables at the end of a GPU job: one of all that it has found, and one of ten lines for a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.gpu.log import BAD
from benchmarks.records.report import Column, ratio
from benchmarks.records.rows import Row, grouped

_SHOWN = 25  # bad lines, at most
_WIDTH = 150
_OURS = ("ours", "ours-triton", "ours-cuda", "kernel-triton", "kernel-cuda", "linear")  # whose times are shown


def table(lines: Sequence[Row]) -> str:
    """Return the counts of each part, the timings, the failures, the device and the commit."""
    return "\n".join([*_parts(lines), *_timings(lines), *_measures(lines), *_bad(lines), *_where(lines)])


_LINES = 10


def short_table(stage: int, lines: Sequence[Row]) -> str:
    """Return ten lines at most: the counts, what is bad or else what was measured, the device and the commit."""
    counted = Counter(line["status"] for line in lines)
    counts = ", ".join(f"{count} {status}" for status, count in sorted(counted.items()))
    found = [f"stage {stage}: {counts or 'nothing'}"]
    where = _where(lines)
    measured = [*_shapes(lines), *_measures([line for line in lines if "fastest" not in line])[1:], *_training(lines)]
    room = _LINES - len(found) - len(where)
    bad = [line for line in _bad(lines)[1:-1] if not line.startswith("skipped")]
    shown = [*bad[: room if not measured else 3], *measured]
    return "\n".join([*found, *(line[:_WIDTH] for line in shown[:room]), *where])


def _shapes(lines: Sequence[Row]) -> list[str]:
    """Return a line for each problem and clock: microseconds of ours and of its rivals, the clock of graphs first."""
    out = []
    problems = grouped([line for line in lines if "op" in line and line.get("part") in ("shapes", "host")])
    for (op, mode, _, n, d, k, m, timer, _), found in sorted(problems.items(), key=lambda item: item[0][7] != "graph"):
        sizes = ", ".join(str(size) for size in (n, d, k, m) if size is not None)
        times = [f"{name} {1e3 * row['ms_p50']:.4g}" for name, row in found.items() if row.get("ms_p50")]
        out.append(f"{op} {mode} ({sizes}) {timer}, us: {', '.join(times) or 'none'}")
    return out


def _training(lines: Sequence[Row]) -> list[str]:
    problems = grouped([line for line in lines if "op" in line and line.get("part") == "training"])
    return [
        f"{key[0]}, us a step: "
        + ", ".join(f"{name} {1e3 * row['ms_p50']:.4g}" for name, row in found.items() if row.get("ms_p50"))
        for key, found in problems.items()
    ]


def _parts(lines: Sequence[Row]) -> list[str]:
    statuses = ("ok", "wrong", "failed", "skipped", "info", "unsupported")
    out = [f"{'part':14}" + "".join(f"{status:>12}" for status in statuses)]
    for part in dict.fromkeys(line["part"] for line in lines):
        counted = Counter(line["status"] for line in lines if line["part"] == part)
        out.append(f"{part:14}" + "".join(f"{counted[status]:12}" for status in statuses))
    return out


def _timings(lines: Sequence[Row]) -> list[str]:
    """Return for each problem, mode and clock the microseconds of ours, ratios to the baselines, and the plan of `auto`."""
    ratios = [Column(f"{base}/ours", base, "ours") for base in ("unfused", "best-eager", "ours-eager", "linear")]
    titles = [*_OURS, *(column.title for column in ratios)]
    out = ["", f"{'us':46}" + "".join(f"{title:>17}" for title in titles) + "  plan"]
    problems = grouped([line for line in lines if "op" in line])
    for (op, mode, dtype, n, d, k, m, timer, _), found in problems.items():
        sizes = ", ".join(str(size) for size in (n, d, k, m) if size is not None)
        cells = [1e3 * found[name]["ms_p50"] if (found.get(name) or {}).get("ms_p50") else None for name in _OURS]
        cells += [one and one.value for one in (ratio(found, column) for column in ratios)]
        told = "".join(f"{'-':>17}" if cell is None else f"{cell:17.4g}" for cell in cells)
        out.append(f"{f'{op} {mode} ({sizes}) {dtype} {timer}':46}{told}  {(found.get('ours') or {}).get('plan')}")
    return out if problems else []


def _measures(lines: Sequence[Row]) -> list[str]:
    out = []
    for line in lines:
        numbers = [f"{name} {value:.4g}" for name, value in line.items() if name.endswith("_us")]
        numbers += [f"{name} {line[name]:.4g}" for name in ("gbps", "tflops") if line.get(name)]
        if "fastest" in line:
            numbers.append(f"{line['fastest']} is the fastest{'' if line['clear'] else ', but hardly'}")
        if numbers:
            name = line.get("name") or f"rates of {line['dtype']} at the {line['mode']}"
            out.append(f"{name}: {', '.join(numbers)}")
    return ["", *out] if out else []


def _bad(lines: Sequence[Row]) -> list[str]:
    def why(line: Row) -> str:
        return str(line.get("why") or line.get("note"))

    def name(line: Row) -> str:
        return str(line.get("name") or f"{line['op']} {line['mode']} {line['provider']}")

    bad = [line for line in lines if line["status"] in BAD]
    out = [f"{line['status']}: {line['part']}: {name(line)}: {why(line)}"[:_WIDTH] for line in bad[:_SHOWN]]
    more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    skipped = Counter((line["part"], why(line)) for line in lines if line["status"] == "skipped")
    missed = [f"skipped: {part}: {count} ({reason})"[:_WIDTH] for (part, reason), count in skipped.items()]
    return ["", *missed, *out, *more, f"{len(bad)} bad of {len(lines)}"]


def _where(lines: Sequence[Row]) -> list[str]:
    found = next((line for line in lines if "git_sha" in line), None)
    if found is None:
        return []
    versions = ", ".join(f"{name} {found.get(name)}" for name in ("torch", "triton", "cuda", "driver", "cuda_library"))
    return [f"{found['device']}; {versions}; commit {found['git_sha']}{' and changes' * bool(found['dirty'])}"]
