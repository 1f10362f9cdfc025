"""The three ways to keep b orthonormal: what they compute, where the penalty's bᵀb comes from, and what training makes of b."""

import copy
import pickle

import pytest
import torch
from layers import CHANGES, CONVOLUTIONS, SIZES, make
from relative_error import error, naive_linear, randomize
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from interp_nn import linalg, use_engine
from interp_nn.engines.problem import Plan
from interp_nn.nn import SummaryClassifier, SummaryConv2d, SummaryHead, SummaryLayer, SummaryLinear
from interp_nn.nn.orthogonality import CONSTRAINTS, constrain, orthogonality_penalty, retract_

by_kind = pytest.mark.parametrize("kind", [*SIZES, *CONVOLUTIONS])
far_from_orthonormal = pytest.mark.filterwarnings("ignore:.*an orthogonality defect above 1:RuntimeWarning")


def matrices(layer):
    """b of each group, tall, in fp64."""
    b = layer.matrix().double()
    b = [b] if layer.groups == 1 else b.unbind()
    return [m if m.shape[0] >= m.shape[1] else m.t() for m in b]


def naive_penalty(layer):
    return sum((m.t() @ m - torch.eye(m.shape[1], dtype=m.dtype)).square().sum() for m in matrices(layer))


@pytest.fixture
def plan_is(monkeypatch):
    """Force a plan, in a memory of plans of its own."""

    def force(order, how):
        plan = Plan("eager", order, saves=how == "saves", autograd=how == "autograd")
        monkeypatch.setattr("interp_nn.ops.remembered.plans", {})
        monkeypatch.setattr("interp_nn.ops.summary.choose", lambda *_: plan)

    return force


# The penalty


@by_kind
@pytest.mark.parametrize("ran", [False, True])
def test_penalty_and_its_gradients_are_those_of_its_formula(kind, ran):
    layer, x = make(kind)
    constrain(layer, "penalty")
    if ran:
        layer(x)
    assert (layer.cached_gram() is not None) is ran or kind == "wide"  # an order without bbᵀ is the best for that one
    value, wanted = orthogonality_penalty(layer), naive_penalty(layer)
    assert value.shape == () and error(value, wanted) <= 1e-13
    (gradient,) = torch.autograd.grad(value, layer.b, create_graph=True)
    (right,) = torch.autograd.grad(wanted, layer.b, create_graph=True)
    assert error(gradient, right) <= 1e-13
    v = torch.randn_like(layer.b)
    hessian = torch.autograd.grad((gradient * v).sum(), layer.b)[0]
    assert error(hessian, torch.autograd.grad((right * v).sum(), layer.b)[0]) <= 1e-13


@pytest.mark.parametrize(
    ("order", "how"),
    [("(Xb)G", ""), ("(Xb)G", "saves"), ("X(bG)", ""), ("(Xb)G", "autograd"), ("X(bG)", "autograd")],
)
def test_the_summary_orders_that_have_a_gram_matrix_give_it(order, how, plan_is):
    plan_is(order, how)
    layer, x = make("linear")
    constrain(layer, "penalty")
    y = layer(x)
    assert error(y, naive_linear(x, layer.b, layer.bias)) <= 1e-13
    assert error(layer.cached_gram(), layer.gram()) <= 1e-14 and not layer.cached_gram().requires_grad
    loss = y.square().sum() + 3 * orthogonality_penalty(layer)
    wanted = naive_linear(x, layer.b, layer.bias).square().sum() + 3 * naive_penalty(layer)
    got, right = (torch.autograd.grad(value, [layer.b, layer.bias]) for value in (loss, wanted))
    assert all(error(g, r) <= 1e-12 for g, r in zip(got, right, strict=True))


@pytest.mark.parametrize(
    ("kind", "order", "how", "found"),
    [
        ("wide", "(X(bbᵀ))b", "saves", True),
        ("wide", "X((bbᵀ)b)", "", True),
        ("wide", "(X(bbᵀ))b", "autograd", True),
        ("wide", "X((bbᵀ)b)", "autograd", True),
        ("linear", "((Xb)bᵀ)b", "saves", False),
        ("linear", "X((bbᵀ)b)", "", False),
        ("wide", "(Xb)G", "", False),
        ("wide", "((Xb)bᵀ)b", "autograd", False),
    ],
)
def test_the_penalty_takes_the_smaller_gram_matrix_where_an_order_has_it(kind, order, how, found, plan_is):
    plan_is(order, how)
    layer, x = make(kind)
    constrain(layer, "penalty")(x)
    assert (layer.cached_gram() is not None) is found
    if found:
        assert error(layer.cached_gram(), layer.matrix() @ layer.matrix().t()) <= 1e-14
    assert error(orthogonality_penalty(layer), naive_penalty(layer)) <= 1e-13


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_penalty_forms_no_product_again(kind):
    layer, x = make(kind)
    constrain(layer, "penalty")(x)
    known = layer.cached_gram()
    known.add_(torch.eye(len(known)))  # a wrong value shows where the penalty comes from
    assert error(orthogonality_penalty(layer), (known - torch.eye(len(known))).square().sum()) <= 1e-13


