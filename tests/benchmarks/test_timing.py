"""The suites themselves, on problems small enough for every run of the tests."""

import itertools
import math
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.records import environment, report, rows
from benchmarks.timing import (
    clocks,
    compare,
    explain_suite,
    footprint,
    measure,
    operator_suite,
    problems,
    providers,
    training_suite,
)
from benchmarks.timing.clocks import Limit
from benchmarks.timing.measure import Asked
from benchmarks.timing.problems import Problem
from interp_nn import functional

CPU = torch.device("cpu")
SMALL = ("ours", "linear", "unfused", "assoc-a", "assoc-b", "assoc-c", "best-eager", "multi-dot", *providers.INVERSES)
ASKED = Asked(CPU, "wall", seconds=0.0, samples=3)


def writer():
    return rows.Writer(None, CPU, "wall", "hot")


def measured(problem, modes, names=SMALL, asked=ASKED):
    """The rows of a problem by (mode, provider)."""
    out = writer()
    measure.measure(problem, modes, names, asked, None, out)
    return {(row["mode"], row["provider"]): row for row in out.rows}


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("shape", [(20, 16, 6), (5, 6, 16)], ids=str)
def test_every_provider_of_the_summary_is_right_or_says_why_not(shape, dtype):
    names = [name for name in providers.NAMES if name != "compile"]
    found = measured(Problem.of("summary", shape, dtype), problems.MODES["summary"], names)
    assert {key for key in found} == set(itertools.product(problems.MODES["summary"], names))
    assert {row["status"] for row in found.values()} <= {"ok", "unsupported"}
    wide, exact = shape[2] > shape[1], dtype != "bf16"
    for mode in problems.MODES["summary"]:
        done = {name for name in names if found[mode, name]["status"] == "ok"}
        assert done >= {"ours", "linear", "unfused", "assoc-a", "assoc-b", "assoc-c", "best-eager", "multi-dot"}
        assert ({"assoc-d", "assoc-e"} <= done) is wide
        assert (set(providers.INVERSES) <= done) is (exact and not wide)
        assert ("orthogonal" in done) is exact
        assert ("cached" in done) is (mode == "infer")
        assert found[mode, "graphed"]["note"] == "there are no CUDA graphs"
        assert "the cuda engine is off" in found[mode, "ours-cuda"]["note"]
        assert found[mode, "ours"]["plan"].startswith("reference ")
        assert found[mode, "best-eager"]["plan"] in providers.ASSOCIATIONS
        for name in done:
            row = found[mode, name]
            assert row["samples"] >= 3 and 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
            assert row["peak_delta_mb"] > 0 and (row["saved_mb"] is None) is (mode in ("bwd", "infer"))
            assert row["gflop"] > 0 and row["least_mb"] > 0


@pytest.mark.parametrize(("op", "shape"), [("cross_entropy", (20, 16, 6)), ("head", (20, 16, 6, 3))])
def test_losses(op, shape):
    found = measured(Problem.of(op, shape), ("loss",))
    status = {name: row["status"] for (_, name), row in found.items()}
    assert all(status.pop(name) == "unsupported" for name in providers.INVERSES)
    assert set(status.values()) == {"ok"}


def test_compiled_providers_are_right():
    found = measured(Problem("summary", 20, 16, 6), ("fwdbwd", "bwd"), ("assoc-b", "compile"))
    assert {row["status"] for row in found.values()} == {"ok"}
    assert found["bwd", "compile"]["plan"] == "assoc-b"


def test_a_wrong_provider_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", lambda x, b: 1.01 * (x @ b @ (b.mT @ b)))
    found = measured(Problem("summary", 20, 16, 6), ("fwdbwd",))
    row = found["fwdbwd", "assoc-b"]
    assert (row["status"], row["ms_p50"]) == ("wrong", None)
    assert "value: relative error 0.01 against fp64" in row["note"]
    assert {row["status"] for (_, name), row in found.items() if name != "assoc-b"} == {"ok"}
    assert "assoc-b, summary, forward + backward, (20, 16, 6) fp32: wrong" in report.markdown(list(found.values()))


def test_ours_has_the_law_to_keep(monkeypatch):
    """Four roundings more than PyTorch are too many for ours, and nobody else's matter."""
    exact = functional.summary

    def rough(x, b):
        return exact(x, b) * (1 + 3e-6)

    monkeypatch.setattr(functional, "summary", rough)
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-c", lambda x, b: rough(x, b))
    found = measured(Problem("summary", 20, 16, 6), ("infer",))
    assert found["infer", "ours"]["status"] == "wrong" and "PyTorch's" in found["infer", "ours"]["note"]
    assert found["infer", "assoc-c"]["status"] == "ok" and found["infer", "assoc-c"]["err_ratio"] > 5


