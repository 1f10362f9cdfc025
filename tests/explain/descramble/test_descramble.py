"""Descrambling in closed form: compared with descent, enumeration and random matrices; signals it recovers; its nulls."""

import math
import warnings
from functools import partial
from itertools import permutations

import pytest
import torch
from torch.autograd import gradcheck

from interp_nn import linalg
from interp_nn.explain.descramble.brockett import brockett_min, smoothness
from interp_nn.explain.descramble.derivatives import derivative_operator, graph_operator
from interp_nn.explain.descramble.descrambler import Descrambler
from interp_nn.explain.descramble.fourier import fft_view
from interp_nn.explain.estimator import NotFittedError

close = torch.testing.assert_close
# The papers' orientation, features x samples
descrambler = partial(Descrambler, features_first=True)
roughness = partial(smoothness, features_first=True)
F64 = torch.float64


def randn(*shape):
    return torch.randn(*shape, dtype=F64)


def random_orthogonal(n, count=None):
    """Uniform (Haar): the QR of Gaussians, with R's diagonal made positive (Mezzadri 2007)."""
    q, r = torch.linalg.qr(randn(*(() if count is None else (count,)), n, n))
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def orthogonality(P):
    return float((P @ P.mT - torch.eye(len(P), dtype=F64)).abs().max())


def correlated(n, N):
    return random_orthogonal(n) @ torch.diag(torch.logspace(0, -1.5, n, dtype=F64)) @ randn(n, N)


# The closed form


OPERATORS = [
    "fourier2",
    "dct",
    "dst",
    "diff1",
    "diff2",
    "diff1_dirichlet",
    "diff2_dirichlet",
    "diff1_periodic",
    "matrix",
]


def test_the_loss_is_the_paired_spectra():
    for trial in range(100):
        n, kind = int(torch.randint(1, 40, ())), OPERATORS[trial % len(OPERATORS)]
        N = n + int(torch.randint(0, 60, ()))
        D = randn(n + 2, n) if kind == "matrix" else kind
        H = randn(n, N) * torch.rand(n, 1, dtype=F64)
        d = descrambler(operator=D).fit(H)
        costs, energies = d.spectrum_
        direct = float(roughness(d.P_, H, D))
        for reached in (d.loss_, direct):
            assert abs(reached - d.lower_bound_) <= 1e-10 * d.lower_bound_
        close(d.lower_bound_, float(costs @ energies))
        assert orthogonality(d.P_) < 1e-12 and d.check() < 1e-9
        assert (costs.diff() >= 0).all() and (energies.diff() <= 0).all()


def descend(A, B, P, steps=150):
    """Riemannian steepest descent by Cayley transforms, with a step that grows and is halved until the loss falls."""
    eye, step = (
        torch.eye(len(P), dtype=F64),
        1.0 / float(torch.linalg.matrix_norm(A, 2) * torch.linalg.matrix_norm(B, 2)),
    )
    loss = float((A * (P @ B @ P.mT)).sum())
    for _ in range(steps):
        gradient = 2 * A @ P @ B @ P.mT
        skew = (gradient - gradient.mT) / 2
        step *= 2
        while True:
            new = torch.linalg.solve(eye + step * skew, (eye - step * skew) @ P)
            value = float((A * (new @ B @ new.mT)).sum())
            if value <= loss or step < 1e-16:
                break
            step /= 2
        P, loss = new, min(value, loss)
    return loss


@pytest.mark.parametrize(("n", "kind"), [(6, "diff1"), (9, "fourier2"), (12, "diff2")])
def test_no_descent_goes_below(n, kind):
    H = correlated(n, 3 * n)
    d = descrambler(operator=kind).fit(H)
    D = derivative_operator(n, kind).matrix()
    reached = [descend(D.mT @ D, H @ H.mT, P) for P in random_orthogonal(n, 20)]
    assert d.loss_ <= min(reached) + 1e-10 * d.loss_
    assert min(reached) <= 1.2 * d.loss_  # so the descents are worth comparing with


