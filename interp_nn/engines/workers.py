"""Processes that do tasks which may hang or end them, such as compiling and running a kernel; lost ones are replaced."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

OUT_OF_TIME = "out of time"  # the reason of a task that was not done when all the time had passed


def _serve(connection: Any, function: Callable[[Any], Any]) -> None:
    """Worker loop: receives a task, sends back the function's result, exits on EOF."""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(function(task))


class Workers:
    """A pool of processes that call one function. One that dies, or takes too long for a task, is replaced.

    Args:
        count: Most processes at a time.
        function: Called with each task, in another process; both and its result have to be picklable.
        limit: Seconds that one task may take.
    """

    def __init__(self, count: int, function: Callable[[Any], Any], limit: float) -> None:
        self._free, self._function, self._limit = count, function, limit
        self._idle: list[tuple[Any, Any]] = []

    def run(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        """Return the function's result for each task, or a str with the reason why there is none."""
        end = time.monotonic() + seconds
        found: list[Any] = [OUT_OF_TIME] * len(tasks)
        waiting = deque(range(len(tasks)))
        busy: dict[Any, tuple[Any, int, float]] = {}
        while waiting or busy:
            now = time.monotonic()
            for connection, (process, place, since) in list(busy.items()):
                if now > end or now - since > self._limit:
                    process.kill()
                    del busy[connection]
                    self._free += 1
                    found[place] = OUT_OF_TIME if now > end else f"not done within {self._limit:.0f} s"
            if now > end:
                break
            while waiting and (self._idle or self._free):
                process, connection = self._idle.pop() if self._idle else self._started()
                place = waiting.popleft()
                busy[connection] = process, place, time.monotonic()
                with contextlib.suppress(OSError):  # it has died since: seen below
                    connection.send(tasks[place])
            ready: list[Any] = list(wait(list(busy), timeout=0.5))
            for connection in ready:
                process, place, _ = busy.pop(connection)
                try:
                    found[place] = connection.recv()
                    self._idle.append((process, connection))
                except (EOFError, OSError):
                    found[place] = "the process that tried it died"
                    self._free += 1
        return found

    def _started(self) -> tuple[Any, Any]:
        """Start a worker; return its process and the connection to it."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        process.start()
        theirs.close()
        self._free -= 1
        return process, ours
