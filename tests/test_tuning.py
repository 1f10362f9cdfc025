"""The tuner without a GPU: candidates, what it keeps and why, the table it writes, and that the table is read as meant."""

import json
import multiprocessing
import os
import pickle
import textwrap
import time
import types
from functools import partial

import pytest
import torch
from processes import python

from interp_nn import trials, tuning
from interp_nn.engines import limits
from interp_nn.engines.devices import spec_for
from interp_nn.engines.limits import unsupported_reason
from interp_nn.engines.triton import configs, engine, launcher, launches
from interp_nn.engines.triton.configs import TILES, Bucket, fits
from interp_nn.engines.workers import Workers
from interp_nn.trials import Group
from interp_nn.tuning import LEVELS

HOPPER = spec_for((9, 0))
STREAM = Group("stream", 2, 128)
ROWS = [rows for rows, _ in LEVELS]
SECONDS = 1000.0


@pytest.fixture(autouse=True)
def _own_table_only(monkeypatch):
    monkeypatch.delenv("INTERP_NN_TABLE", raising=False)
    yield
    configs._forget()


class Bench:
    """A device whose times are a formula of the config, with some noise or none."""

    spec, origin = HOPPER, "a bench"

    def __init__(self, cost=lambda group, n, config: 1.0, fails=lambda config: None, noise=0.0, engines=(1.0, 2.0)):
        self.cost, self.fails, self.noise, self.engines = cost, fails, noise, engines
        self.prepared, self.timed, self.tables = [], [], []

    def prepare(self, group, tried, seconds):
        self.prepared += [(group, config) for config in tried]
        return {config: self.fails(config) for config in tried}

    def kernel_times(self, group, n, tried):
        self.timed.append((group, n, tuple(tried)))
        return {i: [self.cost(group, n, c) * (1 + self.noise * i)] for i, c in enumerate(tried) if not self.fails(c)}

    def engine_times(self, kind, itemsize, columns, n):
        self.tables.append(os.environ.get("INTERP_NN_TABLE"))
        triton, eager = self.engines(kind, n) if callable(self.engines) else self.engines
        noisy = 1 + self.noise
        return {"triton": [triton], "eager": [eager], "triton again": [triton * noisy], "eager again": [eager * noisy]}


def tune(tmp_path, bench, wanted=(STREAM,), problems=(), said=None, **options):
    file = tmp_path / "new" / "table.json"
    say = [].append if said is None else said.append
    content = tuning.tune(file, SECONDS, bench=bench, wanted=wanted, problems=problems, say=say, **options)
    assert json.loads(file.read_text(encoding="utf-8")) == content
    return file, content


# Candidates


@pytest.mark.parametrize("group", tuning.groups(), ids=str)
def test_neighbours_are_one_step_away_and_fit(group):
    for rows in ROWS:
        bucket = group.bucket(rows)
        present = configs.choose(HOPPER, bucket)
        found = tuning.neighbours(present, bucket, HOPPER)
        assert len(found) >= 3
        assert len(set(found)) == len(found) and present not in found
        for config in found:
            changed = [a != b for a, b in zip(present[1:], config[1:], strict=True)]
            changed += [a != b for a, b in zip(present.tiles, config.tiles, strict=True)]
            assert sum(changed) == 1
            assert len(config.tiles) == len(TILES[group.kernel]) and min(config.tiles) >= 16
            assert config.warps in (4, 8) and config.stages in (2, 3, 4, 5) and config.blocks_per_sm in (1, 2)
            assert fits(HOPPER, config, bucket)
            assert not config.scratch or group.kernel in ("pair_loss", "latent_loss")


def test_every_kernel_is_tuned_in_both_sizes():
    found = tuning.groups()
    assert len(set(found)) == len(found)
    assert {(group.kernel, group.itemsize) for group in found} == {(k, size) for k in TILES for size in (2, 4)}


