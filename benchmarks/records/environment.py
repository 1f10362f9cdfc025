"""Records: what was measured, on what, with which versions and which commit."""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import interp_nn

ROOT = Path(__file__).resolve().parents[2]


def facts(device: str = "cpu", revision: str | None = None) -> dict[str, Any]:
    """Device, versions, commit and time, for the head of every record. revision: the commit where there is no git."""
    sha = _git("rev-parse", "HEAD")
    return {
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_sha": sha or revision,
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if sha else None,
        "device": device_name(device),
        "versions": {
            "interp_nn": interp_nn.__version__,
            "torch": str(torch.__version__),  # which is of a class of its own
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
    }


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's model with the number of threads PyTorch uses."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def device_slug(device: str) -> str:
    """The folder of a device's results: "cpu", or the GPU's name in lower case with dashes."""
    return "cpu" if device == "cpu" else "-".join(device_name(device).lower().split())


def now(revision: str | None = None) -> str:
    """The time in UTC and the commit, as the name of a file. revision: the commit where there is no git."""
    time = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return f"{time}-{(_git('rev-parse', 'HEAD') or revision or 'unknown')[:7]}"


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, making its folder; null for NaN and infinity, which JSON has not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
