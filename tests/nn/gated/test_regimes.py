import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn

from interp_nn.nn.gated.from_relu import to_dgn
from interp_nn.nn.gated.gates import HardGate
from interp_nn.nn.gated.networks import DGN, DLGN, DLGNValueTensor
from interp_nn.nn.gated.regimes import copy_gates, fix_gates, permute_gates

WIDTHS = (5, 6, 6, 4, 6, 3)


def relu_network(widths=WIDTHS, bias=False):
    layers = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o, bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def conv_network():
    """Convolutions before a batch norm have no bias: its gradient would be zero up to rounding."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.5),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).double()  # fmt: skip


def rows(n=8, d=5):
    return torch.randn(n, d, dtype=torch.float64)


def images(n=8):
    return torch.randn(n, 2, 6, 6, dtype=torch.float64)


def step(model, x):
    """One step of training."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.5)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# Fixed gates


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: DGN(WIDTHS, dtype=torch.float64), rows),
        (lambda: to_dgn(conv_network()), images),
        (lambda: DLGNValueTensor((5, 3, 2), dtype=torch.float64), rows),
    ],
    ids=["dgn", "dual", "tensor"],
)
def test_fixed_gates_stay_and_values_are_trained(make, inputs):
    model, x = fix_gates(make()).train(), inputs()
    gating, value = copy.deepcopy(model.gating.state_dict()), copy.deepcopy(model.value.state_dict())
    before = [q.clone() for q in model.gating(x)]
    step(model, x)
    assert all(
        torch.equal(v, gating[k]) for k, v in model.gating.state_dict().items()
    )  # and its batch norms' statistics
    assert not any(torch.equal(v, value[k]) for k, v in model.value.state_dict().items())
    assert all(map(torch.equal, model.gating(x), before))
    assert model.value.training and not model.gating.training
    assert fix_gates(model, False) is model
    step(model, x)
    assert model.gating.training and not any(torch.equal(v, gating[k]) for k, v in model.gating.state_dict().items())


def test_gates_that_are_fixed_stay_so_in_a_copy_and_under_eval():
    model = copy.deepcopy(fix_gates(to_dgn(conv_network())))
    assert model.gates_fixed and not any(p.requires_grad for p in model.gating.parameters())
    assert not model.eval().value.training and not model.gating.training
    assert model.train().value.training and not model.gating.training


def test_gradients_still_reach_the_input_through_fixed_gates():
    model, x = fix_gates(DLGN(WIDTHS, dtype=torch.float64)), rows().requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


# Copied gates


@pytest.mark.parametrize("bias", [False, True])
def test_gates_of_a_relu_network(bias):
    network, x = relu_network(bias=bias), rows()
    model = copy_gates(network, DGN(WIDTHS, gate=HardGate(), bias=bias, dtype=torch.float64))
    hidden = x
    for i, gates in enumerate(model.gate_values(x)):
        hidden = network[2 * i](hidden)
        assert torch.equal(gates, (hidden > 0).double())
        hidden = hidden.relu()
    assert not torch.equal(model(x), network(x))
    for mine, theirs in zip(model.value.layers, network[::2], strict=True):
        mine.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(model(x), network(x), rtol=1e-12, atol=0)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in network.parameters()}


def test_biases_that_are_not_there_are_zero():
    model = DGN(WIDTHS, bias=True, dtype=torch.float64)
    copy_gates(relu_network(), model)
    assert not any(layer.bias.any() for layer in model.gating.layers)


def test_equal_beginnings_of_gates_and_values():
    model = DGN(WIDTHS, gate=HardGate(), dtype=torch.float64)
    copy_gates(model.value, model)
    for gating, value in zip(model.gating.layers, model.value.layers, strict=False):
        assert torch.equal(gating.weight, value.weight) and gating.weight is not value.weight
    dual = to_dgn(conv_network(), gating="relu", value_input="x", gate=HardGate())
    copy_gates(dual.value, dual)
    assert all(torch.equal(p, dict(dual.value.named_parameters())[n]) for n, p in dual.gating.named_parameters())


