import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp_nn.explain.cluster_tree import cluster_tree
from interp_nn.explain.merging import (
    by_distance,
    by_functions,
    by_size,
    equal_maps,
    mean_maps,
    path_distances,
    refit,
)
from interp_nn.explain.patterns import ActivationPatterns


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


def test_refit_is_least_squares_and_leaves_what_the_samples_do_not_see():
    x, labels = torch.randn(40, 3, dtype=torch.float64), torch.arange(40) % 3
    x[labels == 1, 2] = 4.0
    labels[:2] = -1
    residual = torch.randn(40, 2, dtype=torch.float64)
    weight, bias = refit(x, residual, labels, 3)
    for c in range(3):
        own = labels == c
        design = torch.nn.functional.pad(x[own], (0, 1), value=1.0)
        wanted = design @ (torch.linalg.pinv(design) @ residual[own])
        torch.testing.assert_close(x[own] @ weight[c].T + bias[c], wanted)
    assert not bool(weight[1, :, 2].any()) and bool(weight[0, :, 2].all())


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
    with pytest.raises(ImportError, match=r"pip install interp_nn\[explain\]"):
        by_distance(torch.zeros(2, 2), 1)