def test_what_turns_wrong_while_it_is_timed_is_noticed(monkeypatch):
    calls = itertools.count()
    monkeypatch.setitem(
        providers.ASSOCIATIONS, "assoc-b", lambda x, b: x @ (b @ (b.mT @ b)) * (1 if next(calls) < 4 else 2)
    )
    row = measured(Problem("summary", 20, 16, 6), ("infer",), ("assoc-b",))["infer", "assoc-b"]
    assert row["status"] == "wrong" and row["note"].startswith("after timing: value")


def test_what_fails_is_a_row(monkeypatch):
    def out_of_memory(x, b):
        raise torch.OutOfMemoryError("tried to allocate 1 PB")

    def broken(x, b):
        raise RuntimeError("no such kernel\nat line 3")

    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", out_of_memory)
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-c", broken)
    found = measured(Problem("summary", 20, 16, 6), ("infer",))
    assert [found["infer", name][field] for name in ("assoc-b", "assoc-c") for field in ("status", "note")] == [
        "oom", "tried to allocate 1 PB", "failed", "RuntimeError: no such kernel",
    ]  # fmt: skip
    slow = measured(Problem("summary", 20, 16, 6), ("infer",), ("ours",), ASKED._replace(call_limit=0.0))
    assert slow["infer", "ours"]["status"] == "skipped"
    monkeypatch.setattr(measure, "datasets", lambda *_: out_of_memory(0, 0))
    found = measured(Problem("summary", 20, 16, 6), ("infer", "fwd"))
    assert {row["status"] for row in found.values()} == {"oom"} and len(found) == 2 * len(SMALL)


def test_what_is_far_slower_is_timed_once(monkeypatch):
    def slow(x, b):
        time.sleep(0.6)
        return x @ (b @ (b.mT @ b))

    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", slow)
    found = measured(Problem("summary", 20, 16, 6), ("infer",), ("ours", "assoc-b"))
    row = found["infer", "assoc-b"]
    assert (row["status"], row["samples"]) == ("ok", 1) and row["ms_p50"] > 600
    assert row["note"] == "timed once: over 5 times the fastest" and found["infer", "ours"]["samples"] == 3


def test_problems_over_the_budget_are_rows(monkeypatch):
    monkeypatch.setattr(operator_suite.ceilings, "measure", lambda *_: operator_suite.ceilings.Ceiling(1e10, 1e11))
    out = writer()
    wanted = operator_suite.Wanted(
        ("summary",), ("infer",), [(8192, 4096, 1024), (8, 4, 2)], ("fp32",), ("ours",), operator_suite.CPU_BUDGET
    )
    operator_suite.run(wanted, ASKED, out)
    assert [row["status"] for row in out.rows] == ["ok", "skipped", "ok", "ok"]
    assert "over the FLOP budget" in out.rows[1]["note"] and "of 150 GFLOP" in out.rows[1]["note"]
    assert [row["mode"] for row in out.rows if row["op"] == "ceiling"] == ["start", "end"]
    assert out.rows[2]["sol_frac"] > 0


def test_nothing_is_begun_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operator_suite.ceilings, "measure", lambda *_: operator_suite.ceilings.Ceiling(1e10, 1e11))
    monkeypatch.setattr(explain_suite, "_SAMPLES", 100)
    file = tmp_path / "record.jsonl"
    assert (
        main(["run", "--device", "cpu", "--minutes", "0", "--dtype", "fp32", "--shape", "8,4,2", "--out", str(file)])
        == 0
    )
    found = rows.read([file])
    timed = [row for row in found if row["op"] != "ceiling"]
    assert {(row["status"], row["note"]) for row in timed} == {("skipped", "out of time: 0 minutes")}
    assert {row["op"] for row in timed} == {
        *("summary", "cross_entropy", "train_cnn", "train_vgg11", "linearize_cnn", "linearize_vgg11", "group_patterns")
    }
    assert all(row["d"] for row in timed)
    assert [row["mode"] for row in found if row["op"] == "ceiling"] == ["start", "end"]
    assert "- (8, 4, 2): out of time: 0 minutes" in capsys.readouterr().out


