"""What terminals and notebooks show: progress bars by tqdm, for calls that may take seconds, and tables as HTML."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from html import escape
from itertools import chain
from typing import Any, TypeVar

_T = TypeVar("_T")
_DELAY = 1.0  # seconds until a bar appears that nobody asked for
_MOST_ENTRIES = 12  # of a tensor in a repr


def track(steps: Iterable[_T], what: str, progress: bool | None, unit: str = "step") -> Iterable[_T]:
    """Return the steps, with a progress bar on stderr while they are taken.

    Args:
        steps: What a loop goes over.
        what: Name of the bar.
        progress: True shows the bar. None shows it in a terminal or a notebook, where tqdm is installed, after a second. False
            shows none.
        unit: What a step is.

    Returns:
        The steps themselves where there is no bar.

    Raises:
        ImportError: `progress` is True and tqdm is not installed.
        TypeError: Another `progress`.

    Example:
        >>> list(track([1, 2], "counting", progress=False))
        [1, 2]
    """
    if not (progress is None or isinstance(progress, bool)):
        raise TypeError(f"progress: got {type(progress).__name__}, want True, False or None")
    if progress is False or (progress is None and not _watched()):
        return steps
    if not progress:
        return _after_delay(steps, what, unit)
    bar = _tqdm()
    if bar is None:
        raise ImportError("progress=True needs tqdm: pip install tqdm")
    return _shown(steps, bar, desc=what, unit=unit)


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, above: Iterable[str] = (), below: Iterable[str] = ()
) -> str:
    """Return a table as HTML, with lines of text above and below it.

    Args:
        header: Titles of the columns.
        rows: Cells of each row.
        above: Lines above the table.
        below: Lines below the table.

    Returns:
        HTML, in which the texts are escaped.

    Example:
        >>> html_table(["layer"], [["fc1"]])
        '<table><tr><th>layer</th></tr><tr><td>fc1</td></tr></table>'
    """
    cells = "".join(
        f"<tr>{''.join(f'<{tag}>{escape(cell.strip())}</{tag}>' for cell in row)}</tr>"
        for tag, row in (("th", header), *(("td", row) for row in rows))
    )
    before, after = (
        f"<p>{'<br>'.join(map(escape, lines))}</p>" if (lines := list(part)) else "" for part in (above, below)
    )
    return f"{before}<table>{cells}</table>{after}"


def brief(name: str, fields: Mapping[str, Any]) -> str:
    """Return the repr of an object with fields, in which a tensor of more than 12 entries is its shape.

    Example:
        >>> import torch
        >>> brief("Ball", {"centre": torch.zeros(784), "radius": 2.0})
        'Ball(centre=tensor of shape (784,), radius=2.0)'
    """
    shown = (
        f"{field}=tensor of shape {tuple(value.shape)}" if _entries(value) > _MOST_ENTRIES else f"{field}={value!r}"
        for field, value in fields.items()
    )
    return f"{name}({', '.join(shown)})"


def _entries(value: Any) -> int:
    return int(value.numel()) if hasattr(value, "numel") else 1


def _shown(steps: Iterable[_T], bar: Any, **options: Any) -> Iterator[_T]:
    """Take the steps with a bar, which is closed also where the loop ends early."""
    with bar(steps, **options) as shown:
        yield from shown


def _after_delay(steps: Iterable[_T], what: str, unit: str) -> Iterator[_T]:
    """Take the steps, from the first one on that begins after the delay with a bar, so that short calls do not import tqdm."""
    start, rest = time.monotonic(), iter(steps)
    for done, step in enumerate(rest):
        if time.monotonic() - start >= _DELAY and (bar := _tqdm()) is not None:
            total = len(steps) if isinstance(steps, Sized) else None
            yield from _shown(chain([step], rest), bar, desc=what, unit=unit, total=total, initial=done, leave=False)
            return
        yield step


def _watched() -> bool:
    """Return True in a terminal or a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    if hasattr(shell, "kernel"):
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, it is another object, or it is closed
        return False


def _tqdm() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a notebook without widgets, where the bar is text
            from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm
