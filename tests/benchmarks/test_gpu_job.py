"""The GPU job without a GPU: how it keeps its time, that a failure is a record and not the end."""

import argparse
import json
import os
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from gpu_stand_ins import BOTH, CPU

from benchmarks.gpu import job, job_table, worker
from benchmarks.gpu.log import Log, read
from benchmarks.records.environment import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")  # problems this small lose more to waking threads


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
        from benchmarks.gpu import timings, worker
        for name, part in worker.PARTS.items():
            part(worker.Settings(torch.device("cpu"), Path(), False, ("cuda",)))
        problem = timings.tiny_problems()[0]
        assert "cuda kernel" in timings.candidates(problem, ("cuda",), timings.datasets(problem, torch.device("cpu"), 0))
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
    printed = job_table.table([line | versions for line in whole])
    rows = [line.split()[5:] for line in printed.splitlines() if line.startswith("loss (32, 8, 4) bfloat16")]
    assert rows == [
        ["triton", "20", "2.5", "2", "2", "10", "3", "2.5", "1.25", "reference,", "cuda"],
        ["cuda", "10", "5", "4", "1", "5", "6", "5", "0.625", "reference,", "cuda"],
    ]
    assert "host both: triton_us 70.5, cuda_us 60.25; cuda is faster, but hardly" in printed
    assert max(map(len, printed.splitlines())) <= job_table._WIDTH
    assert "wrong: correctness: a case: dx: far off" in printed
    assert "skipped: sanitizer: 1 (tool not found)" in printed
    assert "barrier: barrier_us 1.25" in printed
    assert "a GPU; torch 2; commit abc and changes" in printed
    assert job_table.table([]).splitlines()[-1] == "0 bad of 0"


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
