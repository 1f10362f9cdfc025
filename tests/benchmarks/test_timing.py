"""The timing harness: wrong results, errors and slow providers are rows, and the clocks, bytes and operations are right."""

import contextlib
import itertools
import json
import random
import subprocess
import time

import numpy as np
import pytest
import torch
from gpu_stand_ins import CPU, Graph
from matplotlib import pyplot
from support import needs_records

from benchmarks import experiments
from benchmarks.__main__ import main
from benchmarks.records import environment, report, rows
from benchmarks.timing import (
    clocks,
    compare,
    explain_suite,
    footprint,
    host,
    layer_providers,
    measure,
    operator_suite,
    peers,
    problems,
    providers,
    training_suite,
)
from benchmarks.timing.clocks import Limit
from benchmarks.timing.measure import Asked
from benchmarks.timing.problems import Problem
from benchmarks.timing.roofline import Ceiling
from benchmarks.timing.run import PATHS, SUITES
from interp_nn import functional
from interp_nn.nn import SummaryLinear

SMALL = ("ours", "linear", "unfused", "assoc-a", "assoc-b", "assoc-c", "best-eager", "multi-dot", *providers.INVERSES)
ASKED = Asked(CPU, "wall", seconds=0.0, samples=3)
TINY = Problem("summary", 20, 16, 6)


@pytest.fixture
def out():
    return rows.Writer(None, rows.common())


@pytest.fixture
def rated(monkeypatch):
    """Rates without the second that it takes to measure them."""
    monkeypatch.setattr(operator_suite, "measure_rates", lambda *_: Ceiling(1e10, 1e11))


def measured(problem, modes, names=SMALL, asked=ASKED):
    """The rows of a problem by (mode, provider)."""
    writer = rows.Writer(None, rows.common())
    measure.measure(problem, modes, names, asked, None, writer)
    return {(row["mode"], row["provider"]): row for row in writer.rows}


def test_a_sample_of_quick_calls_takes_a_millisecond():
    class Quick:
        using = contextlib.nullcontext

    calls = []
    for seconds, wanted in ((1e-5, 100), (2e-3, 1)):
        measure._sampler(Quick, calls.append, seconds, 2, ASKED)()
        assert calls == [i % 2 for i in range(wanted)]
        calls.clear()


@pytest.mark.parametrize(
    ("problem", "modes"),
    [
        (TINY, problems.MODES["summary"]),
        (Problem("summary", 5, 6, 16), ("fwdbwd",)),
        (TINY._replace(dtype="bf16"), ("infer", "bwd")),
        (Problem("cross_entropy", 20, 16, 6), ("loss",)),
        (Problem("head", 20, 16, 6, 3), ("loss",)),
    ],
    ids=lambda value: value.name if isinstance(value, Problem) else "",
)
def test_every_provider_is_right_or_says_why_not(problem, modes):
    names = [name for name in providers.NAMES if name != "compile"]
    found = measured(problem, modes, names)
    assert {row["status"] for row in found.values()} == {"ok", "unsupported"}
    wide, exact = problem.k > problem.d, problem.dtype != "bf16"
    for mode in modes:
        done = {name for name in names if found[mode, name]["status"] == "ok"}
        assert done >= {"ours", "linear", "unfused", "assoc-a", "assoc-b", "assoc-c", "best-eager", "multi-dot"}
        assert ({"assoc-d", "assoc-e"} <= done) is wide
        assert (set(providers.INVERSES) <= done) is (exact and not wide and not problem.loss)
        assert ("orthogonal" in done) is (exact and not problem.loss) and ("cached" in done) is (mode == "infer")
        assert found[mode, "graphed"]["note"] == "there are no CUDA graphs"
        assert "the cuda engine is off" in found[mode, "ours-cuda"]["note"] == found[mode, "kernel-cuda"]["note"]
        assert found[mode, "best-eager"]["plan"] in providers.ASSOCIATIONS
        for row in (found[mode, name] for name in done):
            assert row["samples"] >= 3 and 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
            assert row["peak_delta_mb"] > 0 and (row["saved_mb"] is None) is (mode in ("bwd", "infer"))
            assert row["gflop"] > 0 and row["least_mb"] > 0


@pytest.mark.parametrize("problem", [TINY, Problem("cross_entropy", 20, 16, 6), Problem("head", 20, 16, 6, 3)], ids=str)
def test_an_engine_called_directly_computes_the_same(problem, monkeypatch):
    """By the eager engine in the place of one with kernels."""
    monkeypatch.setitem(providers.KERNELS, "kernel-triton", providers.OURS["ours-eager"])
    monkeypatch.setattr(providers, "planned", lambda *_: "a plan")
    found = measured(problem, problems.MODES[problem.op], ("kernel-triton",))
    assert {(row["status"], row["saved_mb"]) for row in found.values()} == {("ok", None)}


