"""Plans: the operations they count are those the engine executes, and the choice is the least of them."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import CASES, COMPOSED_FORMS, in_form, pair_in_form
from torch.utils.flop_counter import FlopCounterMode

import interp_nn
from interp_nn import engines
from interp_nn.engines import eager, orders, select
from interp_nn.engines.cost import Problem

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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize(("form", "pair"), CASES)
def test_products_of_an_operator_are_those_executed(form, pair, needs, shape):
    x, b = operands(*shape)
    dy = torch.randn(shape[0], shape[2])

    def execute():
        _, _, kept = eager.forward(x, b, None, form, pair)
        if any(needs):
            eager.backward(dy if pair else None, dy, x, b, kept, form, *needs)

    assert count(execute) == orders.products(form, *shape, pair, *needs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("form", COMPOSED_FORMS)
def test_products_left_to_autograd_are_those_executed(form, pair, needs, shape):
    x, b = operands(*shape, needs)

    def execute():
        out = pair_in_form(form, x, b) if pair else (in_form(form, x, b),)
        if any(needs):
            torch.autograd.backward(out, [torch.ones_like(o) for o in out])

    assert count(execute) == orders.products(form, *shape, pair, *needs)


@pytest.mark.parametrize("sizes", [(7, 5, 3, 2), (6, 4, 9, 3), (20, 8, 4, 11), (7, 12, 40, 3)], ids=str)
@pytest.mark.parametrize("form", ["flat", "latent"])
def test_products_of_a_head_are_those_executed(form, sizes):
    n, d, k, m = sizes
    x, b = operands(n, d, k)
    a, c, target = torch.randn(m, k), torch.randn(m), torch.randint(m, (n,))
    options = eager.LossOptions((1.0, 1.0, 1.0), -100, "mean")
    found = count(lambda: eager.loss(x, b, a, c, target, options, form, None, (True,) * 4))
    assert found == orders.head_products(form, *sizes)


GRID = list(itertools.product((0, 1, 8, 64, 4096), (1, 7, 64, 512), (1, 10, 64, 512)))


def keeps_what_it_may(form, n, d, k, pair):
    """P, Q and R only where they are no larger than b; an output is kept for nothing."""
    sizes = {"P": 0 if pair else n * k, "Q": n * d, "R": n * d}
    return all(sizes.get(name, 0) <= d * k for name in orders.KEEPS[form])


@pytest.mark.parametrize("pair", [False, True])
def test_candidates_keep_nothing_that_outgrows_b(pair):
    for n, d, k in GRID:
        forms = orders.candidates(n, d, k, pair)
        for form in forms:
            starred = form[-1] == "*"
            kept = {"A*": "A+", "B*": "B", "C*": "C+", "D*": "D+", "E*": "E"}[form] if starred else form
            assert keeps_what_it_may(kept, n, d, k, pair), (form, n, d, k)
        assert {"D", "E"}.isdisjoint(form[0] for form in forms) == (k <= d)
        assert orders.candidates(n, d, k, pair, composed=False) == [form for form in forms if form[-1] != "*"]
        assert orders.candidates(n, d, k, pair, operators=False) == [form for form in forms if form[-1] == "*"]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("pair", [False, True])
def test_the_cheapest_is_the_least_of_the_costs(pair, needs):
    for n, d, k in GRID:
        for composed in (True, False):
            forms = orders.candidates(n, d, k, pair, composed=composed)
            costs = [orders.cost(form, n, d, k, pair, *needs) for form in forms]
            chosen = orders.cheapest(n, d, k, pair, *needs, composed=composed)
            assert costs[forms.index(chosen)] == min(costs)


def test_cost_charges_operations_products_and_the_operator():
    arguments = (64, 32, 16, False, True, True)
    for form, fixed in (("B", orders.OPERATOR_OVERHEAD), ("B*", 0)):
        flops, products = orders.products(form, *arguments)
        assert orders.cost(form, *arguments) == flops + products * orders.PRODUCT_OVERHEAD + fixed


@pytest.mark.parametrize(
    ("shape", "association"),
    [
        ((4096, 512, 64), "B"),
        ((32, 512, 100), "C"),
        ((4096, 512, 2048), "E"),
        ((1024, 1024, 4096), "D"),
        ((300, 768, 256), "A"),
        ((16, 64, 8), "A"),
        ((128, 256, 64), "A"),
    ],
    ids=str,
)
def test_known_choices(shape, association):
    assert select.plan(*shape).association == association


def test_a_large_problem_takes_an_operator_and_a_small_one_does_not():
    assert select.plan(2048, 1024, 512).form == "B"
    assert select.plan(16, 8, 4).form[-1] == "*"


@pytest.mark.parametrize("sizes", [(32, 1600, 120, 10), (64, 32, 10, 7), (8, 40, 20, 30), (1, 1, 1, 1)], ids=str)
def test_a_head_forms_the_gram_matrix_where_that_takes_less(sizes, monkeypatch):
    by_gram = orders.head_by_gram(*sizes[1:])
    flops = {}
    for way in (True, False):
        monkeypatch.setattr(orders, "head_by_gram", lambda *_, way=way: way)
        flops[way] = orders.head_products("latent", *sizes)[0]
    assert flops[by_gram] == min(flops.values())


@pytest.mark.parametrize("sizes", [(512, 64, 32, 4), (512, 64, 32, 100), (1, 1, 1, 1)], ids=str)
def test_head_form_is_the_lesser_of_the_two(sizes):
    flops = {form: orders.head_products(form, *sizes)[0] for form in ("flat", "latent")}
    assert flops[orders.head_form(*sizes)] == min(flops.values())


def test_a_plan_explains_itself():
    plan = interp_nn.plan(4096, 512, 64)
    assert (plan.engine, plan.association, plan.flops) == (
        "reference",
        "B",
        orders.products(plan.form, 4096, 512, 64, False, True, True)[0],
    )
    text = str(plan)
    assert text.startswith(f"reference, {plan.form}: X (b (bᵀb)); ")
    assert f"{plan.flops / 1e6:.4g} MFLOP in 9 products" in text and "cost of the others: A 1." in text
    assert interp_nn.plan(4096, 512, 64, grad=()).flops < interp_nn.plan(4096, 512, 64, grad=("b",)).flops < plan.flops
    assert interp_nn.plan(4096, 512, 64, pair=True).association == "A"


def test_a_plan_is_what_functional_takes(monkeypatch):
    from interp_nn import functional
    from interp_nn.ops import summary

    taken, original = [], summary.summary
    monkeypatch.setattr(summary, "summary", lambda *args: taken.append(args[3]) or original(*args))
    for n, d, k in ((64, 32, 8), (8, 64, 32), (300, 768, 256)):
        functional.summary(*operands(n, d, k, (True, True)))
        assert taken[-1] == f"reference:{select.plan(n, d, k).form}"
        functional.summary(*operands(n, d, k))
        assert taken[-1] == f"reference:{select.plan(n, d, k, grad=()).form}"


def test_use_engine_as_a_context_and_as_a_setter():
    assert select.requested() == "auto" and select.engine(Problem(8, 4, 2))[0] == "reference"
    with interp_nn.use_engine("reference") as outer:
        assert isinstance(outer, interp_nn.use_engine) and select.requested() == "reference"
        with interp_nn.use_engine("auto"):
            assert select.requested() == "auto"
        assert select.requested() == "reference"
    assert select.requested() == "auto"
    interp_nn.use_engine("reference")
    assert select.requested() == "reference"
    with pytest.raises(RuntimeError, match="inside"), interp_nn.use_engine("auto"):
        raise RuntimeError("inside")
    assert select.requested() == "reference"
    with pytest.raises(ValueError, match="warp"):
        interp_nn.use_engine("warp")
    assert select.requested() == "reference"


def test_the_engine_asked_for_is_in_the_plan_and_in_the_token(monkeypatch):
    monkeypatch.setattr(select, "ENGINES", ("reference", "probe"))
    monkeypatch.setattr(engines, "unavailable", lambda name: None)
    monkeypatch.setattr(engines, "refusal", lambda *_: None)
    with interp_nn.use_engine("probe"):
        assert select.plan(8, 4, 2, device="sm_90").engine == "probe"
        assert select.choose(Problem(8, 4, 2)).startswith("probe:")
        assert select.choose(Problem(8, 4, 2, pair=True, classes=2)).startswith("probe:")


def python(*code):
    root = str(Path(interp_nn.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_line_prints_versions_and_engines():
    result = python("-m", "interp_nn")
    assert result.returncode == 0 and not result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())  # of engines, the last one
    assert lines["interp_nn"] == interp_nn.__version__
    assert torch.__version__ in lines["torch"]
    assert "engine    reference: available (PyTorch operators, every device)" in result.stdout
    assert lines["engine"].startswith("cuda: ")
    assert lines["requested"].startswith("auto")
    assert lines["devices"].startswith("cpu")


def test_an_unknown_command_is_an_error():
    result = python("-m", "interp_nn", "tnue")
    assert result.returncode == 2 and not result.stdout
    assert "invalid choice: 'tnue'" in result.stderr and "tune" in result.stderr


def test_planning_asks_nothing_of_a_gpu(monkeypatch):
    for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("planning asked torch.cuda"))
    for n, d, k in GRID:
        select.plan(n, d, k)
    assert "torch.cuda." not in Path(select.__file__).read_text(encoding="utf-8")
