"""Gated networks as estimators: predictions, scaling and trees against their networks."""

import numpy as np
import pandas
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, r2_score
from torch.nn import functional as F

from interp_nn.explain import DLGNClassifier, DLGNRegressor, NotFittedError

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(200, 3)) * [1, 100, 0.01] + [0, 1000, 5]
KINDS = np.array(["low", "mid", "high"])[(X[:, 0] > 0).astype(int) + ((X[:, 0] > 0) & (X[:, 1] > 1000))]
QUICK = {"epochs": 30, "learning_rate": 0.05}


@pytest.mark.parametrize("gating", ["shallow", "linear"])
@pytest.mark.parametrize("y", [KINDS, KINDS == "mid"], ids=["three", "two"])
def test_a_classifier_is_its_network_in_the_columns_own_units(gating, y):
    model = DLGNClassifier((6, 6), gating=gating, **QUICK).fit(X, y)
    out = model.network_(torch.from_numpy(X)).detach()
    two = torch.cat([torch.zeros_like(out), out], 1) if out.shape[1] == 1 else out
    np.testing.assert_allclose(model.predict_proba(X), F.softmax(two, 1).numpy(), rtol=1e-12)
    assert (model.predict(X) == model.classes_[two.argmax(1).numpy()]).all()
    assert np.array_equal(model.decision_function(X), out.squeeze(1).numpy() if out.shape[1] == 1 else out.numpy())
    assert model.score(X, y) == accuracy_score(y, model.predict(X)) > 0.9
    # The loss of the last epoch is that of networks on the way to this one: nearly its own, so the scaling was folded rightly.
    assert log_loss(y, model.predict_proba(X)) == pytest.approx(model.loss_[-1], rel=0.1)
    tree = model.to_tree(X)
    assert (model.classes_[tree.predict(torch.from_numpy(X)).numpy()] == model.predict(X)).mean() == tree.fidelity(
        torch.from_numpy(X)
    )
    assert tree.fidelity(torch.from_numpy(X)) > 0.97


@pytest.mark.parametrize("targets", [1, 2])
def test_a_regressor_is_its_network_in_the_targets_own_units(targets):
    y = np.where(X[:, :1] > 0, 5.0, -3.0) + np.where(X[:, 1:2] > 1000, [[100.0, 0.0]], 0)[:, :targets]
    y = y[:, 0] if targets == 1 else y
    model = DLGNRegressor((8, 8), epochs=40, learning_rate=0.05).fit(X, y)
    out = model.network_(torch.from_numpy(X)).detach().numpy()
    assert np.array_equal(model.predict(X), out[:, 0] if targets == 1 else out)
    assert model.score(X, y) == pytest.approx(r2_score(y, model.predict(X))) and model.score(X, y) > 0.9
    spread = np.asarray(y).reshape(len(X), -1).std(0)
    error = (((out - np.asarray(y).reshape(len(X), -1)) / spread) ** 2).mean()
    assert error == pytest.approx(model.loss_[-1], rel=0.2)
    tree = model.to_tree(X, min_samples=5)
    assert tree.task == "regression" and tree.fidelity(torch.from_numpy(X)) > 0.9
    with pytest.raises(ValueError, match="y: got shape"):
        model.score(X, np.zeros((3, 1)))


def test_seeds_frames_and_dtypes():
    frame = pandas.DataFrame(X, columns=list("abc"))
    state = torch.random.get_rng_state()
    first, again, other = (DLGNClassifier((4,), seed=seed, **QUICK).fit(frame, KINDS) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(first.predict_proba(frame), again.predict_proba(frame))
    assert not np.array_equal(first.predict_proba(frame), other.predict_proba(frame))
    with pytest.raises(ValueError, match="same order"):
        first.to_tree(frame[list("bac")])
    single = DLGNClassifier((4,), **QUICK).fit(torch.from_numpy(X).float(), KINDS)
    assert single.network_.value.layers[0].weight.dtype == torch.float32
    constant = np.column_stack([X, np.full(len(X), 7.0)])
    assert np.isfinite(DLGNClassifier((4,), **QUICK).fit(constant, KINDS).predict_proba(constant)).all()
    assert np.isfinite(DLGNRegressor((4,), epochs=2).fit(X, np.full(len(X), 7.0)).predict(X)).all()


def test_refusals():
    for make, error, text in (
        (lambda: DLGNClassifier(epochs=0).fit(X, KINDS), ValueError, "epochs: got 0, want at least 1"),
        (lambda: DLGNClassifier(batch_size=0).fit(X, KINDS), ValueError, "batch_size: got 0"),
        (lambda: DLGNClassifier(learning_rate=0).fit(X, KINDS), ValueError, "learning_rate: got 0"),
        (lambda: DLGNClassifier(()).fit(X, KINDS), ValueError, "widths"),
        (lambda: DLGNClassifier(gating="relu").fit(X, KINDS), ValueError, "gating: got 'relu'"),
        (lambda: DLGNClassifier(beta=-1).fit(X, KINDS), ValueError, "beta: got -1"),
        (lambda: DLGNClassifier().fit(X, X[:, 0]), ValueError, "y: Unknown label type: continuous"),
        (lambda: DLGNClassifier().fit(X, KINDS[:3]), ValueError, r"y: got shape \(3,\), want \(200,\)"),
        (lambda: DLGNClassifier().fit(X[:, :, None], KINDS), ValueError, r"x: got shape \(200, 3, 1\), want \(n, d\)"),
        (lambda: DLGNClassifier().predict(X), NotFittedError, "DLGNClassifier: not fitted yet"),
        (lambda: DLGNRegressor().to_tree(X), NotFittedError, "DLGNRegressor: not fitted yet"),
    ):
        with pytest.raises(error, match=text):
            make()
