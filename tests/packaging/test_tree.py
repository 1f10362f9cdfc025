"""The tree: each file has one home, imports flow one way, and CONTRIBUTING's map shows what there is."""

import ast
import re
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "interp_nn"
FILES = sorted(PACKAGE.rglob("*.py"))

# The rooms of the package, from the ground up: each may import those above it in this list, and itself.
FLOORS = [
    {"version", "display"},
    {"linalg"},
    {"engines"},
    {"ops", "gates"},
    {"functional"},
    {"nn", "trials"},
    {"convert", "explain", "tuning"},
    {"__init__", "__main__"},
]
# The engines' own door is functional and ops; planning serves a report of `convert`.
NEVER = {("nn", "engines"), ("explain", "engines")}


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """(module, name) of every import in a file, absolute, anywhere in it."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.module, alias.name) for alias in node.names)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported_modules(path):
    """The package's modules that a file imports."""
    for module, name in imports(path):
        if module and module.split(".")[0] == "interp_nn":
            yield f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_no_import_climbs():
    floor = {name: i for i, rooms in enumerate(FLOORS) for name in rooms}
    found = [(path, module) for path in FILES for module in imported_modules(path)]
    assert len(found) > len(FILES)
    for path, module in found:
        here = room(module_of(path))
        there = room(module)
        if there == "__init__":  # the version, and the public functions that a docstring's reader would use
            assert here in ("__init__", "__main__"), f"{path} imports the package itself"
            continue
        assert floor[there] < floor[here] or there == here, f"{path.relative_to(ROOT)} imports {module}"
        assert (here, there) not in NEVER, f"{path.relative_to(ROOT)} imports {module}"


def test_no_import_goes_in_a_circle():
    graph = {}
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            continue  # it re-exports what its files hold
        top = [node for node in parsed(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        found = set()
        for node in top:
            if isinstance(node, ast.ImportFrom) and node.module.startswith("interp_nn"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name for name in names if name in MODULES} or {node.module}
        graph[module] = {name for name in found if MODULES.get(name, Path("__init__.py")).name != "__init__.py"}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_few_modules_at_the_root_and_no_method_at_the_top_of_explain():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    assert {path.stem for path in (PACKAGE / "explain").glob("*.py")} == {"__init__", "estimator", "tsne"}


def test_no_module_name_twice():
    files = [*FILES, *(ROOT / "benchmarks").rglob("*.py")]
    twice = {name for name, count in Counter(path.name for path in files).items() if count > 1}
    assert twice <= {"__init__.py", "__main__.py", "engine.py"}


def test_contributing_maps_the_tree():
    """Each path of the map is there, and each folder that holds code is in the map."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", text[text.index("## Where things are") :].partition("\n## ")[0], re.MULTILINE)
    mapped = {path.rstrip("/") for row in rows for path in re.findall(r"`([\w./]+)`", row)}
    missing = {path for path in mapped if not (ROOT / path).exists()}
    assert not missing
    folders = {str(path.parent.relative_to(ROOT)) for path in [*FILES, *(ROOT / "benchmarks").rglob("*.py")]}
    assert {folder for folder in folders if folder not in mapped} <= {"interp_nn"}


@pytest.mark.skipif(not (ROOT / ".github").exists(), reason="a source archive has no workflows")
def test_workflows_pin_actions_by_hash_and_use_one_index():
    for file in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        text = file.read_text(encoding="utf-8")
        for action in re.findall(r"uses: *(.*)", text):
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), f"{file.name}: {action}"
        assert "--extra-index-url" not in text, file.name