@pytest.mark.parametrize("group", tuning.groups(), ids=str)
def test_a_group_is_measured_by_a_launch_of_its_kernel_in_its_bucket(group, monkeypatch):
    """Planned for a GPU that is not there; nothing is launched."""
    chosen, kernels, original = [], [], configs.choose
    monkeypatch.setattr(launches, "spec_on", lambda device: HOPPER)
    monkeypatch.setattr(
        engine, "launch", lambda made, device, *_: kernels.append((made.kernel.__name__, made.constants))
    )
    monkeypatch.setattr(configs, "choose", lambda spec, bucket: chosen.append(bucket) or original(spec, bucket))
    config = original(HOPPER, group.bucket(0))._replace(stages=2, warps=4)
    trials.engine_call(group, 8, torch.device("meta"), config)()
    assert [name for name, _ in kernels] == [group.kernel]
    options = kernels[0][1]
    assert (options["num_stages"], options["num_warps"]) == (2, 4)
    assert options.get("BK", group.columns) in (group.columns, *config.tiles)
    assert not chosen  # what is tried is not looked up


# What is kept


def wide_rows(group, n, config):
    """Best with the largest row tiles, two steps from the present choice for few rows; other numbers do not matter."""
    return 10.0 - config.tiles[0] / 32


def test_the_fastest_is_kept_and_read_back(tmp_path, monkeypatch):
    bench, said = Bench(wide_rows), []
    present = [configs.choose(HOPPER, STREAM.bucket(rows)) for rows in ROWS]
    assert [config.tiles[0] for config in present] == [128, 64, 32]
    file, content = tune(tmp_path, bench, said=said)
    assert content["origin"].startswith("a bench; measured with 65536, 4096, 256 rows")
    monkeypatch.setenv("INTERP_NN_TABLE", str(file))
    found = [configs.choose(HOPPER, STREAM.bucket(rows)) for rows in ROWS]
    assert [config.tiles[0] for config in found] == [128, 128, 128]
    assert found[0] == present[0]
    entry = next(e for e in content["kernels"] if e["rows"] == 0 and e["columns"] == 128)
    assert (entry["microseconds"], entry["before"]) == (6000.0, 9000.0)
    assert any("128x64, 8 warps, 5 stages instead of 32x64, 8 warps, 3 stages" in line for line in said)


def test_what_is_not_faster_by_more_than_the_noise_is_not_kept(tmp_path, monkeypatch):
    def slightly(group, n, config):
        return 1.0 - config.tiles[0] / 128 * 0.015

    for bench in (Bench(slightly), Bench(wide_rows, noise=0.5)):
        file, _ = tune(tmp_path, bench)
        with monkeypatch.context() as patch:
            patch.setenv("INTERP_NN_TABLE", str(file))
            tuned = [configs.choose(HOPPER, STREAM.bucket(rows)) for rows in ROWS]
        assert tuned == [configs.choose(HOPPER, STREAM.bucket(rows)) for rows in ROWS]


def test_what_fails_is_noted_and_not_timed(tmp_path):
    said, bench = [], Bench(wide_rows, fails=lambda config: "OutOfResources: shared" if config.tiles[0] > 64 else None)
    _, content = tune(tmp_path, bench, said=said, levels=((0, 256),))
    assert all(config.tiles[0] <= 64 for _, _, tried in bench.timed for config in tried)
    assert [e["tiles"][0] for e in content["kernels"] if e["columns"] == 128] == [64]
    assert any("failed, as OutOfResources: shared" in line for line in said)
    assert len(set(bench.prepared)) == len(bench.prepared)


def test_a_present_choice_that_fails_is_replaced(tmp_path):
    present = configs.choose(HOPPER, STREAM.bucket(0))
    bench = Bench(fails=lambda config: "does not launch" if config == present else None)
    _, content = tune(tmp_path, bench, levels=((0, 256),))
    (entry,) = (e for e in content["kernels"] if e["columns"] == 128)
    assert entry["tiles"] != list(present.tiles) or entry["stages"] != present.stages or entry["warps"] != present.warps


def test_a_level_that_does_not_fit_into_memory_keeps_its_choice(tmp_path):
    class Full(Bench):
        def kernel_times(self, group, n, tried):
            if n > 1000:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().kernel_times(group, n, tried)

    said = []
    _, content = tune(tmp_path, Full(wide_rows), said=said)
    of = {e["rows"]: e["tiles"][0] for e in content["kernels"] if e["columns"] == 128}
    assert of == {16384: 128, 2048: 64, 0: 128}
    assert any("not timed: CUDA out of memory" in line for line in said)


# The table


