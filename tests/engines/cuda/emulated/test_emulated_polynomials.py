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
