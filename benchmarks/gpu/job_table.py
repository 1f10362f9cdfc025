"""The short table at a GPU job's end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.kernels import WITH_KERNELS
from benchmarks.gpu.log import BAD

_SHOWN = 25  # bad lines, at most
_WIDTH = 150


def table(lines: Sequence[dict[str, Any]]) -> str:
    """What each part came to, the timings as ratios, then what is wrong, the device and the commit."""
    return "\n".join([*_parts(lines), *_timings(lines), *_measures(lines), *_bad(lines), *_where(lines)])


def _parts(lines: Sequence[dict[str, Any]]) -> list[str]:
    statuses = ("ok", "wrong", "failed", "skipped", "info")
    out = [f"{'part':14}" + "".join(f"{status:>9}" for status in statuses)]
    for part in dict.fromkeys(line["part"] for line in lines):
        counted = Counter(line["status"] for line in lines if line["part"] == part)
        out.append(f"{part:14}" + "".join(f"{counted[status]:9}" for status in statuses))
    return out


def _timings(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Of each problem and engine: microseconds by both clocks, and by each the ratios to the unfused and to nn.Linear.

    Then which engine dispatch takes, and which is the fastest by the plain clock, with a question mark if it hardly is.
    """
    timed = [line for line in lines if line["part"] == "time" and "plain" in line]
    verdicts = {line["name"]: line for line in lines if line["part"] == "time" and "fastest" in line}
    problems: dict[str, dict[str, dict[str, Any]]] = {}
    for line in timed:
        problems.setdefault(line["name"].rpartition(", ")[0], {})[line["provider"]] = line
    if not problems:
        return []
    heads = ("us", "unf/ours", "best/ours", "ours/lin")
    out = [
        "",
        f"{'':41}{'plain':^40}{'graph':^40}",
        f"{'':41}" + 2 * "".join(f"{head:>10}" for head in heads) + "  auto, fastest",
    ]
    for name, found in problems.items():
        auto, verdict = found.get("auto", {}).get("engine", "-"), verdicts.get(name, {})
        best = f"{verdict.get('fastest') or '-'}{'' if verdict.get('clear', True) else '?'}"
        for engine in [engine for engine in WITH_KERNELS if engine in found] or ["-"]:
            row = "".join(_clock(found, clock, engine) for clock in ("plain", "graph"))
            out.append(f"{name:34} {engine:6}{row}  {auto}, {best}")
    return out


def _clock(found: dict[str, dict[str, Any]], clock: str, engine: str) -> str:
    at = {name: line[clock]["us_p50"] for name, line in found.items() if line[clock] is not None}
    ours, unfused, linear = at.get(engine), at.get("unfused"), at.get("linear")
    best = min((value for name, value in at.items() if name.startswith(("unfused", "assoc"))), default=None)
    cells = [ours, _ratio(unfused, ours), _ratio(best, ours), _ratio(ours, linear)]
    return "".join(f"{'-':>10}" if cell is None else f"{cell:10.4g}" for cell in cells)


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _measures(lines: Sequence[dict[str, Any]]) -> list[str]:
    out = []
    for line in lines:
        numbers = {name: value for name, value in line.items() if name.endswith(("_us", "_per_second"))}
        if line["part"] == "time" and line["status"] == "info" and numbers:
            told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            best = (
                f"; {line['fastest']} is faster{'' if line['clear'] else ', but hardly'}" if "fastest" in line else ""
            )
            out.append(f"{line['name']}: {told}{best}")
    return ["", *out] if out else []


def _bad(lines: Sequence[dict[str, Any]]) -> list[str]:
    bad = [line for line in lines if line["status"] in BAD]
    out = [f"{line['status']}: {line['part']}: {line['name']}: {line.get('why')}"[:_WIDTH] for line in bad[:_SHOWN]]
    more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    skipped = Counter((line["part"], line.get("why")) for line in lines if line["status"] == "skipped")
    missed = [f"skipped: {part}: {count} ({why})"[:_WIDTH] for (part, why), count in skipped.items()]
    return ["", *missed, *out, *more, f"{len(bad)} bad of {len(lines)}"]


def _where(lines: Sequence[dict[str, Any]]) -> list[str]:
    found = next((line for line in lines if "versions" in line), None)
    if found is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [f"{found['device']}; {versions}; commit {found['git_sha']}{' and changes' * bool(found['git_dirty'])}"]
