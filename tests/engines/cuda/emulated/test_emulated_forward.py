import pytest
import torch
from cases import COVER, EDGES, Case, Guarded, Problem, array, name
from support import assert_close_law

from benchmarks.timing.tolerances import SPLIT_ULPS

AMPERE, TURING = (3, 163 * 1024, 80), (2, 64 * 1024, 75)  # programs, shared memory, capability
# tf32 has ten bits, like fp16; so have the operands of its reference, but ties are broken the other way now and then.
PRECISION = {"F16": torch.float16, "BF16": torch.bfloat16, "TF32": torch.float16, "F32": torch.float32}
ULPS = {"F16": 3, "BF16": 3, "TF32": 3, "F32": SPLIT_ULPS}


def run(emulated, problem, device=AMPERE, seed=None, pair=True, bias=True):
    case = problem.case
    n, k = case.n, case.k
    p, y, g = problem.empty(n, k), problem.empty(n, k), problem.empty(k, k)
    given = problem.inputs
    emulated.forward(
        array(given["x"]), array(given["b"]), array(given["bias"]) if bias else None,
        array(p) if pair else None, array(y), array(g) if pair else None, problem.sizes(emulated), emulated.DeviceSpec(*device),
        case.seed if seed is None else seed,
    )  # fmt: skip
    for result in (p, y, g):
        result.check()
    return p.tensor, y.tensor, g.tensor


def check(problem, results):
    same, exact = problem.forward(False), problem.forward(True)
    for what, got, theirs, truth in zip(("P", "Y", "G"), results, same, exact, strict=True):
        assert_close_law(got, theirs, truth, what, PRECISION[problem.case.kind], ULPS[problem.case.kind])


@pytest.mark.parametrize("case", COVER, ids=name)
def test_law(emulated, case):
    problem = Problem(case)
    emulated.reset_counts()
    check(problem, run(emulated, problem))
    matrices, conflicts, _ = emulated.counts()
    assert conflicts == 0
    assert (matrices > 0) == (case.kind in ("F16", "BF16"))


@pytest.mark.parametrize("case", [c for c in EDGES if c.k in (20, 65)], ids=name)
def test_inputs_at_odd_addresses(emulated, case):
    problem = Problem(case, shift=1)
    check(problem, run(emulated, problem))


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_same_bits_whatever_the_schedule_the_grid_and_the_stages(emulated, kind):
    problem = Problem(Case(kind, 300, 100, 65 if kind == "BF16" else 60))
    first = run(emulated, problem, seed=0)
    for seed in range(1, 5):
        for again, before in zip(run(emulated, problem, seed=seed), first, strict=True):
            assert torch.equal(again, before)
    for device in ((1, 164 * 1024, 80), (4, 164 * 1024, 80), (3, 99 * 1024, 86)):
        for again, before in zip(run(emulated, problem, device), first, strict=True):
            assert torch.equal(again, before)


def test_what_is_optional(emulated):
    problem = Problem(Case("BF16", 130, 64, 20))
    p, y, g = run(emulated, problem, pair=False, bias=False)
    assert bool(p.isnan().all()) and bool(g.isnan().all())  # nobody asked
    _, theirs, _ = problem.forward(False)
    _, exact, _ = problem.forward(True)
    assert_close_law(y, theirs - problem.bias, exact - problem.bias.double(), "Y")


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1, 0x7F800000], ids=hex)  # three NaNs and infinity
@pytest.mark.parametrize("kind", ["F16", "TF32", "F32"])
def test_rows_do_not_see_each_other(emulated, kind, bits):
    problem = Problem(Case(kind, 40, 64, 64))
    before = run(emulated, problem)[1].clone()
    problem.inputs["x"].tensor[7, 3] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    after = run(emulated, problem)[1]
    others = torch.arange(40) != 7
    assert torch.equal(after[others], before[others])
    assert not bool(after[7].isfinite().any())


@pytest.mark.parametrize(("kind", "total"), [("TF32", 1.0), ("F32", 1 + 7 * 2**-22)])
def test_only_a_step_adds_up_in_the_matrix_units(emulated, kind, total):
    """One and 63 times 2^-25: beside the one they are cut off, eight by eight they are not."""
    problem = Problem(Case(kind, 1, 64, 1))
    problem.inputs["x"].tensor.fill_(2**-25)[0, 0] = 1.0
    problem.inputs["b"].tensor.fill_(1.0)
    assert float(run(emulated, problem)[0]) == total


@pytest.mark.parametrize(
    ("case", "device", "text"),
    [
        (Case("F32", 16, 16, 129), AMPERE, "no CUDA kernel"),
        (Case("BF16", 16, 16, 16), TURING, "no CUDA kernel"),
        (Case("F32", 16, 16, 128), TURING, "no CUDA kernel"),
        (Case("F32", 16, 16, 16), (0, 0, 0), "no CUDA device"),
    ],
)
def test_what_cannot_be_done_is_said(emulated, case, device, text):
    with pytest.raises(ValueError, match=text):
        run(emulated, Problem(case), device)


@pytest.mark.parametrize("case", [c for c in COVER if c.kind == "F32" and c.k <= 64], ids=name)
def test_law_on_gpus_without_matrix_units(emulated, case):
    problem = Problem(case)
    check(problem, run(emulated, problem, TURING))


def test_b_with_any_strides(emulated):
    problem = Problem(Case("BF16", 130, 40, 20))
    wide = Guarded((3 * 40, 2 * 20), problem.dtype)
    wide.tensor[::3, ::2] = problem.b
    problem.inputs["b"], problem.strides = wide, (3 * 2 * 20, 2)
    check(problem, run(emulated, problem))


def test_guards_see_what_is_written_outside():
    guarded = Guarded((2, 2), torch.float32)
    guarded.memory[255] = 0.0
    with pytest.raises(AssertionError, match="outside"):
        guarded.check()
