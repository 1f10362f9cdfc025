import copy
import itertools

import pytest
import torch
from explained_networks import mlp
from saving import reloaded
from torch.autograd import gradcheck

from interp_nn.explain import linearize
from interp_nn.nn.gated.gates import HardGate, SoftGate
from interp_nn.nn.gated.networks import DGN, DLGN, DLGNValueTensor, ValueTensor
from interp_nn.nn.gated.regimes import copy_gates

WIDTHS = (5, 7, 3, 6, 2)
NETWORKS = {
    "dgn": lambda **kw: DGN(WIDTHS, **kw),
    "dgn ones bias": lambda **kw: DGN(WIDTHS, value_input="ones", bias=True, **kw),
    "dlgn": lambda **kw: DLGN(WIDTHS, bias=True, **kw),
    "dlgn x": lambda **kw: DLGN(WIDTHS, value_input="x", **kw),
    "dlgn sf": lambda **kw: DLGN(WIDTHS, gating="shallow", **kw),
    "tensor": lambda **kw: DLGNValueTensor(WIDTHS, **kw),
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())


def inputs(n=9, d=5, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype)


def by_hand(model, x, gating, ones):
    """The equations, layer by layer, in the published order."""
    z_f, z_v, q = x, torch.ones_like(x) if ones else x, None
    *hidden, last = model.value.layers
    for feature, value in zip(model.gating.layers, hidden, strict=True):
        q = feature(x if gating == "shallow" else z_f)
        z_f = q.clamp_min(0) if gating == "relu" else q
        z_v = value(z_v) * 1.1 / (1 + torch.exp(-3 * q))
    return last(z_v)


@pytest.mark.parametrize("n", [0, 1, 11])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("value_input", ["x", "ones"])
@pytest.mark.parametrize("gating", ["relu", "linear", "shallow"])
def test_forward_is_the_published_equations(gating, value_input, bias, n):
    settings = {"gating": gating, "value_input": value_input, "gate": SoftGate(3, 0.1), "bias": bias}
    model, x = DGN(WIDTHS, **settings, dtype=torch.float64), inputs(n)
    wanted = by_hand(model, x, gating, value_input == "ones")
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-14)
    values = model.gate_values(x)
    assert [g.shape for g in values] == [(n, 7), (n, 3), (n, 6)]
    z = torch.ones_like(x) if value_input == "ones" else x
    torch.testing.assert_close(model.value(z, values), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_hard_gates_with_tied_weights_are_the_relu_network(dtype, bound, bias):
    model = DGN((20, 64, 64, 64, 10), gate=HardGate(), bias=bias, dtype=dtype)
    network = mlp(20, 64, 64, 64, 10, bias=bias, dtype=dtype)
    for mine, theirs in zip(model.value.layers, network[::2], strict=True):
        mine.load_state_dict(theirs.state_dict())
    copy_gates(network, model)
    x = inputs(200, 20, dtype)
    assert (model(x) - network(x)).abs().max() <= bound * network(x).abs().max()


def test_dlgn_has_its_own_defaults():
    model = DLGN(WIDTHS)
    assert (
        model.gating.kind == "linear"
        and model.value_input == "ones"
        and repr(model.gate) == "SoftGate(beta=4.0, eps=0.0)"
    )
    assert DGN(WIDTHS).gating.kind == "relu" and DGN(WIDTHS).value_input == "x"
    assert not any("bias" in name for name, _ in model.named_parameters())


# Half-spaces


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("make", [DLGN, DLGNValueTensor])
@pytest.mark.parametrize("gating", ["linear", "shallow"])
def test_effective_gate_weights_give_the_preactivations_and_the_half_spaces(gating, make, bias):
    model = make(WIDTHS, gating=gating, bias=bias, dtype=torch.float64)
    x = inputs(300)
    weights, seen = model.effective_gate_weights(), model.gates(x)
    assert [w.weight.shape for w in weights] == [(7, 5), (3, 5), (6, 5)]
    for i, (weight, offset) in enumerate(weights):
        q = x @ weight.T + offset
        assert (q - seen.preactivations(i)).abs().max() <= 1e-12 * q.abs().max()
        assert torch.equal(q > 0, seen.gates(i))
        # Stepping just over each hyperplane along its normal, from where it is, turns that gate and leaves no doubt.
        for unit in range(len(weight)):
            foot = x[:1] - (q[:1, unit : unit + 1] / weight[unit].square().sum()) * weight[unit]
            step = 1e-6 * weight[unit] / weight[unit].norm()
            assert model.gates(foot + step).gates(i)[0, unit] and not model.gates(foot - step).gates(i)[0, unit]


def test_effective_gate_weights_are_differentiable():
    model = DLGN((3, 4, 4, 2), dtype=torch.float64)
    model.effective_gate_weights()[1].weight.square().sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in model.gating.layers)


