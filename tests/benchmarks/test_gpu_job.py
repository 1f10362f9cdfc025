"""The GPU job without a GPU: how it keeps its time, and that a failure is a record and not the end."""

import argparse
import stat
import sys
import textwrap
import time

import pytest
import torch
from gpu_stand_ins import BOTH, CPU
from processes import python

from benchmarks.gpu import cases, job, job_table, worker
from benchmarks.gpu.log import Log, read
from benchmarks.records import report, rows
from benchmarks.timing.clocks import Limit

# A worker


def steps(*bodies):
    return [worker.Step(f"step {i}", body) for i, body in enumerate(bodies)]


def test_a_failure_is_a_line_and_the_next_step_runs(log, lines, tmp_path, capsys):
    def fails(log):
        log.check("first", "too far off", number=torch.inf)
        raise RuntimeError("as asked")

    def succeeds(log):
        log.write("done", "ok")

    position = tmp_path / "position"
    assert worker.work(steps(fails, succeeds, succeeds), log, CPU, 0, position) == 0
    first, failed, *done = lines()
    assert (first["status"], first["why"], first["number"]) == ("wrong", "too far off", None) and log.bad == 2
    assert (failed["status"], failed["why"]) == ("failed", "RuntimeError: as asked") and "as asked" in failed["trace"]
    assert [line["status"] for line in done] == ["ok", "ok"] and position.read_text() == "2"
    assert {"device", "git_sha", "part", "at_s"} <= set(failed) and "step 0: 0.0 s BAD" in capsys.readouterr().out
    worker.work(steps(fails, succeeds, succeeds), log, CPU, 2, None)  # goes on where another one ended
    assert len(lines()) == 5


def test_a_worker_without_its_device_ends(log, lines, monkeypatch):
    monkeypatch.setattr(worker, "_lost", lambda *_: True)
    bad = steps(lambda log: log.write("bad", "wrong"), lambda log: 1 / 0)
    assert worker.work(bad, log, CPU, 0, None) == worker.LOST and len(lines()) == 1


def test_a_step_that_is_done_is_left_out_later(log, lines, tmp_path):
    done, ran = tmp_path / "done", []
    made = steps(*(lambda log, i=i: ran.append(i) for i in range(4)))
    out_of_time = Log(tmp_path / "other", "part", -1.0, {})
    assert worker.work(made, out_of_time, CPU, 0, None, done) == 0 and not done.exists()
    assert worker.work(made[:2], log, CPU, 0, None, done) == 0
    worker.work(made, log, CPU, 3, None, done)  # step 2 has ended an earlier process
    worker.work(made, log, CPU, 0, None, done)
    assert ran == [0, 1, 3] and done.read_text() == "step 0\nstep 1\nstep 2\nstep 3\n"


def test_a_step_that_had_no_time_for_all_it_does_is_run_again(log, tmp_path):
    def skips(facts):
        return lambda log: log.write("half of it", "skipped", **facts)

    problem = {
        "op": "head",
        "mode": "loss",
        "n": 9,
        "d": 8,
        "k": 4,
        "m": 2,
        "dtype": "bf16",
        "timer": "graph",
        "l2": "cold",
    }
    timing = {**problem, "provider": "ours", "note": Limit(0.0).over()}
    done, other = tmp_path / "done", {"why": "the tool is not there"}
    made = steps(skips({"why": worker.OUT_OF_TIME}), skips(timing), skips(other), lambda log: None)
    assert worker.work(made, log, CPU, 0, None, done) == 0
    assert done.read_text() == "step 2\nstep 3\n"


def test_what_had_no_time_in_an_earlier_run_is_not_told_again(stub, tmp_path, capsys):
    stub('write("a case", "ok")')
    for why in ("out of time", "out of time: 8 s", job._KILLED):
        Log(tmp_path / "stage-2.jsonl", "streams", 0.0, {}).write("a case", "skipped", why=why)
    assert run(tmp_path, "2", "--workers", "1")[0] == 0
    assert "stage 2: 5 ok\n" in capsys.readouterr().out


