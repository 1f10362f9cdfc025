"""The command lines' common part: options that are read strictly, and a user's mistake as one line on stderr, exit status 2.

An error of any other kind is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # it is full, or may not be written


class UserInputError(ValueError):
    """A mistake in what the user gave: an option, a file, a folder or a device."""


@contextlib.contextmanager
def users_input() -> Iterator[None]:
    """Turn the errors of a block that reads or checks what the user gave into `UserInputError`."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise UserInputError(str(error)) from error


def status(name: str, function: Callable[[], int | None]) -> int:
    """Run a command and return its exit status; a `UserInputError` or a full disk is one line on stderr, and 2.

    A reader that has gone, as in `python -m benchmarks list | head`, ends the command with status 1.
    """
    try:
        found = function() or 0
        sys.stdout.flush()
        return found
    except UserInputError as error:
        message = str(error)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # so that Python, when it ends, has somewhere to write the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        message = str(error)
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong option in one line; `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def at_least(low: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `low` on."""

    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"got {text}, want at least {low}")
        return int(text)

    return number


def positive(text: str) -> float:
    """Read a number above 0; infinity is one."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"got {text}, want a number above 0")
    return float(text)


def not_negative(text: str) -> float:
    """Read a number from 0 on; infinity is one."""
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"got {text}, want a number from 0 on")
    return float(text)


def seed(text: str) -> int:
    """Read a seed that PyTorch, NumPy and scikit-learn all take, also after the addition of some thousand."""
    if not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"got {text}, want 0 to {2**31 - 1}")
    return int(text)


def device(text: str) -> str:
    """Read the name of a device that holds values here, such as "cpu", "cuda" or "cuda:1"."""
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # PyTorch's backends differ in their errors
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise argparse.ArgumentTypeError(f"got {text!r}, want a device of this machine: {why}") from error
    return text