def test_gates_of_another_gated_network():
    one, two = DLGN(WIDTHS, dtype=torch.float64), DLGN(WIDTHS, dtype=torch.float64)
    x = rows()
    copy_gates(one, two)
    assert all(map(torch.equal, one.gate_values(x), two.gate_values(x)))
    network = conv_network().train()
    network(images(32))  # its batch norms have seen something
    network.eval()
    dual = copy_gates(network, to_dgn(network, gating="relu", value_input="x", gate=HardGate()))
    twin = copy_gates(dual, to_dgn(network, gating="relu"))
    for other in (dual, twin):
        assert torch.equal(other.gating.get_submodule("1").running_mean, network[1].running_mean)
    dual.value.load_state_dict(network.state_dict())
    y = images(3)
    torch.testing.assert_close(dual.eval()(y), network(y), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("source", "to", "message"),
    [
        (relu_network((5, 6, 6, 5, 6, 3)), DGN(WIDTHS), r"source: '2.weight' has shape \(5, 6\), want \(4, 6\)"),
        (
            relu_network(bias=True),
            DGN(WIDTHS),
            "source: '0.bias' has no place in a gating without biases; .* bias=True",
        ),
        (relu_network((5, 6, 6)), DGN(WIDTHS), "source: has 2 nn.Linear layers, want 4, or 5 with an output layer"),
        (nn.Conv2d(1, 1, 1), DGN(WIDTHS), "source: has 0 nn.Linear layers"),
        (DGN(WIDTHS), DGN(WIDTHS, gating="shallow"), r"source: '1.weight' has shape \(6, 6\), want \(6, 5\)"),
        (relu_network(), to_dgn(conv_network()), "source: '0.weight' has shape"),
        (nn.Linear(2, 2), to_dgn(conv_network()), "source: has no '0.weight', want the names"),
    ],
)
def test_gates_that_do_not_fit_are_refused_and_nothing_is_changed(source, to, message):
    before = copy.deepcopy(to.state_dict())
    with pytest.raises(ValueError, match=message):
        copy_gates(source, to)
    assert all(torch.equal(v, before[k]) for k, v in to.state_dict().items())


# Permuted gates


def test_permuted_gates_are_those_of_the_other_layers():
    model, x = DLGN(WIDTHS, dtype=torch.float64), rows()
    before, plain = model.gate_values(x), model(x)
    assert permute_gates(model, (1, 3, 2, 0)) is model
    after = model.gate_values(x)
    assert all(torch.equal(after[i], before[j]) for i, j in enumerate((1, 3, 2, 0)))
    torch.testing.assert_close(model(x), model.value(torch.ones_like(x), after), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(model(x), plain) and "gate_order=(1, 3, 2, 0)" in repr(model)
    seen = model.gates(x)  # by gating layer, whichever value layer they go to
    assert all(torch.equal(seen.preactivations(i), q) for i, q in enumerate(model.gating(x)))
    permute_gates(model, range(4))
    assert torch.equal(model(x), plain)


def test_permuted_gates_of_a_converted_network():
    dual, x = to_dgn(conv_network()).eval(), images()
    before = dual.gate_values(x)
    permute_gates(dual, [1, 0, 2], x[:1])
    after = dual.gate_values(x)
    assert torch.equal(after[0], before[1]) and torch.equal(after[1], before[0]) and torch.equal(after[2], before[2])
    assert dual(x).shape == (8, 3)
    with pytest.raises(
        ValueError, match=r"layer '2' with gates of shape \(4, 6, 6\) cannot take those of '8', \(6, 6, 6\)"
    ):
        permute_gates(dual, [2, 0, 1], x)
    with pytest.raises(ValueError, match="x: got None, want inputs"):
        permute_gates(dual, 0)


def test_choices_of_a_max_pooling_are_not_permuted():
    network = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 2)
    ).double()
    dual, x = to_dgn(network, gating="relu", value_input="x").eval(), images()
    first, second, choice = dual.gating(x)
    permute_gates(dual, (1, 0), x)
    wanted = dual.value(x, [dual.gate(second), dual.gate(first), choice])
    assert torch.equal(dual(x), wanted)


def test_a_seed_permutes_layers_of_equal_shape_and_repeats_itself():
    orders = set()
    for seed in range(40):
        model = permute_gates(DGN(WIDTHS), seed)
        assert model.gate_order == permute_gates(DGN(WIDTHS), seed).gate_order
        assert model.gate_order[2] == 2 and model.gate_order != (0, 1, 2, 3)
        orders.add(model.gate_order)
    assert len(orders) == 5  # all permutations of three layers but the identity


def test_the_order_is_part_of_the_state():
    model = permute_gates(DGN(WIDTHS, dtype=torch.float64), (1, 3, 2, 0))
    other, stream, x = DGN(WIDTHS, dtype=torch.float64), io.BytesIO(), rows()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert other.gate_order == (1, 3, 2, 0) and torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 2), r"order: got \(0, 1, 2\), want a permutation of the 4 gated layers"),
        ((0, 1, 2, 2), r"order: got \(0, 1, 2, 2\), want a permutation"),
        (
            (2, 1, 0, 3),
            r"layer 'gating.layers.0' with gates of shape \(6,\) cannot take those of 'gating.layers.2', \(4,\)",
        ),
    ],
)
def test_orders_that_are_refused(order, message):
    with pytest.raises(ValueError, match=message):
        permute_gates(DGN(WIDTHS), order)


def test_a_seed_for_layers_that_all_differ_is_refused():
    with pytest.raises(ValueError, match=r"order: no two layers have gates of one shape, \[\(3,\), \(4,\)\]"):
        permute_gates(DGN((2, 3, 4, 1)), 0)


@pytest.mark.parametrize("call", [fix_gates, lambda m: copy_gates(m, m), lambda m: permute_gates(m, 0)])
def test_what_is_no_gated_network_is_refused(call):
    with pytest.raises(TypeError, match=r"got Sequential, want a DGN, DLGN or what to_dgn returns"):
        call(relu_network())
