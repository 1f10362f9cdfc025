import contextlib

import pytest
import torch
from cases import Case, Guarded, Problem, TF32Products, array, name
from support import assert_close_law
from test_emulated_forward import AMPERE, PRECISION, TURING, ULPS

from interp_nn.engines import eager
from interp_nn.engines.problem import LossOptions, Plan

WEIGHTS = (0.7, 1.3, 0.9)
KINDS = ("F16", "BF16", "TF32", "F32")
SIZES = [  # n, d, k, classes of a head, reduction
    (0, 7, 10, 3, "sum"),
    (1, 7, 2, 2, "sum"),
    (17, 7, 63, 17, "none"),
    (127, 64, 10, 16, "mean"),
    (129, 72, 100, 100, "mean"),
    (300, 40, 128, 128, "sum"),
    (1000, 64, 20, 10, "mean"),
]
CASES = [
    (Case(kind, n, d, k, (i + j) % 2 == 1, i), m, reduction)
    for j, kind in enumerate(KINDS)
    for i, (n, d, k, m, reduction) in enumerate(SIZES)
]
IDS = [f"{name(case)}-{m}-{reduction}" for case, m, reduction in CASES]


class Loss:
    """A problem with targets, some of them ignored, and for a head (classes not None) with an output layer."""

    def __init__(self, case, classes, reduction, upstream=None):
        self.problem, self.classes, self.reduction = Problem(case), classes, reduction
        dtype, m = self.problem.dtype, classes or case.k
        self.options = LossOptions(WEIGHTS, -100, reduction)
        self.target = torch.randint(m, (case.n,)).where(torch.rand(case.n) < 0.8, -100)
        self.upstream = upstream
        given = self.problem.inputs
        self.a = self.c = None
        if classes is not None:
            a, c = torch.randn(m, case.k).div(case.k**0.5).to(dtype), torch.randn(m).to(dtype)
            given["a"], given["c"] = Guarded(a.shape, dtype, a), Guarded(c.shape, dtype, c)
            self.a, self.c = a, c

    def expected(self, dtype, needs):
        """(value, gradients) of the eager engine in a dtype."""
        problem = self.problem
        x, b, a, c = (None if t is None else t.to(dtype) for t in (problem.x, problem.b, self.a, self.c))
        plan = Plan("eager", "(Xb)G", saves=True) if a is None else Plan("eager", "logits_from_latent")
        upstream = None if self.upstream is None else self.upstream.to(dtype)
        return eager.loss(x, b, a, c, self.target, self.options, plan, upstream, needs)

    def run(self, emulated, device=AMPERE, seed=None, needs=(True, True, True, True)):
        problem, case, m = self.problem, self.problem.case, self.classes
        given = problem.inputs
        value = Guarded((case.n,) if self.reduction == "none" else (1,), torch.float32)
        terms = emulated.LossTerms(
            self.target.numpy(),
            array(self.upstream),
            array(value),
            -100,
            *WEIGHTS,
            getattr(emulated.Reduction, self.reduction),
        )
        results = [problem.empty(case.n, case.d), problem.result_b()]
        if m is not None:
            results += [problem.empty(m, case.k), problem.empty(m)]
        wanted = [array(r) if need else None for r, need in zip(results, needs, strict=False)]
        tail = (
            case.b_transposed,
            problem.sizes(emulated),
            emulated.DeviceSpec(*device),
            case.seed if seed is None else seed,
        )
        if m is None:
            emulated.pair_loss(array(given["x"]), array(given["b"]), terms, *wanted, *tail)
        else:
            inputs = [array(given[key]) for key in ("x", "b", "a", "c")]
            emulated.head_loss(*inputs, terms, *wanted, m, *tail)
        for result in (value, *results):
            result.check()
        value = value.tensor if self.reduction == "none" else value.tensor[0]
        return value, [problem.of_b(r) if i == 1 else r.tensor for i, r in enumerate(results)]

    def check(self, results):
        needs = (True,) * (2 if self.classes is None else 4)
        kind, dtype = self.problem.case.kind, self.problem.dtype
        with TF32Products() if kind == "TF32" else contextlib.nullcontext():
            same = self.expected(dtype, needs)
        exact = self.expected(torch.float64, needs)
        assert_close_law(results[0], same[0].float(), exact[0], "value", PRECISION[kind], ULPS[kind])
        for what, got, theirs, truth in zip(("dX", "db", "dA", "dc"), results[1], same[1], exact[1], strict=False):
            assert_close_law(got, theirs, truth, what, PRECISION[kind], ULPS[kind])


@pytest.mark.parametrize(("case", "m", "reduction"), CASES, ids=IDS)
def test_pair_law(emulated, case, m, reduction):
    loss = Loss(case, None, reduction)
    emulated.reset_counts()
    loss.check(loss.run(emulated))
    assert emulated.counts()[1] == 0


