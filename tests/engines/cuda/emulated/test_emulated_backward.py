import pytest
import torch
from cases import COVER, Case, Problem, array, name
from support import assert_close_law
from test_emulated_forward import AMPERE, PRECISION, TURING, ULPS

SOME = [case for case in COVER if case.k in (20, 65, 128)]


def run_pair(emulated, problem, device=AMPERE, seed=None, with_p=True, with_y=True, need_x=True, need_b=True):
    case, given = problem.case, problem.inputs
    p, _, g = problem.forward(True)
    p, g = p.to(problem.dtype), g.to(problem.dtype)
    dx, db = problem.empty(case.n, case.d), problem.result_b()
    emulated.pair_backward(
        array(given["x"]), array(given["b"]), array(p) if with_y else None, array(g) if with_y else None,
        array(given["dp"]) if with_p else None, array(given["dy"]) if with_y else None,
        array(dx) if need_x else None, array(db) if need_b else None, case.b_transposed, problem.sizes(emulated),
        emulated.DeviceSpec(*device), case.seed if seed is None else seed,
    )  # fmt: skip
    dx.check()
    db.check()
    return (dx.tensor, problem.of_b(db)), (p, g)


def check_pair(problem, results, kept, **terms):
    same, exact = (problem.pair_backward(e, *kept, **terms) for e in (False, True))
    kind = problem.case.kind
    for what, got, theirs, truth in zip(("dX", "db"), results, same, exact, strict=True):
        assert_close_law(got, theirs, truth, what, PRECISION[kind], ULPS[kind])


def run_summary(emulated, problem, device=AMPERE, seed=None, need_x=True, need_b=True, need_bias=True):
    case, given = problem.case, problem.inputs
    g = problem.forward(True)[2].to(problem.dtype)
    dx, db, dbias = problem.empty(case.n, case.d), problem.result_b(), problem.empty(case.k)
    emulated.summary_backward(
        array(given["x"]), array(given["b"]), array(g), array(given["dy"]), array(dx) if need_x else None,
        array(db) if need_b else None, array(dbias) if need_bias else None, case.b_transposed, problem.sizes(emulated),
        emulated.DeviceSpec(*device), case.seed if seed is None else seed,
    )  # fmt: skip
    for result in (dx, db, dbias):
        result.check()
    return (dx.tensor, problem.of_b(db), dbias.tensor), g


def check_summary(problem, results, g):
    same, exact = (problem.summary_backward(e, g) for e in (False, True))
    kind = problem.case.kind
    for what, got, theirs, truth in zip(("dX", "db", "dbias"), results, same, exact, strict=True):
        assert_close_law(got, theirs, truth, what, PRECISION[kind], ULPS[kind])


RUNS = {"pair": (run_pair, check_pair), "summary": (run_summary, check_summary)}
kernels = pytest.mark.parametrize(("run", "check"), RUNS.values(), ids=RUNS)


@kernels
@pytest.mark.parametrize("case", COVER, ids=name)
def test_law(emulated, case, run, check):
    problem = Problem(case)
    emulated.reset_counts()
    check(problem, *run(emulated, problem))
    assert emulated.counts()[1] == 0


@kernels
@pytest.mark.parametrize("case", [c for c in COVER if c.kind == "F32" and c.k in (20, 64)], ids=name)
def test_law_on_gpus_without_matrix_units(emulated, case, run, check):
    problem = Problem(case)
    check(problem, *run(emulated, problem, TURING))


@pytest.mark.parametrize("terms", [{"with_p": False}, {"with_y": False}], ids=["dy", "dp"])
@pytest.mark.parametrize("case", SOME, ids=name)
def test_pair_of_one_gradient(emulated, case, terms):
    problem = Problem(case)
    check_pair(problem, *run_pair(emulated, problem, **terms), **terms)


@pytest.mark.parametrize(
    ("run", "case", "names"),
    [
        (run_pair, (130, 72, 40), ("need_x", "need_b")),
        (run_summary, (130, 200, 40, True), ("need_x", "need_b", "need_bias")),
    ],
    ids=RUNS,
)
@pytest.mark.parametrize("kind", ["F16", "TF32"])
def test_in_parts(emulated, kind, run, case, names):
    problem = Problem(Case(kind, *case))
    whole, _ = run(emulated, problem)
    for i, wanted in enumerate(names):
        parts, _ = run(emulated, problem, **{name: name == wanted for name in names})
        for j, part in enumerate(parts):
            assert torch.equal(part, whole[j]) if i == j else bool(part.isnan().all())


@pytest.mark.parametrize("device", [AMPERE, (8, 99 * 1024, 86), (4, 227 * 1024, 90)], ids=["80", "86", "90"])
@pytest.mark.parametrize("kind", ["BF16", "F32"])
@kernels
def test_same_bits_in_every_schedule(emulated, kind, device, run, check):
    d, transposed = (100, False) if run is run_pair else (200, True)
    problem = Problem(Case(kind, 700, d, 100 if kind == "BF16" else 60, transposed))
    first, kept = run(emulated, problem, device, seed=0)
    check(problem, first, kept)
    for seed in range(1, 5):
        again, _ = run(emulated, problem, device, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
