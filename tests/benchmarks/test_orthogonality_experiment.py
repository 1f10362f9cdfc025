"""The comparison of constraints from its command line, at a size for every run of the tests: what it records must be true."""

import json

import pytest
import torch

from benchmarks.experiments import digits_constraints


def test_orthogonality(tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert digits_constraints.main(["--quick", "--epochs", "1", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "orthogonality.json").read_text())
    assert record["quick"] and record["figures"] == ["orthogonality-constraints.png"]
    assert (tmp_path / record["figures"][0]).read_bytes().startswith(b"\x89PNG")
    ways = record["results"]["ways"]
    assert list(ways) == list(digits_constraints.MEANINGS)
    defect = {name: row["defect"]["mean"] for name, row in ways.items() if name != "nn.Linear"}
    assert defect["parametrization"] < 1e-5 < defect["retract"] < 0.05 < defect["penalty"] < defect["free"]
    for row in record["results"]["trainings"]:
        assert row["history"]["accuracy"][-1] > 0.2
        if row["network"] != "nn.Linear":
            assert row["before"]["defect"] < 1e-5
    assert all(row["step"]["ms_p50"] > 0 and row["step"]["samples"] >= 7 for row in ways.values())
    printed = capsys.readouterr().out
    assert "defect" in printed and all(name in printed for name in ways)


def test_the_penalty_is_in_the_loss():
    torch.manual_seed(0)
    network = digits_constraints._network("penalty")
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)
    x, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    plain, with_penalty = (digits_constraints._losses(way)(network, x, y) for way in ("free", "penalty"))
    # Two layers of orthonormal columns or rows, all singular values 1.1: their squares are off by 0.21.
    assert (with_penalty - plain).item() == pytest.approx(digits_constraints.PENALTY * (120 + 84) * 0.21**2, rel=1e-3)
