"""Readers and replacers of a layer's weight: the rows of the table in docs/converting.md that need PyTorch alone."""

import copy
import warnings

import pytest
import torch
from convertible import error
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils

from interp_nn.convert import fold, summarize
from interp_nn.nn import SummaryClassifier, SummaryLayer, SummaryLinear, follow, update_spectral_norms

READ_ONLY = r"^weight: is computed from b .*`layer\.fold\(\)` for a plain layer"
POLYNOMIALS = ["summary", "newton-schulz"]
by_polynomial = pytest.mark.parametrize("polynomial", POLYNOMIALS)
X = torch.linspace(-1, 1, 18).view(3, 6)


def converted(polynomial="summary"):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    summarize(model, polynomial=polynomial)
    return model


def is_its_weight(layer, x=X):
    """Check that a layer is the plain layer of its weight, and that fold keeps both."""
    wanted = layer(x)
    assert error(nn.functional.linear(x, layer.weight, layer.bias), wanted) <= 1e-5
    folded = copy.deepcopy(layer)
    assert not fold(folded).skipped and error(folded(x), wanted) <= 1e-5


# Pruning, reparametrizations


PRUNED = {
    "l1": lambda m, name: prune.l1_unstructured(m[0], name, 3),
    "structured": lambda m, name: prune.ln_structured(m[0], name, 1, 2, 0),
    "mask": lambda m, name: prune.custom_from_mask(m[0], name, torch.ones_like(getattr(m[0], name)).tril()),
    "global": lambda m, name: prune.global_unstructured([(m[0], name), (m[2], name)], prune.L1Unstructured, amount=3),
}


@by_polynomial
@pytest.mark.parametrize("how", PRUNED.values(), ids=PRUNED)
def test_pruning(how, polynomial):
    model = converted(polynomial)
    with pytest.raises(ValueError, match=READ_ONLY):
        how(model, "weight")
    assert list(model[0]._parameters) == list(converted(polynomial)[0]._parameters)
    how(model, "b")
    update_spectral_norms(model)
    wanted = model(X)
    (reason,) = {row.reason for row in fold(nn.ModuleList(m for m in model if prune.is_pruned(m))).skipped}
    assert reason.startswith("its b is computed from other parameters (by pruning") and reason.endswith(
        "permanent first"
    )
    for layer in (model[0], model[2]):
        if prune.is_pruned(layer):
            prune.remove(layer, "b")
    assert torch.equal(model(X), wanted)
    is_its_weight(model[0])
    again = converted(polynomial)
    fold(again)  # and the weight itself is pruned after fold
    how(again, "weight")
    assert not again[0].weight.all()


REPARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@by_polynomial
@pytest.mark.parametrize("how", REPARAMETRIZED.values(), ids=REPARAMETRIZED)
def test_reparametrizations(how, polynomial):
    layer = converted(polynomial)[0]
    with pytest.raises(ValueError, match=r"Module 'SummaryLinear.*does not have a parameter.* 'weight'"):
        how(layer, "weight")
    before = layer(X)
    how(layer, "b")
    if how is parametrizations.weight_norm:  # the others change b
        assert error(layer(X), before) <= 1e-5
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    follow(optimizer, layer)
    layer(X).square().sum().backward()
    optimizer.step()
    assert error(layer(X), before) > 1e-2
    layer.eval()
    is_its_weight(layer)
    if how is parametrizations.orthogonal:
        assert layer.orthogonality_defect() <= 1e-5
    fold(layer)
    assert not parametrize.is_parametrized(layer)


BY_HOOKS = {
    name: (getattr(nn.utils, name), getattr(nn.utils, f"remove_{name}")) for name in ("weight_norm", "spectral_norm")
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("how", "undo"), BY_HOOKS.values(), ids=BY_HOOKS)
def test_the_old_reparametrizations_by_hooks(how, undo):
    layer = converted()[0]
    with pytest.raises(ValueError, match=r"weight: is computed from b .* take name='b'"):
        how(layer, "weight")
    with pytest.raises(ValueError, match=r"_norm of 'weight' not found in SummaryLinear"):
        undo(layer, "weight")
    is_its_weight(layer)  # nothing has changed
    y = how(layer, "b").eval()(X)  # the hook sets b in a forward
    assert error(nn.functional.linear(X, layer.weight, layer.bias), y) <= 1e-5
    assert fold(nn.Sequential(layer)).skipped
    undo(layer, "b")
    assert error(layer(X), y) <= 1e-5
    is_its_weight(layer)