def test_steps_after_the_time_are_skipped(tmp_path):
    log = Log(tmp_path / "log", "part", -1.0, {})
    assert worker.work(steps(lambda log: 1 / 0, lambda log: 1 / 0), log, CPU, 0, None) == 0
    found = [(line["name"], line["status"], line["why"]) for line in read(tmp_path / "log")]
    assert found == [(f"step {i}", "skipped", "out of time") for i in range(2)]


@pytest.mark.parametrize("tiny", [True, False])
def test_every_part_has_steps_for_every_engine(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "cases", cases.tiny_cases)
    for part, make in worker.PARTS.items():
        names = {}
        for engines in (BOTH, ("triton",), ("cuda",)):
            found = [step.name for step in make(worker.Settings(CPU, tmp_path, tiny, engines))]
            assert bool(found) is not (part.startswith("compile") and "triton" not in engines)
            assert len(set(found)) == len(found)
            names[engines] = set(found)
        if part in ("launches", "repeats", "streams", "graphs", "small"):
            assert names[BOTH] == names["triton",] | names["cuda",] and len(names["triton",]) == len(names["cuda",])


def test_without_triton_every_part_has_steps_and_nothing_is_tuned(log, lines, tmp_path):
    """Another process has the same cases, with other hashes of strings too."""
    code = """
        import sys
        sys.modules["triton"] = None
        from pathlib import Path
        import torch
        from benchmarks.gpu import cases, worker
        print(cases.covering(cases.FACTORS["flat"], tries=2))
        cases.cases = cases.tiny_cases
        for name, part in worker.PARTS.items():
            part(worker.Settings(torch.device("cpu"), Path(), False, ("cuda",)))
    """
    done = python("-c", textwrap.dedent(code), PYTHONHASHSEED="17")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(cases.covering(cases.FACTORS["flat"], tries=2))
    (step,) = worker.PARTS["tune"](worker.Settings(CPU, tmp_path, False, ("cuda",)))
    step.run(log)
    assert [line["status"] for line in lines()] == ["skipped"]


def test_the_job_needs_no_other_packages_of_the_benchmarks(tmp_path):
    """On a machine with PyTorch and Triton alone the command is found, and every part has its steps."""
    code = f"""
        import sys
        for name in ("cycler", "matplotlib", "pandas", "PIL", "scipy", "sklearn", "tqdm"):
            sys.modules[name] = None
        import torch
        from benchmarks import __main__
        from benchmarks.gpu import worker
        asked = worker.Settings(torch.device("cpu"), None, False, ("triton", "cuda"))
        print(all(part(asked) for part in worker.PARTS.values()))
        print(__main__.main(["gpu", "--parts", "launches", "--output", {str(tmp_path)!r}]))
    """
    done = python("-c", textwrap.dedent(code))
    assert done.stdout.split() == ["True", "2"], done.stderr  # no engine is on here


# The job


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    return job.settings(parser.parse_args(arguments))


def test_arguments(capsys):
    asked = parsed()
    assert (asked.stages, asked.engines, asked.minutes, asked.device) == ((1, 2, 3), BOTH, None, "cuda")
    assert parsed("4").stages == (4,)
    asked = parsed("--parts", "time,launches")
    assert (asked.parts, asked.stages) == (("launches", "time"), ())
    assert parsed("--engines", "cuda").engines == ("cuda",)
    for given, message in (
        (("--parts", "time,tume"), "unknown part tume; there are verify, launches, correctness"),
        (("--engines", "cublas"), "unknown engine cublas; there are triton, cuda"),
    ):
        with pytest.raises(SystemExit):
            parsed(*given)
        assert message in capsys.readouterr().err


def test_stages_have_all_parts_and_nine_minutes_for_the_first_three():
    named = [part for stage in job.STAGES.values() for part in stage.parts]
    assert sorted(named) == sorted(set(job.PARTS) - {"time"})
    minutes = [stage.minutes for stage in job.STAGES.values()]
    assert sum(minutes[:3]) <= 9 and max(minutes) <= 4


