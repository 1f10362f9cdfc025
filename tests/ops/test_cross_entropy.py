"""The losses: values, gradients to second order, ignored rows, reductions, loss scaling."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support import (
    CASES,
    DTYPES,
    assert_close_law,
    check_law,
    errors,
    leaves,
    naive_cross_entropy,
    naive_head_cross_entropy,
)
from torch.autograd import gradcheck, gradgradcheck

from interp_nn import functional
from interp_nn.engines import eager, orders, select
from interp_nn.engines.cost import Problem
from interp_nn.engines.problem import LossOptions, Plan
from interp_nn.ops import losses as ops

PAIR_PLANS = [plan for plan, pair in CASES if pair]
HEAD_PLANS = [Plan("eager", "logits_from_x"), Plan("eager", "logits_from_latent")]
REDUCTIONS = ["mean", "sum", "none"]
IGNORED = torch.tensor([0, 2, -100, 1, -100, 1])
close = torch.testing.assert_close


@pytest.fixture(params=["autograd", "operator"])
def way(request, monkeypatch):
    """Losses are left to PyTorch's autograd on a CPU, in eager mode; elsewhere they are the operator's."""
    if request.param == "operator":
        monkeypatch.setattr(select, "_prefers_autograd", lambda problem: False)
    return request.param


both_ways = pytest.mark.usefixtures("way")


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def pair_inputs(n=6, d=4, k=3):
    return 0.7 * randn(n, d), 0.7 * randn(d, k)


def head_inputs(n=6, d=4, k=2, m=3, bias=True):
    return (*pair_inputs(n, d, k), randn(m, k), *([randn(m)] if bias else []))


def loss_in(plan, target, weights=(1.0, 1.0, 1.0), ignore_index=-100, reduction="mean"):
    """The loss under a given plan, as a function of (x, b) or (x, b, a[, c])."""

    def function(x, b, a=None, c=None):
        enabled = [t is not None and t.requires_grad for t in (x, b, a, c)]
        late = x.dtype == torch.float16 or reduction == "none"
        return ops.apply(
            ops.CrossEntropyFunction,
            *(x, b, a, c, None, None, target, LossOptions(weights, ignore_index, reduction), plan),
            (False,) * 4 if late else tuple(enabled),
        )[0]

    return function


def reference_of(plan, target, **options):
    def function(x, b, a=None, c=None):
        if a is None:
            return naive_cross_entropy(x, b, target, **options)
        return naive_head_cross_entropy(x, b, a, c, target, **options)

    return function


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("plan", "inputs"),
    [
        *((plan, pair_inputs()) for plan in PAIR_PLANS),
        *((plan, head_inputs(bias=bias)) for plan in HEAD_PLANS for bias in (True, False)),
    ],
)
def test_derivatives(plan, inputs, reduction):
    inputs = leaves(*inputs)
    function = loss_in(plan, IGNORED, weights=(0.5, 2.0, 3.0), reduction=reduction)
    batched = plan in PAIR_PLANS and reduction == "none"
    assert gradcheck(function, inputs, check_batched_grad=batched)
    assert gradgradcheck(function, inputs, fast_mode=True)


def pair_problem(n, d, k, reduction):
    target = torch.randint(k, (n,))
    target[::7] = -100
    upstream = torch.rand(n if reduction == "none" else (), dtype=torch.float64) + 0.5
    options = {"reduction": reduction, "weights": (1.0, 0.5, 0.25)}
    return target, options, [randn(n, d), randn(d, k) / max(d, k) ** 0.5], [upstream]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("plan", "composed", "shape"),
    [
        (Plan("eager", "(Xb)G", saves=True), Plan("eager", "(Xb)G", autograd=True), (40, 24, 10)),
        (Plan("eager", "(Xb)G", saves=True), Plan("eager", "(Xb)G", autograd=True), (200, 12, 5)),
        (Plan("eager", "((Xb)bᵀ)b", saves=True), Plan("eager", "((Xb)bᵀ)b", autograd=True), (16, 8, 64)),
        (Plan("eager", "(X(bbᵀ))b", saves=True), Plan("eager", "(X(bbᵀ))b", autograd=True), (128, 16, 128)),
        (Plan("eager", "X((bbᵀ)b)"), Plan("eager", "X((bbᵀ)b)", autograd=True), (128, 8, 64)),
    ],
)
def test_pair_loss_obeys_the_law_in_the_order_of_its_shape(plan, composed, shape, reduction, dtype, way):
    found = select.choose(Problem(*shape, pair=True, classes=shape[2]))
    assert found == (plan if way == "operator" else composed)
    target, options, inputs, upstream = pair_problem(*shape, reduction)
    function = functools.partial(functional.summary_cross_entropy, target=target, **options)
    check_law(function, reference_of(plan, target, **options), inputs, upstream, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(40, 24, 10), (9, 16, 24), (200, 12, 5)], ids=str)
@pytest.mark.parametrize("plan", PAIR_PLANS)
def test_pair_loss_in_every_order(plan, shape, reduction):
    target, options, inputs, upstream = pair_problem(*shape, reduction)
    check_law(loss_in(plan, target, **options), reference_of(plan, target, **options), inputs, upstream, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("plan", HEAD_PLANS)
def test_head_loss_obeys_the_law(plan, bias, reduction, dtype):
    n, d, k, m = 60, 24, 16, 7
    target = torch.randint(m, (n,))
    target[::7] = -100
    options = {"reduction": reduction, "weights": (1.0, 0.5, 0.25)}
    inputs = [randn(n, d), randn(d, k) / d**0.5, randn(m, k) / k**0.5, randn(m)][: 3 + bias]
    upstream = torch.rand(n if reduction == "none" else (), dtype=torch.float64) + 0.5
    check_law(loss_in(plan, target, **options), reference_of(plan, target, **options), inputs, [upstream], dtype)


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (1, 2, 2)], ids=str)
def test_functional_losses_with_batch_dimensions(batch, dtype):
    target = torch.randint(3, batch)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction in REDUCTIONS:
        x, b, a, c = (t.to(dtype) for t in (randn(*batch, 4), randn(4, 3) / 2, randn(3, 3), randn(3)))
        for got, expected in (
            (functional.summary_cross_entropy(x, b, target, reduction=reduction), naive_cross_entropy),
            (functional.summary_head_cross_entropy(x, b, a, c, target, reduction=reduction), naive_head_cross_entropy),
        ):
            given = (x, b) if expected is naive_cross_entropy else (x, b, a, c)
            assert got.dtype == wide
            assert got.shape == (target.shape if reduction == "none" else ())
            exact = expected(*(t.double() for t in given), target, reduction=reduction)
            assert_close_law(got, expected(*given, target, reduction=reduction), exact, precision=dtype)


@both_ways
@pytest.mark.parametrize("shape", [(64, 32, 10, 7), (20, 16, 40, 3), (16, 16, 4, 30)], ids=str)
def test_functional_head_equals_naive_whatever_form_it_takes(shape):
    n, d, k, m = shape
    inputs = leaves(randn(n, d), randn(d, k) / d**0.5, randn(m, k), randn(m))
    target = torch.randint(m, (n,))
    assert orders.head_order(n, d, k, m) == ("logits_from_x" if 2 * m < k else "logits_from_latent")
    got, expected = (f(*inputs, target) for f in (functional.summary_head_cross_entropy, naive_head_cross_entropy))
    close(got, expected)
    close(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs))


# Ignored rows and targets


@both_ways
@pytest.mark.parametrize("ignore_index", [-100, 1, -1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_give_exactly_nothing(reduction, ignore_index):
    target = torch.where(IGNORED == -100, ignore_index, torch.tensor([0, 2, 0, 2, 0, 0]))
    ignored = target == ignore_index
    assert ignored.sum() == 2
    x, b = leaves(*pair_inputs())
    options = {"ignore_index": ignore_index, "reduction": reduction}
    loss = functional.summary_cross_entropy(x, b, target, **options)
    dx, db = torch.autograd.grad(loss.sum(), (x, b))
    assert dx[ignored].eq(0).all() and dx[~ignored].ne(0).any(1).all()
    if reduction == "none":
        assert loss[ignored].eq(0).all() and loss[~ignored].ne(0).all()

    x2, b2 = leaves(x[~ignored], b)
    saved = functional.summary_cross_entropy(x2, b2, target[~ignored], reduction=reduction)
    close(loss[~ignored] if reduction == "none" else loss, saved)
    close((dx[~ignored], db), torch.autograd.grad(saved.sum(), (x2, b2)))


@both_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", [0, 3])
def test_no_row_to_keep(n, reduction, dtype):
    """NaN for a mean as F.cross_entropy gives, and the zero gradients it gives."""
    target = torch.full((n,), -100)
    logits = torch.randn(n, 3, requires_grad=True)
    pytorch = F.cross_entropy(logits, target, reduction=reduction)
    zero = torch.autograd.grad(pytorch.sum(), logits)[0]
    assert zero.eq(0).all()
    pair = leaves(*pair_inputs(n), dtype=dtype)
    head = leaves(*head_inputs(n), dtype=dtype)
    for loss, inputs in (
        (functional.summary_cross_entropy(*pair, target, reduction=reduction), pair),
        (functional.summary_head_cross_entropy(*head, target, reduction=reduction), head),
    ):
        assert loss.shape == pytorch.shape
        close(loss.float(), pytorch, equal_nan=True)
        assert math.isnan(float(loss.detach().sum())) == (reduction == "mean")
        assert all(g.eq(0).all() for g in torch.autograd.grad(loss.sum(), inputs))


@both_ways
@pytest.mark.parametrize("bad", [3, -1, 2**40])
@pytest.mark.parametrize("head", [False, True])
def test_a_target_out_of_range_is_refused_and_outside_of_transforms_named(head, bad):
    target = torch.tensor([0, 1, bad, -100, 2, 0])
    inputs = head_inputs() if head else pair_inputs()
    f = functional.summary_head_cross_entropy if head else functional.summary_cross_entropy
    with pytest.raises(ValueError, match=rf"target: got class index {bad}, want 0 <= index < 3 or ignore_index=-100"):
        f(*inputs, target)
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"target|out of bounds"):
        torch.func.grad(f)(*inputs, target)


@both_ways
def test_the_weights_weigh_their_terms():
    x, b = pair_inputs()
    p, y = x @ b, x @ b @ (b.mT @ b)
    target = IGNORED.clamp_min(0)
    terms = F.cross_entropy(p, target), F.cross_entropy(y, target), F.mse_loss(p, y)
    for i, weights in enumerate(((1, 0, 0), (0, 1, 0), (0, 0, 1))):
        close(functional.summary_cross_entropy(x, b, target, weights=weights), terms[i])
    close(functional.summary_cross_entropy(x, b, target, weights=(2, 3, 5)), 2 * terms[0] + 3 * terms[1] + 5 * terms[2])


# Gradients asked for, scaled, repeated


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (0, 3)], ids=str)
@pytest.mark.parametrize("plan", HEAD_PLANS)
def test_gradients_only_where_needed(plan, wanted, reduction):
    inputs = [t.requires_grad_(i in wanted) for i, t in enumerate(head_inputs())]
    options = {"reduction": reduction}
    got = torch.autograd.grad(loss_in(plan, IGNORED, **options)(*inputs).sum(), [inputs[i] for i in wanted])
    expected = naive_head_cross_entropy(*inputs, IGNORED, **options).sum()
    close(got, torch.autograd.grad(expected, [inputs[i] for i in wanted]))


@both_ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_asked_of_one_input_where_all_need_them(reduction):
    inputs = leaves(*head_inputs())
    for t in inputs:
        (got,) = torch.autograd.grad(
            functional.summary_head_cross_entropy(*inputs, IGNORED, reduction=reduction).sum(), t
        )
        (expected,) = torch.autograd.grad(naive_head_cross_entropy(*inputs, IGNORED, reduction=reduction).sum(), t)
        close(got, expected)


def test_gradients_not_needed_are_not_computed():
    x, b = pair_inputs()
    arguments = (None, None, IGNORED, [1.0] * 3, -100, "mean", "eager:X(bG)")
    for needs, shapes in (([True, False], [x.shape]), ([False, True], [b.shape]), ([False, False], [])):
        _, grads = torch.ops.interp_nn.summary_cross_entropy(x, b, *arguments, [*needs, False, False], False)
        assert [g.shape for g in grads] == shapes


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_over_a_retained_graph(reduction, dtype):
    inputs = leaves(*head_inputs(), dtype=dtype)
    loss = functional.summary_head_cross_entropy(*inputs, IGNORED, reduction=reduction).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))


def scale_in_place(grads, upstream):
    """As the engines of one launch do it: a write that autograd does not see."""
    for g in grads:
        g.data.mul_(upstream)
    return list(grads)


@pytest.mark.parametrize("scale", [eager.scale, scale_in_place])
@pytest.mark.parametrize("plan", [Plan("eager", "(Xb)G", saves=True), Plan("eager", "logits_from_x")])
def test_every_backward_over_a_retained_graph_gives_the_same(plan, scale, monkeypatch):
    monkeypatch.setattr(eager, "scale", scale)
    inputs = leaves(*(head_inputs() if plan.order == "logits_from_x" else pair_inputs()))
    for upstream in (1.0, 2.0):
        loss = upstream * loss_in(plan, IGNORED)(*inputs)
        expected = torch.autograd.grad(loss, inputs, create_graph=True)
        for create_graph in (False, True, True, False):
            got = torch.autograd.grad(loss, inputs, retain_graph=True, create_graph=create_graph)
            close(got, expected)
            for g in got:
                g.detach().mul_(3)  # the gradients belong to who asked for them


@both_ways
@pytest.mark.parametrize("head", [False, True])
def test_loss_scaling_in_half_precision(head):
    """Gradients of a mean over 131072 rows lose their bits to fp16's subnormal numbers, unless the scale is in them."""
    n, scale = 2**17, 65536.0
    shapes = ((n, 4), (4, 2), (3, 2), (3,)) if head else ((n, 4), (4, 3))
    function = functional.summary_head_cross_entropy if head else functional.summary_cross_entropy
    reference = naive_head_cross_entropy if head else naive_cross_entropy
    values = [(0.5 * randn(*shape)).half() for shape in shapes]
    values[1] = values[1] / 32  # and dX with it
    target = torch.randint(3, (n,))
    inputs, exact = leaves(*values), leaves(*values, dtype=torch.float64)
    scaled = torch.autograd.grad(function(*inputs, target), inputs, torch.tensor(scale))
    expected = torch.autograd.grad(reference(*exact, target), exact, torch.tensor(scale).double())
    least = 4 * torch.finfo(torch.float16).eps
    assert errors((expected[0] / scale).half().double() * scale, expected[0])[0] > 2 * least
    for got, want in zip(scaled, expected, strict=True):
        assert got.dtype == torch.float16
        assert errors(got, want)[0] < least


