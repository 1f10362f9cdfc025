"""Two processes give what one gives: data-parallel, sharded and tensor-parallel training, and the operator on DTensors.

The checks are in `ranks.py`. All run in one pair of processes, as starting one takes longer than a check.
"""

import ast
from pathlib import Path

import pytest
import torch
from processes import ROOT, python

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

RANKS = Path(__file__).with_name("ranks.py")
# Read, as importing it takes a second in each process that collects tests.
LISTS = {
    node.targets[0].id: [check.id for check in node.value.elts]
    for node in ast.parse(RANKS.read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and node.targets[0].id in ("CHECKS", "SLOW")
}


@pytest.fixture(scope="module")
def said(tmp_path_factory, request):
    """What each process said of a check; empty where it passed."""
    folder = tmp_path_factory.mktemp("ranks")
    chosen = {item.callspec.params["check"] for item in request.session.items if item.path == request.path}
    done = python(RANKS, folder, *sorted(chosen), PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'tools'}")
    assert done.returncode == 0, done.stderr
    return lambda name: [(folder / f"{name}.{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize(
    "check", [*LISTS["CHECKS"], *(pytest.param(name, marks=pytest.mark.slow) for name in LISTS["SLOW"])]
)
def test_on_two_processes(said, check):
    for rank, text in enumerate(said(check)):
        assert not text, f"process {rank}: {text}"