def test_all_matchings_are_critical_and_none_is_below():
    H, D = randn(6, 10), derivative_operator(6, "diff1").matrix()
    A, B = D.mT @ D, H @ H.mT
    d = descrambler(operator="diff1").fit(H)
    a, b = linalg.eigh(A), linalg.eigh(B)
    losses = []
    for order in permutations(range(6)):
        P = a.vectors @ b.vectors[:, list(order)].mT
        gradient = A @ P @ B @ P.mT
        assert (gradient - gradient.mT).abs().max() < 1e-11
        losses.append(float((A * (P @ B @ P.mT)).sum()))
    assert d.loss_ <= min(losses) * (1 + 1e-12) and min(losses) == pytest.approx(d.loss_, rel=1e-12)
    assert -brockett_min(-A, B).value == pytest.approx(max(losses), rel=1e-12)


def test_no_random_orthogonal_matrix_is_below():
    H = randn(8, 30)
    D = derivative_operator(8, "diff1").matrix()
    losses = torch.linalg.matrix_norm(D @ random_orthogonal(8, 20_000) @ H).square()
    d = descrambler(operator="diff1").fit(H)
    assert d.loss_ < losses.min()
    chance = float(losses.mean())
    assert d.loss_ / d.nulls_.fitted == pytest.approx(chance, rel=0.01)


def test_brockett_extremes_of_indefinite_matrices():
    A, B = randn(7, 7), randn(7, 7)
    A, B = A + A.mT, B + B.mT
    low, high = brockett_min(A, B), brockett_min(-A, B)
    for P, value in (low, high._replace(value=-high.value)):
        close(float(torch.trace(A @ P @ B @ P.mT)), value)
        assert orthogonality(P) < 1e-13
    Q = random_orthogonal(7, 500)
    between = (A * (Q @ B @ Q.mT)).sum((1, 2))
    assert low.value < between.min() and between.max() < -high.value


def test_smoothness_is_differentiable():
    P, H = randn(5, 5).requires_grad_(), randn(5, 3).requires_grad_()
    for D in ("fourier2", "diff2", randn(4, 5)):
        assert gradcheck(lambda P, H, D=D: roughness(P, H, D), (P, H))
    close(roughness(P, H, lambda h: h[1:] - h[:-1]), (P @ H).diff(dim=0).square().sum())


@pytest.mark.parametrize("group", ["orthogonal", "special"])
def test_rotations_lose_nothing(group):
    for _ in range(6):
        H = randn(5, 9)
        d, free = descrambler(group=group).fit(H), descrambler().fit(H)
        close(d.loss_, free.loss_)
        sign = torch.linalg.det(d.P_).item()
        assert abs(sign) == pytest.approx(1) and (group == "orthogonal" or sign > 0)


def test_one_decomposition_and_no_iteration(monkeypatch):
    calls = []
    solver = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: calls.append(a.shape) or solver(a))
    descrambler().fit(randn(20, 50))
    assert calls == [(20, 20)]


@pytest.mark.slow
def test_a_thousand_features_take_seconds():
    import resource
    import time

    H = torch.randn(1024, 4096)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    d = descrambler().fit(H)
    assert time.process_time() - start < 30  # 15 s on two cores, whoever else they work for
    assert d.check() < 1e-10
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < 30 * 8 * 1024**2 + 4 * H.numel() * 8


def test_memory_does_not_grow_with_the_square_of_the_samples():
    H = torch.randn(3, 300_000)  # whose N x N matrix would be 720 GB
    assert descrambler(operator="diff1").fit(H).check() < 1e-12


# Signals and structure that it finds


