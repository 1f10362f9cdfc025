"""Small shared maths: Gram matrix, effective weight, polar factor, least-squares code, and the identities behind the layer."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from interp_nn import functional, linalg
from interp_nn.nn import SummaryLinear

close = torch.testing.assert_close
SHAPES = [(8, 3), (3, 8), (5, 5), (1, 4), (4, 1)]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def orthonormal(d, k):
    return torch.linalg.qr(randn(d, k)).Q


def with_singular_values(d, k, values):
    s = torch.tensor(values, dtype=torch.float64)
    return orthonormal(d, len(values)) * s @ orthonormal(k, len(values)).mT


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (3, 0)], ids=str)
def test_gram_and_effective_weight(shape):
    b, x = randn(*shape), randn(6, shape[0])
    close(functional.gram(b), b.mT @ b)
    close(functional.effective_weight(b), b @ b.mT @ b)
    close(x @ functional.effective_weight(b), functional.summary(x, b))


def test_effective_weight_takes_the_smaller_gram_matrix():
    from torch.utils.flop_counter import FlopCounterMode

    for d, k in ((9, 2), (2, 9)):
        with FlopCounterMode(display=False) as counter:
            functional.effective_weight(randn(d, k))
        assert counter.get_total_flops() == 2 * 2 * d * k * min(d, k)


def test_batches_of_matrices():
    b = randn(3, 5, 2)
    close(linalg.gram(b), torch.stack([linalg.gram(m) for m in b]))
    close(linalg.effective_weight(b), torch.stack([linalg.effective_weight(m) for m in b]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cube_root_undoes_effective_weight(shape, dtype):
    b = randn(*shape).to(dtype)
    root = linalg.cube_root(b)
    assert root.dtype == dtype and root.shape == b.shape
    tolerance = 20 * torch.finfo(dtype).eps
    close(linalg.effective_weight(root.double()), b.double(), rtol=0.0, atol=tolerance * float(b.double().norm()))
    if dtype == torch.float64:
        close(linalg.cube_root(linalg.effective_weight(b)), b)


def test_orthogonality_defect():
    assert linalg.orthogonality_defect(orthonormal(6, 3)) < 1e-14
    assert linalg.orthogonality_defect(2 * orthonormal(6, 3)) == pytest.approx(1.0)
    assert linalg.orthogonality_defect(orthonormal(3, 3).mT[:2]) < 1e-14
    assert linalg.orthogonality_defect(torch.zeros(4, 2)) == 1.0
    assert linalg.orthogonality_defect(torch.zeros(4, 0)) == 0.0


# Orthogonalize


def polar_factor(b):
    u, _, vh = torch.linalg.svd(b.double(), full_matrices=False)
    return u @ vh


def identity_defect(factor):
    """max |G - I| of the smaller Gram matrix, in fp64."""
    factor = factor.double()
    g = factor.mT @ factor if factor.shape[1] <= factor.shape[0] else factor @ factor.mT
    return float((g - torch.eye(g.shape[0], dtype=torch.float64)).abs().max())


LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (7, 5), (1, 6), (6, 1), (1, 1)], ids=str)
def test_orthogonalize_reaches_the_polar_factor(shape, dtype):
    b = randn(*shape).to(dtype)
    factor, defect, iterations = functional.orthogonalize(b)
    assert factor.dtype == dtype and factor.shape == shape and iterations < 40
    assert identity_defect(factor) <= LIMITS[dtype]
    assert defect == linalg.orthogonality_defect(factor) and defect <= LIMITS[dtype]
    condition = float(linalg.singular_values(b).max() / linalg.singular_values(b).min())
    assert (factor.double() - polar_factor(b)).abs().max() <= 4 * condition * LIMITS[dtype]


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1.0])
@pytest.mark.parametrize("shape", [(32, 8), (8, 32), (9, 9)], ids=str)
def test_orthogonalize_at_any_scale_and_condition(shape, scale):
    values = torch.logspace(0, -4, min(shape), dtype=torch.float64).tolist()
    b = (scale * with_singular_values(*shape, values)).float()
    factor, defect, _ = functional.orthogonalize(b)
    assert defect <= 1e-6 and identity_defect(factor) <= 1e-6
    exact = functional.orthogonalize(b.double()).factor
    close(exact, polar_factor(b), rtol=0.0, atol=1e-10)


def test_orthogonalize_keeps_what_is_orthonormal():
    q = orthonormal(9, 4)
    close(functional.orthogonalize(q).factor, q, rtol=0.0, atol=1e-14)
    close(functional.orthogonalize(-3 * q).factor, -q, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
def test_orthogonalize_reports_a_column_of_zeros(shape):
    b = with_singular_values(max(shape), 3, [3.0, 2.0, 1.0])
    b = torch.cat((b, torch.zeros_like(b[:, :1])), 1)
    factor, defect, iterations = functional.orthogonalize(b if shape[0] > shape[1] else b.mT)
    assert defect == pytest.approx(1.0, abs=1e-9) and iterations == 100
    assert (linalg.singular_values(factor)[:3] - 1).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (40, 40), (500, 8)], ids=str)
@pytest.mark.parametrize("smallest", [0.5, 1e-2, 1e-4])
def test_orthogonalize_is_the_polar_factor(dtype, shape, smallest):
    """No farther from it than twice the steps on b itself, whose rounding is that of b's condition."""
    k = min(shape)
    exact = with_singular_values(max(shape), k, torch.logspace(0, math.log10(smallest), k).tolist())
    exact = exact if shape[0] >= shape[1] else exact.mT
    b = exact.to(dtype)
    found = functional.orthogonalize(b)
    assert found.defect <= 8 * k * torch.finfo(dtype).eps
    wanted, direct = linalg.polar(b), b / torch.linalg.matrix_norm(b.double(), 2).to(dtype)
    for _ in range(40):
        direct = 1.5 * direct - 0.5 * linalg.mul_gram(direct, linalg.gram_small(direct))
    bound = 2 * torch.linalg.matrix_norm(direct.double() - wanted) + k * torch.finfo(dtype).eps / smallest
    assert torch.linalg.matrix_norm(found.factor.double() - wanted) <= bound


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (9, 9)], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3, 0.9, 2.5])
def test_retract_is_the_polar_factor(batch, shape, spread):
    random = torch.Generator().manual_seed(0)
    q = linalg.polar(torch.randn(*batch, *shape, dtype=torch.float64, generator=random))
    u, s, vh = torch.linalg.svd(q, full_matrices=False)
    b = u * (1 + spread * torch.linspace(-1, 1, s.shape[-1], dtype=torch.float64)).clamp_min(0.02).unsqueeze(-2) @ vh
    close(linalg.retract(b), q, rtol=0.0, atol=1e-11)
    close(linalg.retract(b.float()), q.float(), rtol=0.0, atol=1e-4 if spread > 0.5 else 3e-6)


