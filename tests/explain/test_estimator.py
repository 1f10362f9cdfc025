"""The estimators as scikit-learn has them: its own checks, pipelines, searches, and samples of every kind."""

import pickle
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier, is_clusterer, is_regressor
from sklearn.exceptions import DataConversionWarning
from sklearn.exceptions import NotFittedError as PeerNotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted
from torch import nn
from torch.nn import functional as F

from interp_nn.explain import (
    ActivationClusters,
    Descrambler,
    DLGNClassifier,
    DLGNRegressor,
    NotFittedError,
    NPKMachine,
    ParametricTSNE,
)
from interp_nn.explain.estimator import to_tensor

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:x. .* clusters hold a single sample:UserWarning")


class ToEight(nn.Module):
    """Pads or cuts any number of features to 8."""

    def forward(self, x):
        return F.pad(x, (0, 8))[:, :8]


def network(outputs=2, width=64):
    torch.manual_seed(0)
    return nn.Sequential(ToEight(), nn.Linear(8, width), nn.ReLU(), nn.Linear(width, outputs)).double()


ESTIMATORS = {
    "Descrambler": lambda: Descrambler(),
    "Descrambler, order": lambda: Descrambler(operator="diff1", group="permutation", center=True),
    "ParametricTSNE": lambda: ParametricTSNE(perplexity=2, epochs=2),
    "ActivationClusters": lambda: ActivationClusters(network(width=8)),
    "NPKMachine": lambda: NPKMachine(network()),
    "DLGNClassifier": lambda: DLGNClassifier((8, 8), epochs=30, batch_size=16, learning_rate=0.05),
    "DLGNRegressor": lambda: DLGNRegressor((8, 8), epochs=30, batch_size=16, learning_rate=0.05),
}
_COPIED = (
    "joblib hashes a copy of an nn.Module otherwise than the module; the test of unchanged parameters is in this file"
)
EXCEPTIONS = {
    "ActivationClusters": {
        "check_estimators_overwrite_params": _COPIED,
        "check_fit_idempotent": "predict returns a tensor, whose dtype numpy cannot read",
    },
    "NPKMachine": {
        "check_estimators_overwrite_params": _COPIED,
        "check_classifiers_regression_target": "floating-point targets make it a regressor",
    },
}