def test_entries_change_nothing_that_was_not_measured(tmp_path, monkeypatch):
    """A table's entry also holds for fewer columns and classes, so these get entries of their own: what is chosen now."""
    wanted = [Group("latent_loss", 2, 128, 128), Group("stream", 4, 128)]
    buckets = [
        Bucket(kernel, itemsize, columns, classes, rows)
        for kernel in TILES
        for itemsize in (2, 4)
        for columns in (64, 128, 256)
        for classes in (16, 128)
        for rows in (0, 500, 2048, 5000, 16384, 100000)
    ]
    before = {bucket: configs.choose(HOPPER, bucket) for bucket in buckets}
    file, content = tune(tmp_path, Bench(lambda group, n, config: -config.tiles[0] + 1000.0), wanted=wanted)
    assert {(e["columns"], e["classes"]) for e in content["kernels"] if e["kernel"] == "latent_loss"} == {
        *((64, 16), (64, 128), (128, 16), (128, 128))
    }
    monkeypatch.setenv("INTERP_NN_TABLE", str(file))
    changed = {bucket for bucket in buckets if configs.choose(HOPPER, bucket) != before[bucket]}
    measured = {("latent_loss", 2, 128, 128), ("stream", 4, 128, 16)}
    assert {bucket[:4] for bucket in changed} <= measured | {("stream", 4, 128, 128)}  # a stream has no classes
    assert {bucket.kernel for bucket in changed} == {"latent_loss", "stream"}
    for spec in (spec_for((8, 0)), spec_for((8, 9))):
        assert all(e["capabilities"] == [[9, 0]] for e in content["kernels"])
        with monkeypatch.context() as patch:
            patch.delenv("INTERP_NN_TABLE")
            own = configs.choose(spec, wanted[1].bucket(0))
        assert configs.choose(spec, wanted[1].bucket(0)) == own


def test_the_file_looks_like_the_packages_own(tmp_path):
    file, content = tune(tmp_path, Bench(), problems=[("pair", 2, 64)])
    own = configs._own_table()
    assert set(own.kernels[0]) <= set(content["kernels"][0])
    assert len(file.read_text().splitlines()) == 7 + len(content["kernels"]) + len(content["engines"])
    assert configs._read(file).kernels and configs._read(file).engines
    assert os.listdir(file.parent) == ["table.json"]
    tuning.write(file, {"origin": "nothing", "kernels": [], "engines": []})
    assert configs._read(file) == configs.Table()


@pytest.mark.parametrize(("times", "name"), [((1.0, 2.0), "triton"), ((2.0, 1.0), "eager"), ((1.0, 1.005), None)])
def test_the_faster_engine_is_written_and_read_back(times, name, tmp_path, monkeypatch):
    bench, said = Bench(engines=times), []
    problems = [("summary", 2, 64), ("pair_loss", 2, 128), ("head_loss", 4, 128)]
    file, content = tune(tmp_path, bench, wanted=[], problems=problems, said=said)
    assert len(content["engines"]) == (0 if name is None else 9)
    assert set(bench.tables) == {str(file)}
    assert "INTERP_NN_TABLE" not in os.environ
    monkeypatch.setenv("INTERP_NN_TABLE", str(file))
    for bucket in (
        Bucket("summary", 2, 64, 16, 5000),
        Bucket("pair_loss", 2, 128, 128, 0),
        Bucket("head_loss", 4, 128, 16, 99999),
    ):
        assert configs.measured_engine(HOPPER, bucket) == name
    assert configs.measured_engine(HOPPER, Bucket("head_loss", 4, 128, 128, 99999)) is None
    assert configs.measured_engine(HOPPER, Bucket("pair", 2, 64, 16, 5000)) is None
    verdict = f"summary bf16, 64 columns, rows >= 0: {name or 'no engine'} is faster, {{'triton': "
    assert any(line.startswith(verdict) and line.endswith("} us") for line in said)


@pytest.mark.parametrize(
    ("medians", "name"),
    [
        ({"eager": 3.0, "triton": 2.0, "cuda": 1.0}, "cuda"),
        ({"eager": 3.0, "triton": 1.0, "cuda": 1.01}, None),
        ({"eager": 3.0, "triton": 1.0, "cuda": 1.3, "cuda again": 1.0}, None),  # as far apart as the two engines
        ({"eager": 1.0, "triton": 1.5}, "eager"),
    ],
)
def test_the_fastest_engine_beats_every_other(medians, name):
    again = {f"{engine} again": taken for engine, taken in medians.items() if " " not in engine}
    assert tuning.fastest({**again, **medians}) == name


