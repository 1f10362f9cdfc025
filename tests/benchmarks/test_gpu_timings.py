"""The runs, counts and timings of the GPU job, with streams and graphs that are played on the CPU."""

import contextlib
import itertools
import json

import pytest
import torch
from gpu_stand_ins import BOTH, CPU, H100, Graph, admitting

import interp_nn
from benchmarks.gpu import job_table, kernels, runs, timings
from benchmarks.timing import clocks, providers
from benchmarks.timing.problems import Problem
from interp_nn import engines
from interp_nn.engines.triton import configs


class Stream:
    def __init__(self, device=None):
        self.device = CPU


@pytest.fixture
def played(monkeypatch):
    admitting(monkeypatch)
    monkeypatch.setattr(interp_nn, "use_engine", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(runs, "captured", lambda call, stream: (graph := Graph(call), graph.out))
    monkeypatch.setattr("benchmarks.timing.cuda_graphs.capture", lambda call, device: (Graph(call), None))
    monkeypatch.setattr("benchmarks.timing.measure.capture", lambda call, device: (Graph(call), None))
    for clock in ("on_events", "on_host"):
        monkeypatch.setattr(clocks, clock, lambda work, calls: lambda: work() or 0.01)


def shaky(call, every):
    """The call, a bit off once in a while."""
    count = itertools.count(1)

    def shaken():
        out = list(call())
        if next(count) % every == 0:
            out[-1] = out[-1] + 1e-3
        return out

    return shaken


RUNS = {
    "repeat": (lambda log: runs.repeat("triton", runs.TINY, 5, CPU, log), 7),
    "alternate": (lambda log: runs.alternate("cuda", [runs.TINY, runs.TINY._replace(n=5)], 40, CPU, log), 1),
    "streams": (lambda log: runs.on_streams("triton", runs.TINY, 10, CPU, log), 1),
    "graphs": (lambda log: runs.in_graphs("cuda", runs.TINY, 5, CPU, log), 2),
}


@pytest.mark.parametrize("steady", [True, False])
@pytest.mark.parametrize("name", RUNS)
def test_a_bit_that_changes_is_noticed(name, steady, played, log, lines, monkeypatch):
    run, count = RUNS[name]
    if not steady:
        whole = runs.workload
        monkeypatch.setattr(runs, "workload", lambda *args: {n: shaky(c, 4) for n, c in whole(*args).items()})
    run(log)
    found = [line for line in lines() if line["status"] != "skipped"]
    assert [line["status"] for line in found] == ["ok" if steady else "wrong"] * count
    before = len(lines())
    monkeypatch.setattr(kernels, "unsupported_reason", lambda *_: "too old")
    run(log)
    runs.count_launches("cuda", CPU, log)
    assert {line["status"] for line in lines()[before:]} == {"skipped"}


def test_launches_are_counted(log, lines, monkeypatch):
    admitting(monkeypatch)
    monkeypatch.setattr(interp_nn, "use_engine", lambda name: contextlib.nullcontext())
    for seen in (["kernel"], [], ["kernel", "kernel"]):
        monkeypatch.setattr(kernels, "launches", lambda name, seen=seen: contextlib.nullcontext(seen))
        runs.count_launches("cuda", CPU, log)
    assert [line["status"] for line in lines()] == ["ok"] * 12 + ["wrong"] * 24
    runs._count("a loss", "cuda", ["cuda_loss"], ["loss_kernel", "Memset"], runs.TINY, log)
    assert lines()[-1]["why"] == "2 on the device, 1 of the engine's, want 1"


# Slow are those that are timed on the wall's clock too, where `test_timing` times every mode.
@pytest.mark.parametrize(
    ("problem", "mode"),
    [
        pytest.param(
            problem, mode, marks=[pytest.mark.slow] * (mode in ("infer", "bwd") or problem.op == "cross_entropy")
        )
        for problem, mode in timings.TINY
    ],
    ids=str,
)
def test_every_provider_is_timed_by_each_clock(problem, mode, played, log, lines, monkeypatch):
    for name in BOTH:  # the eager engine computes in the place of those with kernels
        monkeypatch.setitem(providers.KERNELS, f"kernel-{name}", engines.ENGINES[0])
    monkeypatch.setattr(providers, "planned", lambda *_: "a plan")
    timings.time_problem(problem, mode, BOTH, CPU, ("events", "graph", "host"), 0.0, log)
    *timed, verdict = lines()
    assert {(line["provider"], line["timer"]) for line in timed} == set(
        itertools.product(timings.NAMES, ("events", "graph", "host"))
    )
    known = {line["provider"] for line in timed if line["status"] != "ok"}
    assert known <= {"inverse-inv"}, [line["note"] for line in timed]
    assert verdict["fastest"] in engines.ENGINES and not verdict["clear"] and verdict["entry"] is None
    printed = job_table.table([{**line, "part": "time"} for line in lines()])
    assert all(
        f"{problem.op} {mode} (9, 20, 6" in printed and clock in printed for clock in ("events", "graph", "host")
    )
    assert "is the fastest, but hardly" in printed


def test_an_engine_that_is_off_or_refuses_is_not_timed(log, lines, monkeypatch):
    assert not any("cuda" in name for name in timings.names_of(("triton",))) and "ours-eager" in timings.names_of(())
    problem, mode = timings.TINY[0]
    timings.time_problem(problem, mode, ("cuda",), CPU, ("wall",), 0.0, log)
    found = {line["provider"]: line for line in lines() if "provider" in line}
    assert {found[name]["status"] for name in ("ours-cuda", "kernel-cuda")} == {"unsupported"}
    assert {found[name]["status"] for name in ("ours", "unfused", "linear")} == {"ok"} and log.bad == 0


def medians(**microseconds):
    return {name: {"ms_p50": us / 1e3, "ms_p20": us / 1e3, "ms_p80": us / 1e3} for name, us in microseconds.items()}


def test_the_fastest_engine_is_an_entry_of_a_table(monkeypatch, tmp_path):
    def entry(problem, mode, **microseconds):
        return timings.table_entry(problem, mode, CPU, timings.fastest(medians(**microseconds)))

    monkeypatch.setattr(timings, "spec_of", lambda device: H100)
    loss = Problem("cross_entropy", 32, 512, 100, None, "bf16")
    found = entry(loss, "loss", triton=70, cuda=60, eager=90)
    assert found["engine"] == "cuda" and found["microseconds"] == {"triton": 70.0, "cuda": 60.0, "eager": 90.0}
    monkeypatch.setenv("INTERP_NN_TABLE", str(tmp_path / "table.json"))
    (tmp_path / "table.json").write_text(json.dumps({"kernels": [], "engines": [found]}))
    assert configs.measured_engine(H100, configs.Bucket("pair_loss", 2, 128, 128, 4096)) == "cuda"
    assert configs.measured_engine(H100, configs.Bucket("pair_loss", 2, 128, 128, 31)) is None
    assert entry(loss, "loss", triton=60, cuda=60) is None and timings.fastest({})["fastest"] is None
    kinds = {
        entry(p, mode, cuda=1, triton=2)["problem"] for p, mode in timings.problems() if mode in ("loss", "fwdbwd")
    }
    assert kinds == {"pair_loss", "head_loss", "summary"}
    assert all(entry(p, mode, cuda=1, triton=2) is None for p, mode in timings.problems() if mode in ("infer", "bwd"))


# The sanitizer


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ('ok; skipped; echo "$@" | grep -q cuda', "ok", None),
        ('ok; echo "========= Invalid read"; exit 86', "wrong", "exit status 86"),
        ("failed", "wrong", "1 problems ran, not all of them right"),
        ('echo "Error: Device not supported"; exit 1', "skipped", "the tool does not support this device here"),
        ("ok; sleep 30", "skipped", "out of time: 1 s"),
    ],
)
def test_what_the_sanitizer_says(body, status, why, tmp_path, monkeypatch, log, lines):
    tool = tmp_path / "compute-sanitizer"
    says = "\n".join(
        f'{word}() {{ echo \'{{"status": "{word}"}}\' >> "$LINES"; }}' for word in ("ok", "failed", "skipped")
    )
    tool.write_text(f'#!/bin/sh\nwhile [ "$1" != --log ]; do shift; done; LINES="$2"\n{says}\n{body}\n')
    tool.chmod(0o755)
    monkeypatch.setattr(runs, "sanitizer", lambda: str(tool))
    runs.sanitize("racecheck", BOTH, CPU, 1.0, log)
    (line,) = lines()
    assert (line["status"], line.get("why")) == (status, why)
    assert line["command"][:2] == ["--tool", "racecheck"] and "--report-api-errors" not in line["command"]
