"""Weights formed once for several microbatches: the same gradients, and errors where they would be wrong."""

import copy

import pytest
import torch
from support import errors, exceeds, law_floor
from torch import nn
from torch.utils.checkpoint import checkpoint

from interp_nn.engines import eager_polynomial
from interp_nn.nn import SummaryConv2d, SummaryLinear, cached_weights, update_spectral_norms
from interp_nn.nn.polynomials import NAMED


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


@pytest.mark.parametrize(("dtype", "polynomial"), [(torch.float32, "summary"), (torch.bfloat16, "pc-1")])
def test_cached_weights_form_each_weight_once(dtype, polynomial, monkeypatch):
    model, formed = SummaryLinear(6, 4, dtype=dtype, polynomial=polynomial), []
    original = eager_polynomial.weight_forward
    monkeypatch.setattr(eager_polynomial, "weight_forward", lambda *given: (formed.append(1), original(*given))[1])
    with cached_weights(model):
        gradients(model, torch.randn(3, 5, 6, dtype=dtype))
    assert len(formed) == 1


CASES = [
    *((name, None, None) for name in NAMED), ("summary", True, True), ("pc-4", True, False), ((0.7,), True, True),
    ((1.0, 0.5, 0.0, 0.0, 0.1), None, True), ((0.5, 0.25, 0.1), "restore", True),
]  # fmt: skip


def wild(sizes, case, dtype):
    """A layer with the values that training could give it."""
    polynomial, normalize, gain = case
    layer = SummaryLinear(*sizes, polynomial=polynomial, normalize=normalize, gain=gain).double()
    with torch.no_grad():
        layer.b.normal_(0, 0.4)
        if layer.gain is not None:
            layer.gain.fill_(1.3)
    update_spectral_norms(layer)
    return layer.to(dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sizes", [(40, 12), (12, 40)])
def test_weights_of_plain_tensors_on_a_cpu_are_formed_without_a_graph(sizes, case):
    """Outputs and gradients are as near to fp64 as under autograd."""
    layer, batches = wild(sizes, case, torch.float32), torch.randn(4, 9, sizes[0])
    exact, twin = copy.deepcopy(layer).double(), copy.deepcopy(layer)

    def results(model, x):
        return [model(x[0]).detach(), *gradients(model, x)]

    with cached_weights(layer):
        assert (layer._cache._graphless is None) is (case[0] == (0.7,))
        y = layer(batches[0]).detach()
        gradients(layer, batches)
    got = [y, *(p.grad for p in layer.parameters())]
    for ours, theirs, truth in zip(got, results(twin, batches), results(exact, batches.double()), strict=True):
        why = exceeds(errors(ours, truth), errors(theirs, truth), law_floor(torch.float32))
        assert why is None, why


@pytest.mark.parametrize(
    "change", ["zero gain", "small scale", "b in part of a computation", "frozen b", "frozen gain"]
)
def test_gradients_where_a_graph_is_needed_or_a_parameter_is_frozen(change):
    layer, batches = wild((12, 5), ("newton-schulz", None, None), torch.float64), torch.randn(3, 4, 12).double()
    with torch.no_grad():
        if change == "zero gain":
            layer.gain.zero_()
        elif change == "small scale":
            layer.b.mul_(1e3)
            update_spectral_norms(layer)
    if change == "b in part of a computation":
        nn.utils.parametrize.register_parametrization(layer, "b", nn.Identity())
        update_spectral_norms(layer)
    for name in ("b", "gain"):
        getattr(layer, name).requires_grad_(change != f"frozen {name}")
    want = gradients(layer, batches)
    with cached_weights(layer):
        assert (layer._cache._graphless is None) is ("frozen" not in change)
        gradients(layer, batches)
    torch.testing.assert_close([p.grad for p in layer.parameters()], want)


@pytest.mark.parametrize("polynomial", ["newton-schulz", (0.7, 0.2)])
def test_a_block_inside_of_autocast_forms_its_weights_as_outside(polynomial):
    layer, batches = wild((12, 5), (polynomial, None, None), torch.float32), torch.randn(3, 4, 12)
    results = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside), cached_weights(layer):
            formed = layer._cache.leaf.detach().clone()
            with torch.autocast("cpu", enabled=False):
                gradients(layer, batches)
        results.append([formed, *(p.grad for p in layer.parameters())])
    assert all(map(torch.equal, *results))


def test_hooks_of_parameters_run_once_with_the_sum():
    layer, batches = wild((12, 5), ("pc-2", None, None), torch.float64), torch.randn(3, 4, 12).double()
    want, seen = gradients(layer, batches), []
    layer.b.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    layer.gain.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    with cached_weights(layer):
        gradients(layer, batches)
        assert not seen
    torch.testing.assert_close(sorted(seen, key=torch.numel), [layer.gain.grad, want[0]])
    torch.testing.assert_close([p.grad for p in layer.parameters()], [2 * want[0], *want[1:]])
    with cached_weights(layer):  # adds to what is there
        layer(batches[0]).sum().backward()
    assert not torch.equal(layer.gain.grad, want[-1])


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