def test_orthogonalize_zeros_and_nothing():
    factor, defect, _ = functional.orthogonalize(torch.zeros(4, 2))
    assert factor.eq(0).all() and defect == 1.0
    for shape in ((0, 3), (3, 0), (0, 0)):
        factor, defect, iterations = functional.orthogonalize(torch.zeros(shape))
        assert (factor.shape, defect, iterations) == (torch.Size(shape), 0.0, 0)


def test_orthogonalize_says_nan_for_nan():
    b = randn(4, 2)
    b[0, 0] = torch.nan
    assert functional.orthogonalize(b).defect != functional.orthogonalize(b).defect


def test_orthogonalize_stops_where_it_is_told():
    b = randn(20, 6)
    full = functional.orthogonalize(b)
    loose = functional.orthogonalize(b, tolerance=0.1)
    assert loose.iterations < full.iterations
    g = linalg.gram(loose.factor)
    assert full.defect < torch.linalg.matrix_norm(g - torch.eye(6, dtype=g.dtype)) <= 0.1
    for most in (0, 1, 3):
        limited = functional.orthogonalize(b, max_iterations=most)
        assert limited.iterations == most and limited.defect > full.defect


@pytest.mark.parametrize("shape", [(4, 2), (2, 4)], ids=str)
def test_orthogonalize_is_differentiable(shape):
    b = randn(*shape).requires_grad_()
    assert gradcheck(lambda b: functional.orthogonalize(b).factor, b)
    expected = torch.autograd.grad((polar_factor(b) * torch.ones(shape, dtype=b.dtype).cumsum(0)).sum(), b)[0]
    got = torch.autograd.grad((functional.orthogonalize(b).factor * torch.ones_like(b).cumsum(0)).sum(), b)[0]
    close(got, expected)


