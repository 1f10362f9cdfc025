"""What the GPU job runs, counts and times, with streams and graphs that are played on the CPU."""

import contextlib
import itertools
import json
import os
import sys
import types

import pytest
import torch
from gpu_stand_ins import BOTH, CPU, H100, admitting

import interp_nn
from benchmarks.gpu import job_table, kernels, runs, timings
from benchmarks.timing import providers
from interp_nn.engines.triton import configs

pytestmark = pytest.mark.usefixtures("one_thread")  # problems this small lose more to waking threads


class Stream:
    def __init__(self, device=None):
        self.device = CPU

    def wait_stream(self, other):
        pass


class Graph:
    """Runs its call again, into the same tensors."""

    def __init__(self, call):
        self.call, self.out = call, call()

    def replay(self):
        for old, new in zip(self.out, self.call(), strict=True):
            old.copy_(new)


@pytest.fixture
def played(monkeypatch):
    def captured(call, stream):
        graph = Graph(call)
        return graph, graph.out

    admitting(monkeypatch)
    monkeypatch.setattr(interp_nn, "use_engine", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=2000))
    monkeypatch.setattr(timings, "on_events", lambda work, calls: lambda: work() or 0.01)
    monkeypatch.setattr(timings, "spare_words", lambda device: None)
    for module in (runs, timings):
        monkeypatch.setattr(module, "captured", captured)


def shaky(call, every):
    """The call, a bit off once in a while."""
    count = itertools.count(1)

    def shaken():
        out = list(call())
        if next(count) % every == 0:
            out[-1] = out[-1] + 1e-3
        return out

    return shaken


@pytest.mark.parametrize("steady", [True, False])
@pytest.mark.parametrize(
    ("run", "count"),
    [
        (lambda log: runs.repeat("triton", runs.TINY, 5, CPU, log), 7),
        (lambda log: runs.alternate("cuda", [runs.TINY, runs.TINY._replace(n=5)], 40, CPU, log), 1),
        (lambda log: runs.on_streams("triton", runs.TINY, 10, CPU, log), 1),
        (lambda log: runs.in_graphs("cuda", runs.TINY, 5, CPU, log), 2),
    ],
    ids=["repeat", "alternate", "streams", "graphs"],
)
def test_a_bit_that_changes_is_noticed(run, count, steady, played, log, lines, monkeypatch):
    if not steady:
        whole = runs.workload
        monkeypatch.setattr(runs, "workload", lambda *args: {n: shaky(c, 4) for n, c in whole(*args).items()})
    run(log)
    found = [line for line in lines() if line["status"] != "skipped"]
    assert [line["status"] for line in found] == ["ok" if steady else "wrong"] * count
    assert len({line["engine"] for line in found}) == 1 and all(line["engine"] in line["name"] for line in found)


def test_an_engine_that_refuses_a_whole_shape_has_nothing_to_run(played, log, lines, monkeypatch):
    monkeypatch.setattr(kernels, "refusal", lambda *_: "cuda: too old")
    for run in (
        lambda: runs.repeat("cuda", runs.TINY, 5, CPU, log),
        lambda: runs.alternate("cuda", [runs.TINY], 5, CPU, log),
        lambda: runs.on_streams("cuda", runs.TINY, 5, CPU, log),
        lambda: runs.in_graphs("cuda", runs.TINY, 5, CPU, log),
        lambda: runs.count_launches("cuda", CPU, log),
    ):
        before = len(lines())
        run()
        assert {line["status"] for line in lines()[before:]} == {"skipped"}


