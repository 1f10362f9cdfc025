"""The GPU job without a GPU: what it would check, how it keeps its time, that a failure is a record and not the end."""

import argparse
import contextlib
import itertools
import json
import os
import stat
import subprocess
import sys
import textwrap
import time
import types

import pytest
import torch

import interp_nn
from benchmarks import law, providers
from benchmarks.gpu import cases, checks, job, kernels, runs, summary, times, worker
from benchmarks.gpu.log import Log, read
from benchmarks.record import ROOT
from interp_nn import engines, functional
from interp_nn.chips import Chip
from interp_nn.engines import memory
from interp_nn.kernels import configs

CPU = torch.device("cpu")
BOTH = kernels.WITH_KERNELS


@pytest.fixture(autouse=True)
def _one_thread():
    """Problems are so small that several threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log.jsonl", "part", 60.0, {"device": "a device"})


@pytest.fixture
def lines(log):
    return lambda: read(log._path)


# Cases


@pytest.mark.parametrize("what", cases.FACTORS)
def test_every_two_levels_meet_in_some_case(what):
    factors = cases.FACTORS[what]
    rows = cases.covering(factors)
    for one, other in itertools.combinations(factors, 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(itertools.product(factors[one], factors[other])), (one, other)
    largest = sorted(map(len, factors.values()))[-2:]
    assert len(rows) <= 2 * largest[0] * largest[1]


def test_every_process_finds_the_same_cases():
    found = cases.cases()
    assert len({case.name for case in found}) == len(found)
    code = "from benchmarks.gpu import cases; print(*(case.name for case in cases.cases()), sep='\\n')"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.splitlines() == [case.name for case in found]


def test_the_first_cases_are_of_every_kind():
    first = cases.cases()[: 2 * len(cases.FACTORS)]
    assert {case.what for case in first} == set(cases.FACTORS)
    assert len({case.mode for case in first}) > 2


@pytest.mark.parametrize("case", [case for case in cases.cases() if case.d < 100][::9], ids=lambda case: case.name)
def test_a_case_is_a_problem_whose_plain_expression_runs(case):
    asked = checks.problem(case, 17, CPU)
    results = checks.evaluate(asked.plain, asked.inputs, asked.upstreams, asked.wanted)
    assert len(results) == len(asked.outputs) + len(asked.wanted)
    again = checks.problem(case, 17, CPU)
    assert all(torch.equal(t, again.inputs[name]) for name, t in asked.inputs.items())


# The law


def test_the_law():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert law.errors(torch.tensor([3.0, 4.5]), exact) == (0.1, 0.125)
    assert law.errors(torch.tensor([3.0, torch.nan]), exact) == (torch.inf, torch.inf)
    assert law.errors(torch.zeros(2), torch.zeros(2).double()) == (0.0, 0.0)
    assert law.errors(torch.ones(2), torch.zeros(2).double()) == (torch.inf, torch.inf)
    assert law.breach((0.1, 0.1), (0.05, 0.05), 0.0) is None
    assert "maximum error 0.2" in law.breach((0.1, 0.2), (0.05, 0.05), 0.05)
    assert "Frobenius" in law.breach((torch.nan, 0.0), (0.05, 0.05), 0.0)
    assert "proves nothing" in law.breach((0.0, 0.0), (torch.inf, 0.0), 0.0)
    assert law.floor(torch.bfloat16) == 3 * 2**-7


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_guards_notice_what_is_written_around(layout):
    t = torch.arange(6.0).view(2, 3)
    held = checks.guarded(t, layout)
    assert torch.equal(held.tensor, t)
    assert held.tensor.stride() == {"rows": (3, 1), "transposed": (1, 2), "apart": (1, 4), "strided": (6, 2)}[layout]
    assert held.tensor.data_ptr() % 16 == 0
    assert not held.touched()
    held.tensor.fill_(7)
    assert not held.touched()
    gaps = held.buffer.isnan().nonzero()[:, 0]
    inner = [int(i) for i in gaps if gaps[0] + 4096 <= i < gaps[-1] - 4096]
    assert bool(inner) is (layout in ("apart", "strided"))
    for place in (4095, len(held.buffer) - 4096, *inner[:1]):
        before, held.buffer[place] = held.buffer[place].clone(), 0
        assert held.touched()
        held.buffer[place] = before


def admitting(patch):
    """No engine refuses anything."""
    patch.setattr(kernels, "refusal", lambda *args: None)


@contextlib.contextmanager
def any_engine(monkeypatch):
    """The reference computes whatever engine is asked for, and says that a kernel was launched."""
    with monkeypatch.context() as patch:
        admitting(patch)
        patch.setattr(interp_nn, "use_engine", lambda name: contextlib.nullcontext())
        patch.setattr(kernels, "launches", lambda engine: contextlib.nullcontext(["a kernel"]))
        yield patch


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_engine_is_judged_at_each_number_of_rows(layout, log, lines, monkeypatch):
    case = cases.Case("summary", "fp32", (5, 9), 6, 3, layout, "x b bias")
    with any_engine(monkeypatch):
        checks.check_case(case, BOTH, CPU, log)
    found = lines()
    engines = (*BOTH, "reference")
    assert [(line["n"], line["engine"], line["status"]) for line in found] == [
        (n, engine, "ok") for n in (5, 9) for engine in engines
    ]
    for line in found:
        assert set(line["errors"]) == {"y", "dx", "db", "dbias"}
        assert {"device", "form", "config", "kernels", "floor", "dtype", "d", "k", "mode", "layout"} <= set(line)


def test_what_an_engine_refuses_is_counted(log, lines, monkeypatch):
    with any_engine(monkeypatch) as patch:
        patch.setattr(kernels, "refusal", lambda engine, *_: "cuda: not this one" if engine == "cuda" else None)
        checks.check_case(cases.Case("pair", "fp32", (9,), 6, 3, wanted="summary"), BOTH, CPU, log)
        checks.check_far_rows(BOTH, CPU, log, 2**12, 8, torch.float32)
        runs.run_small("cuda", CPU, log)
    found = lines()
    assert {line["status"] for line in found if line["engine"] != "cuda"} == {"ok"}
    refused = [line for line in found if line["engine"] == "cuda"]
    assert len(refused) == 3 + 5 + 2
    assert {(line["status"], line["why"]) for line in refused} == {("skipped", "cuda: not this one")}
    assert f"skipped: part: {len(refused)} (cuda: not this one)" in summary.table(found)


H100 = Chip((9, 0), 132, 232448, 1.0, 1.0)


def test_refusals(monkeypatch):
    monkeypatch.setattr(kernels, "chip_of", lambda device: H100)
    for engine in BOTH:
        monkeypatch.setitem(engines._reasons, engine, None)
        assert kernels.refusal(engine, torch.device("cuda"), torch.bfloat16, 9, 6, 3) is None
    wide = "cuda: its kernels have at most 128 columns, not 200"
    assert kernels.refusal("cuda", torch.device("cuda"), torch.bfloat16, 9, 6, 200) == wide
    assert kernels.refusal("triton", torch.device("cuda"), torch.bfloat16, 9, 6, 200) is None
    assert "at most 128 columns and classes" in kernels.refusal(
        "cuda", torch.device("cuda"), torch.float32, 9, 6, 3, 200, True
    )


def test_which_engines_are_at_hand(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernels.at_hand("cpu") == ()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(engines._reasons, "triton", None)
    monkeypatch.setitem(engines._reasons, "cuda", None)
    assert kernels.at_hand("cpu") == ("triton",)
    assert kernels.at_hand("cuda") == BOTH
    monkeypatch.setitem(engines._reasons, "cuda", "no library")
    assert kernels.reasons("cuda") == {"triton": None, "cuda": "no library"}


def test_the_names_of_what_is_launched(monkeypatch):
    """By the hook of each engine; what it launches is not run here."""
    with kernels.launches("reference") as none:
        functional.summary(torch.ones(2, 3), torch.ones(3, 1))
    assert none == []
    cuda, triton = engines.get("cuda"), engines.get("triton")
    for engine, module, what in (
        ("cuda", cuda, cuda._forward),
        ("triton", triton, types.SimpleNamespace(kernel=types.SimpleNamespace(__name__="stream"))),
    ):
        monkeypatch.setattr(module, "launch", lambda what, *args: args)
        with kernels.launches(engine) as names:
            assert module.launch(what, 1, 2) == (1, 2)
        assert names == [{"cuda": "cuda_forward", "triton": "stream"}[engine]]
        module.launch(what)
        assert len(names) == 1


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (cases.Case("summary", "bf16", (9,), 6, 3), "summary"),
        (cases.Case("pair_loss", "fp32", (9,), 6, 3, ignored="all"), "summary_cross_entropy"),
        (cases.Case("flat", "fp16", (9,), 6, 3, m=2, reduction="none"), "summary_head_cross_entropy"),
    ],
)
@pytest.mark.parametrize("right", [True, False])
def test_a_wrong_result_is_wrong(case, name, right, log, lines, monkeypatch):
    function = getattr(functional, name)
    if not right:
        monkeypatch.setattr(
            functional, name, lambda *args, **options: 1 + 1.2 * function(*args, **options).nan_to_num()
        )
    with any_engine(monkeypatch):
        checks.check_case(case, BOTH, CPU, log)
    assert {line["status"] for line in lines()} == {"ok" if right else "wrong"}


def test_an_engine_that_launches_nothing_is_wrong(log, lines, monkeypatch):
    with any_engine(monkeypatch) as patch:
        patch.setattr(kernels, "launches", lambda engine: contextlib.nullcontext([]))
        checks.check_case(cases.Case("pair", "fp32", (9,), 6, 3, wanted="projection"), BOTH, CPU, log)
    assert [line.get("why") for line in lines()] == ["no kernel was launched", "no kernel was launched", None]


def test_an_engine_that_is_off_has_failed(log, lines, monkeypatch):
    admitting(monkeypatch)
    checks.check_case(cases.Case("pair", "fp32", (9,), 6, 3, wanted="summary"), BOTH, CPU, log)
    assert [line["status"] for line in lines()] == ["failed", "failed", "ok"]
    for line, engine in zip(lines(), BOTH, strict=False):
        assert f"the {engine} engine is off" in line["why"]
    assert log.bad == 2


def test_poison_reaches_what_the_engine_writes(log, lines):
    engine = engines.get("triton")
    with checks.poisoned():
        assert engine.workspace((2, 3), torch.float32, CPU).isnan().all()
        assert engine.workspace((2, 3), torch.float32, CPU, (1, 2)).isnan().all()
        assert not memory.counter(CPU).any()
    assert not torch.are_deterministic_algorithms_enabled()
    checks.check_poison((), CPU, log)
    assert [line["status"] for line in lines()] == ["ok"]


@pytest.mark.parametrize("filled", [True, False])
def test_an_engine_whose_memory_is_not_filled_is_noticed(filled, log, lines, monkeypatch):
    with any_engine(monkeypatch) as patch:
        patch.setattr(kernels, "profiled", lambda call, device: (call(), ["fill", "kernel"][not filled :]))
        checks.check_poison(BOTH, CPU, log)
    assert [line["status"] for line in lines()] == ["ok", *(["ok" if filled else "wrong"] * 2)]


def test_memory_without_poison_is_noticed(log, lines, monkeypatch):
    monkeypatch.setattr(checks, "poisoned", contextlib.nullcontext)
    monkeypatch.setattr(torch, "empty_strided", lambda size, stride, **made: torch.zeros(size, **made))
    checks.check_poison((), CPU, log)
    assert [line["status"] for line in lines()] == ["wrong"]


@pytest.mark.parametrize("allowed", [True, False])
def test_products_sets_the_switches_and_puts_them_back(allowed, monkeypatch):
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)  # as older programs say it
    before = [switch.fp32_precision for switch in switches]
    for mode in cases.MODES:
        with checks.products(mode):
            assert {switch.fp32_precision for switch in switches} == {"tf32" if mode == "tf32" else "ieee"}
    assert [switch.fp32_precision for switch in switches] == before
    assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize("right", [True, False])
def test_far_rows(right, log, lines, monkeypatch):
    if not right:
        summary, loss = functional.summary, functional.summary_cross_entropy
        monkeypatch.setattr(functional, "summary", lambda x, b: torch.cat((summary(x[:-9], b), x[-9:] @ b)))
        monkeypatch.setattr(functional, "summary_cross_entropy", lambda x, b, t: loss(x[:-9], b, t[:-9]))
    with any_engine(monkeypatch):
        checks.check_far_rows(BOTH, CPU, log, 2**12, 8, torch.float32)
    assert [line["engine"] for line in lines()] == [*BOTH, *BOTH]
    assert [line["status"] for line in lines()] == ["ok" if right else "wrong"] * 4
    assert set(lines()[0]["errors"]) == {"db", *(f"{t}[{at}:]" for t in ("y", "dx") for at in (0, 12, 1012))}


# The log


def test_a_log_keeps_what_json_cannot_say(log, lines):
    log.write("one", "info", number=torch.inf, nothing=float("nan"), nested=[{"dtype": torch.float16}], shape=(1, 2))
    log.check("two", None)
    log.check("three", "too far off")
    with log.guarded("four", shape=3):
        raise ValueError("as asked")
    assert log.bad == 2
    one, two, three, four = lines()
    assert (one["number"], one["nothing"], one["nested"], one["shape"]) == (
        "inf",
        "nan",
        [{"dtype": "torch.float16"}],
        [1, 2],
    )
    assert (two["status"], three["status"], three["why"]) == ("ok", "wrong", "too far off")
    assert (four["status"], four["why"], four["shape"]) == ("failed", "ValueError: as asked", 3)
    assert "as asked" in four["trace"] and four["device"] == "a device"


def test_half_a_line_is_no_line(tmp_path):
    file = tmp_path / "log"
    file.write_text('{"status": "ok"}\n{"stat')
    assert read(file) == [{"status": "ok"}]
    assert read(tmp_path / "none") == []


# A worker


def steps(*bodies):
    return [worker.Step(f"step {i}", body) for i, body in enumerate(bodies)]


def test_a_step_that_raises_is_not_the_last(log, lines, tmp_path, capsys):
    def fails(log):
        raise RuntimeError("as asked")

    def succeeds(log):
        log.write("done", "ok")

    position = tmp_path / "position"
    assert worker.work(steps(fails, succeeds, succeeds), log, CPU, 0, position) == 0
    assert [line["status"] for line in lines()] == ["failed", "ok", "ok"]
    assert position.read_text() == "2"
    assert "step 0: 0.0 s BAD" in capsys.readouterr().out


def test_a_worker_goes_on_where_another_one_ended(log, lines):
    done = []
    assert worker.work(steps(*(lambda log, i=i: done.append(i) for i in range(4))), log, CPU, 2, None) == 0
    assert done == [2, 3]


def test_a_worker_without_its_device_ends(log, lines, monkeypatch):
    monkeypatch.setattr(worker, "_lost", lambda *_: True)
    assert (
        worker.work(steps(lambda log: log.write("bad", "wrong"), lambda log: 1 / 0), log, CPU, 0, None) == worker.LOST
    )
    assert len(lines()) == 1


def test_steps_after_the_time_are_skipped(tmp_path):
    log = Log(tmp_path / "log", "part", -1.0, {})
    assert worker.work(steps(lambda log: 1 / 0, lambda log: 1 / 0), log, CPU, 0, None) == 0
    assert [(line["name"], line["status"], line["why"]) for line in read(tmp_path / "log")] == [
        ("step 0", "skipped", "out of time"),
        ("step 1", "skipped", "out of time"),
    ]


@pytest.mark.parametrize("engines", [BOTH, ("triton",), ("cuda",)], ids=",".join)
@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("part", worker.PARTS)
def test_every_part_has_steps_with_names_of_their_own(part, tiny, engines, tmp_path):
    found = worker.PARTS[part](worker.Settings(CPU, tmp_path, tiny, engines))
    assert bool(found) is not (part.startswith("compile") and "triton" not in engines)
    assert len({step.name for step in found}) == len(found)


@pytest.mark.parametrize("part", ["launches", "repeats", "streams", "graphs", "small"])
def test_what_runs_alone_runs_with_every_engine(part, tmp_path):
    steps = {
        engines: {step.name for step in worker.PARTS[part](worker.Settings(CPU, tmp_path, False, engines))}
        for engines in (BOTH, ("triton",), ("cuda",))
    }
    assert steps[BOTH] == steps["triton",] | steps["cuda",]
    assert len(steps["triton",]) == len(steps["cuda",])


def test_without_triton_every_part_has_steps(tmp_path):
    code = """
        import sys
        sys.modules["triton"] = None
        from pathlib import Path
        import torch
        from benchmarks.gpu import times, worker
        for name, part in worker.PARTS.items():
            part(worker.Settings(torch.device("cpu"), Path(), False, ("cuda",)))
        problem = times.tiny_problems()[0]
        assert "cuda kernel" in times.candidates(problem, ("cuda",), times.datasets(problem, torch.device("cpu"), 0))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_without_triton_nothing_is_tuned(log, lines, tmp_path):
    (step,) = worker.PARTS["tune"](worker.Settings(CPU, tmp_path, False, ("cuda",)))
    step.run(log)
    assert [line["status"] for line in lines()] == ["skipped"]


