import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from interp_nn.explain.following.gate_record import record
from interp_nn.explain.paths.path_kernel import npk, npk_from_gates

FP64 = torch.float64


def enumerated(gates, x, bias=False):
    """The kernel from the features of all paths, which begin at an input or, with biases, at the bias of any layer."""
    n, widths = len(x), [g.shape[1] for g in gates]
    columns = []
    starts = range(len(gates) + 1) if bias else [0]
    for start in starts:
        for units in itertools.product(*(range(w) for w in widths[start:])):
            active = torch.ones(n, dtype=FP64)
            for layer, unit in zip(gates[start:], units, strict=True):
                active = active * layer[:, unit].double()
            columns.append(active)
            if start == 0:
                columns[-1:] = [active * x[:, i] for i in range(x.shape[1])] + ([active] if bias else [])
    features = torch.stack(columns, 1)
    return features @ features.T


@given(
    st.integers(1, 7),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(1, 8),
)
def test_is_the_inner_product_over_paths(n, widths, inputs, soft, bias, chunk):
    x = torch.randn(n, inputs, dtype=FP64)
    gates = [torch.rand(n, w, dtype=FP64) if soft else torch.rand(n, w) < 0.6 for w in widths]
    got = npk_from_gates(gates, x, normalize=False, bias=bias, chunk_size=chunk)
    want = enumerated(gates, x, bias)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(got, got.T)
    assert torch.linalg.eigvalsh(got)[0] >= -1e-10 * got.trace()


@pytest.mark.parametrize("bias", [False, True])
def test_normalised_is_the_kernel_of_weights_with_variance_one_over_fan_in(bias):
    x, gates = torch.randn(5, 3, dtype=FP64), [torch.rand(5, w, dtype=FP64) for w in (4, 7)]
    s = x @ x.T / 3
    for g in gates:
        s = (s + bias) * (g @ g.T / g.shape[1])
    torch.testing.assert_close(npk_from_gates(gates, x, bias=bias), s + bias, rtol=1e-14, atol=0)


def test_two_sets_of_samples():
    x, gates = torch.randn(9, 3), [torch.rand(9, w) < 0.5 for w in (6, 5)]
    whole = npk_from_gates(gates, x)
    assert whole.dtype == torch.float32
    parts = npk_from_gates([g[:4] for g in gates], x[:4], [g[4:] for g in gates], x[4:], chunk_size=3)
    torch.testing.assert_close(parts, whole[:4, 4:])


def test_inputs_that_are_not_given_are_one():
    gates = [torch.rand(4, 5) < 0.5, torch.rand(4, 3) < 0.5]
    assert torch.equal(npk_from_gates(gates), npk_from_gates(gates, x=torch.ones(4, 1)))
    assert torch.equal(npk_from_gates(gates), npk_from_gates(gates, x=torch.ones(4, 8)))
    torch.testing.assert_close(npk_from_gates(gates, bias=True), npk_from_gates(gates, x=torch.ones(4, 1), bias=True))


def test_of_a_record():
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1)), torch.randn(6, 3)
    gates = record(model, x)
    plain = [gates.gates(0), gates.gates(1)]
    assert torch.equal(npk_from_gates(gates, x), npk_from_gates(plain, x))
    assert torch.equal(npk_from_gates(gates, x, gates, x), npk_from_gates(plain, x, plain, x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, FP64])
@pytest.mark.parametrize("normalize", [False, True])
def test_of_a_model_is_that_of_its_gates(bias, dtype, normalize):
    layers = [nn.Linear(3, 8, bias), nn.ReLU(), nn.Linear(8, 5, bias), nn.ReLU(), nn.Linear(5, 1, bias)]
    model, x, other = nn.Sequential(*layers).to(dtype), torch.randn(6, 3).to(dtype), torch.randn(4, 3).to(dtype)
    gates, others = record(model, x), record(model, other)
    settings = dict(normalize=normalize, dtype=FP64)
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(npk(model, x, **settings), npk_from_gates(gates, x, bias=bias, **settings))
    close(npk(model, x, other, **settings), npk_from_gates(gates, x, others, other, bias=bias, **settings))
    assert npk(model, x).dtype == npk_from_gates(gates, x).dtype == dtype
    for wrong in (gates, [gates.gates(0)]):
        with pytest.raises(TypeError, match=r"model: got (GateRecord|list), want an nn.Module; npk_from_gates takes"):
            npk(wrong, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, FP64])
def test_dtypes(dtype):
    gates = [torch.rand(4, 5).to(dtype), torch.rand(4, 3).to(dtype)]
    got = npk_from_gates(gates)
    assert got.dtype == (FP64 if dtype == FP64 else torch.float32)
    torch.testing.assert_close(got.double(), npk_from_gates([g.double() for g in gates]), rtol=1e-6, atol=0)
    assert npk_from_gates(gates, dtype=FP64).dtype == FP64


