import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from explained_networks import functional, mlp, resnet, transformer
from hypothesis import given, settings
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import InstanceLinearization, Region
from interp_nn.explain.following.gate_record import frozen, record, supported_ops
from interp_nn.explain.linear import affine_map
from interp_nn.explain.linear.affine_map import AffineMap, linearize
from interp_nn.explain.linear.regions import region
from interp_nn.nn import SummaryLinear

DTYPE = torch.float64
NETWORKS = {"resnet": (resnet, (3, 32, 32)), "functional": (functional, (6,)), "transformer": (transformer, (5, 8))}
EXACT = ("resnet", "functional")


def case(name, dtype=DTYPE, n=3):
    make, shape = NETWORKS[name]
    return make(dtype=dtype), torch.randn(n, *shape, dtype=dtype)


def relative(got, wanted):
    return float((got - wanted).detach().abs().max() / wanted.detach().abs().max())


def applied(weight, x):
    """W x with W (n, *output, *input), in the plainest way."""
    n, d = len(x), x[0].numel()
    return torch.einsum("nkd,nd->nk", weight.reshape(n, -1, d), x.reshape(n, d)).reshape(
        weight.shape[: weight.dim() - x.dim() + 1]
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_map_is_exact_with_weight_and_bias_obtained_independently(name, dtype, bound):
    model, x = case(name, dtype)
    affine = linearize(model, x)
    rows = affine.weight  # reverse mode at x
    bias = frozen(model, x)(torch.zeros_like(x))  # the replay at 0
    assert relative(applied(rows, x) + bias, model(x)) <= bound
    assert relative(affine.bias, bias) <= bound and affine.check() <= bound
    # The replay is this map everywhere.
    far = 3 * torch.randn_like(x)
    assert relative(applied(rows, far) + affine.bias, frozen(model, x)(far)) <= bound
    assert relative(affine(far), frozen(model, x)(far)) <= bound


@pytest.mark.parametrize("name", EXACT)
def test_the_map_holds_in_the_region_and_not_beyond(name):
    model, x = case(name)
    affine, direction = linearize(model, x), torch.randn_like(x)

    @torch.no_grad()
    def defect(step):
        near = x + step * direction
        return float(
            (model(near) - applied(affine.weight, near) - affine.bias).norm() / (model(near) - model(x)).norm()
        )

    assert defect(1e-5) <= 1e-6
    assert defect(1e-3 if name == "resnet" else 0.5) > 1e-3


def test_the_map_holds_up_to_the_nearest_boundary():
    model, x = functional(), torch.randn(1, 6, dtype=DTYPE)
    affine, boundary = linearize(model, x), region(model, x).nearest_boundary(x[0])
    step = boundary.point - x
    assert relative(affine(x + 0.999 * step), model(x + 0.999 * step)) <= 1e-14
    assert relative(affine(x + 1.5 * step), model(x + 1.5 * step)) > 1e-9


def test_gradient_times_input_misses_most_of_the_logit():
    model, x = case("resnet")
    affine = linearize(model, x)
    share = float(affine.bias.norm() / model(x).detach().norm())
    assert share > 0.5
    assert relative(affine.contributions(x).flatten(2).sum(2), model(x)) > 0.5


@pytest.mark.parametrize("name", NETWORKS)
def test_contributions_and_biases_of_layers_add_up(name):
    model, x = case(name)
    affine = linearize(model, x)
    out = model(x)
    parts = affine.bias_by_layer()
    assert relative(sum(parts.values()), affine.bias) <= 1e-10
    assert relative(affine.contributions(x).flatten(out.dim()).sum(-1) + affine.bias, out) <= 1e-12
    assert set(parts) <= {path for path, _ in model.named_modules()}
    single = {"resnet": 5, "functional": 2, "transformer": (slice(None), 1)}[name]
    some = linearize(model, x, lambda output: output[:, single] if name != "transformer" else output[:, 0, 1])
    assert (
        relative(
            some.contributions(x).flatten(1).sum(1) + some.bias,
            out[:, single] if name != "transformer" else out[:, 0, 1],
        )
        <= 1e-12
    )


def test_the_bias_of_a_layer_is_what_removing_it_changes():
    model, x = case("functional")
    parts, replay = linearize(model, x).bias_by_layer(), frozen(model, x)
    assert list(parts) == ["first", "again", "", "head"]
    zero = torch.zeros_like(x)
    with torch.no_grad():
        before = replay(zero)
        for name in ("first", "head"):
            layer = model.get_submodule(name)
            kept = layer.bias.clone()
            layer.bias.zero_()
            assert torch.allclose(before - replay(zero), parts[name], rtol=0, atol=1e-14)
            layer.bias.copy_(kept)


@pytest.mark.parametrize("name", EXACT)
def test_secant_is_tangent_on_piecewise_linear_networks(name):
    model, x = case(name)
    secant, tangent = linearize(model, x), linearize(model, x, mode="tangent")
    assert relative(secant.weight, tangent.weight) <= 1e-12 and relative(secant.bias, tangent.bias) <= 1e-12


def test_secant_is_not_tangent_on_a_transformer():
    model, x = case("transformer")
    secant, tangent = linearize(model, x), linearize(model, x, mode="tangent")

    def single(v):
        return model(v.unsqueeze(0))[0]

    jacobian = torch.stack([torch.autograd.functional.jacobian(single, sample) for sample in x])
    assert relative(tangent.weight, jacobian) <= 1e-12
    assert relative(secant.weight, tangent.weight) > 0.01
    assert relative(tangent(x), model(x)) <= 1e-13 and tangent.check() <= 1e-12


def test_layer_gives_the_map_of_a_preactivation():
    model, x = case("functional")
    first, last = linearize(model, x, layer=0), linearize(model, x, layer="relu#1")
    assert torch.equal(first.weight, model.first.weight.expand(3, 12, 6)) and torch.equal(
        first.bias, model.first.bias.expand(3, 12)
    )
    wanted = model.again(F.relu(model.again(F.relu(model.first(x))))) - 0.3
    for mode in ("secant", "tangent"):
        affine = linearize(model, x, layer="relu#1", mode=mode)
        assert relative(affine(x), wanted) <= 1e-14 and affine.check() <= 1e-14
        assert relative(affine.weight, last.weight) <= 1e-13
    assert relative(sum(last.bias_by_layer().values()), last.bias) <= 1e-12
    clipped = nn.Sequential(nn.Linear(6, 3), nn.ReLU6(), nn.Softmax(-1)).to(DTYPE)  # softmax comes later
    affine = linearize(clipped, x, layer=0)
    assert affine.shape == (3, 2, 3, 6) and relative(affine(x)[:, 1], 6 - clipped[0](x)) <= 1e-14
    assert relative(sum(affine.bias_by_layer().values()), affine.bias) <= 1e-14


def test_targets():
    model, x = case("functional")
    whole, classes = linearize(model, x), torch.tensor([3, 0, 2])
    pairs = (
        (1, whole.weight[:, 1]),
        (-1, whole.weight[:, 3]),
        (slice(1, 3), whole.weight[:, 1:3]),
        (lambda output: output[:, [2, 0]], whole.weight[:, [2, 0]]),
    )
    for target, wanted in pairs:
        assert relative(linearize(model, x, target).weight, wanted) <= 1e-14
    each = linearize(model, x, classes)
    assert each.shape == (3, 6) and relative(each.weight, whole.weight[torch.arange(3), classes]) <= 1e-14
    assert relative(each.bias, whole.bias[torch.arange(3), classes]) <= 1e-14


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Conv1d(1, 5, 3)

    def forward(self, a, b):
        return {"logits": F.relu(self.left(a)) - self.right(b).amax(2)}


def test_several_inputs_and_other_outputs():
    model = TwoInputs().to(DTYPE)
    inputs = torch.randn(3, 4, dtype=DTYPE), torch.randn(3, 1, 8, dtype=DTYPE)
    with pytest.raises(TypeError, match="model: returned dict, want a tensor, or a target function"):
        linearize(model, inputs)
    affine = linearize(model, inputs, lambda output: output["logits"])
    assert affine.shape == ((3, 5, 4), (3, 5, 1, 8)) and affine.check() <= 1e-14
    left, right = affine.contributions(inputs)
    assert relative(left.sum(2) + right.sum((2, 3)) + affine.bias, model(*inputs)["logits"]) <= 1e-14
    u = torch.randn(3, 5, dtype=DTYPE)
    for pulled, weight in zip(affine.rmatvec(u), affine.weight, strict=True):
        assert relative(pulled, torch.einsum("nk,nk...->n...", u, weight)) <= 1e-14
    dense = AffineMap.from_tensors(affine.weight, affine.bias)
    assert relative(dense(inputs), model(*inputs)["logits"]) <= 1e-14
    assert [w.shape for w in affine[1:].weight] == [(2, 5, 4), (2, 5, 1, 8)]


class Weighting(nn.Module):
    """Values weighted by a softmax: nothing else reaches the output from the second input and from `query`."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, a, b):
        return (self.query(b).softmax(-1) * self.value(a))[:, :2]


def test_inputs_and_layers_that_reach_the_output_by_held_values_alone():
    model, inputs = Weighting().to(DTYPE), tuple(torch.randn(3, 4, dtype=DTYPE) for _ in range(2))
    affine = linearize(model, inputs)
    assert (
        [w.shape for w in affine.weight] == [(3, 2, 4)] * 2 and not affine.weight[1].any() and affine.check() <= 1e-14
    )
    parts = affine.bias_by_layer()
    assert relative(parts["value"], affine.bias) <= 1e-14 and not parts["query"].any()


@pytest.mark.parametrize("widths", [(2, 4, 9), (9, 4, 2)])
def test_outputs_of_another_dtype_than_the_inputs(widths):
    model, x = nn.Sequential(mlp(*widths), Cast()), torch.randn(3, widths[0], dtype=DTYPE)
    affine = linearize(model, x)
    assert affine.weight.dtype.is_floating_point and affine.check() <= 1e-6
    assert relative(affine(x), model(x)) <= 1e-6


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


def test_rows_and_columns_and_chunks_agree():
    wide, narrow = mlp(3, 16, 9), mlp(9, 16, 3)
    for model, d in ((wide, 3), (narrow, 9)):
        x = torch.randn(4, d, dtype=DTYPE)
        weights = [linearize(model, x, chunk_size=size).weight for size in (None, 1, 2)]
        rows, columns = linearize(model, x)._by_rows()[0], linearize(model, x)._by_columns()[0]
        for weight in (*weights, rows, columns):
            assert relative(weight, weights[0]) <= 1e-14
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        linearize(wide, torch.randn(4, 3, dtype=DTYPE), chunk_size=0)


def test_products_with_vectors_do_not_form_the_weight():
    model, x = case("resnet", torch.float32, 1)
    affine = linearize(model, x)
    u, v = torch.randn(1, 10), torch.randn_like(x)
    pushed, pulled = affine.matvec(v), affine.rmatvec(u)
    one = linearize(model, x, 3)
    contributions = one.contributions(x)
    assert "weight" not in affine.__dict__ and "weight" not in one.__dict__
    assert relative((u * pushed).sum(), (pulled * v).sum()) <= 1e-4
    assert contributions.shape == x.shape and relative(contributions, affine.weight[:, 3] * x) <= 1e-5


def test_composition_contrast_selection_and_dtype():
    inner, outer = mlp(5, 8, 4), mlp(4, 6, 3)
    x = torch.randn(3, 5, dtype=DTYPE)
    first = linearize(inner, x)
    second = linearize(outer, inner(x).detach())
    both, whole = second @ first, linearize(nn.Sequential(inner, outer), x)
    assert relative(both.weight, whole.weight) <= 1e-13 and relative(both.bias, whole.bias) <= 1e-13
    u = torch.randn(3, 3, dtype=DTYPE)
    assert relative(both.rmatvec(u), whole.rmatvec(u)) <= 1e-13 and relative(both(x), whole(x)) <= 1e-13
    contrast = whole.contrast(2, 0)
    assert contrast.shape == (3, 5) and relative(contrast.weight, whole.weight[:, 2] - whole.weight[:, 0]) <= 1e-13
    logits = nn.Sequential(inner, outer)(x)
    assert relative(contrast(x), logits[:, 2] - logits[:, 0]) <= 1e-13
    assert not whole.contrast(1, 1).weight.any()
    with pytest.raises(
        TypeError, match=r"k, k2: got int and Tensor, want two indices of outputs.*own, take the difference"
    ):
        whole.contrast(0, logits.argmax(1))
    for index in (1, -1, slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])):
        rows = torch.arange(3)[index].reshape(-1)
        assert torch.equal(whole[index].weight, whole.weight[rows]) and torch.equal(whole[index].bias, whole.bias[rows])
    assert len(whole) == 3 and [len(one) for one in whole] == [1, 1, 1]
    single = whole.to(torch.float32)
    assert single.weight.dtype == single.bias.dtype == torch.float32
    assert (
        repr(whole) == "AffineMap(3 samples, (5,) -> (3,), exact)"
        and repr(both) == "AffineMap(3 samples, (5,) -> (3,))"
    )
    assert repr(linearize(inner, x, layer="1")) == "AffineMap(3 samples, (5,) -> (8,), layer '1', exact)"
    assert repr(linearize(inner, x, mode="tangent")) == "AffineMap(3 samples, (5,) -> (4,), exact at x)"


@pytest.mark.parametrize("name", ["functional", "transformer"])
def test_a_contrast_keeps_the_inputs_and_the_model(name):
    model, x = case(name)
    affine, k, k2 = linearize(model, x, lambda y: y.flatten(1)), 2, -1
    contrast, logits = affine.contrast(k, k2), model(x).flatten(1)
    assert torch.equal(contrast.x, x) and contrast.check() <= 1e-12
    assert relative(contrast(x), logits[:, k] - logits[:, k2]) <= 1e-12
    parts = affine.bias_by_layer()
    for layer, part in contrast.bias_by_layer().items():
        assert torch.equal(part, parts[layer][:, k] - parts[layer][:, k2])
    assert relative(sum(contrast.bias_by_layer().values()), contrast.bias) <= 1e-12
    assert repr(contrast).endswith("-> (), exact)" if name == "functional" else "-> (), exact at x)")
    tangent = linearize(model, x, lambda y: y.flatten(1), mode="tangent").contrast(k, k2)
    assert tangent.check() <= 1e-12 and relative(tangent(x), contrast(x)) <= 1e-12
    selected = affine[:2].contrast(k, k2)
    assert (
        relative(selected.weight, contrast.weight[:2]) <= 1e-12 and relative(selected.bias, contrast.bias[:2]) <= 1e-12
    )


def test_a_layer_and_the_batch_norm_after_it_have_only_the_sum_of_their_constants():
    model = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).to(DTYPE).eval()
    )
    x = torch.randn(2, 1, 6, 6, dtype=DTYPE)
    nn.init.ones_(model[1].bias)
    before = linearize(model, x).bias_by_layer()
    with torch.no_grad():
        model[0].bias.add_(5)
        model[1].running_mean.add_(5)
    after = linearize(model, x).bias_by_layer()
    assert relative(after["0"], before["0"]) > 1 and relative(after["1"], before["1"]) > 1
    assert relative(after["0"] + after["1"], before["0"] + before["1"]) <= 1e-12
    assert relative(after["4"], before["4"]) <= 1e-12


def test_a_contrast_notices_a_changed_model():
    model, x = case("functional")
    contrast = linearize(model, x).contrast(0, 1)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError):
        contrast.check()


def test_singular_triplets():
    model, x = case("functional")
    affine = linearize(model, x)
    left, values, right = affine.svd(2)
    assert torch.allclose(values, torch.linalg.svdvals(affine.weight)[:, :2])
    for i in range(2):
        assert torch.allclose(affine.matvec(right[:, i]), values[:, i, None] * left[:, i])
        assert torch.allclose(affine.rmatvec(left[:, i]), values[:, i, None] * right[:, i])
    with pytest.raises(ValueError, match="k: got 5, want between 1 and 4"):
        affine.svd(5)


class Centred(nn.Module):
    def forward(self, x):
        return F.relu(x - x.mean(0))


class Scaled(nn.Module):
    """Samples depend on one another by a frozen factor."""

    def forward(self, x):
        return x / x.std(0)


class FromTheFirst(nn.Module):
    def forward(self, x):
        return x - x[:1].relu()


class Reordered(nn.Module):
    def forward(self, x):
        return x.flip(0).relu()


@pytest.mark.parametrize("make", [Centred, Scaled, FromTheFirst, Reordered])
@pytest.mark.parametrize("mode", ["secant", "tangent"])
def test_s18_samples_that_depend_on_one_another(make, mode, monkeypatch):
    x = torch.randn(4, 6, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"model: the output for sample \d changes by .* want one sample at a time"):
        linearize(make(), x, mode=mode)
    monkeypatch.setattr(affine_map, "check_independence", lambda *_: None)
    assert linearize(make(), x, mode=mode).check() > 0.01


class FixedBatch(nn.Module):
    """Runs batches of four samples only; samples have weights of their own."""

    def forward(self, x):
        return x.view(4, 2, 3).relu().flatten(1) * torch.arange(1.0, 5).to(x).unsqueeze(1)


def test_s18_a_model_of_a_fixed_batch_is_accepted():
    x = torch.randn(4, 6, dtype=DTYPE)
    assert linearize(FixedBatch(), x).check() <= 1e-14


def test_memory_of_the_recording_is_let_go():
    model, x = case("functional")
    affine = linearize(model, x)
    assert affine._operator._start is not None
    assert affine.weight is affine.weight
    assert affine._operator._start is None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"target": 4}, ValueError, r"target: got 4, want an index below 4"),
        (
            {"target": slice(2, 2)},
            ValueError,
            r"target: got slice\(2, 2, None\), which selects nothing; want a slice of 4",
        ),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target: got shape \(2,\), want \(3,\)"),
        ({"target": torch.tensor([0, 1, 4])}, ValueError, "target: got classes 0 to 4, want them below 4"),
        ({"target": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "target: got torch.float32, want int64"),
        ({"target": "cat"}, TypeError, "target: got str, want None, an int, a slice, a tensor or a function"),
        ({"target": True}, TypeError, "target: got bool"),
        ({"target": lambda output: output.sum()}, ValueError, r"target: selected shape \(\), want \(3, ...\)"),
        ({"target": lambda output: 1.0}, TypeError, "target: selected float, want a tensor"),
        (
            {"target": lambda output: output.argmax(1)},
            TypeError,
            "target: selected torch.int64, want floating-point outputs",
        ),
        ({"layer": "relu#7"}, ValueError, "layer: got 'relu#7'"),
        ({"layer": 3}, ValueError, "layer: got 3, want an index below 3"),
        ({"layer": 0, "target": 1}, ValueError, "target, layer: got 1 and 0, want one of them"),
        ({"mode": "jacobian"}, ValueError, "mode: got 'jacobian'"),
    ],
)
def test_bad_arguments(arguments, error, text):
    model, x = case("functional")
    with pytest.raises(error, match=text):
        linearize(model, x, **arguments)


def test_bad_vectors_and_maps():
    model, x = case("functional")
    affine = linearize(model, x)
    with pytest.raises(ValueError, match=r"x: got shapes \[\(3, 5\)\], want \[\(3, 6\)\]"):
        affine.matvec(torch.ones(3, 5, dtype=DTYPE))
    with pytest.raises(ValueError, match=r"u: got shape \(3, 6\), want \(3, 4\)"):
        affine.rmatvec(torch.ones(3, 6, dtype=DTYPE))
    with pytest.raises(
        ValueError, match=r"@: got maps of shapes .* want the second map's outputs as the first's inputs"
    ):
        affine @ affine
    with pytest.raises(TypeError):
        affine @ torch.ones(3)
    with pytest.raises(ValueError, match="k, k2: got 0 and 4"):
        affine.contrast(0, 4)
    with pytest.raises(IndexError, match="samples: got 3"):
        affine[3]
    with pytest.raises(ValueError, match="check: got a map without its model"):
        affine[0].check()
    for other in (affine[0], linearize(model, x, mode="tangent")):
        with pytest.raises(ValueError, match="bias_by_layer: got a map without layers"):
            other.bias_by_layer()
    with pytest.raises(ValueError, match=r"weight: got shape \(2, 3, 4\), want \(2, 4\) first"):
        AffineMap.from_tensors(torch.ones(2, 3, 4), torch.ones(2, 4))


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "leaky": nn.LeakyReLU(0.1),
    "abs": nn.Hardtanh(-0.3, 0.4),
    "relu6": nn.ReLU6(inplace=True),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(inplace=True),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(),
    "norm": nn.GroupNorm(2, 4),
    "pool": nn.MaxPool2d(3, 1, 1),
    "mean": nn.AvgPool2d(3, 1, 1),
    "batch": nn.BatchNorm2d(4),
    "conv": nn.Conv2d(4, 4, 3, padding=1),
    "pad": nn.Sequential(nn.ConstantPad2d(1, 0.7), nn.Conv2d(4, 4, 3)),
}


class Stack(nn.Module):
    """Layers one after another, each with a shortcut around it where asked for."""

    def __init__(self, names, shortcuts):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4 * 25, 3)
        self.names, self.shortcuts = names, shortcuts
        self.layers = nn.ModuleDict({name.replace(" ", "_"): ACTIVATIONS[name] for name in names})

    def forward(self, x):
        h = self.stem(x)
        for name, shortcut in zip(self.names, self.shortcuts, strict=True):
            out = self.layers[name.replace(" ", "_")](h + 0)
            h = h + out if shortcut else out
        return self.head(h.flatten(1))


@settings(max_examples=25)
@given(
    layers=st.lists(st.tuples(st.sampled_from(sorted(ACTIVATIONS)), st.booleans()), min_size=1, max_size=6),
    n=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)
def test_any_stack_of_layers(layers, n, seed):
    torch.manual_seed(seed)
    model = Stack(*zip(*layers, strict=True)).to(DTYPE).eval()
    x, far = torch.randn(n, 2, 5, 5, dtype=DTYPE), 20 * torch.randn(n, 2, 5, 5, dtype=DTYPE)
    affine, replay = linearize(model, x), frozen(model, x)
    assert relative(applied(affine.weight, x) + affine.bias, model(x)) <= 1e-12
    assert relative(applied(affine.weight, far) + affine.bias, replay(far)) <= 1e-12
    assert relative(sum(affine.bias_by_layer().values()), affine.bias) <= 1e-11
    assert affine.check() <= 1e-12


def test_whatever_is_an_index_is_one():
    model, x = case("functional")
    whole = linearize(model, x)
    for index in (torch.tensor(1), np.int64(1), np.array(1)):
        assert torch.equal(whole[index].weight, whole.weight[1:2]) and len(whole[index]) == 1
        assert torch.equal(linearize(model, x, index).weight, linearize(model, x, 1).weight)
    assert torch.equal(whole[np.array([2, 0])].weight, whole.weight[[2, 0]])
    with pytest.raises(IndexError, match="samples: got 3"):
        whole[torch.tensor(3)]


@pytest.mark.parametrize("mode", ["secant", "tangent"])
def test_a_map_of_a_model_whose_parameters_have_changed_is_refused(mode):
    model, x = case("functional")
    affine, kept = linearize(model, x, mode=mode), linearize(model, x, mode=mode)
    weight, bias = kept.weight, kept.bias
    with torch.no_grad():
        model.head.bias += 1
    reads = [
        lambda: affine.weight,
        lambda: affine.bias,
        lambda: affine.matvec(x),
        lambda: affine.rmatvec(torch.ones(3, 4, dtype=DTYPE)),
        lambda: affine(x),
        affine.check,
        kept.check,
    ]
    for read in [*reads, affine.bias_by_layer] if mode == "secant" else reads:
        with pytest.raises(RuntimeError, match=r"model: its parameters have changed .* linearize the model again"):
            read()
    assert kept.weight is weight and kept.bias is bias
    model.head.bias = nn.Parameter(model.head.bias.detach())
    with pytest.raises(RuntimeError, match="parameters have changed"):
        affine.bias_by_layer() if mode == "secant" else affine.matvec(x)


def test_the_check_of_a_model_that_gives_zeros():
    model, x = nn.Linear(2, 2, bias=False).to(DTYPE), torch.zeros(2, 2, dtype=DTYPE)
    assert linearize(model, x).check() == 0


def test_arrays_of_numpy_are_refused_by_name_everywhere():
    model, x = case("functional")
    array, affine, here = x.numpy(), linearize(model, x), region(model, x[:1])
    wrong = [
        lambda: linearize(model, array),
        lambda: frozen(model, array),
        lambda: record(model, array),
        lambda: supported_ops(model, array),
        lambda: region(model, array[:1]),
        lambda: affine(array),
        lambda: affine.matvec(array),
        lambda: affine.contributions(array),
        lambda: affine.rmatvec(array),
        lambda: AffineMap.from_tensors(affine.weight.numpy(), affine.bias),
        lambda: here.contains(array),
        lambda: here.nearest_boundary(array),
        lambda: Region(array, here.offsets, here.on),
        lambda: InstanceLinearization(model).attribute(array, target=0),
    ]
    for call in wrong:
        with pytest.raises(TypeError, match=r"(x|u|weight|normals|inputs\[0\]): got ndarray, want a torch.Tensor"):
            call()


def test_inputs_of_another_dtype_than_the_networks_are_named():
    model = mlp(6, 4, 2, dtype=torch.float32)
    for explain in (linearize, record, frozen, supported_ops):
        with pytest.raises(
            TypeError, match=r"x: got torch.float64 on cpu, but the model's parameters are torch.float32 on cpu"
        ):
            explain(model, torch.ones(2, 6, dtype=DTYPE))


def test_biases_of_layers_after_a_change_of_the_memory_format():
    class Formats(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x):
            h = self.first(x).relu().contiguous(memory_format=torch.channels_last)
            return self.second(h).relu().to(memory_format=torch.contiguous_format).mean((2, 3))

    model, x = Formats().to(DTYPE), torch.randn(2, 3, 7, 7, dtype=DTYPE)
    for last in (x, x.contiguous(memory_format=torch.channels_last)):
        affine = linearize(model, last)
        parts = affine.bias_by_layer()
        assert list(parts) == ["first", "second"] and relative(sum(parts.values()), affine.bias) <= 1e-12
        assert affine.check() <= 1e-12
        gates = linearize(model, last, layer=1)  # as many outputs as pixels: one layer after another
        assert relative(sum(gates.bias_by_layer().values()), gates.bias) <= 1e-12


@pytest.mark.parametrize("name", EXACT)
def test_biases_of_layers_by_rows_and_by_layers_agree(name):
    model, x = case(name)
    replay = frozen(model, x)
    wanted, found = replay._parts_by_layers([]), replay._parts_by_rows()
    assert list(found) == list(wanted)
    for layer, part in found.items():
        torch.testing.assert_close(part, wanted[layer], rtol=1e-11, atol=1e-12)


class TimeFirst(nn.Module):
    """Steps before samples, as many as samples: the first dimension of the constants is not the samples'."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x):
        steps = x.unflatten(1, (3, 2)).transpose(0, 1)
        weight = torch.arange(1.0, 4).to(x).view(3, 1, 1)
        return (self.second(self.first(steps).relu()) * weight).sum(0)


def test_biases_of_layers_if_constants_are_not_by_sample():
    model, x = TimeFirst().to(DTYPE), torch.randn(3, 6, dtype=DTYPE)
    replay, affine = frozen(model, x), linearize(model, x)
    assert replay._parts_by_rows() is None
    parts = affine.bias_by_layer()
    assert list(parts) == ["first", "second"] and relative(sum(parts.values()), affine.bias) <= 1e-12
    model.first.requires_grad_(False).bias.zero_()
    assert relative(linearize(model, x).bias_by_layer()["second"], parts["second"]) <= 1e-12


def test_r9_regions_need_memory_in_proportion_to_units():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 30_000)

        def forward(self, x):
            return self.first(x).relu()[:, :3]

    here = region(Wide(), torch.randn(1, 4))
    assert here.normals.shape == (30_000, 4)  # 3.6 GB by reverse mode over all units