# The job


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    return job.settings(parser.parse_args(arguments))


def test_arguments(capsys):
    asked = parsed()
    assert asked.parts == job.PARTS and asked.minutes == 10 and asked.device == "cuda" and asked.workers >= 1
    assert parsed("--parts", "time,launches").parts == ("launches", "time")
    with pytest.raises(SystemExit):
        parsed("--parts", "time,tume")
    assert "unknown part tume; there are correctness, launches" in capsys.readouterr().err
    assert asked.engines == BOTH and parsed("--engines", "cuda,triton").engines == BOTH
    assert parsed("--engines", "cuda").engines == ("cuda",)
    with pytest.raises(SystemExit):
        parsed("--engines", "cublas")
    assert "unknown engine cublas; there are triton, cuda" in capsys.readouterr().err


def test_what_runs_alone_is_compiled_first():
    assert job.in_order(parsed("--parts", "correctness,tune")) == ["correctness", "tune"]
    assert job.in_order(parsed("--parts", "graphs,time")) == ["compile runs", "graphs", "compile times", "time"]
    assert job.in_order(parsed("--parts", "graphs,time", "--tiny")) == ["graphs", "time"]
    assert job.in_order(parsed("--parts", "graphs,time", "--engines", "cuda")) == ["graphs", "time"]
    assert set(job.in_order(parsed())) == set(worker.PARTS) - {"small"} == set(job.SHARES)


