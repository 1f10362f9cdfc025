"""Weights formed once for several microbatches: the same gradients, and errors where they would be wrong."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from interp_nn.nn import SummaryConv2d, SummaryLinear, cached_weights, update_spectral_norms


def models():
    linear = nn.Sequential(
        SummaryLinear(12, 9, polynomial="newton-schulz"), nn.Tanh(), SummaryLinear(9, 3), nn.Linear(3, 2)
    )
    conv = nn.Sequential(nn.Unflatten(1, (1, 3, 4)), SummaryConv2d(1, 4, 3, polynomial="pc-1"), nn.Flatten())
    return [linear.double(), conv.double()]


def gradients(model, batches, run=lambda m, x: m(x)):
    model.zero_grad()
    for x in batches:
        run(model, x).square().sum().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("index", [0, 1])
def test_cached_weights_give_the_same_gradients(index):
    model = models()[index]
    batches = torch.randn(4, 5, 12, dtype=torch.float64)
    want = gradients(model, batches)
    with cached_weights(model):
        got = gradients(model, batches)
        assert got[-2:] != [None] * 2 and None in got  # the plain layer's, and b's
    torch.testing.assert_close([p.grad for p in model.parameters()], want)
    with cached_weights(model):
        with torch.no_grad():
            torch.testing.assert_close(model(batches[0]), model(batches[0]))
        gradients(model, batches, lambda m, x: checkpoint(m, x, use_reentrant=False))
    torch.testing.assert_close([p.grad for p in model.parameters()], want)
    with cached_weights(model):
        gradients(model, batches, lambda m, x: checkpoint(m, x.requires_grad_(), use_reentrant=True))
    torch.testing.assert_close([p.grad for p in model.parameters()], want)
    torch.testing.assert_close(gradients(model, batches), want)


def test_cached_weights_form_each_weight_once(monkeypatch):
    model, formed = SummaryLinear(6, 4), []
    original = SummaryLinear.effective_weight
    monkeypatch.setattr(SummaryLinear, "effective_weight", lambda self: (formed.append(self), original(self))[1])
    with cached_weights(model):
        gradients(model, torch.randn(3, 5, 6))
    assert len(formed) == 1


def test_cached_weights_refuse_what_would_be_wrong():
    model, x = nn.Sequential(SummaryLinear(6, 4, polynomial="newton-schulz")), torch.randn(5, 6)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    before = model[0].b.clone()

    def inside(then):
        with cached_weights(model):
            model(x).sum().backward()
            then()

    def double():
        with torch.no_grad():
            model[0].b.mul_(2)
        model(x)

    with pytest.raises(RuntimeError, match=r"the optimizer steps 0 \(SummaryLinear\) inside of the block"):
        inside(sgd.step)
    assert torch.equal(model[0].b, before)
    with pytest.raises(RuntimeError, match=r"b of 0 \(SummaryLinear\) has changed"):
        inside(double)
    update_spectral_norms(model)
    with pytest.raises(RuntimeError, match="in another block already"):
        inside(lambda: cached_weights(model).__enter__())
    with pytest.raises(TypeError, match="model: got Tensor"):
        cached_weights(x)
    model.zero_grad()
    with pytest.raises(IndexError):
        inside(lambda: model[1])
    assert model[0].b.grad is None  # nothing was pulled back
    sgd.step()  # the hook is gone
    inside(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1).step)
    assert model[0].b.grad is not None


def test_cached_weights_of_parts_that_do_not_train():
    model = nn.Sequential(SummaryLinear(6, 4, polynomial="newton-schulz"), SummaryLinear(4, 4).requires_grad_(False))
    model[1].freeze()
    batches = torch.randn(3, 5, 6)
    want = gradients(model, batches)
    with cached_weights(model):
        gradients(model, batches)
    got = [p.grad for p in model.parameters()]
    torch.testing.assert_close(got, want)