def test_orthogonalize_leaves_its_argument_alone():
    b = randn(5, 3)
    before = b.clone()
    functional.orthogonalize(b).factor.add_(1)
    assert torch.equal(b, before)
    empty = torch.zeros(0, 3)
    assert functional.orthogonalize(empty).factor is not empty


# The code of least squares


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_inverse_summary_is_the_least_squares_code(batch, dtype):
    x, b = randn(*batch, 8).to(dtype), (randn(8, 3) + 2 * torch.eye(8, 3)).to(dtype)
    z = functional.inverse_summary(x, b)
    assert z.dtype == dtype and z.shape == (*batch, 3)
    exact = torch.linalg.lstsq(b.double(), x.double().reshape(-1, 8).mT).solution.mT.reshape(*batch, 3)
    close(z.double(), exact, rtol=0.0, atol=100 * torch.finfo(dtype).eps * float(exact.abs().max()))


def test_inverse_summary_of_a_singular_gram_matrix():
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        functional.inverse_summary(randn(4, 3), torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("shape", [(3, 6), (0, 2)])
def test_inverse_summary_of_more_columns_than_rows(shape, rows):
    with pytest.raises(torch.linalg.LinAlgError, match=rf"b: got shape \({shape[0]}, {shape[1]}\).*singular"):
        functional.inverse_summary(randn(rows, shape[0]), randn(*shape))


def test_autocast_rounds_neither_the_polar_factor_nor_the_solve():
    x, b = randn(4, 32).float(), randn(32, 16).float()
    layer = SummaryLinear(32, 16)
    with torch.no_grad():
        layer.b.copy_(b)
    half_x, half_b = x.bfloat16(), b.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = functional.orthogonalize(b)
        assert found.factor.dtype == torch.float32 and found.defect < 1e-6
        assert layer.orthogonalize_() < 1e-6
        assert torch.equal(functional.inverse_summary(x, b), functional.inverse_summary(half_x, half_b))
    assert torch.equal(found.factor, functional.orthogonalize(b).factor) and torch.equal(layer.matrix(), found.factor)
    exact = torch.linalg.lstsq(half_b.double(), half_x.double().mT).solution.mT
    with torch.autocast("cpu", torch.bfloat16):
        z = functional.inverse_summary(x, b)
    close(z.double(), exact, rtol=0.0, atol=4 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max()))


# Canonical eigh and svd, the polar factor by svd, and the streaming Gram matrix


def symmetric(values):
    q = orthonormal(len(values), len(values))
    return q * torch.tensor(values, dtype=torch.float64) @ q.mT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 31])
def test_eigh_in_fp64_with_the_signs_of_the_largest_entries(n, dtype):
    a = randn(n, n).to(dtype)
    a = a + a.mT
    values, vectors, blocks = linalg.eigh(a)
    assert values.dtype == vectors.dtype == torch.float64 and blocks == ()
    assert (values.diff() >= 0).all()
    close(vectors * values @ vectors.mT, a.double(), rtol=0.0, atol=1e-13 * n)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_eigh_does_not_depend_on_the_solvers_signs(monkeypatch):
    a = symmetric([1.0, 2.0, 5.0, 7.0])
    expected = linalg.eigh(a)
    solver = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (solver(m)[0], -solver(m)[1]))
    close(linalg.eigh(a).vectors, expected.vectors, rtol=0.0, atol=0.0)


def test_signs_of_entries_of_one_size_do_not_hang_on_rounding():
    vectors = torch.tensor([[-1.0, 1.0 - 1e-12], [1.0 + 1e-12, -1.0]]).double()
    close(linalg.signs(vectors), torch.tensor([-1.0, 1.0]).double())
    assert linalg.signs(torch.zeros(0, 3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "blocks"),
    [
        ([0.0, 0.0, 1.0, 2.0, 2.0, 2.0], ((0, 2), (3, 6))),
        ([3.0, 3.0], ((0, 2),)),
        ([1.0, 2.0, 3.0], ()),
        ([1.0, 1.0 + 1e-9, 3.0], ()),
        ([0.0, 0.0], ((0, 2),)),
        ([5.0], ()),
    ],
    ids=str,
)
def test_degenerate_blocks_are_reported(values, blocks):
    assert linalg.equal_runs(torch.tensor(values, dtype=torch.float64)) == blocks
    assert linalg.eigh(symmetric(values)).blocks == blocks
    descending = tuple(sorted((len(values) - stop, len(values) - start) for start, stop in blocks))
    assert linalg.svd(with_singular_values(len(values), len(values), values[::-1])).blocks == descending


