"""Plans: the operations they count are those the engine executes, and the choice is the least of them."""

import itertools
from pathlib import Path

import pytest
import torch
from support import AUTOGRAD_PLANS, CASES, pair_by, summary_by
from torch.utils.flop_counter import FlopCounterMode

import interp_nn
from interp_nn.engines import eager, orders, select
from interp_nn.engines.problem import LossOptions, Plan, Problem

NEEDS = [(True, True), (True, False), (False, True), (False, False)]
SHAPES = [(7, 5, 3), (6, 4, 9), (150, 6, 5)]  # k > d, and the memory order of many rows and few columns


def count(function):
    """(floating-point operations, matrix products) that PyTorch executes."""
    calls = []
    original = FlopCounterMode._count_flops

    def note(self, packet, out, args, kwargs):
        calls.extend([packet] * (packet in self.flop_registry))
        return original(self, packet, out, args, kwargs)

    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(FlopCounterMode, "_count_flops", note)
        function()
    return counter.get_total_flops(), len(calls)


def operands(n, d, k, needs=(False, False)):
    x, b = torch.randn(n, d), torch.randn(d, k)
    return x.requires_grad_(needs[0]), b.requires_grad_(needs[1])


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize(("plan", "pair"), CASES)
def test_products_of_an_operator_are_those_executed(plan, pair, needs):
    for shape in SHAPES:
        x, b = operands(*shape)
        dy = torch.randn(shape[0], shape[2])

        def execute(x=x, b=b, dy=dy):
            _, _, saved = eager.forward(x, b, None, plan, pair)
            if any(needs):
                eager.backward(dy if pair else None, dy, x, b, saved, plan, *needs)

        assert count(execute) == orders.flops_and_products(plan, Problem(*shape, pair, *needs)), shape


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("plan", AUTOGRAD_PLANS)
def test_products_left_to_autograd_are_those_executed(plan, pair, needs):
    for shape in SHAPES:
        x, b = operands(*shape, needs)

        def execute(x=x, b=b):
            out = pair_by(plan, x, b) if pair else (summary_by(plan, x, b),)
            if any(needs):
                torch.autograd.backward(out, [torch.ones_like(o) for o in out])

        assert count(execute) == orders.flops_and_products(plan, Problem(*shape, pair, *needs)), shape


@pytest.mark.parametrize("sizes", [(7, 5, 3, 2), (6, 4, 9, 3), (20, 8, 4, 11), (7, 12, 40, 3)], ids=str)
@pytest.mark.parametrize("order", ["logits_from_x", "logits_from_latent"])
def test_products_of_a_head_are_those_executed(order, sizes):
    n, d, k, m = sizes
    x, b = operands(n, d, k)
    a, c, target = torch.randn(m, k), torch.randn(m), torch.randint(m, (n,))
    options = LossOptions((1.0, 1.0, 1.0), -100, "mean")
    plan = Plan("eager", order)
    found = count(lambda: eager.loss(x, b, a, c, target, options, plan, None, (True,) * 4))
    assert found == orders.flops_and_products(plan, Problem(n, d, k, classes=m, head=True))


GRID = list(itertools.product((0, 1, 8, 64, 4096), (1, 7, 64, 512), (1, 10, 64, 512)))


@pytest.mark.parametrize("pair", [False, True])
def test_candidates_save_nothing_that_outgrows_b(pair):
    """P, Q and R are saved only where they are no larger than b; an output is saved for nothing."""
    for n, d, k in GRID:
        problem = Problem(n, d, k, pair)
        plans = orders.candidates(problem)
        own, left = orders.candidates(problem, autograd=False), orders.candidates(problem, operators=False)
        assert plans == own + left and [plan.order for plan in own] == [plan.order for plan in left]
        assert not any(plan.autograd for plan in own) and all(plan.autograd for plan in left)
        sizes = {"P": 0 if pair else n * k, "Q": n * d, "R": n * d}
        for plan in own:
            assert all(sizes.get(name, 0) <= d * k for name in orders.saved_names(plan)), (plan, n, d, k)
        assert {"(X(bbᵀ))b", "X((bbᵀ)b)"}.isdisjoint(plan.order for plan in plans) == (k <= d)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_the_cheapest_is_the_least_of_the_costs(pair, needs):
    for sizes in GRID:
        problem = Problem(*sizes, pair, *needs)
        for autograd in (True, False):
            costs = {plan: orders.cost(plan, problem) for plan in orders.candidates(problem, autograd=autograd)}
            assert costs[orders.cheapest(problem, autograd=autograd)] == min(costs.values())


