import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp_nn.explain.clusters.merging import (
    by_distance,
    by_functions,
    by_size,
    equal_maps,
    mean_maps,
    path_distances,
    refit,
)
from interp_nn.explain.clusters.tree import cluster_tree
from interp_nn.gates.patterns import ActivationPatterns


def same_partition(a, b):
    return torch.equal(a.unsqueeze(1) == a, b.unsqueeze(1) == b)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 20), st.sampled_from([torch.float32, torch.float64]))
def test_equal_maps(n, width, distinct, dtype):
    generator = torch.Generator().manual_seed(n + 100 * width + 10000 * distinct)
    which = torch.randint(distinct, (n,), generator=generator)
    maps = torch.randn(distinct, width, generator=generator, dtype=dtype)[which]
    rounding = 1 + 4 * torch.finfo(dtype).eps * torch.randn(maps.shape, generator=generator, dtype=dtype)
    assert same_partition(equal_maps(maps * rounding), which)


def test_maps_that_are_zero_are_equal():
    assert equal_maps(torch.zeros(3, 2)).unique().numel() == 1


def test_functions_of_different_weight():
    """One heavy row pulls the mean of its group; k-means without weights would cut elsewhere."""
    rows = torch.tensor([[0.0], [0.9], [1.7]])
    assert same_partition(by_functions(rows, torch.tensor([1, 1000, 1000]), 2), torch.tensor([0, 0, 1]))
    assert same_partition(by_functions(rows, torch.tensor([1000, 1, 1]), 2), torch.tensor([0, 1, 1]))


def test_agglomeration():
    points = torch.tensor([0.0, 0.1, 5.0, 5.1, 9.0])
    groups = by_distance((points.unsqueeze(1) - points).abs().double(), 3)
    assert same_partition(groups, torch.tensor([0, 0, 1, 1, 2]))


def test_path_distances_count_paths():
    gates = [torch.rand(6, 5) < 0.6, torch.rand(6, 4) < 0.6, torch.rand(6, 3) < 0.6]
    # All paths through three layers, one by one.
    paths = torch.einsum("na,nb,nc->nabc", *(g.double() for g in gates)).flatten(1)
    kernel = paths @ paths.T
    scale = kernel.diagonal().sqrt()
    assert bool((scale > 0).all())
    distances = path_distances([ActivationPatterns.from_gates(g) for g in gates])
    torch.testing.assert_close(distances, 1 - kernel / (scale.unsqueeze(1) * scale))


def test_path_distances_of_layers_that_are_off():
    off = ActivationPatterns.from_gates(torch.tensor([[True, False], [False, False], [False, False]]))
    assert path_distances([off]).tolist() == [[0, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_groups_are_numbered_by_size():
    assert by_size(torch.tensor([7, 3, 7, 5]), torch.tensor([1, 5, 1, 9])).tolist() == [2, 1, 2, 0]
    assert by_size(torch.tensor([9, 3, 5, 3]), torch.tensor([2, 1, 2, 1])).tolist() == [0, 1, 2, 1]


def test_mean_maps_are_weighted():
    values = torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]], [[9.0, 9.0]]])
    got = mean_maps(values, torch.tensor([0, 0, 1]), torch.tensor([3, 1, 7]))
    assert got.tolist() == [[[2.0, 3.0]], [[9.0, 9.0]]]


def left_out(x, y, i, penalty):
    """Ridge regression with an intercept without sample i: its error there, by solving the normal equations."""
    keep = torch.arange(len(x)) != i
    top = torch.linalg.svdvals(x - x.mean(0))[0]
    a, b = x[keep] - x[keep].mean(0), y[keep] - y[keep].mean(0)
    slope = torch.linalg.solve(a.T @ a + penalty * top**2 * torch.eye(x.shape[1], dtype=x.dtype), a.T @ b)
    return (y[i] - y[keep].mean(0) - (x[i] - x[keep].mean(0)) @ slope).square().sum()