def test_recovers_smooth_signals_from_a_random_mixture():
    n, N = 32, 2000
    modes = derivative_operator(n, "dct")
    amounts = torch.exp(-0.35 * torch.arange(n, dtype=F64)).unsqueeze(1) * randn(n, N)
    smooth = modes.inverse(amounts)
    mixture = random_orthogonal(n)
    scrambled = mixture @ smooth
    d = descrambler(operator="diff1").fit(scrambled)
    before, true = (
        roughness(torch.eye(n, dtype=F64), scrambled, "diff1"),
        roughness(torch.eye(n, dtype=F64), smooth, "diff1"),
    )
    assert d.loss_ <= true and d.loss_ == pytest.approx(float(true), rel=0.01) and before > 10 * true
    found = modes.transform(d.P_ @ mixture @ modes.eigenvectors())  # of each mode, where it went
    assert (found[:, :6].abs() - torch.eye(n, 6, dtype=F64)).abs().max() < 0.1


def test_isotropic_inputs_send_singular_vectors_to_frequencies():
    W = randn(12, 20)
    X = random_orthogonal(400)[:20]  # X Xᵀ = I
    d = descrambler(operator="diff1").fit(W @ X)
    _, s, vh, _ = linalg.svd(W)
    in_modes = derivative_operator(12, "diff1").transform(d.weights(W).weight)
    close(in_modes @ vh.mT, torch.diag(s * (in_modes * vh).sum(1).sign()), rtol=0.0, atol=1e-9)


def test_circulant_data_are_a_permutation_of_frequencies():
    n = 16
    signal = randn(n)
    H = torch.stack([signal.roll(i) for i in range(n)])
    d = descrambler(operator="fourier2").fit(H)
    turned = derivative_operator(n).transform(derivative_operator(n).transform(d.P_).mT)  # Tᵀ P T, transposed
    energy = turned.square()
    pairs = torch.stack([energy[0], *(energy[1:-1].view(-1, 2, n).sum(1)), energy[-1]])
    close(pairs.amax(0), torch.ones(n, dtype=F64), rtol=0.0, atol=1e-10)


def test_rotations_within_equal_costs_change_p_and_not_the_loss():
    H = randn(9, 30)
    d = descrambler(operator="fourier2").fit(H)
    assert d.ambiguity_.operator_blocks == ((1, 3), (3, 5), (5, 7), (7, 9)) and d.ambiguity_.data_blocks == ()
    op = derivative_operator(9)
    turn = torch.eye(9, dtype=F64)
    for start, stop in d.ambiguity_.operator_blocks:
        turn[start:stop, start:stop] = random_orthogonal(stop - start)
    other = op.inverse(turn @ op.transform(d.P_))
    assert (other - d.P_).abs().max() > 0.1
    close(float(roughness(other, H, op)), d.loss_, rtol=1e-13, atol=0.0)


def test_equal_energies_are_reported():
    s = torch.tensor([3.0, 2, 2, 2, 1, 0.5], dtype=F64)
    d = descrambler(operator="diff1").fit(random_orthogonal(6) * s @ random_orthogonal(20)[:6])
    assert d.ambiguity_ == ((), ((1, 4),), 6, 6)
    close(d.spectrum_.energies, s.square())


def test_canonical_signs_do_not_come_from_the_solver(monkeypatch):
    H = randn(7, 30)
    first, raw = (descrambler(canonical=c).fit(H).P_ for c in (True, False))
    solver = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (solver(a)[0], -solver(a)[1]))
    close(descrambler().fit(H).P_, first, rtol=0.0, atol=0.0)
    close(descrambler(canonical=False).fit(H).P_, -raw, rtol=0.0, atol=0.0)
    close(descrambler(operator="diff1").fit(H[:, torch.randperm(30)]).P_, descrambler(operator="diff1").fit(H).P_)