def test_kernels_are_compiled_first_and_time_is_shared():
    assert job.in_order(parsed("--parts", "correctness,tune")) == ["correctness", "tune"]
    assert job.in_order(parsed("--parts", "graphs,time")) == ["compile runs", "graphs", "compile times", "time"]
    assert job.in_order(parsed("--parts", "graphs,time", "--tiny")) == ["graphs", "time"]
    assert job.in_order(parsed("--parts", "graphs,time", "--engines", "cuda")) == ["graphs", "time"]
    parts, left = job.in_order(parsed("--parts", ",".join(job.PARTS))), 600.0
    assert set(parts) == set(worker.PARTS) - {"small", "profiled"} == set(job.SHARES)
    for place, part in enumerate(parts):
        given = job.allotted(parts[place:], left)
        assert given == pytest.approx(600 * job.SHARES[part] / sum(job.SHARES.values()))
        left -= given
    assert abs(left) < 1e-6


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Workers that run this body instead, with `part`, `first`, `write` and `at` defined."""

    def install(body):
        file = tmp_path / "python"
        head = f"""\
            #!{sys.executable}
            import json, sys, time
            option = lambda name: sys.argv[sys.argv.index(name) + 1]
            part, first, engines = sys.argv[3], int(option("--first")), option("--engines")

            def write(name, status, **facts):
                with open(option("--log"), "a") as file:
                    file.write(json.dumps({{"part": part, "name": name, "status": status, **facts}}) + "\\n")

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


def run(tmp_path, *arguments):
    """The exit status of a job, and its lines."""
    asked = parsed("--output", str(tmp_path), "--minutes", "1", *arguments)
    name = f"stage-{asked.stages[0]}.jsonl" if asked.stages else "gpu.jsonl"
    return job.run(asked), read(tmp_path / name)


def test_a_process_that_dies_costs_one_step(stub, tmp_path, capsys):
    stub(
        """
        for place in range(first, 4):
            at(place)
            if place in (1, 3):
                open(option("--log"), "a").write('{"half a')
                sys.exit(3)
            write(f"step {place}", "ok")
        """
    )
    status, found = run(tmp_path, "--parts", "correctness", "--workers", "2")
    assert status == 1 and "4 bad of 8" in capsys.readouterr().out
    assert sorted(line["name"] for line in found if line["status"] == "ok") == ["step 0", "step 0", "step 2", "step 2"]
    names = [f"correctness {share}, step {place}" for share in ("0/2", "1/2") for place in (1, 3)]
    failed = {line["name"]: line["why"] for line in found if line["status"] == "failed"}
    assert failed == dict.fromkeys(names, "its process ended with status 3")


def test_a_part_that_does_not_end_is_ended_and_the_next_one_runs(stub, tmp_path):
    stub('at(0); write("begun", "ok"); time.sleep(0 if part == "graphs" else 60)')
    start = time.monotonic()
    status, found = run(tmp_path, "--parts", "streams,graphs", "--tiny", "--minutes", "0.02")
    assert status == 1 and time.monotonic() - start < 10
    found = [(line["part"], line["status"]) for line in found]
    assert found == [("streams", "ok"), ("streams", "failed"), ("graphs", "ok")]


@pytest.mark.parametrize("missing", BOTH)
def test_the_job_goes_on_with_the_engine_that_is_there(missing, stub, tmp_path, monkeypatch, capsys):
    stub('write(engines, "ok")')
    monkeypatch.setattr(job, "_off", lambda device: {name: "not here" if name == missing else None for name in BOTH})
    status, found = run(tmp_path, "--parts", "launches", "--tiny")
    told = capsys.readouterr()
    assert status == 0 and told.err == f"benchmarks gpu: the {missing} engine is off: not here\n"
    assert f"skipped: engines: 1 (the {missing} engine is off: not here)" in told.out
    (other,) = set(BOTH) - {missing}
    assert [(line["part"], line["name"]) for line in found] == [("engines", missing), ("launches", other)]
    assert run(tmp_path, "--parts", "launches", "--tiny", "--engines", missing)[0] == 2