def test_eigh_has_no_negative_zero():
    values = linalg.eigh(-torch.zeros(3, 3)).values
    assert not values.signbit().any()


@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (3, 0), (3, 500)], ids=str)
def test_svd_is_thin_and_canonical(shape):
    a = randn(*shape)
    u, s, vh, _ = linalg.svd(a)
    r = min(shape)
    assert u.shape == (shape[0], r) and s.shape == (r,) and vh.shape == (r, shape[1])
    close(u * s @ vh, a, rtol=0.0, atol=1e-12)
    if r:
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_is_what_orthogonalize_approaches(shape):
    a = randn(*shape)
    close(linalg.polar(a), functional.orthogonalize(a).factor, rtol=0.0, atol=1e-10)
    close((linalg.polar(a) * a).sum(), linalg.singular_values(a).sum())


def test_polar_of_a_singular_matrix_is_orthogonal_where_newton_schulz_cannot_be():
    a = with_singular_values(5, 5, [3.0, 2.0, 1.0])
    assert linalg.orthogonality_defect(linalg.polar(a)) < 1e-13
    close((linalg.polar(a) * a).sum().item(), 6.0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_special_polar_is_the_best_rotation(n):
    a = randn(n, n)
    a = a * torch.where(torch.linalg.det(a) > 0, -1.0, 1.0) if n % 2 else a[:, torch.arange(n).flip(0)]
    a[:, 0] *= -torch.linalg.det(a).sign()
    assert torch.linalg.det(a) < 0
    q, s = linalg.polar(a, special=True), linalg.singular_values(a)
    close(torch.linalg.det(q).item(), 1.0)
    close((q * a).sum(), s.sum() - 2 * s[-1])
    turned = -a if n % 2 else a[:, torch.arange(n).roll(1)]
    if torch.linalg.det(turned) > 0:
        close(linalg.polar(turned, special=True), linalg.polar(turned))


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [4, 0, 3, 30], [100]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gram_accumulator_is_the_gram_matrix(sizes, dtype):
    h = (randn(5, sum(sizes)) + 3).to(dtype)
    seen = linalg.GramAccumulator(5)
    for part in h.split(sizes, dim=1):
        seen.update(part)
    assert seen.count == sum(sizes)
    exact = h.double()
    mean = exact.mean(1, keepdim=True)
    close(seen.mean, mean.squeeze(1))
    close(seen.gram(), exact @ exact.mT)
    close(seen.gram(center=True), (exact - mean) @ (exact - mean).mT, rtol=1e-10, atol=1e-10)


def test_gram_accumulator_keeps_small_deviations_from_a_large_mean():
    h = 1e8 + randn(3, 1000)
    seen = linalg.GramAccumulator(3)
    for part in h.split(100, dim=1):
        seen.update(part)
    centred = h - h.mean(1, keepdim=True)
    close(seen.gram(center=True), centred @ centred.mT, rtol=1e-6, atol=1e-6)
    naive = h @ h.mT - h.shape[1] * torch.outer(h.mean(1), h.mean(1))
    assert (naive - centred @ centred.mT).abs().max() > 1


def test_gram_accumulators_merge():
    h = randn(4, 9)
    parts = [linalg.GramAccumulator(4) for _ in range(3)]
    parts[0].update(h[:, :7])
    parts[1].update(h[:, 7:])
    for both in (parts[0].merge(parts[1]), parts[1].merge(parts[0])):
        assert both.count == 9
        close(both.gram(), h @ h.mT)
    close(parts[0].gram(), h[:, :7] @ h[:, :7].mT)
    close(parts[2].merge(parts[0]).gram(center=True), parts[0].merge(parts[2]).gram(center=True))
    assert parts[2].merge(parts[2]).count == 0


def test_gram_accumulator_takes_large_batches_in_parts(monkeypatch):
    monkeypatch.setattr(linalg, "_ENTRIES_AT_ONCE", 12)
    h = randn(4, 23)
    seen = linalg.GramAccumulator(4)
    seen.update(h)
    close(seen.gram(), h @ h.mT)


def test_check_real():
    assert linalg.check_real("a", t := torch.zeros(2)) is t
    with pytest.raises(TypeError, match=r"a: got list, want a torch.Tensor"):
        linalg.check_real("a", [1.0])
    for bad in (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match=f"a: got {bad.dtype}, want a real floating dtype"):
            linalg.check_real("a", bad)
