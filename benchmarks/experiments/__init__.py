"""Experiments: each trains a network, explains it or compares it with others, and writes figures and a record.

Run one as `python -m benchmarks experiments NAME ...` or `python -m benchmarks.experiments.NAME ...`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

# Those on the papers' own data first.
NAMES = (
    "summary_vgg",
    "summary_cnn",
    "gated_images",
    "titanic",
    "linearize_cifar10",
    "descramble_cifar10",
    "mnist_tsne",
    "digits_attribution",
    "digits_tsne",
    "two_regimes",
    "oblique_trees",
    "gated_digits",
    "orthogonality",
    "descent",
    "descramble_linear",
    "descramble_signals",
    "descramble_digits",
)
ALIASES = {
    "dlgn_cifar10": ("gated_images", "--dataset", "cifar10"),
    "dlgn_cifar100": ("gated_images", "--dataset", "cifar100"),
    "clusters_titanic": ("titanic",),
}


def find(name: str) -> Callable[[list[str]], int]:
    """What runs an experiment's command line and gives its exit status; dashes in the name are underscores.

    Raises ValueError for another name, with the nearest.
    """
    known, *given = ALIASES.get(name.replace("-", "_"), (name.replace("-", "_"),))
    if known not in NAMES:
        near = difflib.get_close_matches(known, [*NAMES, *ALIASES])
        raise ValueError(f"{name}: no such experiment" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    return lambda arguments: int(_module(known).main([*given, *arguments]))


def listing() -> str:
    """Every experiment with what it is about."""
    lines = [f"{name:20} {(inspect.getdoc(_module(name)) or '').partition(chr(10))[0]}" for name in NAMES]
    return "\n".join([*lines, *(f"{alias:20} {' '.join(known)}" for alias, known in ALIASES.items())])


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.experiments.{name}")