@pytest.mark.parametrize("operator", ["grid", "graph", "callable", "tensor"])
def test_operators_of_every_kind(operator):
    H = randn(12, 40)
    diff = derivative_operator(12, "diff2")
    D = {
        "grid": derivative_operator((3, 4), "diff1"),
        "graph": graph_operator(torch.ones(12, 12) - torch.eye(12)),
        "callable": lambda h: h.diff(2, 0),
        "tensor": diff.matrix().float(),
    }[operator]
    d = descrambler(operator=D).fit(H)
    assert d.check() < 1e-10
    if operator in ("callable", "tensor"):
        close(d.loss_, descrambler(operator="diff2").fit(H).loss_)
    if operator == "graph":  # complete: every deviation from the mean costs the same
        assert d.ambiguity_.operator_blocks == ((1, 12),)


def test_centring_frees_the_constant_mode_of_the_mean():
    H = 100 + correlated(10, 500)
    plain, centred = descrambler(operator="diff1").fit(H), descrambler(operator="diff1", center=True).fit(H)
    deviations = H - H.mean(1, keepdim=True)
    close(centred.spectrum_.energies, linalg.eigh(deviations @ deviations.mT).values.flip(0))
    assert plain.spectrum_.energies[0] > 1e3 * plain.spectrum_.energies[1]
    close(centred.transform(H), centred.P_ @ deviations)
    close(centred.mean_, H.mean(1))
    close(plain.transform(H), plain.P_ @ H)
    close(float(centred.transform(H).diff(dim=0).square().sum()), centred.loss_)


# Nulls


def test_chance_is_the_mean_over_random_matrices():
    H = randn(6, 8) + 2
    for group in ("orthogonal", "permutation"):
        d = descrambler(operator="diff1", group=group).fit(H)
        if group == "orthogonal":
            P = random_orthogonal(6, 20_000)
        else:
            P = torch.stack([torch.eye(6, dtype=F64)[list(order)] for order in permutations(range(6))])
        mean = float((P @ H).diff(dim=1).square().sum((1, 2)).mean())
        assert d.loss_ / d.nulls_.fitted == pytest.approx(mean, rel=1e-12 if group == "permutation" else 0.02)


def test_structure_is_told_from_none():
    structured = descrambler(operator="diff1").fit(correlated(16, 1000)).nulls_
    assert structured.fitted < 0.5 * structured.shuffled
    assert structured.held_out == pytest.approx(structured.fitted, rel=0.1)
    none = descrambler(operator="diff1").fit(randn(16, 1000)).nulls_
    assert none.fitted == pytest.approx(none.shuffled, rel=0.05) and none.held_out == pytest.approx(1, abs=0.1)
    assert math.isnan(none.random_net)


def test_nulls_are_drawn_when_read(monkeypatch):
    from interp_nn.explain.descramble import moments

    drawn, real = [], moments.shuffled
    monkeypatch.setattr(moments, "shuffled", lambda *given: drawn.append(1) or real(*given))
    d = descrambler().fit(randn(4, 30))
    assert not drawn
    assert d.nulls_.shuffles == len(drawn) == 19 and d.nulls_ is d.nulls_
    more = d.nulls(shuffles=30, seed=1)
    assert more.shuffles == 30 and len(drawn) == 49 and more.fitted == d.nulls_.fitted
    with pytest.raises(ValueError, match="shuffles: got 0, want at least 1"):
        d.nulls(shuffles=0)


@pytest.mark.parametrize("group", ["orthogonal", "permutation"])
@pytest.mark.parametrize("center", [True, False])
def test_nulls_by_hand(group, center):
    """The mean, spread and rank of the losses of 19 shuffles, each fitted by itself."""
    from interp_nn.explain.descramble.moments import shuffled

    H = correlated(5, 40) + 1
    nulls = descrambler(operator="diff1", center=center, group=group).fit(H).nulls_
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(19):
        other = shuffled(H, generator)
        assert all(torch.equal(a.sort().values, b.sort().values) for a, b in zip(H, other, strict=True))
        values.append(descrambler(operator="diff1", center=center, group=group).fit(other).nulls(1).fitted)
    values = torch.tensor(values, dtype=F64)
    assert nulls.shuffled == pytest.approx(float(values.mean())) and nulls.shuffled_std == pytest.approx(
        float(values.std())
    )
    assert nulls.p == (1 + int((values <= nulls.fitted).sum())) / 20


