"""Experiments: each trains networks, explains or compares them, and writes figures and a record.

Run one as `python -m benchmarks experiments NAME ...`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType

from benchmarks import command_line

# Command names by module and first arguments, those on the papers' data first.
COMMANDS: dict[str, tuple[str, ...]] = {
    "summary_vgg": ("head_comparison", "summary_vgg"),
    "summary_cnn": ("head_comparison", "summary_cnn"),
    **{name: (name,) for name in (
        "gated_images", "titanic", "linearize_cifar10", "descramble_cifar10", "mnist_tsne", "digits_attribution", "digits_tsne",
        "two_regimes", "few_clusters", "oblique_trees", "gated_digits", "gated_tables", "language_map",
        "report_pages", "explainers",
    )},
    "orthogonality": ("digits_constraints",),
    **{name: (name,) for name in ("learning_rates", "recipes", "fine_tuning", "readable_heads")},
    **{name: (name,) for name in ("descent", "descramble_linear", "descramble_signals", "descramble_digits")},
    **{name: (name,) for name in ("operator_learning", "physics_informed", "path_kernel_theorems")},
    "dlgn_cifar10": ("dlgn_recovery", "--dataset", "cifar10"),
    "dlgn_cifar100": ("dlgn_recovery", "--dataset", "cifar100"),
    "clusters_titanic": ("titanic",),
}  # fmt: skip


def find(name: str) -> Callable[[list[str]], int]:
    """Return the function that runs an experiment's command line; dashes in the name are underscores.

    Raises:
        ValueError: There is no such experiment. The message has the nearest names.
    """
    known = name.replace("-", "_")
    if known not in COMMANDS:
        near = difflib.get_close_matches(known, COMMANDS)
        raise ValueError(f"{name}: no such experiment" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    module, *given = COMMANDS[known]
    name = f"benchmarks experiments {known}"
    return lambda arguments: command_line.status(name, lambda: load(module).main([*given, *arguments]))


def listing() -> str:
    """Return a line for each experiment."""
    lines = []
    for name, (module, *given) in COMMANDS.items():
        about = (inspect.getdoc(load(module)) or "").partition("\n")[0]
        lines.append(f"{name:20} {about}" + (f" ({' '.join(given)})" if given else ""))
    return "\n".join(lines)


def load(module: str) -> ModuleType:
    """Import the module of an experiment."""
    return importlib.import_module(f"benchmarks.experiments.{module}")
