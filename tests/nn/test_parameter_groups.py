"""parameter_groups: what decays, each parameter once, and what decay does to the weight of a layer."""

import pytest
import torch
from torch import nn

from interp_nn import convert
from interp_nn.nn import (
    SummaryClassifier,
    SummaryConv2d,
    SummaryHead,
    SummaryLinear,
    constrain,
    follow,
    parameter_groups,
)


def names(model, decay=0.1):
    """The names of the parameters that decay, and of those that do not."""
    groups = parameter_groups(model, decay)
    known = {id(p): name for name, p in model.named_parameters()}
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(model.parameters())) and set(found) == set(known)
    assert all(group["weight_decay"] in (decay, 0.0) for group in groups)
    return tuple(
        {known[id(p)] for g in groups if g["weight_decay"] == wanted for p in g["params"]} for wanted in (decay, 0.0)
    )


def test_vectors_norms_and_normalised_matrices_do_not_decay():
    model = nn.Sequential(
        SummaryConv2d(2, 4, 3, groups=2, polynomial="newton-schulz"), nn.BatchNorm2d(4), nn.LayerNorm((4, 3, 3)),
        nn.Conv2d(4, 4, 1), nn.PReLU(), SummaryLinear(3, 3), SummaryLinear(3, 3, polynomial="pc-1"),
        SummaryLinear(3, 3, polynomial=(1.25, -0.25), normalize=True), nn.Embedding(5, 3), SummaryHead(3, 2, 2),
        SummaryClassifier(2, 2),
    )  # fmt: skip
    decayed, kept = names(model)
    assert decayed >= {"3.weight", "5.b", "6.b", "8.weight", "9.b", "10.b"}
    assert kept >= {"0.b", "0.gain", "0.bias", "1.weight", "2.weight", "2.bias", "4.weight", "5.bias", "6.gain", "7.b"}
    assert all(dict(model.named_parameters())[name].dim() > 1 for name in decayed)


@pytest.mark.parametrize("constraint", ["penalty", "retract", "parametrization"])
@pytest.mark.parametrize("layer", [lambda: SummaryLinear(4, 3), lambda: SummaryConv2d(2, 3, 3)], ids=["linear", "conv"])
def test_a_constrained_b_does_not_decay(constraint, layer):
    model = nn.Sequential(layer(), nn.Linear(4, 3))
    assert names(model) == ({"0.b", "1.weight"}, {"0.bias", "1.bias"})
    decayed, kept = names(constrain(model, constraint))
    assert decayed == {"1.weight"} and len(kept) == 3
    assert names(constrain(model, None))[0] == {"0.b", "1.weight"}


def test_tied_parameters_are_there_once_and_do_not_decay_if_one_layer_says_so():
    model = nn.Sequential(
        SummaryLinear(3, 3), SummaryLinear(3, 3, polynomial="newton-schulz"), nn.Linear(3, 3), nn.Linear(3, 3)
    )
    model[3].weight = model[2].weight
    model[1].b = model[0].b
    decayed, kept = names(model)
    assert decayed == {"2.weight"} and "0.b" in kept


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad],
)
def test_any_optimizer_takes_the_groups(optimizer):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    convert.summarize(model, polynomial="newton-schulz")
    convert.summarize(head := nn.Sequential(nn.Linear(2, 2)))
    model.append(head)
    step = optimizer(parameter_groups(model, 0.1), lr=0.01)
    follow(step, model)
    model(torch.randn(3, 4)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    step.step()
    assert all((p != old).any() for p, old in zip(model.parameters(), before, strict=True))


def test_empty_groups_are_left_out():
    assert [g["weight_decay"] for g in parameter_groups(nn.BatchNorm1d(3), 0.1)] == [0.0]
    assert [g["weight_decay"] for g in parameter_groups(nn.Linear(3, 3, bias=False), 0.1)] == [0.1]
    assert parameter_groups(nn.ReLU(), 0.1) == []
    assert [len(g["params"]) for g in parameter_groups(nn.Linear(3, 3), 0)] == [1, 1]


def test_decay_of_a_normalised_b_leaves_the_weight_and_that_of_a_summary_acts_three_times():
    """The reasons for what decays: one step of pure decay."""
    for options, wanted in (({"polynomial": "newton-schulz"}, 1.0), ({}, 0.99**3), ({"polynomial": "pc-1"}, 0.99)):
        layer = SummaryLinear(5, 3, bias=False, dtype=torch.float64, **options)
        layer.set_weight_(torch.randn(3, 5))
        weight = layer.weight.detach().clone()
        sgd = torch.optim.SGD([layer.b], 0.1, weight_decay=0.1)
        follow(sgd, layer)
        layer.b.grad = torch.zeros_like(layer.b)
        sgd.step()
        torch.testing.assert_close(torch.Tensor(layer.weight), wanted * weight, rtol=1e-6, atol=1e-9)


class FullyShardedDataParallel(nn.Module):
    """Stands for PyTorch's, which needs a process group."""


@pytest.mark.parametrize(
    ("model", "decay", "error", "message"),
    [
        ([], 0.1, TypeError, "model: got list, want an nn.Module"),
        (nn.Linear(2, 2), "0.1", TypeError, "weight_decay: got str, want a number"),
        (nn.Linear(2, 2), True, TypeError, "weight_decay: got bool, want a number"),
        (nn.Linear(2, 2), -0.1, ValueError, "weight_decay: got -0.1, want a finite number >= 0"),
        (nn.Linear(2, 2), float("nan"), ValueError, "weight_decay: got nan, want a finite number >= 0"),
        (
            nn.Sequential(nn.LazyLinear(2)),
            0.1,
            TypeError,
            "0.weight: is uninitialized (a lazy module); run the model once first",
        ),
        (nn.Sequential(FullyShardedDataParallel()), 0.1, ValueError, "model: 0 is a FullyShardedDataParallel"),
    ],
)
def test_what_cannot_be_grouped_is_refused(model, decay, error, message):
    with pytest.raises(error) as raised:
        parameter_groups(model, decay)
    assert str(raised.value).startswith(message)
