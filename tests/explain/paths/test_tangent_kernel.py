import pytest
import torch
from torch import nn

from interp_nn.explain.paths.path_kernel import npk_from_gates
from interp_nn.explain.paths.tangent_kernel import ntk
from interp_nn.nn.gated.gates import HardGate
from interp_nn.nn.gated.networks import DGN


def mlp():
    return nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def by_autograd(model, x):
    """The tangent kernel from one gradient for each sample and output."""
    rows = []
    for sample in x:
        y = model(sample.unsqueeze(0)).flatten()
        trained = [p for p in model.parameters() if p.requires_grad]
        rows.append([torch.cat([g.flatten() for g in torch.autograd.grad(v, trained, retain_graph=True)]) for v in y])
    jacobian = torch.stack([torch.stack(row) for row in rows])
    return torch.einsum("nop,mop->nm", jacobian, jacobian) / jacobian.shape[1]


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_is_the_product_of_gradients(chunk):
    model, x = mlp(), torch.randn(5, 3, dtype=torch.float64)
    want = by_autograd(model, x)
    torch.testing.assert_close(ntk(model, x, chunk_size=chunk), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ntk(model, x[:2], x, chunk_size=chunk), want[:2], rtol=1e-12, atol=1e-12)


def test_parameters_that_are_not_trained_do_not_count():
    model, x = mlp(), torch.randn(4, 3, dtype=torch.float64)
    whole = ntk(model, x)
    model[0].requires_grad_(False)
    torch.testing.assert_close(ntk(model, x), by_autograd(model, x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ntk(model, x), whole)


def test_fixed_gates():
    x = torch.randn(4, 3, dtype=torch.float64)
    model = mlp()
    assert torch.equal(ntk(model, x, fixed_gates=True), ntk(model, x))
    dgn = DGN((3, 6, 4, 2), dtype=torch.float64)
    free = ntk(dgn, x)
    dgn.gating.requires_grad_(False)
    fixed = ntk(dgn, x)
    dgn.gating.requires_grad_(True)
    torch.testing.assert_close(ntk(dgn, x, fixed_gates=True), fixed, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(free, fixed)


@pytest.mark.parametrize("value_input", ["x", "ones"])
def test_mean_over_weights_is_the_path_kernel(value_input):
    """E[NTK] = d s^(2 (d - 1)) H, at a width of 256 within 3 % over 50 draws."""
    width, draws = 256, 50
    dgn = DGN((4, width, width, 1), gate=HardGate(), value_input=value_input)
    x = torch.randn(5, 4)
    generator = torch.Generator().manual_seed(1)
    mean = torch.zeros(5, 5)
    for _ in range(draws):
        for p in dgn.value.parameters():
            p.data.normal_(0, width**-0.5, generator=generator)
        mean += ntk(dgn, x, fixed_gates=True) / draws
    layers, variance = 3, 1 / width
    inputs = torch.ones_like(x) if value_input == "ones" else x
    want = layers * variance ** (layers - 1) * npk_from_gates(dgn.gate_values(x), inputs, normalize=False)
    assert float((mean - want).norm() / want.norm()) < 0.03


def test_bad_input():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="none of its parameters"):
        ntk(nn.Linear(3, 1).requires_grad_(False), x)
    with pytest.raises(ValueError, match="operations that are no gates"):
        ntk(nn.Sequential(nn.Linear(3, 2), nn.GELU()), x, fixed_gates=True)
    with pytest.raises(ValueError, match=r"layer '0' .*training mode"):
        ntk(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), x)
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        ntk(nn.Linear(3, 1), x, chunk_size=0)
    with pytest.raises(
        ValueError, match=r"largest entry is nan, .*want finite outputs and derivatives, or a model and x of"
    ):
        ntk(nn.Linear(3, 1), x * torch.nan)


def test_no_samples():
    x = torch.randn(2, 3)
    for a, b in ((x[:0], None), (x[:0], x), (x, x[:0])):
        assert ntk(nn.Linear(3, 1), a, b).shape == (len(a), len(a if b is None else b))