def test_engines_that_refuse_a_problem_are_not_timed(monkeypatch):
    monkeypatch.setattr(limits, "_machine_reason", lambda engine: None)
    monkeypatch.setattr(limits, "_library_reason", lambda problem: None)
    bench = object.__new__(trials.DeviceBench)
    bench.device, bench.spec = torch.device("cuda", 0), spec_for((7, 5))
    assert bench._able("summary", 4, 64, 8) == ["eager", "cuda"]
    assert bench._able("head_loss", 4, 64, 8) == ["eager"]
    bench.spec = spec_for((9, 0))
    assert bench._able("pair_loss", 2, 128, 8) == ["eager", "triton", "cuda"]


def test_an_engine_may_be_faster_for_many_rows_only(tmp_path, monkeypatch):
    bench = Bench(engines=lambda kind, n: (1.0, 2.0) if n > 5000 else (2.0, 1.0))
    file, _ = tune(tmp_path, bench, wanted=[], problems=[("pair", 4, 128)])
    monkeypatch.setenv("INTERP_NN_TABLE", str(file))
    found = {rows: configs.measured_engine(HOPPER, Bucket("pair", 4, 100, 16, rows)) for rows in (32, 4096, 65536)}
    assert found == {32: "eager", 4096: "eager", 65536: "triton"}