def test_a_relu_gating_has_no_half_spaces():
    with pytest.raises(
        ValueError, match=r"gating: is 'relu', whose gates are not affine .* want 'linear' or 'shallow'"
    ):
        DGN(WIDTHS).effective_gate_weights()


# Records of gates


@networks
def test_record_of_gates(make):
    model, x = make(dtype=torch.float64), inputs()
    seen = model.gates(x)
    assert [site.name for site in seen.sites] == [f"gating.layers.{i}" for i in range(3)]
    assert [tuple(site.shape) for site in seen.sites] == [(7,), (3,), (6,)]
    assert torch.equal(seen.output, model(x)) and not seen.output.requires_grad
    for i, q in enumerate(model.gating(x)):
        assert torch.equal(seen.preactivations(i), q) and torch.equal(seen.gates(i), q > 0)
    assert seen.patterns().width == 16 and len(seen.patterns()) == len(x)
    assert str(seen) == "GateRecord(9 samples, 3 sites, 16 gates)"


@pytest.mark.parametrize(("gate", "wanted"), [(SoftGate(1e-9), 0), (SoftGate(1e9, 0.3), 1), (HardGate(), 1)])
def test_sharpness_from_half_open_to_hard(gate, wanted):
    assert DLGN(WIDTHS, gate=gate, dtype=torch.float64).gate_sharpness(inputs()) == pytest.approx(wanted, abs=1e-6)


def test_sharpness_is_the_mean_over_all_gates():
    model, x = DGN(WIDTHS, gate=SoftGate(2, 0.1), dtype=torch.float64), inputs()
    values = torch.cat(model.gate_values(x), 1).detach()
    assert model.gate_sharpness(x) == pytest.approx(float((2 * values / 1.1 - 1).abs().mean()), rel=1e-12)


# Paths