@by_polynomial
def test_parameters_as_a_vector(polynomial):
    model = converted(polynomial)
    model[0].freeze()
    before = model(X)
    nn.utils.vector_to_parameters(1.5 * nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    update_spectral_norms(model)
    assert error(model(X), before) > 0.1
    is_its_weight(model[0])  # the frozen weight is a new one


# torch.ao


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.ao's deprecation, and of observers
        return function(*args, **options)


@by_polynomial
@pytest.mark.parametrize(
    "which", [None, {nn.Linear}, {SummaryLinear}, {"0", "2"}], ids=["all", "plain", "ours", "names"]
)
def test_dynamic_quantization_leaves_the_layers_and_takes_folded_ones(which, polynomial):
    from torch.ao.quantization import quantize_dynamic

    model = converted(polynomial)
    wanted = model(X)
    left = quietly(quantize_dynamic, model, which)
    assert type(left[0]) is SummaryLinear and torch.equal(left(X), wanted)
    fold(model)
    quantized = quietly(quantize_dynamic, model)
    assert "quantized" in type(quantized[0]).__module__ and error(quantized(X), wanted) <= 5e-2


def quantized_in_eager_mode(model, x):
    from torch.ao import quantization

    wrapped = quantization.QuantWrapper(model)
    wrapped.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(wrapped, inplace=True)
    wrapped(x)
    return quantization.convert(wrapped, inplace=True)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(6, 5), (3, 6)), (nn.Conv2d(2, 3, 2), (3, 2, 4, 4))], ids=["linear", "conv"]
)
def test_static_quantization_names_the_layer_that_it_leaves(layer, shape):
    model, x = nn.Sequential(copy.deepcopy(layer)).eval(), torch.randn(shape)
    summarize(model)
    quantized = quietly(quantized_in_eager_mode, model, x)
    for _ in range(2):
        with pytest.raises(
            TypeError, match=r"^input: got a quantized tensor, torch.quint8, for Summary\w+\(.*fold\(model\)"
        ):
            quantized(x)
        quantized.module[0].freeze()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", [SummaryLayer(6, 3), SummaryClassifier(6, 3)], ids=["layer", "classifier"])
def test_heads_refuse_quantized_inputs(head, training):
    with pytest.raises(
        TypeError, match=rf"^x: got a quantized tensor, torch.quint8, for {type(head).__name__}\(in_f.*fold"
    ):
        head.train(training)(torch.quantize_per_tensor(X, 0.1, 3, torch.quint8))


def test_static_quantization_takes_folded_layers():
    model = converted()
    wanted = model(X)
    fold(model)
    assert error(quietly(quantized_in_eager_mode, model, X)(X), wanted) <= 5e-2


@pytest.mark.slow  # seconds of imports
@by_polynomial
def test_static_quantization_in_graph_mode_keeps_the_layers_in_floating_point(polynomial):
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    summarize(model, select="2", polynomial=polynomial)
    wanted = model(X)

    def quantize():
        prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (X,))
        prepared(X)
        return quantize_fx.convert_fx(prepared)

    quantized = quietly(quantize)
    assert (
        type(quantized.get_submodule("2")) is SummaryLinear
        and "quantized" in type(quantized.get_submodule("0")).__module__
    )
    assert error(quietly(quantized, X), wanted) <= 5e-2


def test_equalization_and_module_fusion_refuse_the_layers_and_take_folded_ones():
    from torch.ao.quantization import fuse_modules
    from torch.ao.quantization._equalize import cross_layer_equalization

    model = converted()
    wanted = model(X)
    with pytest.raises(ValueError, match=r"module type not supported.*SummaryLinear"):
        cross_layer_equalization(model[0], model[2])
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*SummaryLinear"):
        quietly(fuse_modules, model, [["0", "1"]])
    assert torch.equal(model(X), wanted)
    fold(model)
    before = model[0].weight.detach().clone()
    cross_layer_equalization(model[0], model[2])
    assert error(model(X), wanted) <= 1e-5 and error(model[0].weight, before) > 1e-2
    assert error(quietly(fuse_modules, model, [["0", "1"]])(X), wanted) <= 1e-5


# Averages


def two(polynomial):
    """Return two models that were trained from the same start, each to its end, on different data."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        summarize(model, polynomial=polynomial)
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        follow(optimizer, model)
        torch.manual_seed(seed)
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(8, 6).double()).sub(1).square().mean().backward()
            optimizer.step()
        models.append(model)
    return models


def mean_state(models):
    states = [model.state_dict() for model in models]
    return {name: (states[0][name] + states[1][name]) / 2 for name in states[0]}


@by_polynomial
def test_an_average_is_one_of_b_and_of_weights_after_fold(polynomial):
    models = two(polynomial)
    weights = [(models[0][i].weight + models[1][i].weight).detach() / 2 for i in (0, 2)]
    merged, swa = copy.deepcopy(models[0]), swa_utils.AveragedModel(models[0])
    merged.load_state_dict(mean_state(models))
    for model in models:
        swa.update_parameters(model)
    update_spectral_norms(swa)
    x = torch.randn(7, 6).double()
    assert error(swa.eval()(x), merged.eval()(x)) <= 1e-3
    for layer, weight in zip((merged[0], merged[2]), weights, strict=True):
        assert 1e-4 < error(layer.weight, weight) < 0.2  # the average of b has a weight of its own
    for model in models:
        fold(model)
    merged = copy.deepcopy(models[0])
    merged.load_state_dict(mean_state(models))
    folded = merged(x)
    summarize(merged, polynomial=polynomial)
    assert error(merged(x), folded) <= 1e-10
    for layer, weight in zip((merged[0], merged[2]), weights, strict=True):
        assert error(layer.weight, weight) <= 1e-10


def test_batch_norms_of_an_average():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    summarize(model)
    average = swa_utils.AveragedModel(model)
    average.update_parameters(model)
    swa_utils.update_bn([X, X + 1], average)
    z = average.module[0](X)
    assert error(average.module[1].running_mean, (z.mean(0) + average.module[0](X + 1).mean(0)) / 2) <= 1e-5