def run_checks(name):
    results = check_estimator(
        ESTIMATORS[name](), expected_failed_checks=EXCEPTIONS.get(name, {}), on_skip=None, on_fail=None
    )
    failed = [f"{result['check_name']}: {result['exception']}" for result in results if result["status"] == "failed"]
    assert not failed, failed
    # PCA and TSNE skip these too: without pandas, and without scipy's array API
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert skipped <= {
        "check_array_api_input",
        "check_classifier_data_not_an_array",
        "check_dataframe_column_names_consistency",
    }
    assert sum(result["status"] == "xfail" for result in results) == len(EXCEPTIONS.get(name, {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Descrambler"])
def test_scikit_learns_checks(name):
    run_checks(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "Descrambler"])
def test_more_of_scikit_learns_checks(name):
    run_checks(name)


def test_fits_change_no_parameter_of_the_network():
    x, y = data(30)
    for make in (ActivationClusters, NPKMachine, lambda n: ParametricTSNE(n, perplexity=3, epochs=1)):
        model = network()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        make(model).fit(x, y)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def data(n=60, features=5, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(n, features))
    return x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)


@pytest.mark.filterwarnings("ignore:x. rank")
@pytest.mark.parametrize("name", ESTIMATORS)
def test_clone_pipeline_pickle_and_fitted(name):
    x, y = data(20)
    estimator = clone(ESTIMATORS[name]())
    with pytest.raises(PeerNotFittedError):
        check_is_fitted(estimator)
    pipeline = make_pipeline(StandardScaler(), estimator).fit(x, y)
    check_is_fitted(pipeline[-1])
    call = "predict" if hasattr(estimator, "predict") else "transform"
    want = np.asarray(getattr(pipeline, call)(x))
    assert len(want) == 20 and pipeline[-1].n_features_in_ == 5
    np.testing.assert_allclose(np.asarray(getattr(pickle.loads(pickle.dumps(pipeline)), call)(x)), want)
    assert repr(estimator)


def test_errors_before_fit_are_scikit_learns_too():
    x, _ = data(4)
    for call in (
        lambda: ActivationClusters(network()).labels_,
        lambda: ActivationClusters(network()).predict(x),
        lambda: NPKMachine(network()).predict(x),
        lambda: Descrambler().transform(x),
        lambda: Descrambler().P_,
        lambda: ParametricTSNE().transform(x),
        lambda: ParametricTSNE().linearize(x),
    ):
        for error in (PeerNotFittedError, NotFittedError, ValueError, AttributeError):
            with pytest.raises(error):
                call()
    with pytest.raises(NotFittedError) as found:
        Descrambler().transform(x)
    again = pickle.loads(pickle.dumps(found.value))
    assert isinstance(again, PeerNotFittedError) and str(again) == str(found.value)


@pytest.mark.slow
def test_scikit_learn_is_not_imported():
    code = [
        "import sys, interp_nn.explain as e",
        "assert 'sklearn' not in sys.modules",
        "try: e.Descrambler().P_",
        "except e.NotFittedError: pass",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True)


def test_networks_that_are_none_are_named():
    x, y = data(9)
    for estimator, argument in (
        (ActivationClusters(None), "model"),
        (ActivationClusters(torch.relu), "model"),
        (NPKMachine(torch.relu), "network"),
        (ParametricTSNE("net"), "encoder"),
    ):
        with pytest.raises(TypeError, match=f"{argument}: got .*, want an nn.Module"):
            estimator.fit(x, y)


# Searches with named scorers


@pytest.mark.parametrize(
    "scoring", [None, "r2", "neg_mean_squared_error", pytest.param("neg_mean_absolute_error", marks=pytest.mark.slow)]
)
def test_searches_for_regression(scoring):
    x, _ = data(90)
    y = x[:, 0] * x[:, 1] + x[:, 2]
    search = GridSearchCV(NPKMachine(network()), {"ridge": [1e-3, 1e6]}, scoring=scoring, cv=2).fit(x, y)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and scores[0] > scores[1] and search.best_params_ == {"ridge": 1e-3}
    assert is_regressor(search.best_estimator_) and not is_classifier(search.best_estimator_)
    assert search.score(x, y) > (0.5 if scoring in (None, "r2") else -0.5)


@pytest.mark.parametrize(
    ("scoring", "labels"),
    [
        (None, np.array([0, 1, 2])),
        ("balanced_accuracy", np.array([0, 1, 2])),
        ("accuracy", np.array(["none", "one", "two"])),
        pytest.param("f1_macro", np.array(["none", "one", "two"]), marks=pytest.mark.slow),
        ("roc_auc", np.array(["none", "one", "two"])),
    ],
)
def test_searches_for_classification(scoring, labels):
    x, y = data(90)
    y = labels[np.minimum(y, 1)] if scoring == "roc_auc" else labels[y]
    search = GridSearchCV(NPKMachine(network()), {"ridge": [1e-3, 1e6]}, scoring=scoring, cv=2).fit(x, y)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and scores[0] > 0.6
    assert is_classifier(search.best_estimator_) and search.predict(x).dtype == y.dtype


def test_targets_of_every_kind():
    x, y = data(40)
    machine = NPKMachine(network())
    names = np.array(["b", "a", "c"], dtype=object)
    assert machine.fit(x, names[y]).score(x, names[y]) > 0.9 and machine.classes_.tolist() == ["a", "b", "c"]
    assert machine.fit(x, y.astype(object)).classes_.tolist() == [0, 1, 2]
    assert machine.fit(x, y.astype(">f8")).classes_ is None and is_regressor(machine)
    assert machine.fit(x, y.astype(">i4")).score(x, y) > 0.9 and is_classifier(machine)
    with pytest.warns(DataConversionWarning, match="A column-vector y was passed when a 1d array was expected"):
        assert machine.fit(x, y[:, None]).score(x, y[:, None]) > 0.9
    with pytest.raises(ValueError, match=r"y: has missing values \(None or NaN\)"):
        machine.fit(x, np.where(y > 1, None, names[y]))
    with pytest.raises(TypeError, match="y: its labels cannot be sorted"):
        machine.fit(x, np.where(y > 1, 3, names[y]))
    with pytest.raises(ValueError, match="y: got None"):
        machine.fit(x, None)
    constant = np.ones(40)
    assert machine.fit(x, constant).score(x, constant) == 1 and machine.score(x[:2], constant[:2] + 1) == 0


COUNTS = {
    "ParametricTSNE": ["batch_size", "epochs", "exaggeration_epochs", "seed"],
    "ActivationClusters": ["min_size", "chunk_size"],
    "NPKMachine": ["chunk_size"],
    "DLGNClassifier": ["batch_size", "epochs", "seed"],
    "DLGNRegressor": ["batch_size", "epochs", "seed"],
}
NUMBERS = {
    "ParametricTSNE": ["perplexity", "learning_rate", "early_exaggeration"],
    "NPKMachine": ["ridge"],
    "DLGNClassifier": ["learning_rate", "beta"],
    "DLGNRegressor": ["learning_rate", "beta"],
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_other_types_or_out_of_range_are_named(name):
    x, y = data(20)
    for parameter in COUNTS[name]:
        for value in (1.5, "a", True, float("nan")):
            with pytest.raises(TypeError, match=f"^{parameter}: got {value!r}, want an integer"):
                ESTIMATORS[name]().set_params(**{parameter: value}).fit(x, y)
        if parameter != "seed":
            with pytest.raises(ValueError, match=f"^{parameter}: got -1, want at least"):
                ESTIMATORS[name]().set_params(**{parameter: np.int64(-1)}).fit(x, y)
    for parameter in NUMBERS.get(name, []):
        for value in ("a", True, None):
            with pytest.raises(TypeError, match=f"^{parameter}: got {value!r}, want a number"):
                ESTIMATORS[name]().set_params(**{parameter: value}).fit(x, y)
        for value in (float("nan"), -1):
            with pytest.raises(ValueError, match=f"^{parameter}: got {value!r}, want "):
                ESTIMATORS[name]().set_params(**{parameter: value}).fit(x, y)


def test_other_parameters_that_are_named():
    x, y = data(20)
    with pytest.raises(TypeError, match=r"^dtype: got 'float32', want torch\.float32"):
        NPKMachine(network(), dtype="float32").fit(x, y)
    with pytest.raises(TypeError, match=r"^hidden: got 8, want a sequence of widths$"):
        DLGNClassifier(8).fit(x, y)


def test_clusters_are_a_clusterer():
    x, _ = data(30)
    clusters = ActivationClusters(network(width=4))
    labels = clusters.fit_predict(x)
    assert is_clusterer(clusters) and torch.equal(labels, clusters.labels_) and torch.equal(clusters.predict(x), labels)


# Samples of every kind


class Column:
    """A column of a data frame as pandas and polars have them, without either."""

    def __init__(self, values, dtype=None):
        self.values = np.asarray(values)
        self.dtype = self.values.dtype if dtype is None else dtype

    def __array__(self, dtype=None, copy=None):
        return self.values.astype(dtype or self.values.dtype)

    def __len__(self):
        return len(self.values)

    def isna(self):
        return np.array([value is None for value in self.values])

    def to_numpy(self, dtype=None, na_value=None):
        return np.array([na_value if value is None else value for value in self.values], dtype=dtype)


class Nullable:
    """A nullable dtype, of a kind as numpy's are."""

    def __init__(self, name, kind):
        self.name, self.kind = name, kind

    def __str__(self):
        return self.name


class Frame:
    """A data frame of named columns."""

    def __init__(self, **columns):
        self.named = columns

    @property
    def columns(self):
        return list(self.named)

    def __getitem__(self, name):
        return self.named[name]

    def __len__(self):
        return len(next(iter(self.named.values())))


def frame(x, names="abcde"):
    return Frame(**{name: Column(x[:, i]) for i, name in enumerate(names)})


KINDS = {
    "list": lambda x: x.tolist(),
    "tensor": torch.from_numpy,
    "gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "list of tensors": lambda x: list(torch.from_numpy(x)),
    "big-endian": lambda x: x.astype(">f8"),
    "fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),
    "long double": lambda x: x.astype(np.longdouble),
    "object": lambda x: x.astype(object),
    "masked": lambda x: np.ma.masked_array(x, mask=np.zeros_like(x, dtype=bool)),
    "frame": frame,
    "nullable frame": lambda x: Frame(**{n: Column(x[:, i], Nullable("Float64", "f")) for i, n in enumerate("abcde")}),
}


def fitted(name, x, y):
    estimator = ESTIMATORS[name]().fit(x, y)
    return np.asarray(getattr(estimator, "predict" if hasattr(estimator, "predict") else "transform")(x))


@cache
def fitted_to_arrays(name):
    return fitted(name, *data(20))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_every_kind(kind):
    x, y = data(20)
    given = KINDS[kind](x)
    assert torch.equal(to_tensor(given, "x"), torch.from_numpy(x))
    for name in ("Descrambler", "ActivationClusters", "NPKMachine"):
        np.testing.assert_allclose(fitted(name, given, y), fitted_to_arrays(name))


def test_columns_of_every_dtype():
    columns = {
        "flag": Column([True, False, True]),
        "small": Column(np.array([1, 2, 3], dtype=np.uint8)),
        "nullable flag": Column(np.array([True, False, True], dtype=object), Nullable("boolean", "b")),
        "nullable": Column(np.array([1, 2, 3], dtype=object), Nullable("Int64", "i")),
    }
    want = torch.tensor([[1, 1, 1, 1], [0, 2, 0, 2], [1, 3, 1, 3]])
    assert torch.equal(to_tensor(Frame(**columns), "x").long(), want)
    missing = Frame(a=Column([1.0, 2.0]), b=Column(np.array([1.5, None], dtype=object), Nullable("Float64", "f")))
    assert to_tensor(missing, "x").isnan().tolist() == [[False, False], [False, True]]
    with pytest.raises(ValueError, match=r"x: 1 of its samples have values that are not finite \(NaN or inf\)"):
        Descrambler().fit(missing)
    for dtype, values in (
        (Nullable("category", "O"), ["u", "v"]),
        (None, ["u", "v"]),
        (None, np.array(["2020", "2021"], "M8[D]")),
    ):
        with pytest.raises(TypeError, match=r"x: column 'c' is .*, want numbers; encode it first"):
            Descrambler().fit(Frame(a=Column([1.0, 2.0]), c=Column(values, dtype)))


def test_samples_that_cannot_be_read_are_named():
    from scipy import sparse

    x, y = data(9)
    for given, error, text in (
        (sparse.csr_matrix(x), TypeError, "x: got csr_matrix; sparse data is not supported"),
        (torch.from_numpy(x).to_sparse(), TypeError, "x: got a sparse tensor; sparse data is not supported"),
        (x + 1j, ValueError, "x: Complex data not supported: got complex128"),
        (torch.from_numpy(x + 1j), ValueError, "x: Complex data not supported: got torch.complex128"),
        (np.ma.masked_array(x, mask=x > 1), ValueError, "x: has masked entries"),
        (x.astype(str), TypeError, "x: got <U32, want numbers"),
        (np.where(x > 1, np.inf, x), ValueError, "of its samples have values that are not finite"),
        (x[:0], ValueError, r"x: got shape \(0, 5\), want \(n, ...\) with n > 0"),
        (x[:, :0], ValueError, r"x: 0 feature\(s\) \(shape=\(9, 0\)\)"),
        (x[0], ValueError, "Reshape your data"),
    ):
        for name in ("Descrambler", "ActivationClusters", "NPKMachine", "ParametricTSNE"):
            with pytest.raises(error, match=text):
                ESTIMATORS[name]().fit(given, y)


def test_names_of_features():
    x, y = data(20)
    for name in ("Descrambler", "ActivationClusters", "NPKMachine", "ParametricTSNE"):
        estimator = ESTIMATORS[name]().fit(frame(x), y)
        call = estimator.predict if hasattr(estimator, "predict") else estimator.transform
        assert estimator.feature_names_in_.tolist() == list("abcde") and estimator.n_features_in_ == 5
        np.testing.assert_array_equal(np.asarray(call(frame(x))), np.asarray(call(frame(x))))
        with pytest.raises(ValueError, match="must be in the same order as they were in fit"):
            call(frame(x, "bacde"))
        with pytest.raises(
            ValueError, match="unseen at fit time:\n- f\nFeature names seen at fit time, yet now missing:\n- e"
        ):
            call(frame(x, "abcdf"))
        with pytest.warns(UserWarning, match="X does not have valid feature names, but"):
            call(x)
        estimator.fit(x, y)
        assert not hasattr(estimator, "feature_names_in_")
        with pytest.warns(UserWarning, match="X has feature names, but .* was fitted without feature names"):
            call(frame(x))
        with pytest.raises(ValueError, match=r"x: got shape \(20, 4\), want \(n, 5\)"):
            call(x[:, :4])


def test_data_frames_of_pandas():
    pandas = pytest.importorskip("pandas")
    x, y = data(20)
    table = pandas.DataFrame(x, columns=list("abcde")).assign(flag=x[:, 0] > 0, whole=pandas.array(y, dtype="Int64"))
    for name in ("Descrambler", "ActivationClusters", "NPKMachine"):
        estimator = ESTIMATORS[name]().fit(table, pandas.Series(y))
        call = estimator.predict if hasattr(estimator, "predict") else estimator.transform
        np.testing.assert_allclose(np.asarray(call(table)), np.asarray(call(table.astype(float))))
        with pytest.raises(ValueError, match="must be in the same order"):
            call(table[table.columns[::-1]])
    with pytest.raises(TypeError, match="x: column 'kind' is category, want numbers"):
        Descrambler().fit(table.assign(kind=pandas.Categorical(["u", "v"] * 10)))
    labels = pandas.Series(np.array(["u", "v", "w"])[y])
    for column in (labels, labels.astype("category"), labels.astype("string")):
        assert NPKMachine(network()).fit(table, column).score(table, column) > 0.9


def test_scores_across_folds_are_those_of_a_kernel():
    x, y = data(60)
    machine = NPKMachine(network())
    kernel = machine.kernel(x).numpy()
    given = cross_val_score(NPKMachine(), kernel, y, cv=3, scoring="accuracy")
    np.testing.assert_allclose(given, cross_val_score(machine, x, y, cv=3, scoring="accuracy"))
