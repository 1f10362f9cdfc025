"""The made data of oblique trees."""

import pytest
import torch

from benchmarks.experiments import oblique


def test_points_are_on_the_sphere_and_split_without_overlap():
    data = oblique.load("SDII", points=41)
    assert data.x_train.shape == (20, 100) and data.x_test.shape == (10, 100) and data.normals.shape == (15, 100)
    for points in (data.x_train, data.x_test, data.normals):
        torch.testing.assert_close(points.norm(dim=1), torch.ones(len(points), dtype=points.dtype))
    assert data.x_train.dtype == data.y_train.dtype == torch.float32 and data.normals.dtype == torch.float64
    assert not (data.x_train.unsqueeze(1) == data.x_test).all(2).any()


def test_a_point_is_labelled_by_the_last_node_on_its_way():
    normals = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # the root, its first child, its second
    points = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [0.0, 0.0]])
    assert oblique.labels(points, normals).tolist() == [1, 0, 1, 0, 1]


def test_labels_are_those_of_a_walk_through_the_tree():
    data = oblique.load("SDI", points=400)
    for x, y in zip(data.x_train.double(), data.y_train, strict=True):
        node = 0
        for _ in range(oblique.DEPTH):
            right = bool(x @ data.normals[node] > 0)
            node = 2 * node + 1 + right
        assert y == 1 - right


def test_the_published_numbers():
    data = oblique.load("SDI")
    assert len(data.x_train) == 20_000 and len(data.x_test) == 10_000
    # Half of the leaves have each label, and a symmetric sphere gives them their share up to the tree's own angles.
    assert 0.4 < data.y_train.mean() < 0.6
    assert torch.equal(data.normals, oblique.load("SDI", points=8).normals)
    assert not torch.equal(data.normals, oblique.load("SDI", points=8, seed=1).normals)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oblique.load("SDIV"), "name: got 'SDIV', want one of SDI, SDII, SDIII"),
        (lambda: oblique.load("SDI", points=3), "points: got 3, want at least 4"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
