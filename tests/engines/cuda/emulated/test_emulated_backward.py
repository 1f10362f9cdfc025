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


@pytest.mark.parametrize("case", COVER, ids=name)
def test_pair_law(emulated, case):
    problem = Problem(case)
    emulated.reset_counts()
    check_pair(problem, *run_pair(emulated, problem))
    assert emulated.counts()[1] == 0


@pytest.mark.parametrize("case", [c for c in COVER if c.kind == "F32" and c.k in (20, 64)], ids=name)
def test_law_on_gpus_without_matrix_units(emulated, case):
    problem = Problem(case)
    check_pair(problem, *run_pair(emulated, problem, TURING))
    check_summary(problem, *run_summary(emulated, problem, TURING))


@pytest.mark.parametrize("terms", [{"with_p": False}, {"with_y": False}], ids=["dy", "dp"])
@pytest.mark.parametrize("case", SOME, ids=name)
def test_pair_of_one_gradient(emulated, case, terms):
    problem = Problem(case)
    check_pair(problem, *run_pair(emulated, problem, **terms), **terms)


@pytest.mark.parametrize("kind", ["F16", "TF32"])
def test_pair_in_parts(emulated, kind):
    problem = Problem(Case(kind, 130, 72, 40))
    (dx, db), _ = run_pair(emulated, problem)
    (only_dx, untouched), _ = run_pair(emulated, problem, need_b=False)
    assert torch.equal(only_dx, dx) and bool(untouched.isnan().all())
    (untouched, only_db), _ = run_pair(emulated, problem, need_x=False)
    assert torch.equal(only_db, db) and bool(untouched.isnan().all())


@pytest.mark.parametrize("device", [AMPERE, (8, 99 * 1024, 86), (4, 227 * 1024, 90)], ids=["80", "86", "90"])
@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_pair_same_bits_in_every_schedule(emulated, kind, device):
    problem = Problem(Case(kind, 700, 100, 100 if kind == "BF16" else 60))
    (dx, db), kept = run_pair(emulated, problem, device, seed=0)
    check_pair(problem, (dx, db), kept)
    for seed in range(1, 5):
        (dx_again, db_again), _ = run_pair(emulated, problem, device, seed=seed)
        assert torch.equal(dx_again, dx) and torch.equal(db_again, db)


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


@pytest.mark.parametrize("case", COVER, ids=name)
def test_summary_law(emulated, case):
    problem = Problem(case)
    emulated.reset_counts()
    check_summary(problem, *run_summary(emulated, problem))
    assert emulated.counts()[1] == 0


@pytest.mark.parametrize("kind", ["F16", "TF32"])
def test_summary_in_parts(emulated, kind):
    problem = Problem(Case(kind, 130, 200, 40, True))
    whole, _ = run_summary(emulated, problem)
    for i, wanted in enumerate(("need_x", "need_b", "need_bias")):
        needs = dict.fromkeys(("need_x", "need_b", "need_bias"), False) | {wanted: True}
        parts, _ = run_summary(emulated, problem, **needs)
        for j, part in enumerate(parts):
            assert torch.equal(part, whole[j]) if i == j else bool(part.isnan().all())


@pytest.mark.parametrize("device", [AMPERE, (8, 99 * 1024, 86), (4, 227 * 1024, 90)], ids=["80", "86", "90"])
@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_summary_same_bits_in_every_schedule(emulated, kind, device):
    problem = Problem(Case(kind, 700, 200, 100 if kind == "BF16" else 60, True))
    first, g = run_summary(emulated, problem, device, seed=0)
    check_summary(problem, first, g)
    for seed in range(1, 5):
        again, _ = run_summary(emulated, problem, device, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
