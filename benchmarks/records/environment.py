"""The environment of a record: device, versions, commit and time."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import interp_nn

ROOT = Path(__file__).resolve().parents[2]


def facts(device: str = "cpu", revision: str | None = None) -> dict[str, Any]:
    """Return device, versions, commit and time, for the head of every record; `revision` is the commit without git."""
    sha = _run("git", "rev-parse", "HEAD")
    # Without what the run itself writes: a figure may be drawn again before its record.
    changed = "git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    return {
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_sha": sha or revision,
        "dirty": bool(_run(*changed)) if sha else None,
        "device": device_name(device),
        "driver": (_run(*query) or "").partition("\n")[0] or None if device.startswith("cuda") else None,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),  # torch.__version__ is not a plain str
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "interp_nn": interp_nn.__version__,
    }


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's model with the number of threads that PyTorch uses."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name(device))
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else model}, {torch.get_num_threads()} threads"


def device_slug(device: str) -> str:
    """Return the folder of a device's results: "cpu", or the GPU's name in lower case with dashes."""
    return "cpu" if device == "cpu" else "-".join(device_name(device).lower().split())


def now(revision: str | None = None) -> str:
    """Return the time in UTC and the commit, for the name of a file; `revision` where there is no git."""
    time = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    return f"{time}-{(_run('git', 'rev-parse', 'HEAD') or revision or 'unknown')[:7]}"


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
