import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from processes import python_after_torch

import interp_nn

PACKAGE = Path(interp_nn.__file__).parent
ROOT = PACKAGE.parent
PUBLIC = [
    "interp_nn",
    "interp_nn.convert",
    "interp_nn.explain",
    "interp_nn.functional",
    "interp_nn.gates",
    "interp_nn.nn",
]


IMPORT = """
import json, sys, time
sys.dont_write_bytecode = False
before = set(sys.modules)
start = time.process_time()
import interp_nn
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def test_import_takes_under_50_ms_of_a_processor_after_torch_and_loads_nothing_heavy():
    """The best of six counts: the first may have compiled bytecode."""
    seconds, names = zip(*map(json.loads, python_after_torch(*[IMPORT] * 6)), strict=True)
    seconds, new = min(seconds), names[0]
    assert seconds < 0.05
    packages = {name.partition(".")[0] for name in new}
    assert "interp_nn" in packages
    assert not packages & {"triton", "matplotlib", "sklearn"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_are_documented(name):
    module = importlib.import_module(name)
    assert module.__all__ == sorted(set(module.__all__))
    for public in module.__all__:
        thing = getattr(module, public)
        if isinstance(thing, str):
            continue
        doc = inspect.getdoc(thing) if inspect.ismodule(thing) else thing.__doc__
        assert doc and not doc.startswith(f"{public}("), f"{public} has no docstring of its own"


# Data flows one way: the parts that each part may not import.
def test_version_is_the_changelogs_newest():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?v?(\d+\.\d+[^\]\s]*)", changelog, re.MULTILINE)
    assert versions and versions[0] == interp_nn.__version__