@pytest.mark.parametrize("op", problems.LAYERS)
def test_every_layer_is_right_or_says_why_not(op):
    names = [name for name in layer_providers.NAMES if not name.startswith("compile")]
    found = measured(Problem(op, 20, 16, 6, dtype="fp64"), modes := problems.MODES[op], names)
    assert {row["status"] for row in found.values()} == {"ok", "unsupported"}
    expected = {"ours"} if modes == ("update",) else {"ours", "linear", "unfused", "spectral-norm"}
    expected |= {"ours-cached"} if modes == ("step",) else {"orthogonal"} if modes != ("update",) else set()
    expected |= {"repeat"} | (
        {"pc-layer"} if "pc" in op else set(providers.INVERSES) if op == "layer-summary" else set()
    )
    for mode in modes:
        assert {name for name in names if found[mode, name]["status"] == "ok"} == expected
    for (mode, name), row in found.items():
        if row["status"] == "ok":
            assert row["gflop"] > 0 and row["least_mb"] > 0 and row["peak_delta_mb"] > 0
            assert (row["plan"] is not None) is (name == "repeat" or (name.startswith("ours") and mode != "update"))


@pytest.mark.parametrize(
    ("op", "name", "what", "noted"),
    [
        ("layer-pc-4", "ours", "forward", "value: Frobenius error"),
        ("microbatches", "ours-cached", "cached_weights", "db: relative error 0.01"),
        ("update_spectral_norms", "ours", "update_spectral_norms", "value: relative error"),
    ],
)
def test_a_wrong_layer_is_a_row_that_says_so(op, name, what, noted, monkeypatch):
    @contextlib.contextmanager
    def scaling(layer):
        yield
        layer.b.grad.mul_(1.01)

    forward = SummaryLinear.forward
    wrong = {
        "forward": lambda layer, x: (1 + 1e-5) * forward(layer, x),
        "cached_weights": scaling,
        "update_spectral_norms": lambda layer: layer.scale.mul_(1.01),
    }
    place = SummaryLinear if what == "forward" else layer_providers
    monkeypatch.setattr(place, what, wrong[what])
    (row,) = measured(Problem(op, 20, 16, 6), problems.MODES[op][-1:], (name,)).values()
    assert (row["status"], row["ms_p50"]) == ("wrong", None) and row["note"].startswith(noted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_providers_are_right():
    found = measured(TINY, ("fwdbwd", "bwd"), ("assoc-b", "compile"))
    assert {row["status"] for row in found.values()} == {"ok"} and found["bwd", "compile"]["plan"] == "assoc-b"
    for op in ("layer-pc-4", "microbatches"):
        problem = Problem(op, 20, 16, 6, dtype="fp64")
        found = measured(problem, problems.MODES[op][-1:], ("compile", "compile-ours"))
        assert {row["status"] for row in found.values()} == {"ok"}


def test_a_wrong_provider_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", lambda x, b: 1.01 * (x @ b @ (b.mT @ b)))
    found = measured(TINY, ("fwdbwd",))
    row = found["fwdbwd", "assoc-b"]
    assert (row["status"], row["ms_p50"]) == ("wrong", None) and "relative error 0.01 against fp64" in row["note"]
    assert {row["status"] for (_, name), row in found.items() if name != "assoc-b"} == {"ok"}
    assert "assoc-b, summary, forward + backward, (20, 16, 6) fp32: wrong" in report.markdown(list(found.values()))


def test_ours_has_tolerances_to_keep(monkeypatch):
    """Four roundings more than PyTorch are too many for ours, and allowed to the others."""
    exact = functional.summary
    monkeypatch.setattr(functional, "summary", lambda x, b: exact(x, b) * (1 + 3e-6))
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-c", lambda x, b: exact(x, b) * (1 + 3e-6))
    found = measured(TINY, ("infer",), ("ours", "assoc-c"))
    assert found["infer", "ours"]["status"] == "wrong" and "PyTorch's" in found["infer", "ours"]["note"]
    assert found["infer", "assoc-c"]["status"] == "ok" and found["infer", "assoc-c"]["err_ratio"] > 5


@pytest.mark.parametrize("later", [2, float("nan")])
def test_a_result_that_turns_wrong_while_it_is_timed_is_noticed(later, monkeypatch):
    calls = itertools.count()
    turning = lambda x, b: x @ (b @ (b.mT @ b)) * (1 if next(calls) < 4 else later)  # noqa: E731
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", turning)
    row = measured(TINY, ("infer",), ("assoc-b",))["infer", "assoc-b"]
    assert row["status"] == "wrong" and row["note"].startswith("after timing: value")


def test_errors_and_slow_calls_are_rows(monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate 1 PB")

    def broken(x, b):
        raise RuntimeError("no such kernel\nat line 3")

    def slow(x, b):
        time.sleep(0.05)
        return x @ (b @ (b.mT @ b))

    monkeypatch.setattr(measure, "_LONG", 0.04)

    for name, function in (("assoc-a", slow), ("assoc-b", out_of_memory), ("assoc-c", broken)):
        monkeypatch.setitem(providers.ASSOCIATIONS, name, function)
    found = measured(TINY, ("infer",), ("ours", "assoc-a", "assoc-b", "assoc-c"))
    assert [(row["status"], row["note"], row["samples"]) for row in list(found.values())[1:]] == [
        ("ok", "timed in its trials alone: over 5 times the fastest", 2),
        ("oom", "tried to allocate 1 PB", 0),
        ("failed", "RuntimeError: no such kernel", 0),
    ]
    assert measured(TINY, ("infer",), ("ours",), ASKED._replace(call_limit=0.0))["infer", "ours"]["status"] == "skipped"
    monkeypatch.setattr(measure, "_LONG_PLAN", 0.0)
    monkeypatch.setattr(providers, "_planned_as", lambda name, *given: providers.build("assoc-a", *given, None))
    found = measured(TINY, ("infer",), ("ours", "plan-a", "best-plan"))  # far slower than ours, however short
    assert found["infer", "plan-a"]["samples"] == 2 and found["infer", "ours"]["samples"] == 3
    assert "plan-a" not in report._few(list(found.values()))
    monkeypatch.setattr(measure, "datasets", out_of_memory)
    found = measured(TINY, ("infer", "fwd"))
    assert {row["status"] for row in found.values()} == {"oom"} and len(found) == 2 * len(SMALL)


# What happens once


class PlayedClock:
    """Seconds that pass by what is called: one for each sample, and many where something is imported for the first time."""

    def __init__(self, monkeypatch, costs, once):
        self.now, self.once = 0.0, once
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for name, cost in costs.items():
            monkeypatch.setitem(providers.ASSOCIATIONS, name, self.taking(cost))

    def taking(self, seconds):
        def function(x, b):
            self.now += seconds * (1 + 0.01 * random.random()) + self.once
            self.once = 0.0
            return x @ (b @ (b.mT @ b))

        return function


def test_the_order_of_providers_does_not_change_their_ratios(monkeypatch):
    """The first call of the process imports for a second, whichever provider makes it."""
    costs = {"assoc-a": 1e-3, "assoc-b": 2e-3, "assoc-c": 4e-3}
    for names in (
        ("assoc-a", "assoc-b", "assoc-c"),
        ("assoc-b", "assoc-c", "assoc-a"),
        ("assoc-c", "assoc-a", "assoc-b"),
    ):
        PlayedClock(monkeypatch, costs, once=1.2)
        for mode in ("infer", "fwd"):
            found = measured(TINY, (mode,), names, ASKED._replace(samples=5))
            times = [found[mode, name]["ms_p50"] for name in costs]
            assert times == pytest.approx([1, 2, 4], rel=0.02) and {row["samples"] for row in found.values()} == {5}


def test_a_first_call_is_not_taken_for_a_calls_time(monkeypatch):
    """A first call may import or compile, and a second one may tune."""
    for slow in ({1}, {1, 2}):
        clock, calls = PlayedClock(monkeypatch, {"assoc-a": 1e-3}, 0.0), itertools.count(1)

        def slow_at_first(x, b, clock=clock, calls=calls, slow=slow):
            clock.now += 0.6 if next(calls) in slow else 1e-3
            return x @ (b @ (b.mT @ b))

        monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", slow_at_first)
        found = measured(TINY, ("infer",), ("assoc-a", "assoc-b"))
        assert found["infer", "assoc-b"]["ms_p50"] == pytest.approx(1, rel=0.02)
        assert found["infer", "assoc-b"]["samples"] == 3


def test_the_same_calls_under_two_names_are_timed_once():
    writer = rows.Writer(None, rows.common())
    measure.measure(TINY, ("fwd",), ("ours", "assoc-a", "unfused", "best-eager", "repeat"), ASKED, None, writer)
    timed = {row["provider"]: row for row in writer.rows}
    assert timed["unfused"] == timed["assoc-a"] | {"provider": "unfused", "plan": "assoc-a"}
    for row in writer.rows:
        row["samples"] = 7
    assert len(report.noise(rows.grouped(writer.rows))) == 1  # ours and repeat


def test_the_best_of_several_equals_is_not_faster_than_they_are():
    """The least of their medians is; and where one is the fastest in both halves, its own row is returned."""
    draw, least, halves = random.Random(0), [], []
    for _ in range(300):
        found = {}
        for name in "abc":
            groups = tuple(draw.gauss(1.0, 0.1) for _ in range(32))
            found[name] = {"status": "ok", "ms_p50": float(np.median(groups)), "ms_groups": groups}
        least.append(min(row["ms_p50"] for row in found.values()))
        halves.append(measure.fastest_by_halves(found, list(found))["ms_p50"])
    assert np.mean(least) < 0.985 and abs(np.mean(halves) - 1.0) < 0.003
    found["a"] = {"status": "ok", "ms_p50": 0.5, "ms_groups": (0.5,) * 32}
    found["d"], found["e"] = {"status": "ok", "ms_p50": 9.0, "ms_groups": (9.0,) * 3}, {"status": "wrong"}
    assert measure.fastest_by_halves(found, list(found)) == found["a"] | {"plan": "a"}
    assert measure.fastest_by_halves({"e": {"status": "wrong"}}, ["e"])["status"] == "skipped"


def test_a_provider_is_timed_twice_for_the_noise():
    for names, twin in ((("linear", "ours", "repeat"), "ours"), (("best-eager", "assoc-b", "repeat"), "assoc-b")):
        found = measured(TINY, ("fwd",), names)
        row = found["fwd", "repeat"]
        assert (row["status"], row["plan"], row["err_fro"]) == ("ok", twin, found["fwd", twin]["err_fro"])


# Limits


def test_problems_over_the_budget_are_rows(rated, out):
    shapes = [(8192, 4096, 1024), (8, 4, 2)]
    wanted = operator_suite.Wanted(("summary",), ("infer",), shapes, ("fp32",), ("ours",), operator_suite.CPU_BUDGET)
    operator_suite.run(wanted, ASKED, out)
    assert [row["status"] for row in out.rows] == ["ok", "skipped", "ok", "ok"] and out.rows[2]["sol_frac"] > 0
    assert "over the FLOP budget" in out.rows[1]["note"] and "of 100 GFLOP" in out.rows[1]["note"]
    assert [row["mode"] for row in out.rows if row["op"] == "ceiling"] == ["start", "end"]


def test_large_problems_on_a_cpu_have_their_main_providers_and_modes(rated, out):
    names = ["ours", "assoc-a", "assoc-c", "unfused", "inverse-inv", "inverse-cholesky", "multi-dot", "repeat"]
    main = {"ours", "assoc-a", "unfused", "inverse-inv", "repeat"}
    wanted = operator_suite.Wanted(("summary",), None, [(20, 16, 6)], ("fp32",), names, large=1e-9)
    operator_suite.run(wanted, ASKED, out)
    found = {(row["mode"], row["provider"]): row for row in out.rows if row["op"] != "ceiling"}
    assert len(found) == len(names) * 4
    done = {key for key, row in found.items() if row["status"] == "ok"}
    assert done == set(itertools.product(("fwdbwd", "infer"), main))
    notes = {row["note"] for key, row in found.items() if key not in done}
    assert notes == {"0 GFLOP, of 0 on timed only where --provider or --mode names it"}
    operator_suite.run(wanted._replace(modes=("bwd",)), ASKED, out)
    assert {row["provider"] for row in out.rows if row["mode"] == "bwd" and row["status"] == "ok"} == main


@pytest.mark.parametrize(
    ("arguments", "large", "orthogonal"),
    [([], True, True), (["--quick"], True, False), (["--provider", "orthogonal"], False, True)],
    ids=["all", "quick", "named"],
)
def test_providers_and_limits_of_a_run(arguments, large, orthogonal, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(operator_suite, "run", lambda wanted, *_: seen.append(wanted))
    out = ["--out", str(tmp_path / "record.jsonl")]
    assert main(["run", "--device", "cpu", "--suite", "ops", *arguments, *out]) == 2  # nothing was timed
    assert (seen[0].large is not None, "orthogonal" in seen[0].providers) == (large, orthogonal)


def test_nothing_begins_when_the_time_is_over(rated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(explain_suite, "_SAMPLES", 100)
    monkeypatch.setattr(explain_suite, "_BATCH", {"cnn": 1, "vgg11": 1})
    file = tmp_path / "record.jsonl"
    arguments = ["--device", "cpu", "--minutes", "0", "--dtype", "fp32", "--shape", "8,4,2", "--revision", "f00d"]
    assert main(["run", *arguments, "--out", str(file)]) == 0
    timed = [row for row in rows.read([file]) if row["op"] != "ceiling"]
    assert {(row["status"], row["note"]) for row in timed} == {("skipped", "out of time: 0 minutes")}
    suites = ("train_cnn", "train_vgg11", "linearize_cnn", "linearize_vgg11", "group_patterns", *problems.LAYERS)
    assert {row["op"] for row in timed} == {"summary", "cross_entropy", *suites} and all(row["d"] for row in timed)
    assert "- (8, 4, 2): out of time: 0 minutes" in capsys.readouterr().out
    limit, said = Limit(), itertools.chain([None], itertools.repeat("out of time"))  # or between two modes
    monkeypatch.setattr(limit, "over", lambda: next(said))
    found = measured(TINY, ("fwd", "bwd"), ("ours",), ASKED._replace(limit=limit))
    assert [(row["status"], row["note"]) for row in found.values()] == [("ok", None), ("skipped", "out of time")]


# Suites


def test_training_steps(out, monkeypatch):
    seen, step = [], training_suite._own
    wrong = lambda *given: seen.append(torch.backends.cudnn.conv.fp32_precision) or 1.001 * step(*given)  # noqa: E731
    training_suite.run(("ours", "linear", "base-head", "ours-cuda", "repeat"), ASKED, out, ("cnn",))
    status = {row["provider"]: row["status"] for row in out.rows}
    assert status == {"ours": "ok", "linear": "ok", "base-head": "ok", "ours-cuda": "unsupported", "repeat": "ok"}
    sizes = {row["provider"]: row["parameters"] for row in out.rows}
    assert sizes["linear"] == sizes["ours"] == sizes["repeat"] != sizes["base-head"]
    assert {tuple(row[name] for name in ("op", "n", "d", "k", "m")) for row in out.rows} == {
        ("train_cnn", 32, 1600, 120, 10)
    }
    monkeypatch.setattr(training_suite, "_own", wrong)
    training_suite.run(("ours",), ASKED, out, ("cnn",))
    assert out.rows[-1]["status"] == "wrong"
    assert set(seen) == {"ieee"}  # cudnn's convolutions are not, unless asked, on a device that has tf32


def test_explanations(out, monkeypatch):
    seen, linearize = [], explain_suite.linearize
    noted = lambda *given: seen.append(torch.backends.cudnn.conv.fp32_precision) or linearize(*given)  # noqa: E731
    monkeypatch.setattr(explain_suite, "linearize", noted)
    monkeypatch.setattr(explain_suite, "ARCHITECTURES", ("cnn",))
    monkeypatch.setattr(explain_suite, "_BATCH", {"cnn": 2})
    monkeypatch.setattr(explain_suite, "_SAMPLES", 100)
    explain_suite.run(ASKED, out)
    assert set(seen) == {"ieee"} and {row["status"] for row in out.rows} == {"ok"}


# Clocks, memory, operations


@pytest.mark.parametrize("timer", ["events", "graph", "host"])
@pytest.mark.parametrize("cold", [False, True])
def test_the_clocks_of_a_gpu(timer, cold, monkeypatch):
    graphs = []

    def capture(call, device):
        graphs.append(Graph(call))
        return graphs[-1], graphs[-1].out

    monkeypatch.setattr(problems, "cache_bytes", lambda _: 20_000)
    for clock in ("on_events", "on_host"):
        monkeypatch.setattr(clocks, clock, lambda work, calls: lambda: work() or 0.25)
    monkeypatch.setattr(measure, "capture", capture)
    problem, names = Problem("summary", 9, 20, 6), ("ours", "assoc-b", "best-eager", "graphed", "inverse-inv")
    found = measured(problem, ("infer", "fwdbwd"), names, Asked(CPU, timer, cold, seconds=0.0, samples=3))
    sets = problems.rotation(problem, CPU, cold)
    for mode in ("infer", "fwdbwd"):
        assert all(found[mode, name]["ms_p50"] == 0.25 for name in ("ours", "assoc-b", "best-eager"))
        assert {row["l2"] for row in found.values()} == {"cold" if cold else "hot"}
        assert (found[mode, "graphed"]["status"] == found[mode, "inverse-inv"]["status"] == "ok") is (timer != "graph")
        assert timer != "graph" or "a graph cannot record" in found[mode, "inverse-inv"]["note"]
    assert len(graphs) == (2 * 2 if timer == "graph" else 2 * sets)


def test_cold_inputs_fill_the_cache_and_are_used_in_turn(monkeypatch):
    monkeypatch.setattr(problems, "cache_bytes", lambda _: 20_000)
    seen = []
    noted = lambda x, b: seen.append(x.data_ptr()) or x @ (b @ (b.mT @ b))  # noqa: E731
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", noted)
    measured(TINY, ("infer",), ("assoc-b",), ASKED._replace(cold=True, samples=20))
    sets = problems.rotation(TINY, CPU, True)
    assert len(set(seen)) == sets > 2 and sets * 2 * 4 * (20 * 16 + 16 * 6 + 20 * 6) >= 40_000
    one, other = (problems.datasets(TINY, CPU, 2) for _ in range(2))
    assert torch.equal(one[1].x, other[1].x) and not torch.equal(one[0].x, one[1].x)


def test_rounds_take_a_sample_of_each_in_any_order():
    order = []
    samplers = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    taken = clocks.rounds(samplers, 0.0, least=4, most=60)
    assert {len(samples) for samples in taken.values()} == {4}
    assert [sorted(order[i : i + 3]) for i in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert order != sorted(order, key=order.index) and len(clocks.rounds(samplers, 60.0, 5, 6)["a"]) == 6
    timed = clocks.interleave({"short": lambda: time.sleep(0.0005), "long": lambda: time.sleep(0.005)}, seconds=0.0)
    assert timed["short"].p50 < timed["long"].p50 and timed["short"].samples == timed["long"].samples == 7


def test_a_slow_provider_does_not_take_the_samples_of_the_others(monkeypatch):
    now = [0.0]

    def taking(seconds):
        def sample():
            now[0] += seconds
            return 1e3 * seconds

        return sample

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    quick = {f"quick {i}": taking(0.001) for i in range(9)}
    taken = clocks.rounds({**quick, "slow": taking(0.1)}, 2.0, 7, 500)
    counts = {name: len(samples) for name, samples in taken.items()}
    assert 7 <= counts.pop("slow") < 15 and set(counts.values()) == {counts["quick 0"]}
    assert counts["quick 0"] > 100 and now[0] < 2.2
    even = clocks.rounds({name: taking(0.1) for name in "abc"}, 2.0, 7, 500)
    assert len({len(samples) for samples in even.values()}) == 1


def test_memory_is_counted():
    x, w = (torch.randn(100, 100, requires_grad=True) for _ in range(2))
    peak, result = footprint.peak_bytes(lambda: (x @ w) @ w, CPU)
    assert peak == 80_000 and torch.equal(result, (x @ w) @ w)
    assert footprint.saved_bytes(lambda: (x @ w) @ w, (x, w)) == 40_000
    assert footprint.saved_bytes(lambda: x @ w, (x, w)) == 0


def test_operations_and_bytes_are_those_written_out_by_hand():
    """8 rows of 4 features, 2 columns, in fp32. A product of (m, k) and (k, n) is 2 m k n operations."""
    summary = Problem("summary", 8, 4, 2)
    forward = 2 * 2 * 4 * 2 + 2 * 4 * 2 * 2 + 2 * 8 * 4 * 2  # G = bᵀb, bG, X(bG)
    assert problems.useful_flops(summary, "infer") == problems.useful_flops(summary, "fwd") == forward == 192
    # dX = dY(bG)ᵀ, S = XᵀdY, T = bᵀS, db = SG + b(T + Tᵀ)
    backward = 2 * 8 * 2 * 4 + 2 * 4 * 8 * 2 + 2 * 2 * 4 * 2 + 2 * 4 * 2 * 2 + 2 * 4 * 2 * 2
    assert problems.useful_flops(summary, "bwd") == backward == 352
    assert problems.useful_flops(summary, "fwdbwd") == forward + backward
    inputs, output = 8 * 4 + 4 * 2, 8 * 2
    assert problems.least_bytes(summary, "fwd") == 4 * (inputs + output) == 224
    assert problems.least_bytes(summary, "fwdbwd") == 4 * (2 * inputs + 2 * output) == 448
    assert problems.least_bytes(summary._replace(dtype="bf16"), "bwd") == 2 * (2 * inputs + output) == 192
    assert problems.least_bytes(Problem("head", 8, 4, 2, 3), "loss") == 4 * 2 * (inputs + 3 * 2) == 368
    layer = summary._replace(op="layer-newton-schulz")  # W = b (3 I - G) / 2 costs what W = b G does
    assert problems.useful_flops(layer, "fwdbwd") == forward + backward
    # two products of 2 x 2 more for q of degree 4, and four for its gradient
    assert problems.useful_flops(layer._replace(op="layer-pc-4"), "fwdbwd") == forward + backward + 6 * 2 * 2**3
    assert problems.useful_flops(layer, "update") == 10 * 2 * 2 * 4 * 2  # ten iterations of b v and bᵀu
    assert problems.least_bytes(layer, "update") == 4 * 4 * 2


@pytest.mark.parametrize(("mode", "precision"), [("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")])
def test_products_set_and_restore_pytorchs_switches(mode, precision):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    with problems.products(mode):
        assert [switch.fp32_precision for switch in switches] == [precision] * 2
    assert [switch.fp32_precision for switch in switches] == before


# Commands


def test_the_overhead_of_a_layer(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(host, "_ROUNDS", 2)
    monkeypatch.setattr(host, "_CALLS", 1)
    printed, record = host.table(host.run(tmp_path / "host.json")), json.loads((tmp_path / "host.json").read_text())
    assert "engine: loss of a head" in printed and "SummaryLinear, forward to by hand, forward" in printed
    low, high = record["heads"]["compared"][1]["ratio"]
    assert 0 < low <= high and len(record["kernels"]["compared"]) == 4 and record["functions"]["SummaryLinear(x)"] <= 6


@needs_records
def test_the_pages_have_the_overhead_of_the_record():
    record = json.loads((environment.ROOT / "benchmarks/results/cpu/host.json").read_text())
    reading, performance = (
        " ".join((environment.ROOT / "docs" / page).read_text(encoding="utf-8").split())
        for page in ("reading.md", "performance.md")
    )
    heads, kernels = record["heads"]["median"], record["kernels"]["median"]
    ms = [f"{heads[f'{way}, {mode}'] / 1000:.2f}" for mode in ("forward and backward", "forward")
          for way in ("with reconstruction", "loss")]  # fmt: skip
    found = record["heads"]["compared"][1]
    assert "take {} ms with it and {} without".format(*ms[:2]) in reading
    assert "{} and {} ms; one thread".format(*ms[2:]) in reading
    assert (
        f"{found['value']:.2f} times as long (95 % interval {found['ratio'][0]:.2f} to {found['ratio'][1]:.2f};"
        in reading
    )
    ours, plain = ([f"{kernels[f'{call}, {mode}']:.0f}" for mode in ("forward", "forward and backward")]
                   for call in ("summary", "F.linear"))  # fmt: skip
    assert "a forward takes {} µs and {} µs with its backward".format(*ours) in performance
    assert "F.linear takes {} and {} µs".format(*plain) in performance


def test_commands(rated, tmp_path, capsys):
    file = tmp_path / "record.jsonl"
    arguments = ["run", "--suite", "ops", "--op", "summary", "--shape", "16,8,4", "--mode", "fwdbwd", "--samples", "5"]
    arguments += ["--seconds", "0.01", "--provider", "ours", "--provider", "linear"]
    arguments += ["--device", "cpu", "--out", str(file)]
    assert main(arguments) == 0 and "| 16, 8, 4 |" in capsys.readouterr().out
    assert [row["provider"] for row in rows.read([file])] == ["device", "ours", "linear", "repeat", "device"]
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "(quack is not installed)" in printed
    assert all(f"  {name} " in printed for name in (*providers.ABOUT, *peers.NAMES, *SUITES, *experiments.COMMANDS))
    assert main(["experiments"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(experiments.COMMANDS)
    assert main(["env"]) == 0 and json.loads(capsys.readouterr().out).keys() == environment.facts().keys()
    assert main(["experiments", "summary-vg"]) == 2 and "did you mean summary_vgg" in capsys.readouterr().err


def test_the_suite_of_the_selection_prints_its_regret(rated, tmp_path, capsys):
    file = tmp_path / "record.jsonl"
    arguments = ["--device", "cpu", "--shape", "3,8,4", "--samples", "5", "--seconds", "0.01", "--out", str(file)]
    assert main(["run", "--suite", "selection", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "Regret of the choice of a plan: ours / best-plan" in printed and "problems and modes" in printed
    found = [row for row in rows.read([file]) if row["op"] != "ceiling"]
    assert {row["mode"] for row in found} == {"infer", "fwdbwd"} and {row["op"] for row in found} == {"summary"}
    of = {(row["mode"], row["provider"]): row for row in found}
    assert {name for mode, name in of if mode == "infer"} >= {"linear", "unfused", "inverse-inv", *providers.PLAN_NAMES}
    for mode, hows in (("infer", [" by autograd"]), ("fwdbwd", ["", " by autograd"])):
        timed = {
            of[mode, name]["plan"]: of[mode, name]["ms_p50"]
            for name in ("ours", *providers.PLAN_NAMES)
            if of[mode, name]["ms_p50"]
        }
        assert timed.keys() == {f"eager {order}{how}" for order in ("(Xb)G", "X(bG)", "((Xb)bᵀ)b") for how in hows}
        assert of[mode, "best-plan"]["ms_p50"] == min(timed.values()) == timed[of[mode, "best-plan"]["plan"]]
    assert found[0]["paths"] == list(PATHS["selection"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--device", "cpu", "--timer", "graph"], "--timer: got graph, want wall on cpu"),
        (["run", "--shape", "16,0,4"], "got '16,0,4', want N,D,K or N,D,K,M of positive whole numbers"),
        (["run", "--suite", "train", "--provider", "compile"], "--provider: compile: no suite has a problem"),
        (["compare", "HEAD", "--op", "head"], "no problem has the ops, modes and shapes asked for"),
        (
            ["compare", "HEAD", "--op", "summary", "--mode", "loss"],
            "no problem has the ops, modes and shapes asked for",
        ),
        (["compare", "HEAD", "--mode", "fast"], "argument --mode: "),
        (["compare", "HEAD", "--rounds", "4"], "argument --rounds: got 4, want at least 5"),
        (["demo", "--seeds", "0"], "argument --seeds: got 0, want at least 1"),
        (["demo", "--dataset", "mnist", "--data", "nowhere"], "mnist: not found in nowhere"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_fit_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        raise SystemExit(main(arguments))
    assert message in capsys.readouterr().err


def test_demo(tmp_path, monkeypatch, capsys):
    from benchmarks import demo
    from interp_nn.explain.report import network_report

    monkeypatch.setattr(demo, "_timings", lambda n, d, k, device: timings(n, d, k))
    # A quarter of the time is the rendering of the page, which has tests of its own.
    monkeypatch.setattr(network_report, "image", lambda figure, alt: pyplot.close(figure) or "")
    assert main(["demo", "--epochs", "1", "--seeds", "2", "--train-size", "256", "--output", str(tmp_path)]) == 0
    assert "passed" in capsys.readouterr().out and (tmp_path / "demo-digits.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((tmp_path / "demo-digits.json").read_text())["results"]["runs"]
    assert [(run["head"], run["seed"]) for run in runs] == [("mlp", 0), ("summary", 0), ("mlp", 1), ("summary", 1)]


def timings(n, d, k):
    row = measured(TINY, ("fwdbwd",), ("ours",))["fwdbwd", "ours"]
    return {"n": n, "d": d, "k": k, "plan": row["plan"], "ms_p50": {"ours": row["ms_p50"], "linear": 1.0}}


@pytest.mark.slow
def test_the_summary_head_matches_the_mlp_head_on_digits(tmp_path):
    assert main(["demo", "--dataset", "digits", "--output", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "demo-digits.json").read_text())["results"]["runs"]
    last = {head: [r["test_accuracy"][-1] for r in runs if r["head"] == head] for head in ("mlp", "summary")}
    assert len(last["mlp"]) == 3 and sum(last["summary"]) >= sum(last["mlp"]) - 3 * 0.01
    for run in (run for run in runs if run["head"] == "summary"):
        assert run["agreement"] >= 0.99 and run["relative_difference"] <= 0.05 and run["first_loss"] < 10


def test_slower_is_by_the_medians_by_most_samples_and_beyond_the_noise():
    class Worker:
        def __init__(self, ours, linear):
            self.given = {"ours": ours, "linear": linear}

        def ask(self, **question):
            return self.given[question["sample"]] if "sample" in question else []

    def verdict(base, head):
        return compare._compared(TINY, "fwd", (Worker(*base), Worker(*head)), 5, 0.05)

    def slower(base, head):
        return verdict(base, head).slower

    assert slower((1.0, 1.0), (1.2, 1.0)) and not slower((1.0, 1.0), (1.04, 1.0))
    assert not slower((1.0, 1.0), (1.2, 1.2)) and not slower((1.2, 1.0), (1.0, 1.0))
    assert not slower((1.0, 1.0), (1.1, 1.3))  # nn.Linear, which cannot have changed, is slower still
    assert verdict((1.0, 1.0), (1.1, 1.3)).said == "too noisy to judge" and not verdict((1.0, 1.0), (1.1, 1.1)).said
    assert verdict((1.0, 1.0), (0.7, 0.7)).said == "too noisy to judge"
    assert verdict((1.0, 1.0), (1.4, 1.3)).said == "SLOWER" and not verdict((1.0, 1.0), (0.5, 1.0)).said


@pytest.mark.slow
def test_a_planted_slow_revision_is_caught(tmp_path, monkeypatch, capsys):
    if not (environment.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--shared", str(environment.ROOT), str(clone)], check=True)
    file = clone / "interp_nn" / "functional.py"
    planted = "\n_exact = summary\n\n\ndef summary(*given):\n    import time\n\n    time.sleep(0.02)\n    return _exact(*given)\n"
    file.write_text(file.read_text() + planted)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, "commit", "--quiet", "--all", "--message", "slower"], cwd=clone, check=True)
    monkeypatch.setattr(compare.revisions, "__defaults__", (clone,))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a busy machine then only slows it down
    arguments = ["--shape", "64,32,16", "--mode", "fwdbwd", "--op", "summary", "--rounds", "15"]
    assert main(["compare", "HEAD~", "HEAD", *arguments]) == 1 and "SLOWER" in capsys.readouterr().out
    monkeypatch.delattr("tarfile.data_filter", raising=False)  # as before Python 3.10.12
    monkeypatch.setattr("tarfile.TarFile.extraction_filter", staticmethod(lambda member, path: member), raising=False)
    assert main(["compare", "HEAD", "HEAD~", *arguments]) == 0
    assert main(["compare", "HEAD", "nothing", *arguments]) == 2
    assert "benchmarks compare: nothing: " in capsys.readouterr().err
