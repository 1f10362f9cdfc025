"""Derivative operators: each is compared with its matrix, written out, and its eigenpairs with those of the matrix."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp_nn.explain.descramble import modes
from interp_nn.explain.descramble.derivatives import derivative_operator, graph_operator, matrix_operator

close = torch.testing.assert_close
F64 = torch.float64
SIZES = [1, 2, 3, 4, 5, 8, 13, 32, 33]
KINDS = (
    "fourier2",
    "dct",
    "dst",
    "diff1",
    "diff2",
    "diff1_dirichlet",
    "diff2_dirichlet",
    "diff1_periodic",
    "diff2_periodic",
)
NULL_SPACES = {"fourier2": 1, "dct": 1, "diff1": 1, "diff1_periodic": 1, "diff2_periodic": 1, "diff2": 2}


def eye(n):
    return torch.eye(n, dtype=F64)


def fourdif(n):
    """Trefethen's second-derivative matrix of a ring, from its closed form (Spectral Methods in MATLAB, chapter 3)."""
    h = 2 * math.pi / n
    out = torch.empty(n, n, dtype=F64)
    for i in range(n):
        for j in range(n):
            k = i - j
            if k == 0:
                out[i, j] = -(math.pi**2) / (3 * h * h) - 1 / 6 if n % 2 == 0 else -(math.pi**2) / (3 * h * h) + 1 / 12
            elif n % 2 == 0:
                out[i, j] = -0.5 * (-1) ** k / math.sin(k * h / 2) ** 2
            else:
                out[i, j] = -0.5 * (-1) ** k / (math.sin(k * h / 2) * math.tan(k * h / 2))
    return out


def band(rows, columns, start, stencil):
    """A matrix with the stencil from column `start` in its first row, one further to the right in each next row."""
    out = torch.zeros(rows, columns, dtype=F64)
    for i in range(rows):
        for k, value in enumerate(stencil):
            if 0 <= i + start + k < columns:
                out[i, i + start + k] = value
    return out


def ring(n, stencil):
    out = torch.zeros(n, n, dtype=F64)
    for i in range(n):
        for step, value in stencil.items():
            out[i, (i + step) % n] += value
    return out


def written_out(n, kind):
    match kind:
        case "fourier2":
            return fourdif(n)
        case "diff1":
            return band(n - 1, n, 0, (-1, 1))
        case "diff2":
            return band(max(0, n - 2), n, 0, (1, -2, 1))
        case "diff1_dirichlet":
            return band(n + 1, n, -1, (-1, 1))
        case "diff2_dirichlet":
            return band(n, n, -1, (1, -2, 1))
        case "diff1_periodic":
            return ring(n, {0: -1, 1: 1})
        case "diff2_periodic":
            return ring(n, {-1: 1, 0: -2, 1: 1})
    # Second derivatives of cosines and sines.
    t = modes.CosineModes(n) if kind == "dct" else modes.SineModes(n)
    return -t.matrix() * t.waves.square() @ t.matrix().mT