@torch.no_grad()
def all_paths(model, z, gates):
    """Every path's contribution to each output of one sample, by its units: {(i_0, ..., i_L, output): contribution}."""
    found = {}
    layers = [(layer.weight, layer.bias) for layer in model.value.layers]
    gates = [*gates, torch.ones(len(layers[-1][0]), dtype=z.dtype)]
    for start in range(len(layers) + 1):  # at the input, or at the bias of a layer
        if start and layers[start - 1][1] is None:
            continue
        spans = [range(len(z))] if start == 0 else [range(1)]
        for path in itertools.product(*spans, *(range(len(w)) for w, _ in layers[max(start - 1, 0) :])):
            product = z[path[0]] if start == 0 else 1.0
            for place, depth in enumerate(range(max(start - 1, 0), len(layers))):
                weight, bias = layers[depth]
                first = start > 0 and place == 0
                product = (
                    product
                    * (bias[path[1]] if first else weight[path[place + 1], path[place]])
                    * gates[depth][path[place + 1]]
                )
            units = path if start == 0 else (-1,) * start + path[1:]
            found[units] = float(product)
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("value_input", ["x", "ones"])
@pytest.mark.parametrize("gate", [SoftGate(), HardGate()], ids=["soft", "hard"])
def test_strongest_paths_are_those_of_an_enumeration(gate, value_input, bias):
    model = DGN((3, 4, 2, 3, 2), gate=gate, value_input=value_input, bias=bias, dtype=torch.float64)
    x = inputs(3, 3)
    paths = model.paths(x, topk=6)
    assert paths.units.shape == (3, 2, 6, 4) and paths.contribution.shape == (3, 2, 6)
    everything = model.paths(x, topk=10**6)
    torch.testing.assert_close(everything.contribution.sum(2), model(x), rtol=1e-12, atol=1e-14)
    for i in range(3):
        z = torch.ones(3, dtype=torch.float64) if value_input == "ones" else x[i]
        found = all_paths(model, z, [g[i] for g in model.gate_values(x)])
        for output in range(2):
            here = {units[:-1]: c for units, c in found.items() if units[-1] == output}
            assert everything.contribution.shape[2] == len(here)
            wanted = sorted(map(abs, here.values()), reverse=True)[:6]
            got = paths.contribution[i, output]
            assert got.abs().tolist() == pytest.approx(wanted, rel=1e-12)
            for units, c in zip(paths.units[i, output].tolist(), got.tolist(), strict=True):
                assert here[tuple(units)] == pytest.approx(c, rel=1e-12)


@pytest.mark.parametrize(("topk", "n"), [(0, 3), (-1, 3), (2, 0)])
def test_no_paths_are_refused(topk, n):
    with pytest.raises(ValueError, match=r"topk, x: got .* want at least one of each"):
        DGN(WIDTHS).paths(inputs(n, dtype=torch.float32), topk)


# The value tensor


@pytest.mark.parametrize("widths", [(5, 4, 2), (5, 4, 3, 1), (5, 4, 3, 2, 2), (5, 2, 3, 2, 3, 1, 3)])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_value_tensor_is_its_contraction_with_all_gates(widths, n):
    model, x = DLGNValueTensor(widths, dtype=torch.float64), inputs(n)
    gates, letters = model.gate_values(x), "abcdef"[: len(widths) - 2]
    equation = ",".join([letters + "o", *("n" + c for c in letters)]) + "->no"
    torch.testing.assert_close(model(x), torch.einsum(equation, model.value.weight, *gates), rtol=1e-12, atol=1e-13)
    assert model.value.weight.shape == widths[1:]


def test_a_value_tensor_starts_at_unit_variance_where_gates_are_half_open():
    half = [torch.full((1, w), 0.5, dtype=torch.float64) for w in (30, 40)]
    out = ValueTensor((30, 40, 500), None, torch.float64)(torch.empty(0), half)
    assert float(out.detach().std()) == pytest.approx(1, abs=0.15)


def test_a_value_tensor_beyond_memory_is_refused_before_it_is_made():
    with pytest.raises(
        ValueError, match=r"widths: got a value tensor of shape \(100, 100, .*1.00e\+10 entries; want at most"
    ):
        DLGNValueTensor((10, 100, 100, 100, 100, 100))


# As modules