@both_ways
@pytest.mark.parametrize("upstream", [torch.ones(()).expand(6), torch.arange(12.0)[::2], torch.zeros(6)], ids=str)
def test_upstream_of_one_a_row(upstream):
    upstream = upstream.double()
    inputs = leaves(*pair_inputs())
    got, expected = (
        f(*inputs, IGNORED, reduction="none") for f in (functional.summary_cross_entropy, naive_cross_entropy)
    )
    close(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream))


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_logits_do_not_overflow(dtype):
    x, b = leaves(60 * torch.eye(3), torch.eye(3), dtype=dtype)
    loss = functional.summary_cross_entropy(x, b, torch.tensor([0, 1, 0]))
    assert loss.isfinite()
    close(loss, torch.tensor(40.0))  # both entropies are 60 in the one row that is wrong
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, b)))


@both_ways
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_order_through_functional(reduction):
    def second(function):
        torch.manual_seed(1)
        inputs = leaves(*head_inputs())
        loss = function(*inputs, IGNORED, reduction=reduction).square().sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    close(second(functional.summary_head_cross_entropy), second(naive_head_cross_entropy))


@both_ways
def test_inputs_are_untouched_and_repeats_are_the_same_bits():
    inputs = leaves(*head_inputs(), dtype=torch.float32)
    everything = [*inputs, IGNORED]
    before, versions = [t.detach().clone() for t in everything], [t._version for t in everything]
    runs = []
    for _ in range(3):
        loss = functional.summary_head_cross_entropy(*inputs, IGNORED)
        runs.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(t, first) for run in runs[1:] for t, first in zip(run, runs[0], strict=True))
    assert [t._version for t in everything] == versions
    assert all(torch.equal(t, old) for t, old in zip(everything, before, strict=True))