def test_time_that_is_over_costs_what_is_not_done(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    class Slow(Bench):
        def prepare(self, group, tried, seconds):
            now[0] += 0.3 * SECONDS
            return super().prepare(group, tried, seconds)

        def engine_times(self, *problem):
            now[0] += 0.2 * SECONDS
            return super().engine_times(*problem)

    said, wanted = [], [STREAM, Group("summary_backward", 2, 128), Group("pair_loss", 2, 128), Group("stream", 4, 128)]
    problems = [("summary", 2, 64), ("pair", 2, 64)]
    _, content = tune(tmp_path, Slow(), wanted=wanted, problems=problems, said=said)
    assert {(e["kernel"], e["itemsize"]) for e in content["kernels"]} == {(group.kernel, 2) for group in wanted[:3]}
    assert [line for line in said if "skipped" in line] == [
        "stream fp32, 128 columns: skipped, out of time",
        *(f"summary bf16, 64 columns, rows >= {rows}: skipped, out of time" for rows in ROWS[1:]),
        *(f"pair bf16, 64 columns, rows >= {rows}: skipped, out of time" for rows in ROWS),
    ]
    assert [(e["problem"], e["rows"]) for e in content["engines"]] == [("summary", ROWS[0])]


def test_a_table_in_use_is_not_written_over(tmp_path, monkeypatch):
    file, _ = tune(tmp_path, Bench())
    monkeypatch.setenv("INTERP_NN_TABLE", str(file))
    with pytest.raises(RuntimeError, match="INTERP_NN_TABLE names the file to be written"):
        tune(tmp_path, Bench())


# The command


def test_without_a_gpu_the_command_says_why(tmp_path, capsys, monkeypatch):
    assert tuning.main(["--output", str(tmp_path / "table.json")]) == 2
    reason = unsupported_reason("triton")
    assert capsys.readouterr().err == f"interp_nn tune: the triton engine is off: {reason}\n"
    assert not (tmp_path / "table.json").exists()


def test_the_command_passes_on_what_it_is_given(tmp_path, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(tuning, "tune", lambda *args: given.append(args) or {"kernels": [1, 2], "engines": []})
    assert tuning.main(["--output", str(tmp_path / "t"), "--minutes", "2", "--device", "cuda:1"]) == 0
    assert given == [(tmp_path / "t", 120.0, "cuda:1")]
    assert f"INTERP_NN_TABLE={tmp_path / 't'}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tuning.main([])


# Processes that compile


class Deadly:
    """A task that ends the process which receives it."""

    def __reduce__(self):
        return os._exit, (1,)


class Endless:
    """A task that keeps the process which receives it."""

    def __reduce__(self):
        return time.sleep, (600,)


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*fork:DeprecationWarning"
)  # of Python 3.12; these forks count letters
def test_a_process_that_dies_or_hangs_costs_its_task_only(monkeypatch):
    """Forked, as a process that imports PyTorch takes two seconds to start."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    workers = Workers(1, len, 90.0)
    start = time.monotonic()
    assert workers.run([Endless(), "good"], 0.5) == ["out of time"] * 2
    assert time.monotonic() - start < 10
    assert workers.run([Deadly(), "good"], 60.0) == ["the process that tried it died", 4]


def test_the_task_of_a_process_tells_why_a_kernel_cannot_run():
    """Without an interpreter it cannot run on the CPU."""
    function = pickle.loads(pickle.dumps(partial(trials._task, torch.device("cpu"), "none")))
    why = function((STREAM, 256, [configs.choose(HOPPER, STREAM.bucket(0))]))
    assert "the triton engine was given a tensor on cpu" in why


class Hanging:
    """A config's stand-in that hangs with many rows."""

    def run(self, tasks, seconds):
        self.ran = [*getattr(self, "ran", []), *tasks]
        if isinstance(tasks[0][2], dict):
            return [{place: [1.0] for place in tasks[0][2]}]
        return ["not done within 90 s" if task[1] > 1000 and task[2][0].warps == 4 else None for task in tasks]


def test_a_config_that_hangs_with_many_rows_is_not_timed():
    bench, config = object.__new__(trials.DeviceBench), configs.choose(HOPPER, STREAM.bucket(0))
    bench._workers, bench.device = Hanging(), torch.device("cuda", 0)
    tried = [config, config._replace(warps=4)]
    assert bench.prepare(STREAM, tried, 9.0) == dict.fromkeys(tried)
    assert bench.kernel_times(STREAM, 65536, tried) == {0: [1.0]}
    assert bench._workers.ran[-1] == (STREAM, 65536, {0: config})


@pytest.mark.parametrize(
    ("blocks", "columns", "fits"), [(1, 512, True), (2, 256, True), (2, 512, False), (2, None, True)]
)
def test_more_tensor_memory_than_there_is_is_refused(blocks, columns, fits, monkeypatch):
    """A block that finds no tensor memory would wait for ever, and the grid barrier with it."""
    compiled = types.SimpleNamespace(metadata=types.SimpleNamespace(tmem_size=columns))
    kernel = types.SimpleNamespace(warmup=lambda *_, grid, **__: compiled)
    launched = []
    monkeypatch.setattr(engine, "launch", lambda *_: launched.append(True))
    monkeypatch.setattr(
        trials, "engine_call", lambda *_: lambda: engine.launch(launcher.Launch(kernel, 1, 1, {}), None)
    )
    config = configs.choose(HOPPER, STREAM.bucket(0))._replace(blocks_per_sm=blocks)
    why = trials.attempt(STREAM, config, torch.device("cpu"))
    assert (why, bool(launched)) == (
        (None, True) if fits else ("1024 columns of tensor memory, and a multiprocessor has 512", False)
    )


@pytest.mark.slow
def test_kernels_are_tuned_on_the_interpreter(tmp_path):
    """Through the engine's own calls, on so few rows and with so few samples that it can be borne."""
    code = """
        import sys
        from pathlib import Path
        from interp_nn import trials, tuning

        trials.host_clock = lambda calls, device: {key: [1.0 + (call() is call)] for key, call in calls.items()}
        trials._FEW_ROWS = 9
        wanted = [trials.Group(kernel, 4, 64) for kernel in ("stream", "summary_backward", "pair_loss", "flat_loss")]
        problems = [(kind, 4, 64) for kind in ("summary", "pair", "pair_loss", "head_loss")]
        tuning._ROUNDS = 1
        tuning.neighbours = lambda config, *_: [config._replace(stages=4)]
        tuning.tune(Path(sys.argv[1]), 1e6, "cpu", wanted=wanted, problems=problems, levels=((0, 9),))
    """
    file = tmp_path / "table.json"
    done = python("-c", textwrap.dedent(code), str(file), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed, as" not in done.stdout and "not timed" not in done.stdout
    found = configs._read(file)
    assert {entry["kernel"] for entry in found.kernels} == {"stream", "summary_backward", "pair_loss", "flat_loss"}
    assert "interpreted (sm_90)" in json.loads(file.read_text())["origin"]
