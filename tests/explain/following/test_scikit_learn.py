"""scikit-learn's multilayer perceptrons in every method: each number against scikit-learn's own prediction."""

import warnings

import numpy as np
import pandas
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, PolynomialFeatures, RobustScaler, StandardScaler
from torch import nn

from interp_nn.explain import (
    ActivationClusters,
    NotFittedError,
    NPKMachine,
    UnsupportedOperation,
    from_sklearn,
    linearize,
    npk,
    record,
    region,
    supported_ops,
)

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(60, 4)) * [1, 10, 0.1, 3] + [0, 100, 5, -2]
Y = ((X[:, 0] > 0).astype(int) + (X[:, 1] > 100)).astype(str)
SCALERS = (StandardScaler(), MinMaxScaler((-1, 2)), MaxAbsScaler(), RobustScaler())


def fitted(model, x=X, y=Y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few iterations
        return model.fit(x, y)


def classifier(activation="relu", x=X, y=Y, **options):
    options = {"hidden_layer_sizes": (7, 5), "max_iter": 5, "random_state": 0, **options}
    return fitted(MLPClassifier(activation=activation, **options), x, y)


def pipeline(*scalers, activation="relu"):
    mlp = MLPClassifier((7, 5), activation=activation, max_iter=20, random_state=0)
    return fitted(make_pipeline(*(clone(s) for s in scalers), mlp))


def probabilities(logits):
    logits = logits.detach()
    if logits.shape[1] == 1:
        return np.column_stack([torch.sigmoid(-logits), torch.sigmoid(logits)])
    return torch.softmax(logits, 1).numpy()


@pytest.mark.parametrize("activation", ["relu", "identity", "tanh", "logistic"])
@pytest.mark.parametrize("classes", [Y, Y == "2"], ids=["three", "two"])
def test_the_network_is_the_classifier(activation, classes):
    model = classifier(activation, X[:, [0, 3]], classes)
    network = from_sklearn(model)
    assert not network.training
    x = torch.from_numpy(X[:, [0, 3]])
    np.testing.assert_allclose(probabilities(network(x)), model.predict_proba(X[:, [0, 3]]), rtol=0, atol=1e-14)
    affine = linearize(model, X[:, [0, 3]])
    assert affine.check() < 1e-12
    np.testing.assert_allclose(probabilities(affine(x)), model.predict_proba(X[:, [0, 3]]), rtol=0, atol=1e-12)
    assert supported_ops(model, x).exact == (activation in ("relu", "identity"))


@pytest.mark.parametrize("targets", [1, 2])
def test_the_network_is_the_regressor(targets):
    y = X[:, :targets] if targets > 1 else X[:, 0]
    model = fitted(MLPRegressor(hidden_layer_sizes=(6,), max_iter=5, random_state=0), X, y)
    network = from_sklearn(model)
    out = network(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(out.reshape(y.shape), model.predict(X), rtol=1e-13)
    np.testing.assert_allclose(linearize(model, X)(torch.from_numpy(X)).detach().numpy(), out, rtol=1e-11, atol=1e-11)
    single = fitted(
        MLPRegressor(hidden_layer_sizes=(6,), max_iter=5, random_state=0), X.astype(np.float32), y.astype(np.float32)
    )
    assert from_sklearn(single)[0].weight.dtype == torch.float32


def test_the_logarithm_of_a_poisson_regressor():
    try:
        model = MLPRegressor(hidden_layer_sizes=(6,), max_iter=5, random_state=0, loss="poisson")
    except TypeError:
        pytest.skip("this scikit-learn has no loss='poisson'")
    model = fitted(model, X / 100, np.abs(X[:, 0]))
    log = from_sklearn(model)(torch.from_numpy(X / 100))[:, 0]
    np.testing.assert_allclose(log.exp().detach().numpy(), model.predict(X / 100), rtol=1e-12)


@pytest.mark.parametrize(
    "scalers",
    [*((s,) for s in SCALERS), SCALERS, (StandardScaler(with_mean=False), RobustScaler(with_centering=False))],
    ids=lambda scalers: "-".join(type(s).__name__ for s in scalers),
)
def test_scalers_before_and_in_the_first_layer(scalers):
    model = pipeline(*scalers)
    x, want = torch.from_numpy(X), model.predict_proba(X)
    apart, folded = from_sklearn(model), from_sklearn(model, fold=True)
    assert len(apart) == len(folded) + 1 and not list(apart[0].parameters())
    assert isinstance(folded[0], nn.Linear)
    for network in (apart, folded):
        np.testing.assert_allclose(probabilities(network(x)), want, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        linearize(apart, x).weight, linearize(folded, x).weight, rtol=1e-11, atol=1e-12
    )  # both in the columns' own units
    if len(scalers) == 1:
        assert torch.equal(linearize(model, X).weight, linearize(apart, x).weight)
        # The kernel begins at the scaled columns, or at the columns themselves.
        scaled = torch.from_numpy(model[0].transform(X))
        torch.testing.assert_close(npk(model, X), npk(from_sklearn(model[-1]), scaled))
        torch.testing.assert_close(npk(folded, x), npk(folded, x, method="closed"))


def test_passthrough_and_no_scaler():
    for steps in (("passthrough",), (None,)):
        model = fitted(make_pipeline(*steps, MLPClassifier((5,), max_iter=5, random_state=0)))
        assert [type(layer) for layer in from_sklearn(model)] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.filterwarnings("ignore:x. .* clusters hold a single sample:UserWarning")
def test_regions_clusters_and_kernels_of_the_pipeline():
    model = pipeline(StandardScaler())
    network, x = from_sklearn(model), torch.from_numpy(X)
    of_model, of_network = region(model, X[:1]), region(network, x[:1])
    assert torch.equal(of_model.normals, of_network.normals) and torch.equal(of_model.on, of_network.on)
    assert bool(of_model.contains(x[0]))
    frame = pandas.DataFrame(X, columns=list("abcd"))
    clusters, wanted = ActivationClusters(model).fit(frame, None), ActivationClusters(network).fit(X)
    assert torch.equal(clusters.labels_, wanted.labels_) and clusters.check() < 1e-12
    assert torch.equal(clusters.affine_.weight, wanted.affine_.weight)
    assert torch.equal(clusters.region(0).on, wanted.region(0).on)
    assert torch.equal(clusters.predict(frame), wanted.predict(X))
    assert torch.equal(record(model, X).patterns().packed, record(network, x).patterns().packed)
    assert torch.equal(npk(model, X, X[:3]), npk(network, x, x[:3]))
    assert npk(model, X[:4], method="montecarlo", draws=2).shape == (4, 4)
    assert (NPKMachine(model).fit(X, Y).predict(X) == NPKMachine(network).fit(X, Y).predict(X)).all()


def test_columns_of_data_frames():
    frame = pandas.DataFrame(X, columns=list("abcd"))
    model = classifier(x=frame)
    assert torch.equal(linearize(model, frame).weight, linearize(model, X).weight)
    for call in (linearize, npk, lambda m, x: ActivationClusters(m).fit(x), lambda m, x: region(m, x[:1])):
        with pytest.raises(ValueError, match=r"x: got columns .*, want \['a', 'b', 'c', 'd'\]"):
            call(model, frame[list("bacd")])


@pytest.mark.parametrize("activation", ["identity", "tanh", "logistic"])
def test_methods_that_need_gates_refuse_activations_without(activation):
    model = pipeline(StandardScaler(), activation=activation)
    with pytest.raises(ValueError, match="model: has no gates"):
        region(model, X[:1])
    with pytest.raises(ValueError, match="model: has no gates"):
        ActivationClusters(model).fit(X)
    if activation == "identity":
        assert bool(npk(model, X).isfinite().all())
    else:
        name = {"tanh": "Tanh", "logistic": "Sigmoid"}[activation]
        with pytest.raises(UnsupportedOperation, match=f"{name} in layer '2'"):
            npk(model, X)


def test_what_has_no_exact_conversion_is_refused_by_name():
    class Derived(MLPClassifier):
        pass

    for model, error, text in (
        (
            fitted(LogisticRegression()),
            TypeError,
            "got LogisticRegression, want scikit-learn's MLPClassifier or MLPReg",
        ),
        (fitted(Derived((3,), max_iter=2)), TypeError, "got Derived"),
        (
            pipeline(PolynomialFeatures()),
            TypeError,
            "step of the Pipeline: got PolynomialFeatures, want .*RobustScaler",
        ),
        (pipeline(MinMaxScaler(clip=True)), ValueError, "MinMaxScaler has clip=True, .* want clip=False"),
        (MLPClassifier(), NotFittedError, "MLPClassifier is not fitted yet"),
        (make_pipeline(StandardScaler(), classifier()), NotFittedError, "StandardScaler of the Pipeline is not fitted"),
        (nn.Linear(2, 2), TypeError, "got Linear, want scikit-learn's"),
        (None, TypeError, "got NoneType"),
    ):
        with pytest.raises(error, match=text):
            from_sklearn(model)
        if model is not None and not isinstance(model, nn.Module):
            with pytest.raises(error, match=text):
                linearize(model, X)
    changed = classifier()
    changed.activation = "swish"
    with pytest.raises(ValueError, match="activation='swish'"):
        from_sklearn(changed)
    with pytest.raises(ValueError, match=r"x: got shape \(60, 3\), want \(n, 4\)"):
        linearize(classifier(), X[:, :3])


def test_the_network_does_not_share_the_models_memory():
    model = classifier()
    network = from_sklearn(model)
    before = network[0].weight.clone()
    model.coefs_[0][:] = 0
    assert torch.equal(network[0].weight, before)


def test_a_module_that_is_an_estimator_too_is_a_module():
    class Both(nn.Sequential, BaseEstimator):
        pass

    x = torch.from_numpy(X)
    assert linearize(Both(nn.Linear(4, 2), nn.ReLU()).double(), x).check() < 1e-12
