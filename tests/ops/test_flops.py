"""FlopCounterMode counts the products that are formed, on every path: operators, autograd, compiled, polynomials, losses."""

import itertools

import pytest
import torch
from support import OPERATOR_PLANS
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import interp_nn
from interp_nn import functional
from interp_nn.engines import orders
from interp_nn.engines.problem import LossOptions, Plan, Problem, plan_to_text
from interp_nn.nn import SummaryLinear
from interp_nn.ops import losses, summary

SIZES = {"tall": (11, 7, 3), "wide": (11, 3, 7), "few rows": (2, 7, 5), "few rows, wide": (2, 5, 7)}
POLYNOMIALS = {"summary": None, "degree 1": (0.5, 1.5), "2": (1, 2, 3), "3": (1, 2, 3, 4), "4": (1, 2, 3, 4, 5)}


def half(flags):
    """Half of the values of so many flags, all True among them: any but one of the flags meet in every combination."""
    return [values for values in itertools.product([False, True], repeat=flags) if (flags - sum(values)) % 2 == 0]


def counted(call):
    """Return a call's result and the operations that PyTorch counts, none of them by a decomposition."""
    with FlopCounterMode(display=False) as counter:
        out = call()
    return out, counter.get_total_flops()


def formula(operator, *arguments):
    """The operations that the counter gives the operator itself, in one call."""
    return counted(lambda: operator(*arguments))[1]


def tensors(n, d, k, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype), torch.randn(d, k, dtype=dtype), torch.randn(k, dtype=dtype)


def plans(polynomial):
    return orders.OPERATOR_PLANS if polynomial is None else orders.POLYNOMIAL_PLANS


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("polynomial", POLYNOMIALS.values(), ids=POLYNOMIALS)
def test_summaries_and_pairs_are_counted_as_their_products(size, polynomial):
    x, b, bias = tensors(*size)
    q = () if polynomial is None else (torch.tensor(polynomial, dtype=x.dtype), torch.tensor(0.5, dtype=x.dtype))
    for plan in plans(polynomial):
        text = plan_to_text(plan)
        _, done = counted(lambda text=text: summary._summary(x, b, bias, text, *q))
        assert formula(torch.ops.interp_nn.summary, x, b, bias, text, *q) == done > 0
        if plan == Plan("eager", "(Xb)G"):
            continue
        _, done = counted(lambda text=text: summary._summary_pair(x, b, text, *q))
        assert formula(torch.ops.interp_nn.summary_pair, x, b, text, *q) == done > 0


@pytest.mark.parametrize("size", [SIZES["tall"], SIZES["few rows, wide"]], ids=["tall", "few rows, wide"])
@pytest.mark.parametrize("polynomial", POLYNOMIALS.values(), ids=POLYNOMIALS)
def test_backwards_are_counted_as_their_products(size, polynomial):
    x, b, bias = tensors(*size)
    g = torch.randn(size[0], size[2], dtype=x.dtype)
    q, wanted = (), list(itertools.product([False, True], repeat=3))
    if polynomial is not None:
        q = torch.tensor(polynomial, dtype=x.dtype), torch.tensor(0.5, dtype=x.dtype)
        wanted = half(5)
    for plan, (dp, dy), needs in itertools.product(plans(polynomial), [(None, g), (g, g), (g, None)], wanted):
        pair = dp is not None
        if pair and plan == Plan("eager", "(Xb)G"):
            continue
        text = plan_to_text(plan)
        _, _, saved, _ = summary._forward(x, b, None if pair else bias, text, pair, *(q or (None, None)))
        arguments = (dp, dy, x, b, saved, text, [*needs], False, *q)
        _, done = counted(lambda arguments=arguments: summary._summary_backward(*arguments))
        assert formula(torch.ops.interp_nn.summary_backward, *arguments) == done, (plan, pair, dy is None, needs)


@pytest.mark.parametrize("size", [*SIZES.values(), (9, 40, 30)], ids=[*SIZES, "large"])
@pytest.mark.parametrize("classes", [None, 2, 19])
def test_losses_are_counted_as_their_products(size, classes):
    x, b, _ = tensors(*size)
    a, c = (None, None) if classes is None else (torch.randn(classes, size[2]).double(), torch.randn(classes).double())
    target = torch.randint(classes or size[2], (size[0],))
    options = losses._unpack(LossOptions((1.0, 1.0, 1.0), -100, "mean"))
    found = (
        ("logits_from_x", "logits_from_latent")
        if classes
        else [p for p in OPERATOR_PLANS if p.saves or p.order[0] == "X"]
    )
    for plan, needs in itertools.product(found, half(4) if classes else itertools.product([False, True], repeat=2)):
        plan = Plan("eager", plan) if classes else plan
        needs = (*needs, False, False)[:4]
        arguments = (x, b, a, c, target, *options, plan_to_text(plan), needs, False)
        _, done = counted(lambda arguments=arguments: losses._loss(*arguments))
        assert formula(torch.ops.interp_nn.summary_cross_entropy, *arguments) == done > 0, (plan, needs)
        if any(needs):
            arguments = (torch.ones((), dtype=x.dtype), *arguments)
            _, done = counted(lambda arguments=arguments: losses._loss_backward(*arguments))
            assert formula(torch.ops.interp_nn.summary_cross_entropy_backward, *arguments) == done, (plan, needs)
    if classes:  # all gradients: the cost that plans are chosen by
        problem = Problem(*size, classes=classes, head=True)
        arguments = (x, b, a, c, target, *options, plan_to_text(plan), (True,) * 4, False)
        assert (
            formula(torch.ops.interp_nn.summary_cross_entropy, *arguments)
            == orders.flops_and_products(plan, problem)[0]
        )


SHAPES = [(32, 20, 6), (4096, 64, 16), (200, 6, 20), (300_000, 16, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("polynomial", [(0, 1), (0.5, 1, 2)])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_training_step_has_the_operations_of_its_plan(shape, polynomial, how):
    n, d, k = shape
    x, b = torch.randn(n, d, device="meta", requires_grad=True), torch.randn(d, k, device="meta", requires_grad=True)
    plan = interp_nn.plan(n, d, k, degree=None if polynomial == (0, 1) else len(polynomial) - 1, device="meta")

    def step():
        functional.summary(x, b, polynomial=polynomial).sum().backward()

    if how == "compiled":
        step = torch.compile(step, backend="aot_eager")
    assert counted(step)[1] == plan.flops


def test_a_layer_counts_more_than_nn_linear():
    with torch.device("meta"):
        layer, x = SummaryLinear(4096, 256), torch.empty(16384, 4096, requires_grad=True)
    assert counted(lambda: layer(x))[1] >= 2 * 16384 * 4096 * 256
    layer = SummaryLinear(64, 16).freeze()
    assert counted(lambda: layer(torch.ones(8, 64)))[1] == 2 * 8 * 64 * 16


def test_every_operator_has_a_formula():
    from interp_nn.ops import sharding  # noqa: F401 - it defines two

    schemas = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("interp_nn::")}
    helpers = {s for s in schemas if s.startswith("interp_nn::cuda_")}  # called by operators, which are counted
    counted = {str(packet).replace(".", "::") for packet in flop_registry if str(packet).startswith("interp_nn.")}
    assert counted == schemas - helpers and len(counted) == 7
