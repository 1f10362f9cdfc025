"""The record of a GPU job: a line for each check, and the time that is left for more."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import rows
from benchmarks.timing.clocks import OUT_OF_TIME
from interp_nn.engines.cuda import compiled_library
from interp_nn.engines.devices import interpreting
from interp_nn.engines.limits import unsupported_reason

BAD = ("wrong", "failed")  # the statuses that make the job fail; the others are "ok", "skipped" and "info"


class Log(rows.Writer):
    """The lines of one part, written as they come, within `seconds`; all have the `shared` fields."""

    def __init__(self, path: Path, part: str, seconds: float, shared: Mapping[str, Any]) -> None:
        super().__init__(path, {"part": part, **shared})
        self._start, self._seconds, self.bad = time.monotonic(), seconds, 0

    def write(self, name: str | None = None, status: str = "ok", **facts: Any) -> None:
        """Append a line; "skipped", "wrong" and "failed" come with `why`, or with `note` in a timing."""
        self.bad += status in BAD
        named = {} if name is None else {"name": name}
        super().write(**named, status=status, at_s=round(time.monotonic() - self._start, 3), **facts)

    def check(self, name: str, why: str | None, **facts: Any) -> None:
        """Append a line that is "ok" if `why` is None, else "wrong"."""
        self.write(name, "ok" if why is None else "wrong", **({} if why is None else {"why": why}), **facts)

    def left(self) -> float:
        """Return the seconds that remain."""
        return self._seconds - (time.monotonic() - self._start)

    @contextlib.contextmanager
    def guarded(self, name: str, **facts: Any) -> Iterator[None]:
        """Turn an exception into a line, so that the next step runs."""
        try:
            yield
        except Exception as error:
            where = "".join(traceback.format_exception(error)[-4:])
            self.write(name, "failed", why=f"{type(error).__name__}: {error}"[:2000], trace=where[-4000:], **facts)


def lacked_time(line: Mapping[str, Any]) -> bool:
    """Return whether a line is of something that was skipped because the time was over."""
    return line["status"] == "skipped" and str(line.get("why") or line.get("note")).startswith(OUT_OF_TIME)


def read(path: Path) -> list[rows.Row]:
    """Read the lines of a log, none where there is no file."""
    return rows.lines(path) if path.exists() else []


def common(device: torch.device, revision: str | None) -> rows.Row:
    """Return the fields that all lines of this process share; `revision` is the commit where there is no git."""
    shared = {**rows.common(device.type, revision), "table": os.environ.get("INTERP_NN_TABLE")}
    if device.type == "cuda":  # and the CUDA version that the compiled library was built with
        built = None if unsupported_reason("cuda") else compiled_library.dotted(compiled_library.versions()[0])
        shared["cuda_library"] = built
    elif interpreting():
        shared["device"] += ", interpreted"
    return shared