@pytest.mark.parametrize(
    "gate", [SoftGate(), HardGate(), HardGate(straight_through=True)], ids=["soft", "hard", "through"]
)
@pytest.mark.parametrize("gating", ["relu", "linear", "shallow"])
def test_its_affine_map_is_that_of_the_value_network_with_its_gates(gating, gate):
    model, x = DGN(WIDTHS, gating=gating, gate=gate, bias=True, dtype=torch.float64).eval(), inputs(4)
    affine, gates = linearize(model, x), [g.detach() for g in model.gate_values(x)]
    assert affine.check() <= 1e-12
    weight = torch.func.vmap(torch.func.jacrev(lambda z, *g: model.value(z[None], [t[None] for t in g])[0]))(x, *gates)
    torch.testing.assert_close(affine.weight, weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(affine.bias, model.value(torch.zeros_like(x), gates), rtol=1e-12, atol=1e-14)


@networks
def test_gradients(make):
    model = make(gate=SoftGate(2), dtype=torch.float64)
    x = inputs(3).requires_grad_()
    names = [name for name, _ in model.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(run, (x, *model.parameters()))


@networks
def test_both_networks_are_trained_and_share_nothing(make):
    model = make(dtype=torch.float64)
    model(inputs()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    gating, value = set(model.gating.parameters()), set(model.value.parameters())
    assert not gating & value and gating | value == set(model.parameters())


@networks
def test_state_dict_deepcopy_and_pickle_round_trip(make):
    model, x = make(dtype=torch.float64), inputs()
    other = make(dtype=torch.float64)
    assert not torch.equal(other(x), model(x))
    model.gate_order = (0, 1, 2)
    other.load_state_dict(model.state_dict())
    third = make(dtype=torch.float64)
    third.load_state_dict(reloaded(model.state_dict(), weights_only=True))
    for twin in (other, third, copy.deepcopy(model), reloaded(model, weights_only=False)):
        assert torch.equal(twin(x), model(x))


# Slow are those whose lines the others have: gating, values of ones, biases, a shallow gating, a tensor of values.
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in ("dgn", "dlgn", "dlgn x")))
        for name, make in NETWORKS.items()
    ],
)
def test_compiled_whole_it_computes_the_same(make):
    model, x = make(dtype=torch.float64), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-14)
    compiled(x).sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=1e-12, atol=1e-14)


@networks
def test_autocast_to_bfloat16(make):
    model, x = make(), inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - model(x)).norm() <= 0.05 * model(x).norm()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@networks
def test_samples_do_not_depend_on_one_another(make):
    model, x = make(dtype=torch.float64), inputs(4)
    torch.testing.assert_close(torch.vmap(lambda v: model(v[None])[0])(x), model(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([model(v[None]) for v in x]), model(x), rtol=1e-12, atol=1e-14)


def test_made_on_meta_and_in_a_dtype():
    assert all(p.is_meta for p in DLGN(WIDTHS, device="meta").parameters())
    assert all(p.dtype == torch.bfloat16 for p in DLGNValueTensor(WIDTHS, dtype=torch.bfloat16).parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DGN((5, 2)), r"widths: got \(5, 2\), want positive integers \(d_in, w_1, ..., w_L, out\)"),
        (lambda: DGN((5, 0, 2)), r"widths: got \(5, 0, 2\)"),
        (lambda: DGN((5, 2.0, 2)), r"widths: got \(5, 2.0, 2\)"),
        (lambda: DGN(WIDTHS, gating="deep"), "gating: got 'deep', want 'relu', 'linear' or 'shallow'"),
        (lambda: DLGN(WIDTHS, gating="relu"), "gating: got 'relu', want 'linear' or 'shallow'"),
        (lambda: DLGNValueTensor(WIDTHS, gating="relu"), "gating: got 'relu', want 'linear' or 'shallow'"),
        (lambda: DGN(WIDTHS, value_input="1"), "value_input: got '1', want 'x' or 'ones'"),
        (lambda: DGN(WIDTHS)(torch.ones(3, 4)), r"x: got shape \(3, 4\), want \(n, 5\)"),
        (lambda: DGN(WIDTHS).gates(torch.ones(5)), r"x: got shape \(5,\), want \(n, 5\)"),
        (lambda: DGN(WIDTHS).value(torch.ones(3, 5), []), "gates: got those of 0 layers, want 3"),
        (
            lambda: DGN(WIDTHS).value(torch.ones(3, 5), [torch.ones(3, 7), torch.ones(3, 1), torch.ones(3, 6)]),
            r"gates: got shape \(3, 1\) for layer 'value.layers.1', want \(n, \*\(3,\)\)",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
