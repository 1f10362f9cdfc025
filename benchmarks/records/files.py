"""Files that are always whole: each is written under a temporary name of its own and then takes its place in one step."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, with the same suffix, that replaces `path` after the block.

    It has a name of its own in the folder of `path`, which is made, so that writers do not disturb one another. After an error
    it is removed, and `path` keeps what it had. A link keeps pointing to the file that is replaced.
    """
    path = Path(os.path.realpath(path))
    _check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text in UTF-8, in one step."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file in one step; it begins anew after a line that an interrupted process cut short."""
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        data = f"{line}\n".encode()
        while data:  # a full disk takes a part of it, and the next call raises
            data = data[file.write(data) :]


def check_writable(*paths: Path) -> None:
    """Check that files can be written, before the work that they are for; make their folders.

    Raises:
        OSError: A file cannot be written, or a folder cannot be made. The message names it.
    """
    for path in paths:
        check_folder(path.parent)
        _check_file(path)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(f"{path}: may not be written")


def check_folder(folder: Path) -> None:
    """Make a folder, and check that a file can be written into it.

    Raises:
        OSError: The folder cannot be made or written. The message names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{os.getpid()}-{secrets.token_hex(8)}.part"
        try:
            trial.write_bytes(b"\n")
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: no folder that can be written: {error.strerror}") from error


def _check_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # a folder, or a device
        raise OSError(f"{path}: not a file")
