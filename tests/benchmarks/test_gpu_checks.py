"""The checks of the GPU job, rehearsed without a GPU: they notice wrong results."""

import contextlib
import itertools

import pytest
import torch
from gpu_stand_ins import BOTH, CPU, admitting

import interp_nn
from benchmarks.gpu import cases, checks, job_table, kernels, runs
from benchmarks.timing import footprint, tolerances
from interp_nn import engines, functional
from interp_nn.engines import barrier, plain, verify

EAGER = kernels.EAGER


def test_every_two_levels_meet_in_some_case():
    for factors in cases.FACTORS.values():
        rows = cases.covering(factors, tries=2)
        for one, other in itertools.combinations(factors, 2):
            met = {(row[one], row[other]) for row in rows}
            assert met == set(itertools.product(factors[one], factors[other])), (one, other)


def test_tolerances():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert tolerances.errors(torch.tensor([3.0, 4.5]), exact) == (0.1, 0.125)
    assert tolerances.errors(torch.tensor([3.0, torch.nan]), exact) == (torch.inf, torch.inf)
    assert tolerances.errors(torch.zeros(2), torch.zeros(2).double()) == (0.0, 0.0)
    assert tolerances.errors(torch.ones(2), torch.zeros(2).double()) == (torch.inf, torch.inf)
    assert tolerances.exceeds((0.1, 0.1), (0.05, 0.05), 0.0) is None
    assert "maximum error 0.2" in tolerances.exceeds((0.1, 0.2), (0.05, 0.05), 0.05)
    assert "Frobenius" in tolerances.exceeds((torch.nan, 0.0), (0.05, 0.05), 0.0)
    assert "proves nothing" in tolerances.exceeds((0.0, 0.0), (torch.inf, 0.0), 0.0)
    assert tolerances.floor(torch.bfloat16) == 3 * 2**-7


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_guards_notice_writes_around(layout):
    t = torch.arange(6.0).view(2, 3)
    held = checks.guarded(t, layout)
    assert torch.equal(held.tensor, t) and held.tensor.data_ptr() % 16 == 0
    assert held.tensor.stride() == {"rows": (3, 1), "transposed": (1, 2), "apart": (1, 4), "strided": (6, 2)}[layout]
    held.tensor.fill_(7)
    assert not held.touched()
    gaps = held.buffer.isnan().nonzero()[:, 0]
    inner = [int(i) for i in gaps if gaps[0] + 4096 <= i < gaps[-1] - 4096]
    assert bool(inner) is (layout in ("apart", "strided"))
    for place in (4095, len(held.buffer) - 4096, *inner[:1]):
        before, held.buffer[place] = held.buffer[place].clone(), 0
        assert held.touched()
        held.buffer[place] = before


@pytest.fixture
def any_engine(monkeypatch):
    """The eager engine computes whatever engine is asked for, and says that a kernel was launched."""
    admitting(monkeypatch)
    monkeypatch.setattr(interp_nn, "use_engine", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "launches", lambda engine: contextlib.nullcontext(["a kernel"]))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_engine_is_judged_at_each_number_of_rows(layout, log, lines, any_engine):
    checks.check_case(cases.Case("summary", "fp32", (5, 9), 6, 3, layout, "x b bias"), BOTH, CPU, log)
    assert [(line["n"], line["engine"], line["status"]) for line in lines()] == [
        (n, engine, "ok") for n in (5, 9) for engine in (*BOTH, EAGER)
    ]
    for line in lines():
        assert set(line["errors"]) == {"y", "dx", "db", "dbias"}
        assert {"device", "order", "config", "kernels", "floor", "dtype", "d", "k", "mode", "layout"} <= set(line)


def test_unsupported_problems_are_counted(log, lines, any_engine, monkeypatch):
    why = {"cuda": "cuda: not this one"}
    monkeypatch.setattr(kernels, "unsupported_reason", lambda engine, *_: why.get(engine))
    checks.check_case(cases.Case("pair", "fp32", (9,), 6, 3, wanted="summary"), BOTH, CPU, log)
    checks.check_far_rows(BOTH, CPU, log, 2**12, 8, torch.float32)
    runs.run_small("cuda", CPU, log)
    assert {line["status"] for line in lines() if line["engine"] != "cuda"} == {"ok"}
    skipped = [line for line in lines() if line["engine"] == "cuda"]
    assert len(skipped) == 3 + 5 + 2 and {(line["status"], line["why"]) for line in skipped} == {
        ("skipped", why["cuda"])
    }
    assert f"skipped: part: {len(skipped)} (cuda: not this one)" in job_table.table(lines())


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (cases.Case("summary", "bf16", (9,), 6, 3), "summary"),
        (cases.Case("pair_loss", "fp32", (9,), 6, 3, ignored="all"), "summary_cross_entropy"),
        (cases.Case("flat", "fp16", (9,), 6, 3, m=2, reduction="none"), "summary_head_cross_entropy"),
    ],
)
def test_a_wrong_result_is_wrong(case, name, log, lines, any_engine, monkeypatch):
    function = getattr(functional, name)
    checks.check_case(case, BOTH, CPU, log)
    monkeypatch.setattr(functional, name, lambda *args, **given: 1 + 1.2 * function(*args, **given).nan_to_num())
    checks.check_case(case, BOTH, CPU, log)
    assert [line["status"] for line in lines()] == ["ok"] * 3 + ["wrong"] * 3