def test_the_time_may_end_between_two_modes(monkeypatch):
    limit = Limit()
    said = itertools.chain([None], itertools.repeat("out of time"))
    monkeypatch.setattr(limit, "over", lambda: next(said))
    found = measured(Problem("summary", 20, 16, 6), ("fwd", "bwd"), ("ours",), ASKED._replace(limit=limit))
    assert [(row["status"], row["note"]) for row in found.values()] == [("ok", None), ("skipped", "out of time")]


def test_dtypes_take_turns():
    found = list(operator_suite.problems(operator_suite.Wanted(dtypes=("bf16", "fp32"))))
    assert [problem.dtype for problem in found] == ["bf16", "fp32"] * (len(found) // 2)
    assert all(one._replace(dtype="fp32") == other for one, other in zip(found[::2], found[1::2], strict=True))


def test_the_three_largest_shapes_are_over_a_cpus_budget():
    over = [
        p
        for p in operator_suite.problems(operator_suite.Wanted(("summary",)))
        if operator_suite.over(p, operator_suite.CPU_BUDGET)
    ]
    assert [p[1:4] for p in over] == [(8192, 4096, 1024), (8192, 4096, 4096), (1024, 25088, 4096)]


def test_training_steps(monkeypatch):
    out = writer()
    training_suite.run(("ours", "linear", "unfused", "ours-cuda"), ASKED, out, ("cnn",))
    status = {row["provider"]: row["status"] for row in out.rows}
    assert status == {"ours": "ok", "linear": "ok", "unfused": "ok", "ours-cuda": "unsupported"}
    assert {(row["op"], row["n"], row["d"], row["k"], row["m"]) for row in out.rows} >= {
        ("train_cnn", 32, 1600, 120, 10)
    }
    monkeypatch.setattr(training_suite, "_own", lambda network, images, target: 1.001 * network.loss(images, target))
    out = writer()
    training_suite.run(("ours",), ASKED, out, ("cnn",))
    assert out.rows[0]["status"] == "wrong"


def test_convolutions_of_the_suites_are_exact(monkeypatch):
    """As cudnn's would not be without asking, on a device that has tf32."""
    seen, linearize, step = [], explain_suite.linearize, training_suite._own

    def noted(call):
        return lambda *given: seen.append(torch.backends.cudnn.conv.fp32_precision) or call(*given)

    monkeypatch.setattr(explain_suite, "linearize", noted(linearize))
    monkeypatch.setattr(training_suite, "_own", noted(step))
    monkeypatch.setattr(explain_suite, "ARCHITECTURES", ("cnn",))
    monkeypatch.setattr(explain_suite, "_SAMPLES", 100)
    out = writer()
    explain_suite.run(ASKED, out)
    training_suite.run(("ours",), ASKED, out, ("cnn",))
    assert set(seen) == {"ieee"} and {row["status"] for row in out.rows} == {"ok"}


def test_explanations_are_timed_by_events_on_a_gpu(monkeypatch):
    monkeypatch.setattr(explain_suite, "on_events", lambda call, calls: lambda: call() is None or 0.25)
    monkeypatch.setattr(explain_suite.footprint, "peak_bytes", lambda call, device: (0, call()))
    monkeypatch.setattr(explain_suite, "launches", lambda call, device: 1)
    out, sizes = writer(), {"n": 1, "d": 1, "k": 1}
    for timer in measure.TIMERS["cuda"]:
        asked = ASKED._replace(device=torch.device("cuda"), timer=timer)
        explain_suite._measure(
            "group_patterns", sizes, {"ours": lambda: torch.ones(1)}, lambda got: 0.0, 0.0, asked, out
        )
    assert [(row["timer"], row["ms_p50"]) for row in out.rows] == [("events", 0.25)] * 2


def test_a_commit_can_be_named_where_there_is_no_git(tmp_path, monkeypatch):
    monkeypatch.setattr(explain_suite, "_SAMPLES", 10_000)
    arguments = ["run", "--suite", "explain", "--quick", "--seconds", "0.01", "--device", "cpu", "--revision", "f00d"]
    for git, sha, dirty in ((None, "f00d", None), ("abc", "abc", True)):
        monkeypatch.setattr(environment, "_git", lambda *_, git=git: git)
        out = tmp_path / f"{sha}.jsonl"
        assert main([*arguments, "--out", str(out)]) == 0
        assert {(row["git_sha"], row["dirty"]) for row in rows.read([out])} == {(sha, dirty)}
    monkeypatch.setattr(environment, "_git", lambda *_: None)
    assert environment.now("f00dfeed").endswith("-f00dfee") and environment.now().endswith("-unknown")


def test_run_from_the_command_line(tmp_path, capsys):
    file = tmp_path / "record.jsonl"
    arguments = ["run", "--suite", "ops", "--op", "summary", "--shape", "16,8,4", "--mode", "fwdbwd", "--samples", "3"]
    arguments += [
        "--seconds",
        "0.01",
        "--provider",
        "ours",
        "--provider",
        "linear",
        "--device",
        "cpu",
        "--out",
        str(file),
    ]
    assert main(arguments) == 0
    assert "| 16, 8, 4 |" in capsys.readouterr().out
    found = rows.read([file])
    assert [row["provider"] for row in found] == ["device", "ours", "linear", "device"]
    assert main([*arguments, "--timer", "graph"]) == 2
    assert "--timer: got graph, want wall on cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "--shape", "16,0,4"])
    assert "got '16,0,4', want N,D,K or N,D,K,M of positive whole numbers" in capsys.readouterr().err


def test_list_and_roofline(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in providers.NAMES)
    assert main(["roofline", "--device", "cpu", "--shape", "64,32,16", "--op", "summary"]) == 0
    printed = capsys.readouterr().out
    assert "| summary (64, 32, 16) fp32 | fwdbwd |" in printed


def test_records_have_folders_of_devices(monkeypatch):
    assert environment.device_slug("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert environment.device_slug("cuda") == "nvidia-h200"


class Graph:
    """What a CUDA graph does, on the CPU: the call again, into the same tensors."""

    def __init__(self, call):
        self.call, self.out = call, call()

    def replay(self):
        for old, new in zip(self.out, self.call(), strict=True):
            old.copy_(new)


@pytest.mark.parametrize("timer", ["events", "graph"])
@pytest.mark.parametrize("cold", [False, True])
def test_the_clocks_of_a_gpu(timer, cold, monkeypatch):
    monkeypatch.setattr(problems, "cache_bytes", lambda _: 20_000)
    monkeypatch.setattr(measure, "on_events", lambda work, calls: lambda: work() or 0.25)
    graphs = []

    def capture(call, device):
        graphs.append(Graph(call))
        return graphs[-1], graphs[-1].out

    monkeypatch.setattr(measure, "capture", capture)
    problem, names = Problem("summary", 9, 20, 6), ("ours", "assoc-b", "best-eager", "graphed")
    found = measured(problem, ("infer", "fwdbwd"), names, Asked(CPU, timer, cold, seconds=0.0, samples=3))
    sets = problems.rotation(problem, CPU, cold)
    for mode in ("infer", "fwdbwd"):
        assert all(found[mode, name]["ms_p50"] == 0.25 for name in ("ours", "assoc-b", "best-eager"))
        if timer == "events":
            assert (found[mode, "graphed"]["status"], found[mode, "graphed"]["plan"]) == ("ok", "assoc-b")
        else:
            assert found[mode, "graphed"]["note"] == "this timer replays every provider as a graph"
    assert len(graphs) == (2 * sets if timer == "events" else 2 * 2)


# What things cost


def test_useful_operations_are_those_of_the_cheapest_order():
    n, d, k = 4096, 512, 64
    assert problems.useful_flops(Problem("summary", n, d, k), "fwd") == 2 * n * d * k + 4 * d * k * k
    assert problems.useful_flops(Problem("summary", 64, 4096, 4096), "infer") == 6 * 64 * 4096 * 4096
    for problem in (Problem("summary", 9, 8, 7), Problem("summary", 7, 8, 9)):
        whole, parts = (
            sum(problems.useful_flops(problem, mode) for mode in modes) for modes in (("fwdbwd",), ("fwd", "bwd"))
        )
        assert whole == parts


def test_least_bytes():
    problem = Problem("summary", 10, 7, 3, None, "bf16")
    x, b, y = 10 * 7, 7 * 3, 10 * 3
    assert problems.least_bytes(problem, "infer") == 2 * (x + b + y)
    assert problems.least_bytes(problem, "bwd") == 2 * (2 * x + 2 * b + y)
    assert problems.least_bytes(problem, "fwdbwd") == 2 * (2 * x + 2 * b + 2 * y)


def test_memory_is_counted():
    x, w = (torch.randn(100, 100, requires_grad=True) for _ in range(2))
    peak, result = footprint.peak_bytes(lambda: (x @ w) @ w, CPU)
    assert peak == 80_000 and torch.equal(result, (x @ w) @ w)
    assert footprint.saved_bytes(lambda: (x @ w) @ w, (x, w)) == 40_000
    assert footprint.saved_bytes(lambda: x @ w, (x, w)) == 0


def test_sets_of_inputs_fill_the_cache(monkeypatch):
    monkeypatch.setattr(problems, "cache_bytes", lambda _: 100_000)
    problem = Problem("summary", 9, 20, 6)
    count = problems.rotation(problem, CPU, True)
    assert count * 2 * 4 * (9 * 20 + 6 * 20 + 9 * 6) >= 200_000 and problems.rotation(problem, CPU, False) == 1
    one, other = (problems.datasets(problem, CPU, 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True)) and not torch.equal(one[0].x, one[1].x)


def test_cold_inputs_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(problems, "cache_bytes", lambda _: 20_000)
    seen = []
    monkeypatch.setitem(
        providers.ASSOCIATIONS, "assoc-b", lambda x, b: seen.append(x.data_ptr()) or x @ (b @ (b.mT @ b))
    )
    problem = Problem("summary", 9, 20, 6)
    measured(problem, ("infer",), ("assoc-b",), ASKED._replace(cold=True, samples=20))
    assert len(set(seen)) == problems.rotation(problem, CPU, True) > 2


def test_interleaved_timing_orders_what_it_times():
    timed = clocks.interleave({"short": lambda: time.sleep(0.0005), "long": lambda: time.sleep(0.005)}, seconds=0.05)
    assert timed["short"].p50 < timed["long"].p50
    assert timed["short"].samples == timed["long"].samples >= 7


def test_rounds_take_every_one_as_often():
    order = []
    samplers = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    taken = clocks.rounds(samplers, 0.0, least=4, most=60)
    assert {len(samples) for samples in taken.values()} == {4}
    assert [sorted(order[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert order != sorted(order, key=order.index) and len(clocks.rounds(samplers, 60.0, 1, 6)["a"]) == 6


def test_geometric_mean():
    assert math.isclose(rows.geomean([2.0, 8.0]), 4.0)


def test_a_run_of_nothing_says_so(tmp_path, capsys):
    out = tmp_path / "record.jsonl"
    assert main(["run", "--suite", "train", "--provider", "compile", "--out", str(out)]) == 2
    assert "benchmarks run: nothing asked for can be run" in capsys.readouterr().err and not out.exists()


# Two revisions


@pytest.fixture
def repository(tmp_path):
    """A repository with this checkout's library, and a second commit that is slower."""
    if not (environment.ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path / "clone", check=True, capture_output=True)

    subprocess.run(["git", "clone", "--quiet", "--shared", str(environment.ROOT), str(tmp_path / "clone")], check=True)
    git("tag", "base")
    functional_file = tmp_path / "clone" / "interp_nn" / "functional.py"
    planted = "\n_exact = summary\n\n\ndef summary(*given):\n    import time\n\n    time.sleep(0.02)\n    return _exact(*given)\n"
    functional_file.write_text(functional_file.read_text() + planted)
    git("commit", "--quiet", "--all", "--message", "slower")
    git("tag", "slower")
    return tmp_path / "clone"


def test_a_planted_slow_revision_is_caught(repository, monkeypatch, capsys):
    monkeypatch.setattr(compare.revisions, "__defaults__", (repository,))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that a busy machine only slows it down
    arguments = ["--shape", "64,32,16", "--mode", "fwdbwd", "--op", "summary", "--rounds", "15"]
    assert main(["compare", "base", "slower", *arguments]) == 1
    assert "SLOWER" in capsys.readouterr().out
    monkeypatch.delattr("tarfile.data_filter", raising=False)  # as before Python 3.10.12
    monkeypatch.setattr("tarfile.TarFile.extraction_filter", staticmethod(lambda member, path: member), raising=False)
    assert main(["compare", "slower", "base", *arguments]) == 0
    assert main(["compare", "base", "nothing", *arguments]) == 2
    assert "benchmarks compare: nothing: " in capsys.readouterr().err


def test_readme_is_what_its_record_says():
    readme = environment.ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    names = [line.split()[-2] for line in text.splitlines() if line.startswith(f"{report.BEGIN} table")]
    assert names
    for name in names:
        assert report.markdown(rows.read([environment.ROOT / Path(name)]), brief=True) in text