def test_a_sample_of_the_data_stands_for_too_many(monkeypatch):
    from interp_nn.explain.descramble import moments

    monkeypatch.setattr(moments, "_KEPT_ENTRIES", 300)
    d = descrambler(operator="diff1")
    for part in correlated(6, 90).split(30, dim=1):
        d.partial_fit(part)
    assert sum(part.numel() for part in d._samples.kept) == 300
    assert d.nulls_.p == 0.05 and d.nulls_.fitted < d.nulls_.shuffled


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "shape"), [("smooth", (60, 6)), ("diag_sum", (6, 6)), ("diag_normsq", (5, 5))])
def test_p_is_uniform_under_iid_noise(criterion, shape):
    from scipy.stats import chisquare

    generator, counts = torch.Generator().manual_seed(5), torch.zeros(20)
    for seed in range(200):
        x = torch.randn(shape, generator=generator, dtype=F64)
        counts[round(Descrambler(criterion, operator="diff1").fit(x).nulls(seed=seed).p * 20) - 1] += 1
    assert chisquare(counts).pvalue > 0.001


def test_few_samples_look_smooth_and_are_not():
    with pytest.warns(UserWarning, match="x: rank 8 for 16 features, so that P is arbitrary in 8 directions"):
        nulls = descrambler(operator="diff1").fit(randn(16, 8)).nulls_
    assert nulls.fitted < 0.25 and nulls.shuffled < 0.3 and nulls.held_out > 0.6


def test_nulls_are_the_same_each_time_and_leave_the_generators_alone():
    H = randn(5, 40)
    state = torch.get_rng_state()
    first, second = (descrambler().fit(H).nulls_ for _ in range(2))
    assert first[:3] == second[:3] and first[4:] == second[4:] and torch.equal(torch.get_rng_state(), state)


def test_one_sample_has_nothing_to_hold_out():
    with pytest.warns(UserWarning, match="rank 1 for 4"):
        nulls = descrambler().fit(randn(4, 1)).nulls_
    assert math.isnan(nulls.held_out) and nulls.fitted == pytest.approx(0, abs=1e-12)
    with pytest.warns(UserWarning, match="rank 0 for 4"):
        d = descrambler().fit(torch.zeros(4, 3))
    assert d.loss_ == 0 and math.isnan(d.nulls_.fitted) and d.check() < 1e-14


# Orientation


def test_samples_by_features_and_the_other_way():
    from interp_nn.explain.descramble.seriation import seriate

    H = correlated(6, 40)
    for x in (H.mT, H.mT.numpy(), H.mT.tolist()):
        d, other = Descrambler(operator="diff1").fit(x), descrambler(operator="diff1").fit(H)
        close(d.P_, other.P_, rtol=0.0, atol=1e-12)
        assert d.n_features_in_ == other.n_features_in_ == 6 and d.nulls_ == pytest.approx(other.nulls_, nan_ok=True)
        close(torch.as_tensor(d.transform(x)), other.transform(H).mT)
        assert isinstance(d.transform(x), torch.Tensor) == isinstance(x, torch.Tensor)
        assert torch.equal(seriate(x).order, seriate(H, features_first=True).order)
    close(smoothness(d.P_, H.mT, "diff1"), torch.tensor(d.loss_, dtype=F64))
    assert torch.equal(d.fit_transform(H.mT), d.transform(H.mT))
    whole = Descrambler(operator="diff1").fit((10 * H.mT).long())
    close(whole.P_, Descrambler(operator="diff1").fit((10 * H.mT).long().double()).P_)