def test_a_stage_goes_on_where_it_ended(stub, tmp_path, capsys):
    """The second run adds to the record, and finds the names of the steps that are done."""
    stub(
        """
        import os
        done = option("--done")
        write("again" if os.path.exists(done) else "first", "ok", verify=os.environ.get("INTERP_NN_VERIFY"))
        open(done, "a").write("step")
        """
    )
    for count in (1, 2):
        status, found = run(tmp_path, "4")
        assert status == 0 and [line["name"] for line in found] == ["first", "again"][:count]
        assert f"stage 4: {count} ok" in capsys.readouterr().out
    assert found[0]["verify"] == "0"
    _, found = run(tmp_path, "1")
    assert {line["part"]: line["verify"] for line in found} == {
        "verify": None, "compile runs": "0", "launches": "0", "correctness": "0"
    }  # fmt: skip


def test_a_table_of_a_stage_has_ten_lines(shared, tmp_path):
    log = Log(tmp_path / "log", "shapes", 60.0, {**shared, "git_sha": "abc", "dirty": True})
    log.write("barrier", "info", barrier_us=1.25)
    for place in range(6):
        problem = {
            "op": "summary",
            "mode": "infer",
            "dtype": "bf16",
            "n": place,
            "d": 8,
            "k": 4,
            "m": None,
            "l2": "cold",
        }
        for timer in ("events", "graph"):
            for name, ms in (("ours", 0.02), ("linear", 0.01)):
                log.write(**problem, timer=timer, provider=name, ms_p50=ms, samples=5, plan="triton")
    printed = job_table.short_table(3, log.rows).splitlines()
    assert len(printed) == 10 and printed[0] == "stage 3: 1 info, 24 ok" and "commit abc and changes" in printed[-1]
    assert printed[1] == "summary infer (0, 8, 4) graph, us: ours 20, linear 10"
    for place in range(30):
        log.write(f"case {place}", "wrong", why="far off")
    printed = job_table.short_table(3, log.rows).splitlines()
    assert len(printed) == 10 and [line.startswith("wrong: shapes: case") for line in printed[1:5]] == [True] * 3 + [
        False
    ]
    assert job_table.short_table(1, []) == "stage 1: nothing"


def test_the_library_is_built_once_for_the_gpu_at_hand(stub, tmp_path, capsys, monkeypatch):
    stub(
        """
        import os
        if "-c" in sys.argv:
            print(90 if "compiled_library" in sys.argv[2] else "")
        elif "setup.py" in sys.argv:
            assert os.environ["INTERP_NN_CUDA_ARCHS"] == "90"
            print("error: no nvcc")
            sys.exit(1)
        else:
            write("first", "ok")
        """.replace("option(", "option(")
    )
    head = (tmp_path / "python").read_text()
    (tmp_path / "python").write_text(head.replace("part, first", "if '--log' in sys.argv: part, first"))
    job._build()
    assert "the CUDA library for sm_90: " in (told := capsys.readouterr().out) and "error: no nvcc" in told


def test_a_build_that_takes_too_long_ends_with_its_compilers(stub, tmp_path, capsys, monkeypatch):
    stub("")
    (tmp_path / "python").write_text(
        f"""#!/bin/sh
        [ "$1" = -c ] && echo 90 && exit
        (sleep 2; touch {tmp_path}/compiled) &
        sleep 60
        """
    )
    monkeypatch.setattr(job, "_BUILDING", 0.5)
    job._build()
    assert ": not done within 0 s" in capsys.readouterr().out
    time.sleep(2.5)
    assert not (tmp_path / "compiled").exists()