@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_the_one_written_out(kind):
    for n in SIZES:
        d = derivative_operator(n, kind)
        want = written_out(n, kind)
        assert d.matrix().shape == want.shape and d.rows == len(want)
        assert (d.matrix() - want).abs().sum() <= 2e-14 * n * max(1.0, float(want.abs().sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_eigenpairs_in_closed_form(kind):
    for n in (*SIZES, 127, 257):
        d = derivative_operator(n, kind)
        t, tau = d.eigenvectors(), d.eigenvalues
        assert t.dtype == tau.dtype == F64 and (tau >= 0).all() and (tau.diff() >= 0).all()
        assert (t.mT @ t - eye(n)).abs().max() < 1e-14 + 2e-17 * n
        penalty = d.matrix().mT @ d.matrix()
        assert (penalty @ t - t * tau).abs().max() <= 4e-15 * max(1.0, float(tau[-1]))
        numeric = torch.linalg.eigvalsh(penalty)
        assert (numeric - tau).abs().max() <= 1e-13 * max(1.0, float(tau[-1]))
        assert int((tau == 0).sum()) == min(n, NULL_SPACES.get(kind, 0))


def test_costs_of_the_second_derivative_of_a_ring():
    assert derivative_operator(7).eigenvalues.tolist() == [0, 1, 1, 16, 16, 81, 81]
    assert derivative_operator(6, "fourier2").eigenvalues.tolist() == [0, 1, 1, 16, 16, 81]
    assert derivative_operator(4, "dct").eigenvalues.tolist() == [0, 1, 16, 81]
    assert derivative_operator(3, "dst").eigenvalues.tolist() == [1, 16, 81]
    assert derivative_operator(1024).eigenvalues[-1] == 512.0**4


def test_costs_that_a_numerical_solver_loses():
    """At n = 1024 the second differences of the smoothest modes cost 1e-11 of the roughest: Euler's beam, (4.730 / n)⁴."""
    tau = derivative_operator(1024, "diff2").eigenvalues
    assert tau[:2].tolist() == [0, 0]
    beta = (tau[2:5] ** 0.25 * 1023).tolist()
    assert beta == pytest.approx([4.7300, 7.8532, 10.9956], rel=2e-3)
    single = torch.linalg.eigvalsh((d := derivative_operator(256).matrix().float()).mT @ d)
    assert single[0].abs() > 1  # fp32: the constant, which costs nothing


def test_free_second_differences_cost_constants_and_lines_nothing():
    d = derivative_operator(40, "diff2")
    x = torch.arange(40, dtype=F64)
    for free in (torch.ones_like(x), x):
        assert d.apply(free.unsqueeze(1)).abs().max() == 0
        coordinates = d.transform(free.unsqueeze(1)).squeeze(1)
        assert coordinates[2:].abs().max() < 1e-12
    assert d.blocks == ((0, 2),)


def test_free_first_differences_have_the_modes_of_the_dct():
    from scipy.fft import dct, dst

    t = derivative_operator(32, "diff1").eigenvectors()
    close(t.mT, torch.from_numpy(dct(eye(32).numpy(), norm="ortho", axis=0)), rtol=0.0, atol=3e-14)
    t = derivative_operator(32, "diff2_dirichlet").eigenvectors()
    close(t.mT, torch.from_numpy(dst(eye(32).numpy(), type=1, norm="ortho", axis=0)), rtol=0.0, atol=3e-14)


def test_blocks_are_the_pairs_of_cosine_and_sine():
    assert derivative_operator(6).blocks == ((1, 3), (3, 5))
    assert derivative_operator(7, "diff1_periodic").blocks == ((1, 3), (3, 5), (5, 7))
    assert derivative_operator(1024).blocks == tuple((i, i + 2) for i in range(1, 1023, 2))
    for kind in ("dct", "dst", "diff1", "diff1_dirichlet", "diff2_dirichlet"):
        assert derivative_operator(1024, kind).blocks == ()


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_are_products_with_the_modes(kind):
    for n in (1, 2, 3, 7, 256, 509, 512, 513):
        d, h = derivative_operator(n, kind), torch.randn(n, 3, dtype=F64)
        t = d.eigenvectors()
        close(d.transform(h), t.mT @ h, rtol=0.0, atol=3e-14)
        close(d.inverse(h), t @ h, rtol=0.0, atol=3e-14)
        close(d.inverse(d.transform(h)), h, rtol=0.0, atol=1e-13)
        assert d.transform(h[:, :0]).shape == d.inverse(h[:, :0]).shape == (n, 0)


@given(st.sampled_from([modes.FourierModes, modes.CosineModes, modes.SineModes]), st.integers(1, 70), st.integers(1, 3))
def test_ffts_are_products_with_the_modes_at_any_size(kind, n, columns):
    t = kind(n)
    h = torch.randn(n, columns, dtype=F64, generator=torch.Generator().manual_seed(n))
    close(t._analyse(h), t.matrix().mT @ h, rtol=0.0, atol=1e-13)
    close(t._synthesise(h), t.matrix() @ h, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [16, 512])
def test_transforms_keep_the_dtype(n, dtype):
    d, h = derivative_operator(n, "diff1"), torch.randn(n, 4).to(dtype)
    for got, want in ((d.transform(h), d.eigenvectors().mT @ h.double()), (d.apply(h), h.double().diff(dim=0))):
        assert got.dtype == dtype
        close(got.double(), want, rtol=0.0, atol=20 * torch.finfo(dtype).eps)


def test_transforms_and_differences_are_differentiable():
    for n in (5, 257):
        for kind in KINDS:
            d = derivative_operator(n, kind)
            h = torch.randn(n, 1, dtype=F64, requires_grad=True)
            (d.transform(h).square().sum() + d.inverse(h).square().sum()).backward()
            close(h.grad, 4 * h.detach(), rtol=1e-10, atol=1e-10)


# Grids, graphs and matrices


@pytest.mark.parametrize("shape", [(3, 4), (5, 1), (2, 3, 4), (1, 1), (6,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_grid_adds_the_penalties_of_its_axes(shape, kind):
    d, n = derivative_operator(shape, kind), math.prod(shape)
    h = torch.randn(n, 2, dtype=F64)
    penalty = 0.0
    for axis, size in enumerate(shape):
        along = h.view(*shape, 2).movedim(axis, 0).flatten(1)
        penalty += derivative_operator(size, kind).apply(along).square().sum().item()
    close(d.apply(h).square().sum().item(), penalty)
    t, tau = d.eigenvectors(), d.eigenvalues
    assert (t.mT @ t - eye(n)).abs().max() < 1e-14 and (tau.diff() >= 0).all()
    matrix = d.matrix()
    assert (matrix.mT @ matrix @ t - t * tau).abs().max() < 1e-13 * max(1.0, float(tau[-1]))
    close(d.transform(h), t.mT @ h)
    close(d.inverse(h), t @ h)


def test_equal_axes_of_a_grid_are_degenerate():
    tau = derivative_operator((3, 3), "diff1").eigenvalues
    want = sorted(a + b for a in (0, 1, 3) for b in (0, 1, 3))
    close(tau, torch.tensor(want, dtype=F64))
    assert derivative_operator((3, 3), "diff1").blocks == ((1, 3), (4, 6), (6, 8))


def test_the_graph_of_a_line_and_of_a_ring_are_first_differences():
    for kind, closed in (("diff1", False), ("diff1_periodic", True)):
        adjacency = torch.diag(torch.ones(6), 1)
        adjacency[0, 6] = closed
        d, line = graph_operator(adjacency + adjacency.mT), derivative_operator(7, kind)
        close(d.eigenvalues, line.eigenvalues)
        assert d.blocks == line.blocks
        h = torch.randn(7, 3, dtype=F64)
        close(d.apply(h).square().sum(), line.apply(h).square().sum())


def test_a_graph_penalises_its_edges_by_their_weights():
    weights = torch.rand(6, 6, dtype=F64).triu(1)
    weights[0, 3] = 0
    d, h = graph_operator(weights + weights.mT), torch.randn(6, 2, dtype=F64)
    want = sum(weights[i, j] * (h[i] - h[j]).square().sum() for i in range(6) for j in range(i))
    want = want + sum(weights[j, i] * (h[i] - h[j]).square().sum() for i in range(6) for j in range(i))
    close(d.apply(h).square().sum(), want)
    assert d.rows == 14
    t, matrix = d.eigenvectors(), d.matrix()
    close(matrix.mT @ matrix, t * d.eigenvalues @ t.mT)
    assert d.eigenvalues[0] < 1e-14 and graph_operator(torch.zeros(4, 4)).blocks == ((0, 4),)


@pytest.mark.parametrize("rows", [1, 3, 5, 9])
def test_a_matrix_and_its_eigenpairs(rows):
    matrix = torch.randn(rows, 5, dtype=F64)
    d, h = matrix_operator(matrix), torch.randn(5, 2, dtype=F64)
    close(d.apply(h), matrix @ h)
    close(d.matrix(), matrix)
    t, tau = d.eigenvectors(), d.eigenvalues
    assert (tau.diff() >= 0).all() and (t.mT @ t - eye(5)).abs().max() < 1e-14
    close(matrix.mT @ matrix @ t, t * tau, rtol=0.0, atol=1e-12)
    assert int((tau == 0).sum()) == max(0, 5 - rows)
    assert d.blocks == (((0, 5 - rows),) if rows <= 3 else ())


def test_a_matrix_keeps_the_digits_that_its_square_loses():
    d = matrix_operator(derivative_operator(300, "diff2").matrix())
    exact = derivative_operator(300, "diff2").eigenvalues
    close(d.eigenvalues[2:5], exact[2:5], rtol=1e-9, atol=0.0)
    squared = torch.linalg.eigvalsh(d.matrix().mT @ d.matrix())
    assert ((squared[2] / exact[2]) - 1).abs() > 1e-9


def test_nothing_is_changed_in_place():
    for n in (6, 600):
        for kind in KINDS:
            d = derivative_operator(n, kind)
            h = torch.randn(n, 2, dtype=F64)
            before = h.clone()
            for call in (d.apply, d.transform, d.inverse):
                call(h).add_(1)
            d.eigenvectors().zero_()
            d.matrix().zero_()
            assert torch.equal(h, before) and d.eigenvectors().abs().max() > 0 and d.matrix().abs().max() > 0
    given = eye(3)
    d = matrix_operator(given)
    d.matrix().zero_()
    d.eigenvectors().zero_()
    assert torch.equal(given, eye(3)) and torch.equal(d.matrix(), eye(3)) and d.eigenvectors().abs().max() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: derivative_operator(4, "diff3"), ValueError, "kind: got 'diff3', want one of fourier2, dct"),
        (lambda: derivative_operator(0), ValueError, "n: got 0, want at least one place"),
        (lambda: derivative_operator((3, 0)), ValueError, r"n: got \(3, 0\), want at least one place"),
        (lambda: derivative_operator(()), ValueError, r"n: got \(\), want at least one place"),
        (
            lambda: derivative_operator(4).apply(torch.zeros(3, 2)),
            ValueError,
            r"x: got shape \(3, 2\), want \(4, samples\)",
        ),
        (
            lambda: derivative_operator(4).transform(torch.zeros(4)),
            ValueError,
            r"x: got shape \(4,\), want \(4, samples\)",
        ),
        (lambda: derivative_operator(4).inverse(torch.zeros(1, 4)), ValueError, r"coefficients: .*want \(4, samples\)"),
        (lambda: matrix_operator(eye(2).long()), TypeError, "matrix: got torch.int64, want a real floating dtype"),
        (lambda: matrix_operator([[1.0]]), TypeError, "matrix: got list, want a torch.Tensor"),
        (lambda: matrix_operator(torch.zeros(2)), ValueError, r"matrix: got shape \(2,\), want a finite matrix"),
        (lambda: matrix_operator(eye(2) * torch.nan), ValueError, "matrix: .*want a finite matrix"),
        (lambda: graph_operator(torch.zeros(2, 3)), ValueError, r"adjacency: got shape \(2, 3\), want a symmetric"),
        (lambda: graph_operator(-eye(2)), ValueError, "want a symmetric matrix of weights >= 0"),
        (lambda: graph_operator(eye(2).cfloat()), TypeError, "adjacency: got torch.complex64"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_operators_are_pickled():
    edges = torch.rand(6, 6, dtype=torch.float64)
    made = (derivative_operator((2, 3), "diff2"), matrix_operator(edges), graph_operator(edges + edges.T))
    for operator in made:
        assert torch.equal(pickle.loads(pickle.dumps(operator)).matrix(), operator.matrix())