def test_refit_tells_samples_from_the_others_best():
    """The penalty is the best of all when every sample is left out in turn, by brute force."""
    x, labels = torch.randn(45, 6, dtype=torch.float64), torch.arange(45) % 3
    labels[:3] = -1
    residual = x[:, :2] + torch.tensor([0.01, 0.5, 3.0])[torch.arange(45) % 3].unsqueeze(1) * torch.randn(45, 2)
    weight, bias = refit(x, residual, labels, 3)
    finite = [1e-9, *(10.0**k for k in range(-6, 3))]
    for c in range(3):
        own, y = x[labels == c], residual[labels == c]
        errors = [sum(left_out(own, y, i, penalty) for i in range(len(own))) for penalty in finite]
        penalty = finite[int(torch.stack(errors).argmin())]
        centred, top = own - own.mean(0), torch.linalg.svdvals(own - own.mean(0))[0]
        ridge = centred.T @ centred + penalty * top**2 * torch.eye(6, dtype=x.dtype)
        slope = torch.linalg.solve(ridge, centred.T @ (y - y.mean(0)))
        torch.testing.assert_close(weight[c], slope.T)
        torch.testing.assert_close(bias[c], y.mean(0) - own.mean(0) @ slope)


def test_refit_leaves_what_the_samples_do_not_see():
    x, labels = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 2
    x[labels == 1, 2] = 4.0
    labels[5] = 2
    weight, bias = refit(x, x.sum(1, keepdim=True), labels, 3)
    torch.testing.assert_close(weight[:, 0], torch.tensor([[1.0, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(bias[:, 0], torch.stack([torch.zeros(()), torch.tensor(4.0), x[5].sum()]).double())


def test_refit_adds_no_noise_where_there_is_nothing_to_fit():
    """As many samples as inputs fit noise exactly; what others of the cluster tell nothing of is left alone."""
    x, noise = torch.randn(30, 29, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    weight, _ = refit(x, noise, torch.zeros(30).long(), 1)
    exact = torch.linalg.pinv(x - x.mean(0)) @ (noise - noise.mean())
    assert weight.norm() < 0.1 * exact.norm()


def test_a_tree_nests():
    gates = torch.rand(30, 9) < 0.5
    groups = ActivationPatterns.from_gates(gates).groups()
    layers = {
        name: ActivationPatterns.from_gates(groups.patterns.unpack()[:, cut])
        for name, cut in (("first", slice(0, 2)), ("second", slice(2, 4)), ("third", slice(4, 9)))
    }
    tree = cluster_tree(layers, groups.counts)
    assert len(tree) == 3
    for level, width in zip(tree.levels, (2, 4, 9), strict=True):
        wanted = ActivationPatterns.from_gates(groups.patterns.unpack()[:, :width]).groups().labels
        assert same_partition(level.nodes, wanted)
        assert level.counts.tolist() == sorted(level.counts.tolist(), reverse=True) and level.counts.sum() == 30
    for above, level in zip(tree.levels, tree.levels[1:], strict=False):
        assert torch.equal(level.parents[level.nodes], above.nodes)
        children = above.counts.new_zeros(len(above.counts)).index_add_(0, level.parents, level.counts)
        assert torch.equal(children, above.counts)
    text = str(tree).splitlines()
    assert text[:2] == ["30 samples", "layer first: 4 nodes"] and text[4] == f"first 0: {int(tree.levels[0].counts[0])}"


def test_a_deep_tree_stays_short():
    gates = torch.rand(4000, 30) < 0.5
    layers = {str(i): ActivationPatterns.from_gates(gates[:, 3 * i : 3 * i + 3]) for i in range(10)}
    assert len(str(cluster_tree(layers, torch.ones(4000).long())).splitlines()) < 150


def test_a_tree_shows_the_largest_nodes_and_counts_the_rest():
    layer = ActivationPatterns.from_gates(torch.eye(6).bool())
    assert str(cluster_tree({"only": layer}, torch.tensor([9, 8, 7, 6, 5, 4]))).splitlines() == [
        "39 samples", "layer only: 6 nodes", "only 0: 9", "only 1: 8", "only 2: 7", "only 3: 6", "and 2 smaller: 9",
    ]  # fmt: skip


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        by_distance(torch.zeros(2, 2), 1)