# Rank


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
def test_missing_rank_is_reported(dtype):
    H = (randn(10, 4) @ randn(4, 50)).to(dtype)
    with pytest.warns(UserWarning, match="rank 4 for 10 features, so that P is arbitrary in 6 directions"):
        d = descrambler(operator="diff1").fit(H)
    assert d.ambiguity_.rank == 4 and d.ambiguity_.data_blocks[-1] == (4, 10)
    assert "rank 4 of 10" in repr(d)
    assert d.loss_ == pytest.approx(d.lower_bound_, rel=1e-9)
    null = linalg.eigh(H.double() @ H.double().mT).vectors[:, :6]
    turned = d.P_ @ (torch.eye(10, dtype=F64) + null @ (random_orthogonal(6) - torch.eye(6, dtype=F64)) @ null.mT)
    assert (turned - d.P_).abs().max() > 0.05
    assert float(roughness(turned, H.double(), "diff1")) == pytest.approx(d.loss_, rel=1e-6)


# Streaming and dtypes


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 13, 20]], ids=str)
def test_parts_make_the_whole(sizes):
    H = randn(6, 40)
    whole, parts = descrambler(operator="diff1").fit(H), descrambler(operator="diff1")
    for part in H.split(sizes, dim=1):
        assert parts.partial_fit(part) is parts
    close(parts.P_, whole.P_, rtol=0.0, atol=1e-10)
    close(parts.loss_, whole.loss_)
    close(parts.nulls_.held_out, whole.nulls_.held_out)
    assert descrambler(operator="diff1").fit(H[:, :20]).partial_fit(H[:, 20:]).loss_ == pytest.approx(whole.loss_)


