"""The best order of features, compared with all orders, with the order before scrambling, and with its bound."""

from functools import partial
from itertools import permutations

import pytest
import torch

from interp_nn.explain.descramble import seriation
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.explain.descramble.descrambler import Descrambler
from interp_nn.explain.descramble.seriation import fiedler, seriate

close = torch.testing.assert_close
# The papers' orientation, features x samples
descrambler = partial(Descrambler, features_first=True)
ordered = partial(seriate, features_first=True)
F64 = torch.float64


def randn(*shape):
    return torch.randn(*shape, dtype=F64)


def loss(H, order, kind):
    return float(derivative_operator(len(H), kind).apply(H[order]).square().sum())


def best(H, kind):
    orders = torch.tensor(list(permutations(range(len(H)))))
    return float((derivative_operator(len(H), kind).matrix() @ H[orders]).square().sum((1, 2)).min())


def curve(n, features=40):
    """Points along a smooth curve in many dimensions, whose order is its own."""
    t = torch.linspace(0, 1, n, dtype=F64).unsqueeze(1)
    return torch.sin(t * torch.linspace(0.5, 6, features, dtype=F64) + torch.arange(features))


@pytest.mark.parametrize("kind", ["diff1", "diff1_periodic", "diff2", "fourier2", "diff1_dirichlet"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_exact_for_few_features(n, kind):
    for _ in range(3):
        H = randn(n, 4)
        found = ordered(H, kind)
        assert found.exact and sorted(found.order.tolist()) == list(range(n))
        close(found.loss, best(H, kind))
        close(loss(H, found.order, kind), found.loss)
        assert found.lower_bound <= found.loss


def test_paths_are_exact_where_trying_all_orders_ends():
    H = curve(12)
    order = torch.randperm(12)
    found = ordered(H[order])
    assert found.exact and order[found.order].tolist() in (list(range(12)), list(range(12))[::-1])
    distance = torch.cdist(H, H).square()
    for other in (torch.randperm(12) for _ in range(2000)):
        assert found.loss <= float(distance[other[:-1], other[1:]].sum())


def test_equal_orders_are_named_once():
    H, ring = curve(9), torch.stack([torch.cos(t := torch.arange(9) * 2 * torch.pi / 9), torch.sin(t)], 1).double()
    assert ordered(H).order.tolist() == ordered(H.flip(0)).order.tolist() == list(range(9))
    assert ordered(ring, "diff1_periodic").order.tolist() == list(range(9))
    shifted = torch.arange(9).roll(4).flip(0)
    order = shifted[ordered(ring[shifted], "diff1_periodic").order]
    assert (order.diff() % 9).unique().tolist() in ([1], [8])


def test_two_opt_improves_on_fiedler():
    """The lengths of paths through 8 random features relative to the shortest one: mean and maximum of 20."""
    plain, improved = [], []
    for _ in range(20):
        H = randn(8, 100)
        distance = torch.cdist(H, H).square()
        start, shortest = fiedler(distance), ordered(H).loss
        plain.append(loss(H, start, "diff1") / shortest)
        order = seriation._reversed_while_shorter(distance, start.clone(), closed=False)
        improved.append(loss(H, order, "diff1") / shortest)
    assert min(plain + improved) >= 1 - 1e-12
    assert sum(plain) / 20 < 1.08 and max(plain) < 1.25
    assert sum(improved) / 20 < 1.01 and max(improved) < 1.05


@pytest.mark.parametrize(("kind", "n"), [("diff1", 40), ("diff1_periodic", 33), ("diff2", 30), ("fourier2", 24)])
def test_many_features_reach_a_local_minimum(kind, n):
    H = curve(n) + 0.3 * randn(n, 40)
    found = ordered(H[torch.randperm(n)], kind)
    assert not found.exact and found.lower_bound <= found.loss
    assert sorted(found.order.tolist()) == list(range(n))
    scrambled = [loss(H, torch.randperm(n), kind) for _ in range(50)]
    assert found.loss < 0.8 * min(scrambled)


@pytest.mark.parametrize("kind", ["diff1", "diff1_periodic", "diff2"])
def test_no_exchange_or_reversal_is_left(kind):
    H, D = randn(20, 30), derivative_operator(20, kind).matrix()
    found = ordered(H, kind)
    others = []
    for i in range(20):
        for j in range(i + 1, 20):
            other = found.order.clone()
            if kind == "diff2":
                other[[i, j]] = other[[j, i]]
            else:
                other[i : j + 1] = other[i : j + 1].flip(0)
            others.append(other)
    losses = (D @ H[torch.stack(others)]).square().sum((1, 2))
    assert losses.min() >= found.loss * (1 - 1e-10)


def test_a_smooth_order_is_found_again():
    H = curve(60)
    order = torch.randperm(60)
    found = ordered(H[order])
    assert order[found.order].tolist() in (list(range(60)), list(range(60))[::-1])
    close(found.loss, loss(H, torch.arange(60), "diff1"))


def test_the_bound_of_orthogonal_matrices_that_keep_constants_is_the_tighter():
    for kind in ("diff1", "fourier2"):
        H = randn(7, 20) + 3
        found = ordered(H, kind)
        orthogonal = descrambler(operator=kind).fit(H).loss_
        assert orthogonal < found.lower_bound <= found.loss
        close(descrambler(operator=kind, group="permutation").fit(H).lower_bound_, found.lower_bound)
    held = ordered(H, "diff1_dirichlet")  # constants are not free
    close(held.lower_bound, descrambler(operator="diff1_dirichlet").fit(H).loss_)


def test_equal_and_zero_features():
    H = torch.ones(5, 3)
    assert ordered(H).loss == ordered(torch.zeros(20, 3)).loss == ordered(torch.zeros(20, 3), "diff2").loss == 0
    twins = randn(3, 6).repeat(2, 1)
    order = (ordered(twins).order % 3).tolist()
    assert order[0] == order[1] and order[2] == order[3] and order[4] == order[5]


def test_data_of_other_dtypes_and_left_alone():
    H = randn(6, 8)
    before = H.clone()
    assert ordered(H.float()).order.tolist() == ordered(H).order.tolist()
    assert torch.equal(H, before)


@pytest.mark.parametrize(
    ("H", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"x: got shape \(3,\), want \(features, samples\)"),
        (torch.zeros(3, 0), ValueError, r"x: got shape \(3, 0\)"),
        (torch.zeros(3, 2, dtype=torch.cfloat), ValueError, r"x: Complex data not supported: got torch\.complex64"),
        (torch.zeros(3, 2).to_sparse(), TypeError, "x: got a sparse tensor"),
        (torch.full((3, 2), torch.nan), ValueError, "x: has entries that are not finite"),
        ("H", TypeError, "x: got <U1, want numbers"),
    ],
)
def test_bad_input_is_named(H, error, message):
    with pytest.raises(error, match=message):
        ordered(H)
    with pytest.raises(ValueError, match="kind: got 'no'"):
        ordered(torch.zeros(3, 2), "no")
