"""The record of a GPU job: JSON lines, one a check or timing, each with all that is needed to believe it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import environment
from interp_nn import engines
from interp_nn.engines.cuda import compiled_library
from interp_nn.engines.devices import interpreting

BAD = ("wrong", "failed")  # what makes the job fail; the others are "ok", "skipped" and "info"


class Log:
    """Lines of one part, written as they come, and the time that is left for more.

    A line holds part, name, status and seconds since the start, what all lines share (`common`), and the facts it is given.
    """

    def __init__(self, path: Path, part: str, seconds: float, common: dict[str, Any]) -> None:
        self._path, self._part, self._common = path, part, common
        self._start = time.monotonic()
        self._seconds = seconds
        self.bad = 0

    def write(self, name: str, status: str, **facts: Any) -> None:
        """Append a line. status: "ok", "info", "skipped" (with `why`), "wrong" or "failed" (with `why`)."""
        self.bad += status in BAD
        at = round(time.monotonic() - self._start, 3)
        line = {"part": self._part, "name": name, "status": status, "at_s": at, **self._common, **facts}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(line), allow_nan=False) + "\n")

    def check(self, name: str, why: str | None, **facts: Any) -> None:
        """A line that is "ok" if `why` is None, else "wrong"."""
        if why is None:
            self.write(name, "ok", **facts)
        else:
            self.write(name, "wrong", why=why, **facts)

    def left(self) -> float:
        """Seconds that remain."""
        return self._seconds - (time.monotonic() - self._start)

    @contextlib.contextmanager
    def guarded(self, name: str, **facts: Any) -> Iterator[None]:
        """What raises inside is a line, and not the end."""
        try:
            yield
        except Exception as error:
            where = "".join(traceback.format_exception(error)[-4:])
            self.write(name, "failed", why=f"{type(error).__name__}: {error}"[:2000], trace=where[-4000:], **facts)


def _plain(value: Any) -> Any:
    """The value in what JSON has: infinities and NaN as text, which is how a failed comparison reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a killed process left unfinished is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def common(device: torch.device, revision: str | None) -> dict[str, Any]:
    """What every line of this process shares: device, versions, commit. revision: the commit where there is no git."""
    here = environment.facts(device.type, revision)
    versions = here.pop("versions") | {"triton": _version("triton"), "numpy": _version("numpy")}
    if device.type == "cuda":
        # The CUDA that the compiled library was built with, where it is there.
        versions["cuda_library"] = (
            None if engines.unavailable("cuda") else compiled_library.dotted(compiled_library.versions()[0])
        )
        found = torch.cuda.get_device_properties(device)
        here |= {
            "capability": [found.major, found.minor],
            "multiprocessors": found.multi_processor_count,
            "memory": found.total_memory,
            "l2": found.L2_cache_size,
        }
    elif interpreting():
        here["device"] += ", interpreted"
    return here | {"versions": versions, "table": os.environ.get("INTERP_NN_TABLE")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