def test_an_engine_that_launches_nothing_is_wrong_and_one_that_is_off_has_failed(log, lines, monkeypatch):
    admitting(monkeypatch)
    case = cases.Case("pair", "fp32", (9,), 6, 3, wanted="projection")
    checks.check_case(case, BOTH, CPU, log)
    assert [line["status"] for line in lines()] == ["failed", "failed", "ok"] and log.bad == 2
    assert all(f"the {engine} engine is off" in line["why"] for line, engine in zip(lines(), BOTH, strict=False))
    monkeypatch.setattr(interp_nn, "use_engine", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "launches", lambda engine: contextlib.nullcontext([]))
    checks.check_case(case, BOTH, CPU, log)
    assert [line.get("why") for line in lines()[3:]] == ["no kernel was launched", "no kernel was launched", None]


def test_memory_is_poisoned_and_missing_poison_is_noticed(log, lines, any_engine, monkeypatch):
    engine = engines.unverified("triton")
    with checks.poisoned():
        assert engine.workspace((2, 3), torch.float32, CPU).isnan().all() and not barrier.counter(CPU).any()
    assert not torch.are_deterministic_algorithms_enabled()
    for filled in (True, False):
        names = ["fill", "kernel"][not filled :]
        monkeypatch.setattr(footprint, "profiled", lambda call, device, names=names: (call(), names))
        checks.check_poison(BOTH, CPU, log)
    assert [line["status"] for line in lines()] == ["ok"] * 3 + ["ok", "wrong", "wrong"]
    monkeypatch.setattr(checks, "poisoned", contextlib.nullcontext)
    monkeypatch.setattr(torch, "empty_strided", lambda size, stride, **made: torch.zeros(size, **made))
    checks.check_poison((), CPU, log)
    assert lines()[-1]["status"] == "wrong"


@pytest.mark.parametrize("right", [True, False])
def test_far_rows(right, log, lines, any_engine, monkeypatch):
    if not right:
        summary, loss = functional.summary, functional.summary_cross_entropy
        monkeypatch.setattr(functional, "summary", lambda x, b: torch.cat((summary(x[:-9], b), x[-9:] @ b)))
        monkeypatch.setattr(functional, "summary_cross_entropy", lambda x, b, t: loss(x[:-9], b, t[:-9]))
    checks.check_far_rows(BOTH, CPU, log, 2**12, 8, torch.float32)
    assert [(line["engine"], line["status"]) for line in lines()] == [(e, "ok" if right else "wrong") for e in BOTH * 2]
    assert set(lines()[0]["errors"]) == {"db", *(f"{t}[{at}:]" for t in ("y", "dx") for at in (0, 12, 1012))}


@pytest.mark.parametrize("right", [True, False])
def test_a_variant_is_compared_twice(right, log, lines, monkeypatch):
    class Kernels:
        def scale(self, grads, upstream):
            return [g if right else g + 1 for g in plain.scale(grads, upstream)]

    monkeypatch.setattr(engines, "unverified", lambda name: Kernels())
    checks.check_variant(verify.Variant("triton", "scale", (torch.float32, torch.float16)), CPU, log)
    (line,) = lines()
    assert line["name"].startswith("verify triton scale in float32, float16")
    assert (line["status"], "why" in line) == (("ok", False) if right else ("wrong", True)) and line["again_ms"] >= 0


def test_the_first_use_of_a_layer_is_a_line(log, lines):
    checks.check_first_use(CPU, log)
    (line,) = lines()
    assert (line["name"], line["status"], line["verdicts"]) == ("first use", "ok", {})
    assert line["plan"].startswith("eager")


def test_a_profile_leaves_the_clocks_and_has_a_kernel_s_second_launch(log, lines, tmp_path, monkeypatch):
    program = tmp_path / "ncu"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    runs.profile_kernel("stream", CPU, tmp_path, log)
    assert [line["status"] for line in lines()] == ["ok"]
    asked = (tmp_path / "ncu-stream.txt").read_text()
    assert asked.startswith(
        "--set=full --clock-control=none --kernel-name regex:stream --launch-skip 1 --launch-count 1 "
    )
