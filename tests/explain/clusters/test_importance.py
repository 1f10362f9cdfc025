import pytest
import torch

from interp_nn.explain.clusters.importance import over_clusters, ranks, row_space_part, shares

LABELS = torch.tensor([1, 0, 1, 2, -1, 0, 1, 1, 3, 3])


def samples(d=3):
    """Clusters 0 to 3: two samples, four in a plane, one, and two equal ones."""
    x = torch.randn(10, d, dtype=torch.float64)
    x[7] = x[0] + x[2] - x[6]
    x[9] = x[8]
    return x


def test_ranks_are_those_of_the_design_matrices():
    x = samples()
    wanted = [
        torch.linalg.matrix_rank(torch.nn.functional.pad(x[c == LABELS], (0, 1), value=1.0)).item() for c in range(4)
    ]
    assert ranks(x, LABELS, 4).tolist() == wanted == [2, 3, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_do_not_count_rounding(dtype):
    """Columns that add up exactly, at a scale at which their rounding is far from zero."""
    x = 1e3 + torch.rand(400, 3, dtype=dtype)
    x = torch.cat([x, (x[:, :1] + x[:, 1:2]) / 3], 1)
    labels = torch.arange(400) % 4
    assert ranks(x, labels, 4).tolist() == [4, 4, 4, 4]
    constant = torch.full((400, 3), 0.1, dtype=dtype)
    assert ranks(constant, labels, 4).tolist() == [1, 1, 1, 1]


def test_projection_keeps_what_the_samples_see_and_nothing_else():
    x, coefficients = samples(), torch.randn(4, 3, dtype=torch.float64)
    projected = row_space_part(coefficients, x, LABELS)
    for c in range(4):
        design = x[c == LABELS] - x[c == LABELS].mean(0)
        torch.testing.assert_close(design @ projected[c], design @ coefficients[c])
        unseen = torch.eye(3, dtype=torch.float64) - torch.linalg.pinv(design) @ design
        torch.testing.assert_close(unseen @ projected[c], torch.zeros(3, dtype=torch.float64))
    assert not bool(projected[2:].any())
    torch.testing.assert_close(row_space_part(projected, x, LABELS), projected)


def test_shares_and_their_mean_over_clusters():
    got = shares(torch.tensor([[1.0, 3.0], [0.0, 0.0], [2.0, 2.0]]))
    assert got.tolist() == [[0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]
    mean, dispersion = over_clusters(got, torch.tensor([3, 0, 1]))
    assert mean.tolist() == [0.3125, 0.6875]
    torch.testing.assert_close(dispersion, torch.full((2,), 0.25 * 3**0.5 / 4))