def test_time_is_divided_among_what_is_to_come():
    parts = job.in_order(parsed())
    left, given = 600.0, {}
    for place, part in enumerate(parts):
        given[part] = job.allotted(parts[place:], left)
        left -= given[part]
    assert abs(left) < 1e-6
    assert all(given[part] == pytest.approx(600 * job.SHARES[part] / sum(job.SHARES.values())) for part in parts)
    assert job.allotted(["time"], 600.0) == 600.0


def test_nothing_runs_without_a_device(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert job.run(parsed("--output", str(tmp_path))) == 2
    said = capsys.readouterr().err
    assert "the triton engine is off: " in said and "the cuda engine is off: " in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Workers that run this body instead, with `part`, `first`, `log` and `position` at hand."""

    def install(body):
        file = tmp_path / "python"
        head = f"""\
            #!{sys.executable}
            import json, sys, time
            option = lambda name: sys.argv[sys.argv.index(name) + 1]
            part, first, share = sys.argv[3], int(option("--first")), option("--share")
            engines = option("--engines")

            def write(name, status, **facts):
                with open(option("--log"), "a") as file:
                    line = {{"part": part, "name": name, "status": status, **facts}}
                    file.write(json.dumps(line) + "\\n")

            def at(place):
                with open(option("--position"), "w") as file:
                    file.write(str(place))

            """
        file.write_text(textwrap.dedent(head) + textwrap.dedent(body))
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(job.sys, "executable", str(file))
        monkeypatch.setattr(job, "_off", lambda device: dict.fromkeys(BOTH))
        monkeypatch.setattr(job, "_GRACE", 0.5)

    return install


def test_a_process_that_dies_costs_one_step(stub, tmp_path, capsys):
    stub(
        """
        for place in range(first, 4):
            at(place)
            if place in (1, 3):
                sys.exit(3)
            write(f"step {place}", "ok")
        """
    )
    assert job.run(parsed("--parts", "correctness", "--output", str(tmp_path), "--minutes", "1", "--workers", "2")) == 1
    found = read(tmp_path / "gpu.jsonl")
    assert sorted(line["name"] for line in found if line["status"] == "ok") == ["step 0", "step 0", "step 2", "step 2"]
    failed = {line["name"]: line["why"] for line in found if line["status"] == "failed"}
    names = [f"correctness {share}, step {place}" for share in ("0/2", "1/2") for place in (1, 3)]
    assert failed == dict.fromkeys(names, "its process ended with status 3")
    assert "4 bad of 8" in capsys.readouterr().out


def test_a_process_that_cannot_start_is_not_started_again(stub, tmp_path):
    stub("sys.exit(1)")
    assert job.run(parsed("--parts", "launches", "--tiny", "--output", str(tmp_path), "--minutes", "1")) == 1
    assert [line["name"] for line in read(tmp_path / "gpu.jsonl")] == ["launches 0/1, its start"]


def test_a_part_that_does_not_end_is_ended_and_the_next_one_runs(stub, tmp_path):
    stub(
        """
        at(0)
        write("begun", "ok")
        time.sleep(0 if part == "graphs" else 60)
        """
    )
    start = time.monotonic()
    asked = parsed("--parts", "streams,graphs", "--tiny", "--output", str(tmp_path), "--minutes", "0.05")
    assert job.run(asked) == 1
    assert time.monotonic() - start < 10
    found = [(line["part"], line["status"]) for line in read(tmp_path / "gpu.jsonl")]
    assert found == [("streams", "ok"), ("streams", "failed"), ("graphs", "ok")]


def test_a_good_run_is_a_success(stub, tmp_path, capsys):
    stub('write("step", "ok"); write("other", "skipped", why="tool not found")')
    assert job.run(parsed("--parts", "sanitizer,graphs", "--tiny", "--output", str(tmp_path), "--minutes", "1")) == 0
    printed = capsys.readouterr().out
    assert "graphs: at most" in printed and "skipped: sanitizer: 1 (tool not found)" in printed


@pytest.mark.parametrize("missing", BOTH)
def test_the_job_goes_on_with_the_engine_that_is_there(missing, stub, tmp_path, monkeypatch, capsys):
    stub('write(engines, "ok")')
    monkeypatch.setattr(
        job, "_off", lambda device: {engine: "not here" if engine == missing else None for engine in BOTH}
    )
    assert job.run(parsed("--parts", "launches", "--tiny", "--output", str(tmp_path), "--minutes", "1")) == 0
    told = capsys.readouterr()
    assert told.err == f"benchmarks gpu: the {missing} engine is off: not here\n"
    assert f"skipped: engines: 1 (the {missing} engine is off: not here)" in told.out
    (other,) = set(BOTH) - {missing}
    found = [(line["part"], line["name"], line["status"]) for line in read(tmp_path / "gpu.jsonl")]
    assert found == [("engines", missing, "skipped"), ("launches", other, "ok")]
    asked = parsed("--parts", "launches", "--tiny", "--output", str(tmp_path), "--engines", missing)
    assert job.run(asked) == 2


def test_engines_are_asked_for_in_another_process(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert job._off("cpu") == {"triton": None, "cuda": "its kernels run on CUDA devices only"}
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(job.sys, "executable", "/bin/false")
    assert set(job._off("cpu")) == set(BOTH) and None not in job._off("cpu").values()


def test_workers_use_the_table_that_was_tuned(tmp_path, monkeypatch):
    monkeypatch.delenv("INTERP_NN_TABLE", raising=False)
    assert "INTERP_NN_TABLE" not in job.environment(tmp_path, "time")
    (tmp_path / "table.json").write_text("{}")
    assert job.environment(tmp_path, "time")["INTERP_NN_TABLE"] == str(tmp_path / "table.json")
    assert "INTERP_NN_TABLE" not in job.environment(tmp_path, "tune")
    assert job.environment(tmp_path, "time")["PYTHONPATH"].startswith(str(ROOT))


def test_the_summary_shows_ratios_and_what_is_bad():
    def timed(provider, plain, graph, **facts):
        clocks = {"plain": {"us_p50": plain}, "graph": None if graph is None else {"us_p50": graph}}
        return {
            "part": "time",
            "name": f"loss (32, 8, 4) bfloat16, {provider}",
            "status": "ok",
            "provider": provider,
        } | (clocks | facts)

    whole = [
        {"part": "correctness", "name": "a case", "status": "wrong", "why": "dx: far off"},
        {"part": "sanitizer", "name": "memcheck", "status": "skipped", "why": "tool not found"},
        {"part": "time", "name": "barrier", "status": "info", "barrier_us": 1.25},
        timed("triton", 20.0, 10.0),
        timed("cuda", 10.0, 5.0),
        timed("auto", 20.0, 10.0, engine="reference"),
        timed("unfused", 50.0, 30.0),
        timed("assoc-b", 40.0, 25.0),
        timed("linear", 10.0, 8.0),
        timed("inverse-inv", 10.0, None),
        {"part": "time", "name": "loss (32, 8, 4) bfloat16", "status": "info", "fastest": "cuda", "clear": True},
        {"part": "time", "name": "host both", "status": "info", "triton_us": 70.5, "cuda_us": 60.25}
        | {"fastest": "cuda", "clear": False},
    ]
    versions = {"versions": {"torch": "2"}, "device": "a GPU", "git_sha": "abc", "git_dirty": True}
    printed = summary.table([line | versions for line in whole])
    rows = [line.split()[5:] for line in printed.splitlines() if line.startswith("loss (32, 8, 4) bfloat16")]
    assert rows == [
        ["triton", "20", "2.5", "2", "2", "10", "3", "2.5", "1.25", "reference,", "cuda"],
        ["cuda", "10", "5", "4", "1", "5", "6", "5", "0.625", "reference,", "cuda"],
    ]
    assert "host both: triton_us 70.5, cuda_us 60.25; cuda is faster, but hardly" in printed
    assert max(map(len, printed.splitlines())) <= summary._WIDTH
    assert "wrong: correctness: a case: dx: far off" in printed
    assert "skipped: sanitizer: 1 (tool not found)" in printed
    assert "barrier: barrier_us 1.25" in printed
    assert "a GPU; torch 2; commit abc and changes" in printed
    assert summary.table([]).splitlines()[-1] == "0 bad of 0"


# Runs and timings: the logic around the device, with the reference at work and the device's part played on the CPU


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
    monkeypatch.setattr(times, "on_events", lambda work, calls: lambda: work() or 0.01)
    monkeypatch.setattr(times, "spare_words", lambda device: None)
    for module in (runs, times):
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


@pytest.mark.parametrize("problem", times.tiny_problems(), ids=lambda problem: problem.what)
def test_every_provider_is_timed_by_both_clocks(problem, played, log, lines):
    times.time_problem(problem, BOTH, CPU, 0.01, log)
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
    printed = summary.table([{**line, "part": "time"} for line in lines()])
    assert all(f"{problem.name:34} {engine}" in printed for engine in BOTH)


def test_an_engine_that_refuses_a_problem_is_not_timed(played, log, lines, monkeypatch):
    monkeypatch.setattr(kernels, "refusal", lambda engine, *_: "cuda: no" if engine == "cuda" else None)
    problem = times.tiny_problems()[-1]
    times.time_problem(problem, BOTH, CPU, 0.01, log)
    skipped = [(line["name"], line["why"]) for line in lines() if line["status"] == "skipped"]
    assert skipped == [(f"{problem.name}, cuda", "cuda: no")]
    assert not {"cuda", "cuda kernel"} & {line.get("provider") for line in lines()}


def clocks(**microseconds):
    return {name: times.Clock([value / 1e3] * 5, 1) for name, value in microseconds.items()}


def test_which_engine_is_faster_is_an_entry_of_a_table(monkeypatch, tmp_path):
    monkeypatch.setattr(times, "chip_of", lambda device: H100)
    loss = times.Problem("loss", 32, 512, 100, None, torch.bfloat16)
    entry = times._entry(loss, CPU, clocks(triton=70, cuda=60, reference=90))
    assert entry["engine"] == "cuda" and entry["microseconds"] == {"triton": 70.0, "cuda": 60.0, "reference": 90.0}
    monkeypatch.setenv("INTERP_NN_TABLE", str(tmp_path / "table.json"))
    (tmp_path / "table.json").write_text(json.dumps({"kernels": [], "engines": [entry]}))
    assert configs.measured_engine(H100, configs.Bucket("pair_loss", 2, 128, 128, 4096)) == "cuda"
    assert configs.measured_engine(H100, configs.Bucket("pair_loss", 2, 128, 128, 31)) is None
    assert times._entry(loss, CPU, clocks(triton=60, cuda=60)) is None
    assert times._entry(loss._replace(what="forward"), CPU, clocks(triton=70, cuda=60)) is None
    kinds = {p.what: times._entry(p, CPU, clocks(cuda=1, triton=2)) for p in times.problems()}
    named = {what: entry["problem"] for what, entry in kinds.items() if entry}
    assert named == {"loss": "pair_loss", "head": "head_loss", "both": "summary"}


def test_the_fastest():
    assert times.fastest({}) == {"fastest": None, "clear": False}
    assert times.fastest(clocks(triton=3, cuda=2)) == {"fastest": "cuda", "clear": True}
    shaky = {"triton": times.Clock([1.0, 2.0, 3.0], 1), "cuda": times.Clock([1.0, 2.1, 3.0], 1)}
    assert times.fastest(shaky) == {"fastest": "triton", "clear": False}


@pytest.mark.parametrize("problem", times.host_problems(), ids=lambda problem: problem.what)
def test_the_host_cost_of_both_engines(problem, played, log, lines, monkeypatch):
    monkeypatch.setattr(times, "rounds", lambda samplers, *_, **__: {name: [s(), s()] for name, s in samplers.items()})
    monkeypatch.setattr(times, "_HOST_CALLS", 2)
    assert (problem.n, problem.d, problem.k) == (32, 512, 100)
    times.time_host(problem, BOTH, CPU, log)
    line = lines()[-1]
    assert line["name"] == problem.name and line["status"] == "info"
    assert all(line[f"{name}_us"] > 0 for name in (*BOTH, "reference", "auto", "linear"))
    assert line["fastest"] in (*BOTH, "reference")
    assert f"{problem.name}: triton_us" in summary.table([{**line, "part": "time"}])


def test_a_provider_that_computes_something_else_is_not_timed(played, log, lines, monkeypatch):
    monkeypatch.setitem(providers.ASSOCIATIONS, "assoc-b", lambda x, b: 2 * (x @ b))
    times.time_problem(times.tiny_problems()[0], BOTH, CPU, 0.01, log)
    assert [line["name"] for line in lines() if line["status"] == "wrong"] == ["forward (9, 20, 6) float32, assoc-b"]


def test_the_problems_timed():
    problems = times.problems()
    assert len({problem.name for problem in problems}) == len(problems)
    assert {problem.what for problem in problems} == {"forward", "backward", "both", "loss", "head"}
    assert all(problem.dtype == torch.bfloat16 for problem in problems[: len(problems) // 2])


def test_a_rival_is_asked_only_for_the_dtypes_that_it_has():
    for problem in times.problems():
        if problem.what == "forward":
            assert ("inverse-inv" in times._summaries(problem)) is (problem.dtype == torch.float32)


def test_an_empty_launch_allocates_nothing(played, log, lines, monkeypatch):
    launched, fill = [], torch.zeros
    engine = types.SimpleNamespace(Launch=lambda *_: None, launch=lambda _, device, *given: launched.append(given[0]))
    monkeypatch.setattr(times.engines, "get", lambda name: engine)
    monkeypatch.setattr(times.memory, "counter", lambda device: None)
    monkeypatch.setattr(times, "chip_of", lambda device: H100)
    monkeypatch.setitem(sys.modules, "interp_nn.kernels.phased", types.SimpleNamespace(phased_forward=None))
    monkeypatch.setattr(times, "rounds", lambda samplers, *_: {name: [sample()] for name, sample in samplers.items()})
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *given, **more: made.append(fill(*given, **more)) or made[-1])
    times.barrier(CPU, log)
    (line,) = lines()
    assert line["status"] == "info" and line["empty_launch_us"] > 0
    assert len(made) == 1 and len(launched) > 200 and {id(some) for some in launched} == {id(made[0])}


def test_sets_of_inputs_fill_the_cache():
    problem = times.tiny_problems()[0]
    assert len(times.datasets(problem, CPU, 0)) == 2
    sets = times.datasets(problem, CPU, 100_000)
    assert len(sets) * 2 * 4 * (9 * 20 + 6 * 20 + 9 * 6) >= 200_000
    assert len(times.datasets(problem, CPU, 10**9)) == 256


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


# All of it on the interpreter


def interpreted(tmp_path, parts):
    code = """
        import argparse, sys
        from benchmarks.gpu import job
        parser = argparse.ArgumentParser()
        job.add_arguments(parser)
        sys.exit(job.run(job.settings(parser.parse_args())))
    """
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--minutes", "3", "--parts", parts]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    talk = (tmp_path / "gpu.log").read_text() if (tmp_path / "gpu.log").exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + talk
    off, *found = read(tmp_path / "gpu.jsonl")
    assert (off["part"], off["name"], off["status"]) == ("engines", "cuda", "skipped")
    return found


def test_correctness_on_the_interpreter(tmp_path):
    found = interpreted(tmp_path, "correctness")
    assert {line["status"] for line in found} == {"ok"}
    kernels = {kernel for line in found for kernel in line.get("kernels", ())}
    assert kernels >= {
        *("stream", "summary_backward", "pair_backward", "phased_forward", "phased_backward"),
        *("pair_loss", "latent_loss", "flat_loss"),
    }
    assert {"device", "versions", "git_sha", "git_dirty", "utc", "at_s"} <= set(found[0])
    json.dumps(found, allow_nan=False)


@pytest.mark.slow
def test_the_other_parts_on_the_interpreter(tmp_path):
    found = interpreted(tmp_path, "launches,repeats,sanitizer,time")
    assert {line["part"] for line in found} == {"launches", "repeats", "sanitizer", "time"}
    assert {line["status"] for line in found} <= {"ok", "skipped"}
    assert {line["provider"] for line in found if line["part"] == "time"} >= {
        *("triton", "triton kernel", "auto", "reference")
    }
