"""Inputs on a breakpoint or a tie: the map is the model's, a pattern has one map, and the margin is zero."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import ActivationClusters, linearize, record, region

DTYPE = torch.float64


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


FUNCTIONS = {
    "abs": torch.abs,
    "hardshrink": lambda x: F.hardshrink(x, 1.0),
    "softshrink": lambda x: F.softshrink(x, 1.0),
    "hardtanh": F.hardtanh,
    "threshold": lambda x: F.threshold(x, 1.0, -3.0),
    "ge": lambda x: x * (x >= 1),
    "le": lambda x: x * (x <= 1),
    "gt": lambda x: x * (x > 1),
    "maximum": lambda x: torch.maximum(x, x.flip(1)),
    "minimum": lambda x: torch.minimum(x, x.flip(1)),
    "max pool": lambda x: F.max_pool1d(x.unsqueeze(1), 3, 1, 1).flatten(1),
    "adaptive max pool": lambda x: F.adaptive_max_pool1d(x.unsqueeze(1), 3).flatten(1),
    "max": lambda x: x.max(1).values,
    "min": lambda x: x.min(1).values,
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1),
    "clamp": lambda x: x.clamp(-1, 1),
    "crossed clamp": lambda x: x.clamp(2.0, 1.0),
    "crossed clamp of tensors": lambda x: x.clamp(torch.tensor([2.0, 0, 1, -1]), torch.ones(4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples_with_one_pattern_have_one_map_which_is_the_models(name, dtype):
    model = Of(FUNCTIONS[name])
    x = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=dtype)] * 4)
    affine = linearize(model, x)
    assert torch.equal(affine(x), model(x)) and affine.check() == 0
    groups = record(model, x).patterns().groups()
    assert torch.equal(affine.weight, affine.weight[groups.first][groups.labels])
    assert torch.equal(affine.bias, affine.bias[groups.first][groups.labels])
    clusters = ActivationClusters(model).fit(x)
    assert len(clusters.counts_) > 1 or name == "crossed clamp"
    assert clusters.check() == 0


def test_the_winner_of_a_tie_is_on_alone():
    x = torch.tensor([[1.0, 1, 0], [0, 1, 1], [3, 3, 3], [0, 0, 0]], dtype=DTYPE)
    seen = record(Of(lambda x: F.max_pool1d(x.unsqueeze(1), 3)), x)
    assert seen.gates(0).flatten(1).int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]]
    here = region(Of(lambda x: x.amax(1, keepdim=True)), x[2:3])
    assert bool(here.contains(x[2])) and not bool(here.contains(x[1]))


@pytest.mark.parametrize(
    ("function", "on", "off"),
    [
        (lambda x: x.clamp_max(1.0), [1.0, -3.0], [0.75, -3.0]),
        (lambda x: x.clamp(max=1.0), [1.0, -3.0], [0.75, -3.0]),
        (lambda x: torch.maximum(x[:, :1], x[:, 1:]), [1.0, 1.0], [0.75, 1.0]),
        (lambda x: x.amax(1), [1.0, 1.0], [0.75, 1.0]),
        (lambda x: F.max_pool1d(x.unsqueeze(1), 2), [1.0, 1.0], [0.75, 1.0]),
        (lambda x: F.hardshrink(x, 0.5), [-0.5, 3.0], [-0.75, 3.0]),
        (lambda x: x * (x >= 1), [1.0, 3.0], [0.75, 3.0]),
    ],
)
def test_the_margin_on_a_tie_is_zero(function, on, off):
    margin = record(Of(function), torch.tensor([on, off], dtype=DTYPE)).margin()
    assert 0 <= margin[0] < 1e-300 and margin[1] == 0.25


def test_ties_of_zeros_that_a_relu_left_do_not_count():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2))
    x = torch.tensor([[[-1.0, -2.0, 3.0, 1.0]], [[-1.0, -2.0, 3.0, 3.0]]], dtype=DTYPE)
    assert record(model, x).margin().tolist() == [1.0, 0.0]
