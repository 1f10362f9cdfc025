"""Providers of a user: functions in a file of theirs, marked by `provider`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_OPS = {2: "summary", 3: "cross_entropy"}  # by the number of arguments


class Custom(NamedTuple):
    """A user's provider: its function computes an op of `benchmarks.timing.problems`, and should equal its reference."""

    name: str
    about: str
    function: Callable[..., Any]
    op: str
    reference: Callable[..., Any] | None
    file: Path | None


FOUND: dict[str, Custom] = {}
_marked: list[Custom] = []


def provider(
    name: str, *, about: str | None = None, reference: Callable[..., Any] | None = None
) -> Callable[[_Function], _Function]:
    """Make a function a provider, which `python -m benchmarks run --provider FILE.py:NAME` times beside the others.

    The function is f(x, b) -> y for the summary Y = X b (bᵀb), or f(x, b, target) -> loss for the loss of the pair (P, Y),
    CE(P) + CE(Y) + MSE(P, Y) with P = X b. Its arguments are x (n, d) and b (d, k), both of one dtype and on one device, and
    target (n,), int64. b is a view of nn.Linear's weight (k, d): its strides are (1, d). y is (n, k) and a loss is a scalar,
    in the dtype of x. Results and gradients are compared with fp64, before and after the timing, within the tolerances of
    interp_nn's own providers.

    Args:
        name: Name in records, tables and figures.
        about: One sentence for the record. None is the first line of the function's docstring.
        reference: The function in PyTorch that this one should equal, with the same arguments. None is the summary or its loss.

    Returns:
        A decorator, which returns the function itself.

    Raises:
        TypeError: `about` is not a text. The decorator raises it for a function without two or three arguments, or without a
            docstring and `about`.
        ValueError: The name is empty, or has other characters than letters, digits, "-", "_" and ".".

    Example:
        >>> from benchmarks import provider
        >>> @provider("by-hand", about="two products, the second with the Gram matrix")
        ... def by_hand(x, b):
        ...     return (x @ b) @ (b.mT @ b)
    """
    if not isinstance(name, str) or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"provider: name: got {name!r}, want letters, digits, '-', '_' and '.'")
    if about is not None and (not isinstance(about, str) or not about.strip()):
        raise TypeError(f"provider: about: got {about!r}, want a sentence")

    def mark(function: _Function) -> _Function:
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        given = inspect.signature(function).parameters.values()
        count = sum(one.kind in kinds and one.default is one.empty for one in given)
        if count not in _OPS:
            raise TypeError(f"provider: {name} has {count} arguments, want f(x, b) -> y or f(x, b, target) -> loss")
        if not (said := about or (inspect.getdoc(function) or "").partition("\n")[0]):
            raise TypeError(f"provider: about: got None, and {name} has no docstring; want a sentence")
        _marked.append(Custom(name, said, function, _OPS[count], reference, None))
        return function

    return mark


def op_of(name: str) -> str | None:
    """Return the op of a user's provider; None for another provider."""
    return FOUND[name].op if name in FOUND else None


def is_summary(name: str) -> bool:
    """Return False for a user's provider that computes something else than the summary or its loss."""
    return name not in FOUND or FOUND[name].reference is None


def about(name: str) -> dict[str, str]:
    """Return the field of a record that says what a user's provider is; nothing for another provider."""
    return {"about": FOUND[name].about} if name in FOUND else {}


def place(error: BaseException) -> str:
    """Return the file and the line of a user's provider where an exception passed, as " (mine.py, line 6)"; "" if none."""
    files = {str(one.file) for one in FOUND.values() if one.file is not None}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def load(text: str, taken: frozenset[str]) -> str:
    """Run the file of "FILE.py:NAME", and return the provider's name.

    Raises:
        ValueError: There is no such file or provider in it, the file fails, or its name is one of `taken` or of another file.
    """
    path, _, name = text.rpartition(":")
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"got {text!r}, want FILE.py:NAME: there is no file {path!r}")
    if not any(one.file == file for one in FOUND.values()):
        for one in _run(file):
            if one.name in taken:
                built_in = "a built-in provider, which `python -m benchmarks list` describes"
                raise ValueError(f"{path}: the name {one.name!r} is taken by {built_in}; give yours another one")
            if one.name in FOUND:
                raise ValueError(f"{path}: the name {one.name!r} is taken by {FOUND[one.name].file}")
            FOUND[one.name] = one
    names = [one.name for one in FOUND.values() if one.file == file]
    if name not in names:
        raise ValueError(
            f"got {text!r}, want FILE.py:NAME with a name of the file: {', '.join(names) or 'it has none'}"
        )
    return name


def _run(file: Path) -> list[Custom]:
    """Run a file as a module, with its folder on the path, and return what it marks."""
    spec = importlib.util.spec_from_file_location(f"provider_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: want a Python file, with a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for what looks its own module up, such as a dataclass
    sys.path.insert(0, str(file.parent))
    _marked.clear()
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(file.parent))
    names = [one.name for one in _marked]
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: a name is there twice: {', '.join(names)}")
    return [one._replace(file=file) for one in _marked]
