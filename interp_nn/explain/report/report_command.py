"""`python -m interp_nn report`: a page about a network and a table in a CSV file."""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn.explain.report.network_report import report


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status: 2 for a user's mistake, in one line."""
    parser = argparse.ArgumentParser("python -m interp_nn report", description=__doc__)
    parser.add_argument(
        "model", help="MODULE:NAME of a network or of a function that returns one; or MODEL.pt2 of torch.export"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE.csv", help="numbers, with a line of names first"
    )
    parser.add_argument(
        "--target", metavar="COLUMN", help="the column of classes (whole numbers from 0, or --classes' names) or values"
    )
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names of the outputs, in their order")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE.html")
    given = parser.parse_args(arguments)
    existed = given.output.exists()
    try:
        with open(given.output, "a", encoding="utf-8"):  # tried before the work begins
            pass
        model = load_model(given.model)
        names, x, y = load_table(given.data, given.target, given.classes)
        page = report(model, x, y, feature_names=names, class_names=given.classes, title=given.model)
        page.save(given.output)
    except (OSError, ImportError, ValueError, TypeError, AttributeError) as error:
        print(f"python -m interp_nn report: {error}", file=sys.stderr)
        return 2
    finally:  # whatever the error was
        if not existed and given.output.is_file() and not given.output.stat().st_size:
            given.output.unlink()
    print(page)
    print(f"wrote {given.output}")
    return 0


def load_model(name: str) -> nn.Module:
    """Load a network: a file of `torch.export.save`, or MODULE:NAME.

    Raises:
        ValueError: The name is neither, or what it names is no network.
        OSError: The file cannot be read.
        ImportError: There is no such module.
    """
    if name.endswith(".pt2"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"model: {name}: no such file")
        return torch.export.load(name).module()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"model: got {name!r}, want MODULE:NAME or a file MODEL.pt2")
    if "" not in sys.path:
        sys.path.insert(0, "")
    found: Any = getattr(importlib.import_module(module), attribute, None)
    if isinstance(found, Callable) and not isinstance(found, nn.Module):  # type: ignore[arg-type]
        found = found()
    if not isinstance(found, nn.Module):
        raise ValueError(f"model: {name} is {type(found).__name__}, want an nn.Module or a function that returns one")
    return found.eval()


def load_table(
    file: Path, target: str | None, classes: Sequence[str] | None = None
) -> tuple[list[str], Tensor, Tensor | None]:
    """Load the names and the values (n, d) of a CSV file's features, and its target (n,): int64 if its values are whole.

    The values of a target of names are their places in `classes`.

    Raises:
        ValueError: No lines, a line of another length, an entry that is no finite number, or no such target.
        OSError: The file cannot be read.
    """
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = [row for row in csv.reader(lines) if row]
    if len(rows) < 2:
        raise ValueError(f"{file}: got {len(rows)} lines, want a line of names and at least one of numbers")
    names = rows[0]
    if target is not None and target not in names:
        raise ValueError(f"--target: got {target!r}, want one of {', '.join(names)}")
    place = len(names) if target is None else names.index(target)
    labels = {name: float(i) for i, name in enumerate(classes or ())}
    if not any(row[place] in labels and math.isnan(_number(row[place])) for row in rows[1:] if len(row) > place):
        labels = {}  # of numbers, which are the classes themselves
    values = torch.empty(len(rows) - 1, len(names), dtype=torch.float64)
    for i, row in enumerate(rows[1:]):
        if len(row) != len(names):
            raise ValueError(f"{file}, line {i + 2}: got {len(row)} entries, want {len(names)}")
        for j, entry in enumerate(row):
            number = labels.get(entry, math.nan) if labels and j == place else _number(entry)
            if not math.isfinite(number):
                wanted = "a finite number"
                if j == place:
                    named = f"one of --classes {' '.join(classes)}" if classes else "--classes with all labels in order"
                    wanted += f", or {named}"
                raise ValueError(f"{file}, line {i + 2}, {names[j]}: got {entry!r}, want {wanted}")
            values[i, j] = number
    if target is None:
        return names, values, None
    y = values[:, place]
    kept = [j for j in range(len(names)) if j != place]
    whole = bool((y == y.round()).all() and (y >= 0).all())
    return [names[j] for j in kept], values[:, kept], y.long() if whole else y


def _number(entry: str) -> float:
    try:
        return float(entry)
    except ValueError:
        return math.nan