def test_every_order_is_the_cheapest_of_some_problem():
    found = {orders.cheapest(Problem(*sizes), autograd=False).order for sizes in GRID}
    assert found == {plan.order for plan in orders.OPERATOR_PLANS}


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((4096, 512, 64), "X(bG)"),
        ((32, 512, 100), "((Xb)bᵀ)b"),
        ((4096, 512, 2048), "X((bbᵀ)b)"),
        ((1024, 1024, 4096), "(X(bbᵀ))b"),
        ((300, 768, 256), "(Xb)G"),
        ((16, 64, 8), "(Xb)G"),
        ((128, 256, 64), "(Xb)G"),
        # About as many operations as ((Xb)bᵀ)b, whose products of few rows were 20 % slower; far fewer of them, at n = 8, win.
        ((32, 512, 64), "(Xb)G"),
        ((8, 512, 16), "(Xb)G"),
        ((8, 512, 64), "((Xb)bᵀ)b"),
    ],
    ids=str,
)
def test_known_choices(shape, order):
    assert select.plan(*shape).order == order


def test_a_large_problem_takes_an_operator_and_a_small_one_does_not():
    assert select.plan(2048, 1024, 512)[:4] == ("eager", "X(bG)", False, False)
    assert select.plan(16, 8, 4).autograd


def head(n, d, k, m):
    return Problem(n, d, k, classes=m, head=True)


@pytest.mark.parametrize("sizes", [(32, 1600, 120, 10), (64, 32, 10, 7), (8, 40, 20, 30), (1, 1, 1, 1)], ids=str)
def test_a_head_forms_the_gram_matrix_where_that_takes_less(sizes, monkeypatch):
    by_gram = orders.head_by_gram(*sizes[1:])
    flops = {}
    for way in (True, False):
        monkeypatch.setattr(orders, "head_by_gram", lambda *_, way=way: way)
        flops[way] = orders.flops_and_products(Plan("eager", "logits_from_latent"), head(*sizes))[0]
    assert flops[by_gram] == min(flops.values())


@pytest.mark.parametrize("sizes", [(512, 64, 32, 4), (512, 64, 32, 100), (1, 1, 1, 1)], ids=str)
def test_head_order_is_the_lesser_of_the_two(sizes):
    flops = {
        order: orders.flops_and_products(Plan("eager", order), head(*sizes))[0]
        for order in ("logits_from_x", "logits_from_latent")
    }
    assert flops[orders.head_order(*sizes)] == min(flops.values())


def test_a_plan_explains_itself():
    plan = interp_nn.plan(4096, 512, 64)
    flops = orders.flops_and_products(plan, Problem(4096, 512, 64))[0]
    assert (plan.engine, plan.order, plan.flops) == ("eager", "X(bG)", flops)
    text = str(plan)
    assert text.startswith("eager, X(bG)")
    assert f"{plan.flops / 1e6:.4g} MFLOP in 8 products" in text and "cost of the others: X(bG) by autograd 1" in text
    assert interp_nn.plan(4096, 512, 64, grad=()).flops < interp_nn.plan(4096, 512, 64, grad=("b",)).flops < plan.flops
    assert interp_nn.plan(4096, 512, 64, pair=True).order == "(Xb)G"


def test_a_plan_is_what_functional_takes(monkeypatch):
    from interp_nn import functional
    from interp_nn.ops import direct

    taken, original = [], direct.summary
    monkeypatch.setattr(direct, "summary", lambda *args: taken.append(args[3].plan) or original(*args))
    for n, d, k in ((64, 32, 8), (8, 64, 32), (300, 768, 256)):
        functional.summary(*operands(n, d, k, (True, True)))
        assert taken[-1][:4] == select.plan(n, d, k)[:4]
        functional.summary(*operands(n, d, k))
        assert taken[-1][:4] == select.plan(n, d, k, grad=())[:4]


def test_use_engine_as_a_context_and_as_a_setter():
    assert select.requested() == "auto" and select.choose_engine(Problem(8, 4, 2))[0] == "eager"
    with interp_nn.use_engine("eager") as outer:
        assert isinstance(outer, interp_nn.use_engine) and select.requested() == "eager"
        with interp_nn.use_engine("auto"):
            assert select.requested() == "auto"
        assert select.requested() == "eager"
    assert select.requested() == "auto"
    interp_nn.use_engine("eager")
    assert select.requested() == "eager"
    with pytest.raises(RuntimeError, match="inside"), interp_nn.use_engine("auto"):
        raise RuntimeError("inside")
    assert select.requested() == "eager"
    with pytest.raises(ValueError, match=r"^use_engine: unknown engine 'warp'; this build has eager.*'auto'"):
        interp_nn.use_engine("warp")
    assert select.requested() == "eager"


def test_the_engine_asked_for_is_in_the_plan(monkeypatch):
    monkeypatch.setattr(select, "unsupported_reason", lambda *_: None)
    with interp_nn.use_engine("cuda"):
        assert select.plan(8, 4, 2, device="sm_90").engine == "cuda"
        assert select.choose(Problem(8, 4, 2)).engine == "cuda"
        assert select.choose(Problem(8, 4, 2, pair=True, classes=2)).engine == "cuda"


def test_planning_asks_nothing_of_a_gpu(monkeypatch):
    for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("planning asked torch.cuda"))
    for n, d, k in GRID:
        select.plan(n, d, k)
    assert "torch.cuda." not in Path(select.__file__).read_text(encoding="utf-8")
