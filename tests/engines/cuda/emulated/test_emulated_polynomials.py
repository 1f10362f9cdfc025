"""q(G) in the kernels: forward, backward and losses against the eager engine's polynomials, in guarded memory."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from cases import Case, Guarded, Problem, TF32Products, array, name
from support import assert_close_law
from test_emulated_forward import AMPERE, PRECISION, TURING, ULPS

from interp_nn.engines import eager, eager_polynomial
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan

COEFFICIENTS = [(1.5, -0.5), (1.875, -1.25, 0.375), (2.1875, -2.1875, 1.3125, -0.3125), (0.3, -0.7, 0.2, 0.5, -0.4)]
WEIGHTS = (0.7, 1.3, 0.9)


class Powers(NamedTuple):
    case: Case
    degree: int
    scaled: bool
    classes: int | None = None
    reduction: str = "mean"


def label(powers):
    head = "" if powers.classes is None else f"-{powers.classes}"
    return f"{name(powers.case)}-degree{powers.degree}{'-scaled' if powers.scaled else ''}{head}"


SIZES = [(0, 7, 10), (17, 7, 20), (129, 100, 65), (300, 40, 128), (140, 72, 24)]
CASES = [
    Powers(Case(kind, *size, (i + j) % 2 == 1, i), (i + j) % 4 + 1, (i + j // 2) % 2 == 0)
    for j, kind in enumerate(("F16", "BF16", "TF32", "F32"))
    for i, size in enumerate(SIZES)
]
# Each degree also in the most exact kind, tall and wide.
CASES += [Powers(Case("F32", n, d, 16), degree, True) for n, d in ((50, 40), (20, 5)) for degree in (1, 2, 3, 4)]
of_cases = pytest.mark.parametrize("powers", CASES, ids=label)


class Run:
    """A problem with a polynomial, and what the eager engine computes of it."""

    def __init__(self, powers):
        self.case, self.problem = powers.case, Problem(powers.case)
        self.kind, self.dtype = powers.case.kind, self.problem.dtype
        scale = torch.tensor(0.8) if powers.scaled else None
        self.q = Polynomial(torch.tensor(COEFFICIENTS[powers.degree - 1]), scale)
        exact = self.eager_forward(torch.float64)
        self.kept = [t.to(self.dtype) for t in (exact[0], *exact[2:])]  # P, G, q(G) as forward stores them
        self.given = {key: Guarded(t.shape, self.dtype, t) for key, t in zip("pgq", self.kept, strict=True)}
        self.dc = Guarded((powers.degree + 1,), torch.float32)

    def tensors(self, dtype, *names):
        return [getattr(self.problem, key).to(dtype) for key in names]

    def polynomial(self, dtype):
        scale = self.q.scale
        return self.q if dtype != torch.float64 else Polynomial(
            self.q.coefficients.double(), None if scale is None else scale.double()
        )  # fmt: skip

    def eager_forward(self, dtype):
        """(P, Y, G, q(G))."""
        x, b, bias = self.tensors(dtype, "x", "b", "bias")
        q = self.polynomial(dtype)
        p, y, (_, g, terms) = eager_polynomial.forward(x, b, bias, q, eager_polynomial.SAVING, True)
        return p, y, g, terms + torch.diag(q.coefficients[0].to(dtype).expand(len(g)))

    def eager_backward(self, dtype, pair, with_p=True, with_y=True):
        """(dX, db, dbias, dc) for P, G and q(G) as forward stored them."""
        x, b, dp, dy = self.tensors(dtype, "x", "b", "dp", "dy")
        p, g, q_of_g = (t.double() for t in self.kept)
        q = self.polynomial(dtype)
        identity = torch.eye(len(g), dtype=torch.float64)
        terms = (q_of_g - self.q.coefficients[0].double() * identity).to(dtype)
        needs = (True, True, not pair, True, False)
        if pair:
            dp, dy, plan, saved = dp if with_p else None, dy if with_y else None, eager_polynomial.SAVING, p.to(dtype)
            saved = [saved, g.to(dtype), terms]
        else:
            scaled = b if q.scale is None else b * q.scale
            w = (scaled.double() @ q_of_g).to(dtype) if dtype != torch.float64 else scaled @ q_of_g
            dp, plan, saved = None, Plan("eager", "X(bq)"), [g.to(dtype), terms, w]
        return eager_polynomial.backward(dp, dy, x, b, q, saved, plan, needs)[:4]

    def sizes(self, emulated, q_of_g=None, need_c=True):
        scale = None if self.q.scale is None else self.q.scale.view(1).numpy()
        return self.problem.sizes(emulated).polynomial(
            self.q.coefficients.numpy(), scale, array(q_of_g), array(self.dc) if need_c else None
        )

    def forward(self, emulated, device=AMPERE, seed=None, pair=True):
        n, k, given = self.case.n, self.case.k, self.problem.inputs
        p, y, g, q_of_g = (self.problem.empty(*shape) for shape in ((n, k), (n, k), (k, k), (k, k)))
        emulated.forward(
            array(given["x"]), array(given["b"]), array(given["bias"]), array(p) if pair else None, array(y), array(g),
            self.sizes(emulated, q_of_g, False), emulated.DeviceSpec(*device), self.case.seed if seed is None else seed,
        )  # fmt: skip
        return self.checked(p, y, g, q_of_g)

    def backward(self, emulated, pair, device=AMPERE, seed=None, with_p=True, with_y=True, needs=(True,) * 4):
        case, given = self.case, self.problem.inputs
        dx, db, dbias = self.problem.empty(case.n, case.d), self.problem.result_b(), self.problem.empty(case.k)
        self.dc = Guarded(self.q.coefficients.shape, torch.float32)
        to_x, to_b, to_bias = (array(t) if need else None for t, need in zip((dx, db, dbias), needs, strict=False))
        sizes = self.sizes(emulated, self.given["q"] if with_y else None, needs[3])
        tail = case.b_transposed, sizes, emulated.DeviceSpec(*device), case.seed if seed is None else seed
        x, b, dy, dp = (array(given[key]) for key in ("x", "b", "dy", "dp"))
        p, g = (array(self.given[key]) if with_y else None for key in "pg")
        if pair:
            emulated.pair_backward(
                x, b, p, g, dp if with_p else None, dy if with_y else None, to_x, to_b, *tail
            )  # fmt: skip
        else:
            emulated.summary_backward(x, b, g, dy, to_x, to_b, to_bias, *tail)
        dx, _, dbias, dc = self.checked(dx, db, dbias, self.dc)
        return [dx, self.problem.of_b(db), dbias, dc]

    @staticmethod
    def checked(*results):
        for result in results:
            result.check()
        return [result.tensor for result in results]

    def compare(self, names, found, expected):
        """Compare by the law with expected(dtype)."""
        with TF32Products() if self.kind == "TF32" else contextlib.nullcontext():
            same = expected(self.dtype)
        for what, got, theirs, truth in zip(names, found, same, expected(torch.float64), strict=True):
            if theirs is not None:
                assert_close_law(got, theirs.to(got.dtype), truth, what, PRECISION[self.kind], ULPS[self.kind])


@of_cases
def test_forward_law(emulated, powers):
    run = Run(powers)
    emulated.reset_counts()
    run.compare(("P", "Y", "G", "q(G)"), run.forward(emulated), run.eager_forward)
    assert emulated.counts()[1] == 0


@pytest.mark.parametrize("pair", [False, True], ids=["summary", "pair"])
@of_cases
def test_backward_law(emulated, powers, pair):
    run = Run(powers)
    emulated.reset_counts()
    found = run.backward(emulated, pair)
    run.compare(("dX", "db", "dbias", "dc"), found, lambda dtype: run.eager_backward(dtype, pair))
    assert emulated.counts()[1] == 0


@pytest.mark.parametrize("pair", [False, True], ids=["summary", "pair"])
@pytest.mark.parametrize("degree", [1, 3])
def test_on_gpus_without_matrix_units(emulated, pair, degree):
    run = Run(Powers(Case("F32", 150, 40, 20, True), degree, True))
    run.compare(("P", "Y", "G", "q(G)"), run.forward(emulated, TURING), run.eager_forward)
    found = run.backward(emulated, pair, TURING)
    run.compare(("dX", "db", "dbias", "dc"), found, lambda dtype: run.eager_backward(dtype, pair))


@pytest.mark.parametrize("terms", [{"with_p": False}, {"with_y": False}], ids=["dy", "dp"])
@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_pair_of_one_gradient(emulated, kind, terms):
    run = Run(Powers(Case(kind, 130, 72, 40), 2, True))
    found = run.backward(emulated, True, **terms)
    run.compare(("dX", "db", "dbias", "dc"), found, lambda dtype: run.eager_backward(dtype, True, **terms))


@pytest.mark.parametrize("pair", [False, True], ids=["summary", "pair"])
@pytest.mark.parametrize("degree", [1, 2])
def test_in_parts(emulated, pair, degree):
    run = Run(Powers(Case("F16", 130, 200, 40, True), degree, True))
    whole = run.backward(emulated, pair)
    for i in range(4):
        if pair and i == 2:
            continue  # a pair has no bias
        parts = run.backward(emulated, pair, needs=[j == i for j in range(4)])
        for j, part in enumerate(parts):
            assert torch.equal(part, whole[j]) if i == j else bool(part.isnan().all())


@pytest.mark.parametrize("kind", ["BF16", "F32"])
def test_same_bits_in_every_schedule(emulated, kind):
    run = Run(Powers(Case(kind, 300, 100, 100 if kind == "BF16" else 60), 3, True))
    first = [run.forward(emulated, seed=0), *(run.backward(emulated, pair, seed=0) for pair in (False, True))]
    for seed in range(1, 4):
        again = [run.forward(emulated, seed=seed), *(run.backward(emulated, pair, seed=seed) for pair in (False, True))]
        for left, right in zip(first, again, strict=True):
            assert all(torch.equal(a, b) or bool(a.isnan().all()) for a, b in zip(left, right, strict=True))
    for device in ((1, 164 * 1024, 80), (4, 99 * 1024, 86)):
        assert all(torch.equal(a, b) for a, b in zip(first[0], run.forward(emulated, device), strict=True))


def test_a_summary_alone_stores_no_projection(emulated):
    run = Run(Powers(Case("BF16", 300, 64, 40), 3, True))
    p, *others = run.forward(emulated, pair=False)
    assert bool(p.isnan().all())
    assert all(torch.equal(a, b) for a, b in zip(others, run.forward(emulated)[1:], strict=True))


@pytest.mark.parametrize("degree", [0, 5])
def test_other_degrees_are_refused(emulated, degree):
    run = Run(Powers(Case("F32", 16, 16, 16), 1, False))
    run.q = Polynomial(torch.ones(degree + 1), None)
    with pytest.raises(ValueError, match="degree 1 to 4"):
        run.forward(emulated)


class Loss(Run):
    """The losses of a polynomial; classes None is the pair's."""

    def __init__(self, powers):
        super().__init__(powers)
        case, m = powers.case, powers.classes
        self.classes, self.reduction = m, powers.reduction
        self.target = torch.randint(m or case.k, (case.n,)).where(torch.rand(case.n) < 0.8, -100)
        self.upstream = torch.rand(case.n if powers.reduction == "none" else 1) + 0.5
        self.output = {}
        if m is not None:
            a, c = torch.randn(m, case.k).div(case.k**0.5).to(self.dtype), torch.randn(m).to(self.dtype)
            self.output = {"a": Guarded(a.shape, self.dtype, a), "c": Guarded(c.shape, self.dtype, c)}

    def expected(self, dtype):
        """(value, dX, db, dA, dc, dcoefficients) as the eager engine computes them of logits in a dtype."""
        x, b = (t.requires_grad_() for t in (t.clone() for t in self.tensors(dtype, "x", "b")))
        q = self.polynomial(dtype)
        q = Polynomial(q.coefficients.clone().requires_grad_(), q.scale)
        output = [t.tensor.to(dtype, copy=True).requires_grad_() for t in self.output.values()]
        if output:
            o1, o2 = eager_polynomial.logits(x, b, *output, q, Plan("eager", "logits_from_latent"))
        else:
            o1, o2, _ = eager_polynomial.forward(x, b, None, q, eager_polynomial.SAVING, True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        options = LossOptions(WEIGHTS, -100, self.reduction)
        value = eager.three_terms(o1.to(wide), o2.to(wide), self.target, options, True)
        upstream = self.upstream.to(wide).view(value.shape)
        return value.detach(), *torch.autograd.grad(value, (x, b, *output, q.coefficients), upstream)

    def run(self, emulated, device=AMPERE, seed=None, needs=(True,) * 5):
        case, given, m = self.case, self.problem.inputs, self.classes
        value = Guarded((case.n,) if self.reduction == "none" else (1,), torch.float32)
        reduction = getattr(emulated.Reduction, self.reduction)
        terms = emulated.LossTerms(
            self.target.numpy(), self.upstream.numpy(), array(value), -100, *WEIGHTS, reduction
        )  # fmt: skip
        results = [self.problem.empty(case.n, case.d), self.problem.result_b()]
        results += [] if m is None else [self.problem.empty(m, case.k), self.problem.empty(m)]
        self.dc = Guarded(self.q.coefficients.shape, torch.float32)
        wanted = [array(r) if need else None for r, need in zip(results, needs, strict=False)]
        seed = case.seed if seed is None else seed
        tail = case.b_transposed, self.sizes(emulated, None, needs[4]), emulated.DeviceSpec(*device), seed
        x, b = array(given["x"]), array(given["b"])
        if m is None:
            emulated.pair_loss(x, b, terms, *wanted, *tail)
        else:
            emulated.head_loss(x, b, *map(array, self.output.values()), terms, *wanted, m, *tail)
        found = self.checked(value, *results, self.dc)
        found[2] = self.problem.of_b(results[1])
        return [value.tensor.view(-1 if self.reduction == "none" else ()), *found[1:]]

    def check(self, found):
        names = ("value", "dX", "db", *(("dA", "dc") if self.output else ()), "dcoefficients")
        self.compare(names, found, self.expected)


LOSS_SIZES = [  # n, d, k, classes of a head, reduction
    (17, 7, 63, 17, "none"),
    (129, 100, 10, 16, "mean"),
    (300, 40, 128, 128, "sum"),
    (40, 12, 16, 3, "mean"),
]
LOSSES = [
    Powers(Case(kind, n, d, k, (i + j) % 2 == 1, i), (i + j) % 4 + 1, (i + j // 2) % 2 == 0, m, reduction)
    for j, kind in enumerate(("F16", "BF16", "TF32", "F32"))
    for i, (n, d, k, m, reduction) in enumerate(LOSS_SIZES)
]


@pytest.mark.parametrize("head", [False, True], ids=["pair", "head"])
@pytest.mark.parametrize("powers", LOSSES, ids=label)
def test_loss_law(emulated, powers, head):
    loss = Loss(powers if head else powers._replace(classes=None))
    device = (3, 227 * 1024, 90) if head and powers.case.kind in ("F32", "TF32") else AMPERE
    emulated.reset_counts()
    loss.check(loss.run(emulated, device))
    assert emulated.counts()[1] == 0


def test_loss_on_gpus_without_matrix_units(emulated):
    loss = Loss(Powers(Case("F32", 150, 40, 12, True), 3, True))
    loss.check(loss.run(emulated, TURING))


@pytest.mark.parametrize("classes", [None, 7])
@pytest.mark.parametrize("degree", [1, 2])
def test_loss_in_parts(emulated, classes, degree):
    loss = Loss(Powers(Case("BF16", 140, 40, 24), degree, True, classes))
    value, *whole = loss.run(emulated)
    places = (0, 1, 4) if classes is None else range(5)  # of the results among the needs
    for wanted in (None, *places):
        again, *parts = loss.run(emulated, needs=[i == wanted for i in range(5)])
        assert torch.equal(again, value)
        for place, part, of_whole in zip(places, parts, whole, strict=True):
            assert torch.equal(part, of_whole) if place == wanted else bool(part.isnan().all())


@pytest.mark.parametrize("classes", [None, 10])
def test_loss_has_the_same_bits_in_every_schedule(emulated, classes):
    loss = Loss(Powers(Case("F32", 300, 100, 20, True), 3, True, classes))
    first = loss.run(emulated, seed=0)
    for seed in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(first, loss.run(emulated, seed=seed), strict=True))


@pytest.mark.parametrize("classes", [None, 7])
def test_loss_without_rows(emulated, classes):
    loss = Loss(Powers(Case("F32", 0, 24, 12), 3, True, classes, "sum"))
    value, *gradients = loss.run(emulated)
    assert all(not bool(t.any()) for t in (value, *gradients))
