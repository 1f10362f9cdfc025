"""The scripts in examples/ that a newcomer starts from: short, and they run. Those for the benchmarks have tests there."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "convert", "explain", "gated"])
def test_script(name, capsys, monkeypatch, tmp_path):
    path, page = EXAMPLES / f"{name}.py", tmp_path / "page.html"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    monkeypatch.setattr("sys.argv", [str(path), *([str(page)] if name == "explain" else [])])
    with torch.random.fork_rng():
        runpy.run_path(str(path), run_name="__main__")
    assert " %" in capsys.readouterr().out
    assert page.exists() == (name == "explain")