def test_a_new_part_is_seen():
    d = descrambler(operator="diff1").partial_fit(randn(4, 10))
    before = d.loss_, d.nulls_
    d.partial_fit(randn(4, 10))
    assert d.loss_ > before[0] and d.nulls_ != before[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_data_of_any_dtype_are_taken_to_fp64(dtype):
    H = randn(6, 50).to(dtype)
    d = descrambler(operator="diff1").fit(H)
    close(d.P_, descrambler(operator="diff1").fit(H.double()).P_)
    assert d.transform(H).dtype == dtype
    close(d.transform(H).double(), d.P_ @ H.double(), rtol=0.0, atol=30 * torch.finfo(dtype).eps)


# Diagonal criteria


@pytest.mark.parametrize("n", [1, 2, 5, 11])
def test_the_largest_trace_is_the_nuclear_norm(n):
    W = randn(n, n)
    d = descrambler("diag_sum").fit(W)
    s = linalg.singular_values(W)
    assert -d.loss_ == pytest.approx(float(s.sum()), rel=1e-10) and d.check() < 1e-12
    PW = d.transform(W)
    assert (PW - PW.mT).abs().max() < 1e-13 and torch.linalg.eigvalsh(PW).min() > -1e-13
    close(torch.trace(PW).item(), -d.loss_)
    close(d.spectrum_.energies, s)


def test_rotations_reach_less_of_a_trace_where_they_must():
    W = randn(6, 6)
    W[0] *= -torch.linalg.det(W).sign()
    s = linalg.singular_values(W)
    d = descrambler("diag_sum", group="special").fit(W)
    assert -d.loss_ == pytest.approx(float(s.sum() - 2 * s[-1]), rel=1e-10) and d.check() < 1e-12
    assert torch.linalg.det(d.P_) > 0 and d.loss_ > descrambler("diag_sum").fit(W).loss_


def test_squares_on_the_diagonal_from_any_start():
    """Ascent from 50 random starts, as written out here, does not reach more than the ascent from the polar factor."""
    W = randn(8, 8)
    d = descrambler("diag_normsq").fit(W)
    best = 0.0
    for P in random_orthogonal(8, 50):
        last = 0.0
        for _ in range(2000):
            value = float((P @ W).diagonal().square().sum())
            assert value >= last * (1 - 1e-13)
            if value <= last * (1 + 1e-13):
                break
            u, _, vh = torch.linalg.svd(W * (P @ W).diagonal())
            P, last = (u @ vh).mT, value
        best = max(best, value)
    polar = descrambler("diag_sum").fit(W).transform(W).diagonal().square().sum()
    assert polar < -d.loss_ and -d.loss_ >= 0.99 * best and d.loss_ >= d.lower_bound_
    assert d.check() < 1e-6
    close(d.lower_bound_, -float(W.square().sum()))


def test_orders_for_a_diagonal_are_assignments():
    W = randn(6, 6)
    for criterion, gains in (("diag_sum", W), ("diag_normsq", W.square())):
        d = descrambler(criterion, group="permutation").fit(W)
        best = max(float(gains[list(order)].diagonal().sum()) for order in permutations(range(6)))
        assert -d.loss_ == pytest.approx(best, rel=1e-12)
        assert sorted(d.P_.flatten().tolist()) == [0.0] * 30 + [1.0] * 6
        value = d.transform(W).diagonal()
        close(float(value.sum() if criterion == "diag_sum" else value.square().sum()), best)


def test_nulls_of_a_diagonal():
    diagonal = random_orthogonal(6) @ torch.diag(torch.tensor([5.0, 4, 1, 1, 1, 0.5], dtype=F64))
    nulls = descrambler("diag_normsq").fit(diagonal).nulls_
    assert nulls.fitted == pytest.approx(1) and nulls.shuffled < 0.95
    assert math.isnan(nulls.held_out) and math.isnan(nulls.random_net)


def test_a_singular_matrix_is_reported():
    with pytest.warns(UserWarning, match="rank 2 for 5"):
        d = descrambler("diag_sum").fit(randn(5, 2) @ randn(2, 5))
    assert d.ambiguity_ == ((), ((2, 5),), 2, 5)


# The interface of scikit-learn


def test_parameters_and_clone():
    from sklearn.base import clone

    d = descrambler("smooth", "diff2", group="special", center=True)
    assert d.get_params() == {
        "criterion": "smooth",
        "operator": "diff2",
        "group": "special",
        "center": True,
        "canonical": True,
        "features_first": True,
        "progress": None,
    }
    assert clone(d.fit(randn(3, 9))).get_params() == d.get_params()
    assert d.set_params(operator="diff1") is d and d.operator == "diff1"
    with pytest.raises(ValueError, match="shape: not a parameter; want one of criterion, operator"):
        d.set_params(shape=3)


@pytest.mark.parametrize("name", ["P_", "loss_", "lower_bound_", "spectrum_", "ambiguity_", "nulls_", "mean_"])
def test_fitted_attributes_raise_before_fit(name):
    with pytest.raises(NotFittedError, match="Descrambler: not fitted to samples yet"):
        getattr(descrambler(), name)
    assert not hasattr(descrambler(), name) and "not fitted" in repr(descrambler())


@pytest.mark.parametrize(
    ("parameters", "H", "error", "message"),
    [
        ({}, torch.zeros(4, 5, dtype=torch.cfloat), ValueError, "x: Complex data not supported: got torch.complex64"),
        ({}, [["a"]], TypeError, "x: got <U1, want numbers"),
        ({}, torch.zeros(4), ValueError, r"x: got shape \(4,\), want \(n, ...\) with n > 0. Reshape your data"),
        ({}, torch.zeros(4, 0), ValueError, r"x: got shape \(0, 4\)"),
        ({}, torch.zeros(0, 4), ValueError, r"x: 0 feature\(s\) \(shape=\(4, 0\)\)"),
        ({}, torch.zeros(2, 3, 4), ValueError, r"x: got shape \(2, 3, 4\)"),
        ({}, torch.full((2, 3), torch.inf), ValueError, "x: 3 of its samples have values that are not finite"),
        ({"operator": "diff9"}, torch.zeros(4, 5), ValueError, "kind: got 'diff9', want one of fourier2, dct"),
        ({"operator": 3}, torch.zeros(4, 5), TypeError, "operator: got int, want a name, a matrix"),
        ({"operator": torch.zeros(2, 3)}, torch.zeros(4, 5), ValueError, "operator: got one for 3 places, want 4"),
        ({"operator": lambda h: h[0]}, torch.zeros(4, 5), ValueError, r"the function gave \(4,\) for \(4, 4\)"),
        ({"operator": torch.sin}, torch.zeros(4, 5), ValueError, "the function is not linear in each column"),
        ({"operator": lambda h: h + 1}, torch.zeros(2, 5), ValueError, "the function is not linear in each column"),
        ({"criterion": "rough"}, torch.zeros(4, 5), ValueError, "criterion: got 'rough', want one of smooth, diag_sum"),
        ({"group": "unitary"}, torch.zeros(4, 5), ValueError, "group: got 'unitary', want one of orthogonal, special"),
        ({"criterion": "diag_sum"}, torch.zeros(4, 5), ValueError, r"got shape \(4, 5\), want a square matrix"),
        (
            {"criterion": "diag_sum", "center": True},
            torch.eye(4),
            ValueError,
            "center: got True with criterion='diag_sum'",
        ),
    ],
)
def test_bad_input_is_named(parameters, H, error, message):
    d = descrambler(**parameters)
    with pytest.raises(error, match=message):
        d.fit(H)


def test_more_bad_input():
    d = descrambler().fit(randn(4, 9))
    with pytest.raises(ValueError, match=r"x: got shape \(9, 3\), want \(n, 4\)"):
        d.partial_fit(randn(3, 9))
    with pytest.raises(ValueError, match=r"x: got shape \(9, 3\), want \(n, 4\)"):
        d.transform(randn(3, 9))
    with pytest.raises(ValueError, match=r"criterion: got 'diag_sum', which takes one square matrix; want fit\(W\)"):
        descrambler("diag_sum").partial_fit(randn(3, 3))
    for A, B, error, message in (
        (randn(2, 2), torch.eye(2, dtype=F64), ValueError, "A: .*want a symmetric matrix"),
        (torch.eye(2), torch.eye(3), ValueError, r"B: got shape \(3, 3\), want a symmetric matrix, both of one size"),
        (torch.eye(2), torch.eye(2).long(), TypeError, "B: got torch.int64"),
    ):
        with pytest.raises(error, match=message):
            brockett_min(A, B)


# Waves


def test_fft_view_finds_the_waves_of_a_filter():
    t = torch.arange(16, dtype=F64)
    W = torch.outer(torch.cos(2 * math.pi * 3 * t / 16), torch.cos(2 * math.pi * 5 * torch.arange(20, dtype=F64) / 20))
    amplitudes, rows, columns = fft_view(W)
    assert (
        amplitudes.shape == (16, 20)
        and rows.tolist() == list(range(-8, 8))
        and columns.tolist() == list(range(-10, 10))
    )
    bright = (amplitudes > 1e-9).nonzero()
    assert {(int(rows[i]), int(columns[j])) for i, j in bright} == {(a, b) for a in (-3, 3) for b in (-5, 5)}
    random = randn(5, 7)
    close(fft_view(random.float()).amplitudes.square().sum(), random.square().sum(), rtol=1e-6, atol=0.0)
    assert fft_view(random).row_waves.tolist() == [-2, -1, 0, 1, 2]
    with pytest.raises(TypeError, match=r"W: got torch\.int64"):
        fft_view(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"W: got shape \(2,\), want a matrix"):
        fft_view(torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "rank", "samples"), [(6, 2, 500), (16, 8, 2000), (64, 8, 2000), (64, 8, 40)])
def test_rounding_of_the_data_does_not_change_the_rank(dtype, n, rank, samples):
    H = torch.randn(n, rank, dtype=torch.float64) @ torch.randn(rank, samples, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"rank {rank} for {n} features"):
        assert descrambler(operator="diff1").fit(H.to(dtype)).ambiguity_.rank == rank
    full = torch.randn(n, 200, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert descrambler(operator="diff1").fit(full.to(dtype)).ambiguity_.rank == n