def test_the_build_has_a_share_of_the_first_stage_alone(stub, tmp_path, monkeypatch):
    stub('write("left", "ok", seconds=float(option("--seconds")))')
    monkeypatch.setattr(job, "_build", lambda: time.sleep(3))
    asked = parsed("--output", str(tmp_path), "--minutes", "0.2", "--workers", "1")
    assert job.run(asked._replace(stages=(1, 2))) == 0
    seconds = {line["part"]: line["seconds"] for number in (1, 2) for line in read(tmp_path / f"stage-{number}.jsonl")}
    whole = sum(job.SHARES[name] for name in ("verify", "compile runs", "launches", "correctness"))
    assert 0 < seconds["verify"] < (12 - 0.5 - 3) * job.SHARES["verify"] / whole
    assert seconds["sanitizer"] > 12 - 0.5 - 3


def test_another_process_finds_out_which_engines_are_on(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(job.sys, "executable", "/bin/false")
    assert run(tmp_path)[0] == 2 and not list(tmp_path.iterdir())
    told = capsys.readouterr().err
    assert "the triton engine is off: " in told and "the cuda engine is off: " in told


def test_the_table_shows_times_and_failures(shared, tmp_path):
    log = Log(tmp_path / "log", "time", 60.0, {**shared, "git_sha": "abc", "dirty": True})
    log.write("barrier", "info", barrier_us=1.25)
    log.write("a case", "wrong", why="dx: far off")
    log.write("memcheck", "skipped", why="tool not found")
    problem = {
        "op": "head", "mode": "loss", "dtype": "bf16", "n": 32, "d": 8, "k": 4, "m": 2, "timer": "graph", "l2": "cold",
    }  # fmt: skip
    for name, ms in (("ours", 0.02), ("ours-cuda", 0.01), ("unfused", 0.05), ("linear", 0.01)):
        log.write(
            **problem, provider=name, ms_p50=ms, samples=5, plan="cuda logits_from_latent" if name == "ours" else None
        )
    log.write(**problem, provider="assoc-b", status="wrong", note="value: off")
    printed = job_table.table(log.rows)
    (row,) = (line for line in printed.splitlines() if line.startswith("head loss (32, 8, 4, 2) bf16 graph"))
    assert row.split()[8:] == ["20", "-", "10", "-", "-", "10", "2.5", "-", "-", "0.5", "cuda", "logits_from_latent"]
    for told in (
        "barrier: barrier_us 1.25", "wrong: time: a case: dx: far off", "wrong: time: head loss assoc-b: value: off",
        "skipped: time: 1 (tool not found)", "commit abc and changes", "2 bad of 8",
    ):  # fmt: skip
        assert told in printed
    assert job_table.table([]).splitlines()[-1] == "0 bad of 0"
    assert "head" in report.markdown(rows.read([log.path]))  # `benchmarks table` reads it too


def test_the_command_of_a_worker(tmp_path):
    log = tmp_path / "log"
    arguments = ["tune", "--log", str(log), "--seconds", "60", "--device", "cpu", "--engines", "cuda", "--share", "0/1"]
    assert worker.main(arguments) == 0
    (line,) = read(log)
    assert line["status"] == "skipped" and {"device", "git_sha", "dirty", "utc", "at_s", "share"} <= set(line)


@pytest.mark.slow
def test_every_part_on_the_interpreter(tmp_path):
    """A job from its start to its table."""
    parts = "verify,correctness,launches,repeats,sanitizer,shapes,host,training,profile,time"
    arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--minutes", "8", "--parts", parts]
    done = python("-m", "benchmarks", "gpu", *arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "gpu.log").read_text()
    off, *found = read(tmp_path / "gpu.jsonl")
    assert (off["name"], off["status"]) == ("cuda", "skipped") and {line["part"] for line in found} == set(
        parts.split(",")
    )
    assert {line["status"] for line in found if line["part"] == "correctness"} == {"ok"}
    assert {line["status"] for line in found} <= {"ok", "skipped", "info", "unsupported"}
    kernels = {kernel for line in found for kernel in line.get("kernels", ())}
    assert kernels >= {"stream", "summary_backward", "pair_backward", "pair_loss", "latent_loss", "flat_loss"}
    timed = {line["provider"] for line in found if line.get("op") and line["status"] == "ok"}
    assert timed >= {"ours", "ours-triton", "kernel-triton", "unfused", "linear"}