@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(n):
    assert npk_from_gates([torch.ones(n, 3, dtype=torch.bool)]).shape == (n, n)
    assert npk_from_gates([torch.ones(2, 3)], other_gates=[torch.ones(n, 3)]).shape == (2, n)


def test_a_layer_without_units_has_no_paths():
    assert npk_from_gates([torch.ones(2, 3), torch.ones(2, 0)]).tolist() == [[0, 0], [0, 0]]


def test_depth_110():
    """fp32 holds the normalised kernel of on/off gates to its last bit; where it cannot, npk_from_gates raises."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(6, 128, generator=generator) < 0.7
    gates = [base ^ (torch.rand(6, 128, generator=generator) < 0.01) for _ in range(110)]
    exact = npk_from_gates(gates, dtype=FP64)
    assert float(exact.amin()) > 0 and float(exact.amax()) < 1e-10
    torch.testing.assert_close(npk_from_gates(gates).double(), exact, rtol=2**-24, atol=float(exact.amax()) * 2**-24)
    with pytest.raises(ValueError, match=r"more than torch.float32 holds.*normalize=True"):
        npk_from_gates(gates, normalize=False)
    assert bool(npk_from_gates(gates, normalize=False, dtype=FP64).isfinite().all())
    with pytest.raises(ValueError, match=r"more than torch.float64 holds"):
        npk_from_gates(gates * 2, normalize=False, dtype=FP64)
    with pytest.raises(ValueError, match=r"too small for torch.float32.*dtype=torch.float64"):
        npk_from_gates(gates * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(gates=[]), "gates: got no layers"),
        (dict(gates=[torch.ones(2, 3), torch.ones(3, 3)]), r"gates: layer 1 has shape \(3, 3\)"),
        (dict(gates=[torch.ones(2, 3), torch.ones(2)]), r"gates: layer 1 has shape \(2,\)"),
        (
            dict(gates=[torch.ones(2, 3), torch.full((2, 3), torch.nan)]),
            "gates: layer 1 has values that are not finite",
        ),
        (dict(gates=[torch.ones(2, 3)], other_gates=[]), "other_gates: got no layers"),
        (dict(gates=[torch.ones(2, 3)], other_gates=[torch.ones(2, 3)] * 2), "other_gates: got 2 layers, want 1"),
        (
            dict(gates=[torch.ones(2, 3), torch.ones(2, 4)], other_gates=[torch.ones(2, 3), torch.ones(2, 5)]),
            "other_gates: layer 1 has 5 units, want 4",
        ),
        (dict(gates=[torch.ones(2, 3)], x=torch.ones(3, 1)), r"x: got shape \(3, 1\), want \(2, ...\)"),
        (dict(gates=[torch.ones(2, 3)], x=torch.tensor([[1.0], [torch.inf]])), "x: has values that are not finite"),
        (dict(gates=[torch.ones(2, 3)], other_x=torch.ones(2, 1)), "other_x: given without x"),
        (
            dict(gates=[torch.ones(2, 3)], x=torch.ones(2, 1), other_x=torch.ones(2, 1)),
            "want it where other_gates and x",
        ),
        (
            dict(gates=[torch.ones(2, 3)], other_gates=[torch.ones(2, 3)], x=torch.ones(2, 1)),
            "want it where other_gates and x",
        ),
        (
            dict(
                gates=[torch.ones(2, 3)], other_gates=[torch.ones(2, 3)], x=torch.ones(2, 1), other_x=torch.ones(2, 2)
            ),
            "other_x: got 2 inputs a sample, want 1",
        ),
        (dict(gates=[torch.ones(2, 3)], chunk_size=0), "chunk_size: got 0"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        npk_from_gates(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(gates=[torch.ones(2, 3, dtype=torch.int64)]), "gates: layer 0 is torch.int64"),
        (dict(gates=[[1.0]]), "gates: layer 0 is list"),
        (dict(gates=[torch.ones(2, 3)], x=torch.ones(2, 1, dtype=torch.int64)), "x: got torch.int64"),
        (dict(gates=[torch.ones(2, 3)], dtype=torch.float16), "dtype: got torch.float16"),
    ],
)
def test_bad_types(arguments, message):
    with pytest.raises(TypeError, match=message):
        npk_from_gates(**arguments)


@pytest.mark.parametrize(
    "layers", [[nn.Conv2d(1, 2, 3), nn.ReLU()], [nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2), nn.LeakyReLU()]]
)
def test_records_of_other_networks_are_refused(layers):
    gates = record(nn.Sequential(*layers), torch.randn(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"gates: layer '\d' is .*npk\(model, x\)"):
        npk_from_gates(gates)
