"""The examples in the package's docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch

import interp_nn

PACKAGE = Path(interp_nn.__file__).parent
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
PUBLIC = ["interp_nn", *(f"interp_nn.{part}" for part in ("convert", "explain", "functional", "gates", "linalg", "nn"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_examples_run(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    if plots := sys.modules.get("matplotlib.pyplot"):
        plots.close("all")
    assert not failed
    assert attempted == path.read_text(encoding="utf-8").count(">>> "), "doctest does not find all of the examples"


def test_every_public_name_has_an_example():
    missing = []
    for part in PUBLIC:
        module = importlib.import_module(part)
        for name in module.__all__:
            thing = getattr(module, name)
            doc = thing.__doc__ or ""
            documented = not isinstance(thing, str) and not inspect.ismodule(thing)
            if documented and not ("Example:" in doc and ">>> " in doc):
                missing.append(f"{part}.{name}")
    assert not missing, f"{len(missing)} names have no `Example:` with `>>>`: {', '.join(missing)}"