def test_the_form_that_cuda_lacks_is_not_run_twice(log, lines, monkeypatch):
    admitting(monkeypatch)
    assert set(runs.admitted("triton", runs.TINY, CPU, log)) - set(runs.admitted("cuda", runs.TINY, CPU, log)) == {
        "flat head loss"
    }
    assert [(line["status"], line["why"]) for line in lines()] == [("skipped", "cuda: it has the latent form only")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_bits(dtype):
    t = torch.tensor([0.0, 1.0, torch.nan], dtype=dtype)
    assert not runs.differing([t], [t.clone()])
    assert runs.differing([t], [torch.tensor([-0.0, 1.0, torch.nan], dtype=dtype)])


@pytest.mark.parametrize("engine", BOTH)
def test_launches_are_counted(engine, log, lines, monkeypatch):
    admitting(monkeypatch)
    monkeypatch.setattr(interp_nn, "use_engine", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "launches", lambda name: contextlib.nullcontext(["kernel"]))
    runs.count_launches(engine, CPU, log)
    assert [line["status"] for line in lines()] == ["ok"] * 8
    for seen in ([], ["kernel", "kernel"]):
        monkeypatch.setattr(kernels, "launches", lambda name, seen=seen: contextlib.nullcontext(seen))
        runs.count_launches(engine, CPU, log)
    assert [line["status"] for line in lines()] == ["ok"] * 8 + ["wrong"] * 16
    assert {line["engine"] for line in lines()} == {engine}


def test_what_else_the_device_runs_is_counted(log, lines):
    runs._count("a loss", "cuda", ["cuda_loss"], ["loss_kernel", "Memset"], runs.TINY, log)
    runs._count("a loss", "cuda", ["cuda_loss"], ["loss_kernel"], runs.TINY, log)
    assert [line.get("why") for line in lines()] == ["2 on the device, 1 of the engine's, want 1", None]


def test_ranges_that_a_program_marks_are_not_launches(monkeypatch):
    def event(name, device, marked=False):
        return types.SimpleNamespace(
            name=name, device_type=types.SimpleNamespace(name=device), is_user_annotation=marked
        )

    profile = contextlib.nullcontext(
        types.SimpleNamespace(
            events=lambda: [
                event("Optimizer.step#Adam.step", "CPU", True),
                event("Optimizer.step#Adam.step", "CUDA", True),
                event("a kernel", "CUDA"),
            ]
        )
    )
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels.profiled(lambda: 7, torch.device("cuda")) == (7, ["a kernel"])


@pytest.mark.parametrize("problem", timings.tiny_problems(), ids=lambda problem: problem.what)
def test_every_provider_is_timed_by_both_clocks(problem, played, log, lines):
    timings.time_problem(problem, BOTH, CPU, 0.01, log)
    found = {line["provider"]: line for line in lines() if "provider" in line}
    failed = [line["name"] for line in lines() if line["status"] not in ("ok", "info")]
    assert failed == [f"{problem.name}, {engine} kernel" for engine in BOTH]  # which only the engines themselves have
    assert {*BOTH, "auto", "reference", "unfused", "linear"} <= set(found)
    assert ("inverse-inv" in found) is (problem.what == "forward")
    for name, line in found.items():
        assert line["plain"]["samples"] >= 5 and line["plain"]["us_p50"] == 10.0
        assert (line["graph"] is None) is (name == "inverse-inv")
        assert line["rotated_bytes"] >= 2000
    (verdict,) = (line for line in lines() if line["status"] == "info")
    assert verdict["fastest"] == "triton" and not verdict["clear"] and verdict["entry"] is None
    printed = job_table.table([{**line, "part": "time"} for line in lines()])
    assert all(f"{problem.name:34} {engine}" in printed for engine in BOTH)


def test_an_engine_that_refuses_a_problem_is_not_timed(played, log, lines, monkeypatch):
    monkeypatch.setattr(kernels, "refusal", lambda engine, *_: "cuda: no" if engine == "cuda" else None)
    problem = timings.tiny_problems()[-1]
    timings.time_problem(problem, BOTH, CPU, 0.01, log)
    skipped = [(line["name"], line["why"]) for line in lines() if line["status"] == "skipped"]
    assert skipped == [(f"{problem.name}, cuda", "cuda: no")]
    assert not {"cuda", "cuda kernel"} & {line.get("provider") for line in lines()}


def clocks(**microseconds):
    return {name: timings.Clock([value / 1e3] * 5, 1) for name, value in microseconds.items()}


def test_which_engine_is_faster_is_an_entry_of_a_table(monkeypatch, tmp_path):
    monkeypatch.setattr(timings, "chip_of", lambda device: H100)
    loss = timings.Problem("loss", 32, 512, 100, None, torch.bfloat16)
    entry = timings._entry(loss, CPU, clocks(triton=70, cuda=60, reference=90))
    assert entry["engine"] == "cuda" and entry["microseconds"] == {"triton": 70.0, "cuda": 60.0, "reference": 90.0}
    monkeypatch.setenv("INTERP_NN_TABLE", str(tmp_path / "table.json"))
    (tmp_path / "table.json").write_text(json.dumps({"kernels": [], "engines": [entry]}))
    assert configs.measured_engine(H100, configs.Bucket("pair_loss", 2, 128, 128, 4096)) == "cuda"
    assert configs.measured_engine(H100, configs.Bucket("pair_loss", 2, 128, 128, 31)) is None
    assert timings._entry(loss, CPU, clocks(triton=60, cuda=60)) is None
    assert timings._entry(loss._replace(what="forward"), CPU, clocks(triton=70, cuda=60)) is None
    kinds = {p.what: timings._entry(p, CPU, clocks(cuda=1, triton=2)) for p in timings.problems()}
    named = {what: entry["problem"] for what, entry in kinds.items() if entry}
    assert named == {"loss": "pair_loss", "head": "head_loss", "both": "summary"}


def test_the_fastest():
    assert timings.fastest({}) == {"fastest": None, "clear": False}
    assert timings.fastest(clocks(triton=3, cuda=2)) == {"fastest": "cuda", "clear": True}
    shaky = {"triton": timings.Clock([1.0, 2.0, 3.0], 1), "cuda": timings.Clock([1.0, 2.1, 3.0], 1)}
    assert timings.fastest(shaky) == {"fastest": "triton", "clear": False}


@pytest.mark.parametrize("problem", timings.host_problems(), ids=lambda problem: problem.what)
def test_the_host_cost_of_both_engines(problem, played, log, lines, monkeypatch):
    monkeypatch.setattr(
        timings, "rounds", lambda samplers, *_, **__: {name: [s(), s()] for name, s in samplers.items()}
    )
    monkeypatch.setattr(timings, "_HOST_CALLS", 2)
    assert (problem.n, problem.d, problem.k) == (32, 512, 100)
    timings.time_host(problem, BOTH, CPU, log)
    line = lines()[-1]
    assert line["name"] == problem.name and line["status"] == "info"
    assert all(line[f"{name}_us"] > 0 for name in (*BOTH, "reference", "auto", "linear"))
    assert line["fastest"] in (*BOTH, "reference")
    assert f"{problem.name}: triton_us" in job_table.table([{**line, "part": "time"}])


def test_a_provider_that_computes_something_else_is_not_timed(played, log, lines, monkeypatch):
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", lambda x, b: 2 * (x @ b))
    timings.time_problem(timings.tiny_problems()[0], BOTH, CPU, 0.01, log)
    assert [line["name"] for line in lines() if line["status"] == "wrong"] == ["forward (9, 20, 6) float32, assoc-b"]


def test_the_problems_timed():
    problems = timings.problems()
    assert len({problem.name for problem in problems}) == len(problems)
    assert {problem.what for problem in problems} == {"forward", "backward", "both", "loss", "head"}
    assert all(problem.dtype == torch.bfloat16 for problem in problems[: len(problems) // 2])


def test_a_rival_is_asked_only_for_the_dtypes_that_it_has():
    for problem in timings.problems():
        if problem.what == "forward":
            assert ("inverse-inv" in timings._summaries(problem)) is (problem.dtype == torch.float32)


def test_an_empty_launch_allocates_nothing(played, log, lines, monkeypatch):
    launched, fill = [], torch.zeros
    engine = types.SimpleNamespace(Launch=lambda *_: None, launch=lambda _, device, *given: launched.append(given[0]))
    monkeypatch.setattr(timings.engines, "get", lambda name: engine)
    monkeypatch.setattr(timings.barrier_words, "counter", lambda device: None)
    monkeypatch.setattr(timings, "chip_of", lambda device: H100)
    monkeypatch.setitem(sys.modules, "interp_nn.engines.triton.phased", types.SimpleNamespace(phased_forward=None))
    monkeypatch.setattr(timings, "rounds", lambda samplers, *_: {name: [sample()] for name, sample in samplers.items()})
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *given, **more: made.append(fill(*given, **more)) or made[-1])
    timings.barrier(CPU, log)
    (line,) = lines()
    assert line["status"] == "info" and line["empty_launch_us"] > 0
    assert len(made) == 1 and len(launched) > 200 and {id(some) for some in launched} == {id(made[0])}


def test_sets_of_inputs_fill_the_cache():
    problem = timings.tiny_problems()[0]
    assert len(timings.datasets(problem, CPU, 0)) == 2
    sets = timings.datasets(problem, CPU, 100_000)
    assert len(sets) * 2 * 4 * (9 * 20 + 6 * 20 + 9 * 6) >= 200_000
    assert len(timings.datasets(problem, CPU, 10**9)) == 256


def test_the_sanitizer_is_looked_for(tmp_path, monkeypatch, log, lines):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("CUDA_PATH", "")
    monkeypatch.setattr(runs.os.path, "exists", lambda path: "/usr/local" not in str(path) and os.path.lexists(path))
    assert runs.sanitizer() is None
    runs.sanitize("memcheck", BOTH, CPU, 5.0, log)
    assert lines()[0]["status"] == "skipped" and "tool not found" in lines()[0]["why"]
    tool = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert runs.sanitizer() == str(tool)


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ('echo \'{"status": "ok"}\' > "$LINES"', "ok", None),
        ('echo \'{"status": "ok"}\' > "$LINES"; echo "========= Invalid read"; exit 86', "wrong", "exit status 86"),
        ('echo \'{"status": "failed"}\' > "$LINES"', "wrong", "1 problems ran, not all of them right"),
        (
            'echo \'{"status": "ok"}\' > "$LINES"; echo \'{"status": "skipped"}\' >> "$LINES"; echo "$@" | grep -q cuda',
            *("ok", None),
        ),
        ('echo \'{"status": "skipped"}\' > "$LINES"', "wrong", "0 problems ran, not all of them right"),
        ("exit 0", "wrong", "0 problems ran, not all of them right"),
        ('echo "Error: Device not supported"; exit 1', "skipped", "the tool does not support this device here"),
        ("sleep 60", "skipped", "not done within 1 s"),
    ],
)
def test_what_the_sanitizer_says(body, status, why, tmp_path, monkeypatch, log, lines):
    tool = tmp_path / "compute-sanitizer"
    find = 'while [ "$1" != --log ]; do shift; done; LINES="$2"'
    tool.write_text(f"#!/bin/sh\n{find}\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(runs, "sanitizer", lambda: str(tool))
    runs.sanitize("racecheck", BOTH, CPU, 1.0, log)
    (line,) = lines()
    assert (line["status"], line.get("why")) == (status, why)
    assert line["command"][:2] == ["--tool", "racecheck"] and "--report-api-errors" not in line["command"]


def test_only_what_kernels_do_is_memchecks_matter(tmp_path, monkeypatch, log, lines):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(runs, "sanitizer", lambda: str(tool))
    runs.sanitize("memcheck", BOTH, CPU, 5.0, log)
    command = lines()[0]["command"]
    assert command[command.index("--report-api-errors") + 1] == "no"