MORE_CHANGES = {
    **CHANGES,
    "loaded": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "cast": lambda m: m.float().double(),
}


@far_from_orthonormal
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("change", MORE_CHANGES.values(), ids=MORE_CHANGES)
def test_a_changed_weight_is_not_taken_for_the_old_one(kind, change):
    layer, x = make(kind)
    constrain(layer, "penalty")(x)
    with torch.no_grad():
        change(layer)
    assert layer.cached_gram() is None
    assert abs(orthogonality_penalty(layer) - naive_penalty(layer)) <= 1e-10


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("forward", ["before", "between", "after"])
def test_a_fused_step_leaves_no_old_gram_matrix(kind, set_to_none, forward):
    """Such a step changes the weight and records nothing."""
    layer, x = make(kind)
    constrain(layer, "penalty")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        loss = layer(x).square().sum()
        if forward == "before":
            layer(x)
        loss.backward()
        if forward == "between":
            layer(x)
        optimizer.step()
        assert error(orthogonality_penalty(layer), naive_penalty(layer)) <= 1e-13
        optimizer.zero_grad(set_to_none)
        if forward == "after":
            layer(x)
        assert error(orthogonality_penalty(layer), naive_penalty(layer)) <= 1e-13


def test_hooks_do_not_pile_up():
    layer, x = make("linear")
    constrain(layer, "penalty")
    for _ in range(3):
        layer(x)
    assert len(layer.b._backward_hooks) == 1
    constrain(layer, None)
    assert not layer.b._backward_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_has_the_constraint_and_no_gram_matrix(duplicate):
    layer, x = make("linear")
    constrain(layer, "penalty")(x)
    other = duplicate(layer)
    assert other.constraint == "penalty" and other.cached_gram() is None and layer.cached_gram() is not None
    assert torch.equal(other(x), layer(x)) and orthogonality_penalty(other) == orthogonality_penalty(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_fp32(dtype):
    layer, x = make("linear", dtype)
    layer.orthogonalize_()
    constrain(layer, "penalty")(x)
    value = orthogonality_penalty(layer)  # cancels: ‖bᵀb - I‖ has the rounding of fp32, which is not small against it
    assert abs(value.sqrt() - naive_penalty(layer).sqrt()) <= 1e-6
    with torch.no_grad():
        layer.b.mul_(1.25)
    layer(x)
    value = orthogonality_penalty(layer)
    assert value.dtype == torch.float32 and error(value, naive_penalty(layer)) <= 1e-5
    value.backward()
    assert layer.b.grad.dtype == dtype


def test_autocast_does_not_round_the_penalty():
    layer, x = make("linear", torch.float32)
    layer.orthogonalize_()
    with torch.autocast("cpu", torch.bfloat16):
        constrain(layer, "penalty")(x)
        assert layer.cached_gram() is None
        assert orthogonality_penalty(layer) < 1e-9
    assert layer(x).dtype == torch.float32 and layer.cached_gram().dtype == torch.float32


def test_transforms_leave_nothing_behind():
    layer, x = make("linear")
    constrain(layer, "penalty")
    weights = dict(layer.named_parameters())
    torch.func.vmap(layer)(x)
    torch.func.grad(lambda x: layer(x).sum())(x)
    torch.func.grad(lambda w: torch.func.functional_call(layer, w, x).sum())(weights)
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    assert layer.cached_gram() is None
    gradient = torch.func.grad(lambda w: torch.func.functional_call(layer, w, x).sum() + naive_penalty(layer) * 0)(
        weights
    )
    assert error(gradient["b"], torch.autograd.grad(layer(x).sum(), layer.b)[0]) <= 1e-12


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("ran", [False, True])
def test_derivatives_of_the_penalty_by_transforms(kind, ran):
    layer, x = make(kind)
    constrain(layer, "penalty")
    model = nn.ModuleDict({"it": layer})
    model.forward = lambda x: layer(x).square().sum() + orthogonality_penalty(model)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    wanted = torch.autograd.grad(layer(x).square().sum() + naive_penalty(layer), list(model.parameters()))
    if ran:
        model(x)
    assert (layer.cached_gram() is not None) is ran

    def value(weights):
        return torch.func.functional_call(model, weights, (x,))

    gradient = torch.func.grad(value)(weights)
    assert all(error(g, w) <= 1e-12 for g, w in zip(gradient.values(), wanted, strict=True))
    along = {name: torch.randn_like(p) for name, p in weights.items()}
    slope = sum((w * a).sum() for w, a in zip(wanted, along.values(), strict=True))
    assert error(torch.func.jvp(value, (weights,), (along,))[1], slope) <= 1e-12
    with forward_ad.dual_level():
        given = {name: forward_ad.make_dual(p, along[name]) for name, p in weights.items()}
        assert error(forward_ad.unpack_dual(value(given)).tangent, slope) <= 1e-12
    several = {name: torch.stack((p, 2 * p)) for name, p in weights.items()}
    doubled = {name: 2 * p for name, p in weights.items()}
    with torch.no_grad():
        assert error(torch.vmap(value)(several), torch.stack((value(weights), value(doubled)))) <= 1e-12
    assert (layer.cached_gram() is not None) is ran


def test_the_sum_over_a_model():
    model = nn.Sequential(SummaryConv2d(1, 3, 3), SummaryLinear(6, 4), SummaryLayer(4, 4), nn.Linear(4, 4)).double()
    model += nn.Sequential(SummaryClassifier(4, 3), SummaryHead(4, 3, 2)).double()
    randomize(model)
    constrain(model, "penalty")
    layers = [model[i] for i in (0, 1, 2, 4, 5)]
    wanted = sum(naive_penalty(layer) for layer in layers)
    assert error(orthogonality_penalty(model), wanted) <= 1e-13
    constrain(model[1], None)
    assert error(orthogonality_penalty(model), wanted - naive_penalty(model[1])) <= 1e-13
    model[2].b = model[1].b
    constrain(model[1], "penalty")  # a weight that two layers share counts once
    assert error(orthogonality_penalty(model), sum(naive_penalty(model[i]) for i in (0, 1, 4, 5))) <= 1e-13


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")
def test_compiled_with_its_penalty():
    layer, x = make("linear")
    constrain(layer, "penalty")

    def loss(x):
        return layer(x).square().sum() + orthogonality_penalty(layer)

    wanted = torch.autograd.grad(loss(x), layer.b)[0]
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), layer.b)[0]
    assert error(got, wanted) <= 1e-12


