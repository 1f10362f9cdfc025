"""What the GPU job checks, and that it notices what is wrong, without a GPU."""

import contextlib
import itertools
import os
import subprocess
import sys
import types

import pytest
import torch
from gpu_stand_ins import BOTH, CPU, H100, admitting

import interp_nn
from benchmarks.gpu import cases, checks, job_table, kernels, runs
from benchmarks.records.environment import ROOT
from benchmarks.timing import tolerances
from interp_nn import engines, functional
from interp_nn.engines import barrier

pytestmark = pytest.mark.usefixtures("one_thread")  # problems this small lose more to waking threads


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
    assert tolerances.errors(torch.tensor([3.0, 4.5]), exact) == (0.1, 0.125)
    assert tolerances.errors(torch.tensor([3.0, torch.nan]), exact) == (torch.inf, torch.inf)
    assert tolerances.errors(torch.zeros(2), torch.zeros(2).double()) == (0.0, 0.0)
    assert tolerances.errors(torch.ones(2), torch.zeros(2).double()) == (torch.inf, torch.inf)
    assert tolerances.breach((0.1, 0.1), (0.05, 0.05), 0.0) is None
    assert "maximum error 0.2" in tolerances.breach((0.1, 0.2), (0.05, 0.05), 0.05)
    assert "Frobenius" in tolerances.breach((torch.nan, 0.0), (0.05, 0.05), 0.0)
    assert "proves nothing" in tolerances.breach((0.0, 0.0), (torch.inf, 0.0), 0.0)
    assert tolerances.floor(torch.bfloat16) == 3 * 2**-7


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
    assert f"skipped: part: {len(refused)} (cuda: not this one)" in job_table.table(found)


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
        assert not barrier.counter(CPU).any()
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