@pytest.mark.parametrize(("case", "m", "reduction"), CASES, ids=IDS)
def test_head_law(emulated, case, m, reduction):
    device = AMPERE if case.kind in ("F16", "BF16") or m <= 16 else (3, 227 * 1024, 90)
    loss = Loss(case, m, reduction)
    emulated.reset_counts()
    loss.check(loss.run(emulated, device))
    assert emulated.counts()[1] == 0


@pytest.mark.parametrize("classes", [None, 10])
def test_law_on_gpus_without_matrix_units(emulated, classes):
    loss = Loss(Case("F32", 150, 40, 12, True), classes, "mean")
    if classes is None:
        return loss.check(loss.run(emulated, TURING))
    with pytest.raises(ValueError, match="no CUDA kernel"):
        loss.run(emulated, TURING)


@pytest.mark.parametrize("kind", ["F16", "F32"])
@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_is_read_on_the_device(emulated, kind, classes, reduction):
    case = Case(kind, 140, 24, 12)
    upstream = torch.rand(140) if reduction == "none" else torch.tensor([2.0**-12])
    loss = Loss(case, classes, reduction, upstream)
    loss.check(loss.run(emulated))


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_parts(emulated, classes, reduction):
    loss = Loss(Case("BF16", 140, 40, 24), classes, reduction)
    value, whole = loss.run(emulated)
    for wanted in [(), *[(i,) for i in range(len(whole))]]:
        needs = [i in wanted for i in range(4)]
        again, parts = loss.run(emulated, needs=needs)
        assert torch.equal(again, value)
        for need, part, of_whole in zip(needs, parts, whole, strict=False):
            assert torch.equal(part, of_whole) if need else bool(part.isnan().all())


@pytest.mark.parametrize("kind", ["BF16", "F32"])
@pytest.mark.parametrize("classes", [None, 10])
def test_same_bits_in_every_schedule(emulated, kind, classes):
    loss = Loss(Case(kind, 700, 200, 20, True), classes, "mean")
    value, grads = loss.run(emulated, seed=0)
    loss.check((value, grads))
    for seed in range(1, 5):
        again, others = loss.run(emulated, seed=seed)
        assert torch.equal(again, value)
        assert all(torch.equal(a, b) for a, b in zip(others, grads, strict=True))


@pytest.mark.parametrize("classes", [None, 7])
def test_no_row_that_counts(emulated, classes):
    loss = Loss(Case("F16", 40, 24, 12), classes, "mean")
    loss.target.fill_(-100)
    value, grads = loss.run(emulated)
    assert bool(value.isnan())
    assert all(not bool(g.any()) for g in grads)


def test_a_single_class_has_no_gradient_of_its_bias(emulated):
    """Its probability is 1, so the gradients of both logits are opposite and that of their bias is zero, to the bit."""
    loss = Loss(Case("TF32", 591, 48, 12, True), 1, "mean")
    _, (dx, _, _, dc) = loss.run(emulated)
    assert bool(dx.any()) and not bool(dc.any())


@pytest.mark.parametrize("classes", [None, 7])
def test_a_target_out_of_range_stops_the_kernel(emulated, classes):
    loss = Loss(Case("F16", 40, 24, 12), classes, "mean")
    loss.target[3] = 12
    with pytest.raises(RuntimeError, match="class index out of range"):
        loss.run(emulated)


@pytest.mark.parametrize("classes", [None, 7])
def test_rows_do_not_see_each_other(emulated, classes):
    loss = Loss(Case("F16", 40, 64, 64), classes, "none")
    value, grads = loss.run(emulated)
    loss.problem.inputs["x"].tensor[7, 3] = float("inf")
    loss.target[7] = 1
    after, others = loss.run(emulated)
    rest = torch.arange(40) != 7
    assert torch.equal(after[rest], value[rest])
    assert torch.equal(others[0][rest], grads[0][rest])
    assert not bool(after[7].isfinite())


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_scale(emulated, kind):
    dtype = Problem(Case(kind, 1, 1, 1)).dtype
    given = [torch.randn(33, 70).to(dtype), torch.randn(5000).to(dtype), torch.randn(1).to(dtype)]
    for upstream in (1.0, 0.3):
        scaled = [Guarded(g.shape, dtype, g) for g in given]
        emulated.scale(
            torch.tensor([upstream]).numpy(),
            [array(s) for s in scaled],
            getattr(emulated.Kind, kind),
            emulated.DeviceSpec(*AMPERE),
        )
        for before, after in zip(given, scaled, strict=True):
            after.check()
            assert torch.equal(after.tensor, (before.float() * upstream).to(dtype))
