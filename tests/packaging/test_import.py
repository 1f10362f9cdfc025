import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from processes import python_after_torch

import interp_nn
from interp_nn.engines.limits import unsupported_reason

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


ENGINE = """
import os
os.environ["INTERP_NN_ENGINE"] = "{}"
import interp_nn, torch
print("imported", flush=True)
interp_nn.functional.summary(torch.ones(2, 2), torch.ones(2, 2))
"""
COUNTER = """
import {}
from importlib.util import find_spec
assert find_spec("torch.utils.flop_counter")
assert torch.ops.interp_nn.summary in torch.utils.flop_counter.flop_registry
"""
PROCESSES = {
    **{f"import {i}": IMPORT for i in range(6)},
    **{name: ENGINE.format(name) for name in ("triton", "warp")},
    "counter after": COUNTER.format("torch, interp_nn, torch.utils.flop_counter"),
    "counter before": COUNTER.format("torch.utils.flop_counter, interp_nn, torch"),
}


@pytest.fixture(scope="module")
def said():
    """Return the output of each process; all are forks of one, as the import of PyTorch takes two seconds."""
    return dict(zip(PROCESSES, python_after_torch(*PROCESSES.values()), strict=True))


def test_import_takes_under_50_ms_of_a_processor_after_torch_and_loads_nothing_heavy(said):
    """The best of six counts: the first may have compiled bytecode."""
    seconds, names = zip(*(json.loads(said[f"import {i}"]) for i in range(6)), strict=True)
    seconds, new = min(seconds), names[0]
    assert seconds < 0.05
    packages = {name.partition(".")[0] for name in new}
    assert "interp_nn" in packages
    assert not packages & {"triton", "matplotlib", "sklearn"}


def test_an_engine_of_the_environment_is_checked_at_use_not_at_import(said):
    if not torch.cuda.is_available():  # there the engine is on
        assert said["triton"].startswith("imported\nTraceback")
        assert "RuntimeError: the triton engine was asked for, but " in said["triton"]
        assert unsupported_reason("triton") in said["triton"]
    assert said["warp"].startswith("imported\nTraceback")
    assert "ValueError: INTERP_NN_ENGINE: unknown engine 'warp'; this build has eager" in said["warp"]


def test_the_counter_may_be_imported_before_or_after(said):
    assert said["counter after"] == said["counter before"] == ""


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
