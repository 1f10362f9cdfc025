"""The command line, as users call it, on problems small enough for every run of the tests."""

import json
import time

import pytest
import torch

from benchmarks import networks, ops, providers
from benchmarks.__main__ import main
from benchmarks.timing import interleave


def test_demo_writes_its_record_and_figure(tmp_path, capsys):
    assert main(["demo", "--epochs", "1", "--seeds", "2", "--train-size", "256", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "passed" in printed
    whole = json.loads((tmp_path / "demo-digits.json").read_text())
    assert {"experiment", "git_sha", "device", "versions", "seeds", "epochs", "seconds", "budget", "results"} <= set(
        whole
    )
    runs = whole["results"]["runs"]
    assert [(run["head"], run["seed"]) for run in runs] == [("mlp", 0), ("summary", 0), ("mlp", 1), ("summary", 1)]
    assert all(0 < run["test_accuracy"][-1] <= 1 for run in runs)
    assert (tmp_path / "demo-digits.png").read_bytes().startswith(b"\x89PNG")


def test_demo_says_what_is_missing(tmp_path, capsys):
    assert main(["demo", "--dataset", "mnist", "--data", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "mnist: not found in" in capsys.readouterr().err


def test_run_and_table(tmp_path, capsys):
    file = tmp_path / "ops.json"
    assert main(["run", "--shape", "16,8,4", "--shape", "8,4,16", "--seconds", "0.01", "--output", str(file)]) == 0
    whole = json.loads(file.read_text())
    assert {row["provider"] for row in whole["results"]} == set(providers.PROVIDERS)
    assert all(row["status"] == "ok" and row["samples"] >= 7 for row in whole["results"])
    capsys.readouterr()
    assert main(["table", str(file)]) == 0
    assert "| 16, 8, 4 |" in capsys.readouterr().out


def test_a_wrong_provider_is_reported(monkeypatch):
    monkeypatch.setitem(providers.PROVIDERS, "eager B", lambda x, b: 2 * (x @ b))
    whole = ops.run([(16, 8, 4)], "infer", 0.01, None)
    status = {row["provider"]: row["status"] for row in whole["results"]}
    assert status.pop("eager B") == "wrong"
    assert set(status.values()) == {"ok"}
    assert "Wrong: eager B" in ops.table(whole)


def test_interleaved_timing_orders_what_it_times():
    timed = interleave({"short": lambda: time.sleep(0.0005), "long": lambda: time.sleep(0.005)}, seconds=0.05)
    assert timed["short"].p50 < timed["long"].p50
    assert timed["short"].samples == timed["long"].samples >= 7


@pytest.mark.parametrize(("channels", "size", "features"), [(1, 8, 256), (1, 28, 1024), (3, 32, 1600)])
def test_networks_fit_their_images(channels, size, features):
    x, t = torch.randn(4, channels, size, size), torch.tensor([0, 1, 2, 3])
    for build in networks.NETWORKS.values():
        network = build(channels, size)
        network.loss(x, t).backward()
        assert network.eval()(x).shape == (4, 10)
    assert network.head.in_features == features
