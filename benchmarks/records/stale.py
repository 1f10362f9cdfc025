"""`make lint`: names the records that are older than what they measure.

A record names its commit and the paths that it measures. It is stale where a later commit has changed them. Timings that name no
paths, which older ones do not, measure the whole library. Where git or the commit is missing, nothing is said.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LIBRARY = ("interp_nn",)


def main() -> None:
    """Print a line for each stale record."""
    for file in sorted((ROOT / "benchmarks" / "results").rglob("*.json*")):
        for line in stale(file, ROOT):
            print(line)


def stale(file: Path, root: Path) -> Iterator[str]:
    """Yield a line for each commit of a record after which its paths have changed."""
    for commit, paths in sorted(_measured(file)):
        count = _git(root, "rev-list", "--count", f"{commit}..HEAD", "--", *paths)
        if count is not None and int(count):
            yield f"stale: {file.relative_to(root)}: {count} commits since {commit[:7]} have changed {', '.join(paths)}"


def _measured(file: Path) -> set[tuple[str, tuple[str, ...]]]:
    """Return the commits of a record with the paths that it measured then."""
    text = file.read_text(encoding="utf-8")
    found: list[Any] = (
        [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else [json.loads(text)]
    )
    rows = [row for row in found if isinstance(row, dict) and row.get("git_sha")]
    return {(row["git_sha"], tuple(row.get("paths") or _LIBRARY)) for row in rows if row.get("paths") or "op" in row}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    main()