# Retraction


@far_from_orthonormal
@by_kind
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_a_retraction_is_the_nearest_orthonormal_matrix(kind, size):
    layer, _ = make(kind)
    constrain(layer, "retract")
    assert layer.orthogonality_defect() < 1e-12
    with torch.no_grad():
        layer.b.add_(size * torch.randn_like(layer.b))
    weight, version = layer.b, layer.b._version
    wanted = [linalg.polar(m) for m in matrices(layer)]
    retract_(layer)
    assert layer.b is weight and weight._version > version and weight.is_leaf and weight.requires_grad
    assert all(error(m, w) <= 1e-9 for m, w in zip(matrices(layer), wanted, strict=True))
    assert layer.orthogonality_defect() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_retraction_of_sixteen_bits(dtype):
    layer, _ = make("linear", dtype)
    constrain(layer, "retract")
    with torch.no_grad():
        layer.b.mul_(1.1)
    with torch.autocast("cpu", torch.bfloat16):
        retract_(layer)
    assert layer.orthogonality_defect() < 0.02


def test_without_the_constraint_nothing_is_retracted():
    layer, _ = make("linear")
    weight = layer.b.clone()
    retract_(constrain(constrain(layer, "retract"), None))
    assert layer.orthogonality_defect() < 1e-12 and not torch.equal(layer.b, weight)
    with torch.no_grad():
        layer.b.copy_(weight)
    retract_(layer)
    assert torch.equal(layer.b, weight)


def test_tied_weights_are_retracted_once():
    model = nn.Sequential(SummaryLinear(5, 5), SummaryLinear(5, 5)).double()
    model[1].b = model[0].b
    constrain(model, "retract")
    with torch.no_grad():
        model[0].b.mul_(1.1)
    retract_(model)
    assert model[0].spectrum().tolist() == pytest.approx([1.0] * 5)


def test_a_frozen_layer_follows_its_retraction():
    layer, x = make("linear")
    constrain(layer, "retract").freeze()
    with torch.no_grad():
        layer.b.mul_(1.1)
    retract_(layer)
    assert error(layer(x), naive_linear(x, layer.b, layer.bias)) <= 1e-12