def test_a_region_takes_the_image_that_it_was_made_from():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 2)).to(DTYPE)
    image = torch.randn(1, 3, 6, 6, dtype=DTYPE)
    here = region(model, image)
    for x in (image, image[0], image.expand(2, 3, 6, 6)):
        boundary = here.nearest_boundary(x)
        assert boundary.point.shape == x.shape and bool(here.contains(x).all())
        flat = here.nearest_boundary(x.reshape(-1, 108))
        assert torch.equal(boundary.distance.reshape(-1), flat.distance.reshape(-1))
        assert torch.equal(boundary.point.reshape(-1, 108), flat.point)
    with pytest.raises(ValueError, match=r"x: got shape \(1, 3, 6, 5\), want \(..., 108\)"):
        here.contains(image[..., :5])
    with pytest.raises(TypeError, match=r"x: got tuple, want a torch\.Tensor"):
        region(model, (image,))


@pytest.mark.parametrize("polynomial", ["summary", "newton-schulz"])
@pytest.mark.parametrize("sizes", [(5, 16, 7), (1024, 512, 512)])
def test_layers_whose_plan_depends_on_gradients(polynomial: str, sizes: tuple[int, int, int]) -> None:
    """A summary layer's products are the same ones in recording and replay, also where an operator computes it."""
    n, d, k = sizes
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, d), nn.ReLU(), SummaryLinear(d, k, polynomial=polynomial), nn.ReLU(), nn.Linear(k, 2)
    )
    assert linearize(model.eval(), torch.randn(n, 6)).check() < 1e-5


def test_a_missing_batch_dimension_is_named():
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).eval()
    norm = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)).eval()
    for model in (flat, norm):
        with pytest.raises(ValueError, match=r"x: got shapes \[\(1, 4, 4\)\], .* add a batch dimension: x\[None\]"):
            linearize(model, torch.ones(1, 4, 4))
        with pytest.raises(RuntimeError, match="shapes"):  # with one it fails too
            linearize(model, torch.ones(2, 1, 5, 5))
