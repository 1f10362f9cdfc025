import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def import_once():
    """Return the CPU time of an import after torch in a new process, which may write bytecode, and the modules it adds."""
    code = (
        "import json, sys, time, torch\n"
        "before = set(sys.modules)\n"
        "start = time.process_time()\n"
        "import interp_nn\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps([seconds, sorted(set(sys.modules) - before)]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_takes_under_50_ms_of_a_processor_after_torch_and_loads_nothing_heavy():
    seconds, new = import_once()
    for _ in range(5):  # the first may have compiled bytecode; the best of six counts
        if seconds < 0.05:
            break
        seconds = min(seconds, import_once()[0])
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
ABOVE = {"convert", "explain", "nn", "trials", "tuning"}
UPWARD = {
    "linalg": {"engines", "functional", "gates", "ops", *ABOVE},
    "gates": {"engines", "functional", "ops", *ABOVE},
    "engines": {"functional", "gates", "ops", *ABOVE},
    "ops": {"functional", "gates", *ABOVE},
    "functional": {"gates", *ABOVE},
    "nn": {"convert", "engines", "explain", "trials", "tuning"},
    "convert": {"explain", "trials", "tuning"},
    "explain": {"convert", "engines", "trials", "tuning"},
}


def imported(source, package):
    """Parts of the package that a file of `package` imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("interp_nn.")}


def test_no_import_climbs():
    climbs = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        part = relative.parts[0].removesuffix(".py")
        package = ".".join(["interp_nn", *relative.parts[:-1]])
        climbs[str(relative)] = imported(path.read_text(encoding="utf-8"), package) & UPWARD.get(part, set())
    assert len(climbs) > 50 and not any(climbs.values()), {file: parts for file, parts in climbs.items() if parts}


@pytest.mark.parametrize(
    "source",
    [
        "import interp_nn.nn.linear",
        "from interp_nn import nn",
        "from interp_nn.nn import SummaryLinear",
        "def f():\n    from interp_nn.nn.linear import SummaryLinear",
        "from .. import nn",
        "from ..nn import summary",
    ],
)
def test_a_climbing_import_would_be_seen(source):
    assert imported(source, "interp_nn.ops") == {"nn"}


def test_version_is_the_changelogs_newest():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[?v?(\d+\.\d+[^\]\s]*)", changelog, re.MULTILINE)
    assert versions and versions[0] == interp_nn.__version__
