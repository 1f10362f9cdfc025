import inspect

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from interp_nn.nn.gated.gates import GatedConv2d, GatedLinear, HardGate, SoftGate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 5), (2, 3, 5, 7)])
def test_values_of_gates(shape, dtype):
    q = torch.randn(shape, dtype=dtype)
    soft = SoftGate(3, 0.1)(q)
    assert soft.dtype == dtype and soft.shape == q.shape
    wanted = 1.1 / (1 + (-3 * q.double()).exp())
    assert ((soft.double() - wanted).abs() <= 4 * torch.finfo(dtype).eps * wanted).all()
    for gate in (HardGate(), HardGate(straight_through=True)):
        assert torch.equal(gate(q), (q > 0).to(dtype))


def test_hard_gates_at_zero_and_beyond():
    q = torch.tensor([0.0, -0.0, 5e-324, torch.inf, -torch.inf], dtype=torch.float64)
    assert HardGate()(q).tolist() == [0, 0, 1, 1, 0] == HardGate(True)(q).tolist()
    assert SoftGate()(q).tolist() == [0.5, 0.5, 0.5, 1, 0]


@pytest.mark.parametrize(("beta", "eps"), [(4, 0), (1, 0.1), (30, 0)])
def test_gradients_of_soft_gates(beta, eps):
    q = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gate = SoftGate(beta, eps)
    assert gradcheck(gate, (q,)) and gradgradcheck(gate, (q,))
    (slope,) = torch.autograd.grad(gate(q).sum(), q)
    s = torch.sigmoid(beta * q)
    torch.testing.assert_close(slope, (1 + eps) * beta * s * (1 - s), rtol=1e-12, atol=1e-14)


def test_hard_gates_pass_no_gradient_but_straight_through_a_sigmoids():
    q = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert not HardGate()(q).requires_grad
    upstream = torch.randn(5, 3, dtype=torch.float64)
    got = torch.autograd.grad(HardGate(True, beta=2.5)(q), q, upstream)
    wanted = torch.autograd.grad(SoftGate(2.5)(q), q, upstream)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert not HardGate(True).eval()(q).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftGate(0), "beta: got 0, want a positive number"),
        (lambda: SoftGate(float("nan")), "beta: got nan"),
        (lambda: SoftGate(1, -0.1), "eps: got -0.1, want 0 or a positive number"),
        (lambda: HardGate(True, -1), "beta: got -1"),
    ],
)
def test_settings_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_are_printed():
    assert repr(SoftGate(3, 0.1)) == "SoftGate(beta=3.0, eps=0.1)"
    assert repr(HardGate()) == "HardGate()" and repr(HardGate(True, 2)) == "HardGate(straight_through=True, beta=2.0)"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_gated_layers_are_gates_times_layers(n, bias):
    linear = GatedLinear(5, 3, bias, SoftGate(2), dtype=torch.float64)
    z, q = torch.randn(n, 5, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)
    assert torch.equal(linear(z, q), nn.functional.linear(z, linear.weight, linear.bias) * torch.sigmoid(2 * q))
    conv = GatedConv2d(
        4, 6, 3, 2, 1, groups=2, bias=bias, padding_mode="circular", gate=HardGate(), dtype=torch.float64
    )
    plain = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=bias, padding_mode="circular", dtype=torch.float64)
    plain.load_state_dict(conv.state_dict())  # the same parameters
    z, q = torch.randn(n, 4, 7, 5, dtype=torch.float64), torch.randn(n, 6, 4, 3, dtype=torch.float64)
    assert torch.equal(conv(z, q), plain(z) * (q > 0))


def test_gated_layers_have_pytorchs_arguments_first():
    for ours, theirs in ((GatedLinear, nn.Linear), (GatedConv2d, nn.Conv2d)):
        names = [p for p in inspect.signature(ours).parameters if p != "gate"]
        assert names == list(inspect.signature(theirs).parameters)
    assert GatedLinear(2, 2).bias is None and isinstance(GatedLinear(2, 2).gate, SoftGate)


def test_gradients_of_a_gated_layer():
    layer = GatedLinear(4, 3, True, dtype=torch.float64)
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    q = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (z, q)) and gradgradcheck(layer, (z, q))


def test_gates_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"gates: got shape \(5, 1\) .*, want \(n, \*\(3,\)\)"):
        GatedLinear(4, 3)(torch.randn(5, 4), torch.randn(5, 1))