# Parametrization


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parametrized_layer_starts_at_its_polar_factor_and_stays_orthonormal(kind, dtype):
    layer, x = make(kind, dtype)
    shape, eps = layer.b.shape, torch.finfo(dtype).eps
    polar = copy.deepcopy(layer)
    polar.orthogonalize_()
    constrain(layer, "parametrization")
    assert isinstance(layer, (SummaryLinear, SummaryConv2d)) and layer.b.shape == shape
    assert error(layer.b, polar.b) <= 50 * eps
    before = layer(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        assert layer.orthogonality_defect() <= 200 * eps
    after = layer(x).detach()
    assert error(after, before) > 1e-3
    constrain(layer, None)
    assert type(layer) in (SummaryLinear, SummaryConv2d) and set(layer.state_dict()) == {"b", "bias"}
    assert not parametrize.is_parametrized(layer) and layer.b.is_leaf and layer.b.requires_grad
    assert error(layer(x), after) <= 20 * eps


def test_writing_methods_reach_a_parametrized_weight():
    layer = constrain(make("linear")[0], "parametrization")
    before = layer.b.clone()
    layer.reset_parameters()
    assert error(layer.b, before) > 0.1 and layer.orthogonality_defect() < 1e-12
    assert layer.orthogonalize_() < 1e-12


def test_a_parametrized_layer_freezes_and_folds():
    layer, x = make("conv")
    constrain(layer, "parametrization")
    before = layer(x)
    folded = layer.fold()
    assert folded.weight.requires_grad and folded.weight.is_leaf and error(folded(x), before) <= 1e-12
    layer.freeze()
    assert error(layer(x), before) <= 1e-12
    layer.reset_parameters()
    assert error(layer(x), before) > 0.1


@by_kind
def test_a_frozen_parametrized_layer_is_current_and_computes_its_weight_once(kind):
    layer = make(kind)[0]
    constrain(layer, "parametrization").eval().freeze()
    for _ in range(10):  # chance, where the address of a weight computed anew decides
        kept = layer.frozen_weight()
        assert layer.frozen_weight() is kept
        with torch.no_grad():
            for p in layer.parametrizations.b.parameters():
                p.add_(torch.randn_like(p))
        assert error(layer.frozen_weight(), layer.effective_weight()) <= 1e-12


def test_the_penalty_counts_every_weight_that_is_computed():
    model = nn.Sequential(*(SummaryLinear(5, 4) for _ in range(8))).double()
    randomize(model)
    for layer in model:
        parametrize.register_parametrization(layer, "b", nn.Identity())
    constrain(model, "penalty")
    assert error(orthogonality_penalty(model), sum(map(naive_penalty, model))) <= 1e-13


def test_a_copy_of_a_parametrized_layer():
    layer, x = make("linear")
    other = copy.deepcopy(constrain(layer, "parametrization"))
    assert torch.equal(other(x), layer(x)) and other.constraint == "parametrization"
    other.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(layer)


# constrain


def test_every_constraint_can_follow_every_other():
    layer, x = make("linear")
    for old in (None, *CONSTRAINTS):
        for new in (None, *CONSTRAINTS):
            constrain(layer, old)
            assert constrain(layer, new) is layer
            assert layer.constraint == new and parametrize.is_parametrized(layer) is (new == "parametrization")
            assert error(layer(x), naive_linear(x, layer.b, layer.bias)) <= 1e-12


def test_the_constraint_is_shown():
    model = nn.Sequential(SummaryLinear(3, 2), SummaryConv2d(1, 2, 3), SummaryLayer(3, 2))
    assert "constraint" not in repr(model)
    assert repr(constrain(model, "retract")).count("constraint='retract'") == 3


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: constrain(SummaryLinear(2, 2), "hard"),
            ValueError,
            "constraint: got 'hard', want None, 'penalty', 'ret",
        ),
        (lambda: constrain(nn.Linear(2, 2), "penalty"), ValueError, "model: got Linear without a summary layer"),
        (
            lambda: orthogonality_penalty(SummaryLinear(2, 2)),
            ValueError,
            "model: has no layer with the constraint 'pen",
        ),
        (
            lambda: constrain(nn.ModuleDict({"fc": SummaryLinear(2, 2, dtype=torch.bfloat16)}), "parametrization"),
            TypeError,
            "fc: got b torch.bfloat16, want float32 or float64",
        ),
        (lambda: constrain(_tied(), "parametrization"), ValueError, "0: its b is tied to 1.b, and cannot be"),
    ],
)
def test_errors_name_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def _tied():
    model = nn.Sequential(SummaryLinear(3, 3), SummaryLinear(3, 3))
    model[1].b = model[0].b
    return model


def test_a_penalised_layer_under_a_forced_engine():
    layer, x = make("linear", torch.float32)
    constrain(layer, "penalty")
    with use_engine("eager"):
        layer(x)
    assert error(orthogonality_penalty(layer), naive_penalty(layer)) <= 1e-5
