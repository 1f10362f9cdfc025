import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC
from torch import nn

from interp_nn.explain.estimator import NotFittedError
from interp_nn.explain.paths.kernel_machine import NPKMachine, kernel_alignment
from interp_nn.explain.paths.path_kernel import npk


def network():
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def samples(n, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def test_regression_is_kernel_ridge():
    model, (x, _), (new, _) = network(), samples(40), samples(9, seed=1)
    y = torch.stack([x[:, 0] * x[:, 1], x.sum(1)], 1)
    machine = NPKMachine(model, ridge=1e-2, dtype=torch.float64).fit(x, y)
    kernel, cross = npk(model, x, dtype=torch.float64), npk(model, new, x, dtype=torch.float64)
    alpha = 1e-2 * float(kernel.diagonal().mean())
    mean = y.double().mean(0)
    peer = KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel.numpy(), (y - mean).numpy())
    np.testing.assert_allclose(machine.predict(new), peer.predict(cross.numpy()) + mean.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(machine.predict(new), machine.decision_function(new))
    one = NPKMachine(model, ridge=1e-2, dtype=torch.float64).fit(x, y[:, 0])
    np.testing.assert_allclose(one.predict(new), machine.predict(new)[:, 0], rtol=1e-9, atol=1e-12)
    assert machine.score(x, y) > 0.9
    assert machine.score(new, machine.predict(new)) == 1


@pytest.mark.parametrize("names", [None, np.array(["none", "one", "two"]), np.array([False, True])])
def test_classes(names):
    model, (x, y), (new, true) = network(), samples(300), samples(200, seed=1)
    if names is not None:
        y, true = (names[(t > 0).int().numpy() if len(names) == 2 else t.numpy()] for t in (y, true))
    machine = NPKMachine(model, ridge=1e-2).fit(x, y)
    got = machine.predict(new)
    assert got.dtype == machine.classes_.dtype
    assert machine.score(new, true) == accuracy_score(true, got) > 0.8
    assert machine.decision_function(new).shape == ((200,) if len(machine.classes_) == 2 else (200, 3))


def test_given_kernels():
    model, (x, y), (new, _) = network(), samples(50), samples(20, seed=1)
    machine, given = NPKMachine(model).fit(x, y), NPKMachine()
    given.fit(machine.kernel(x), y)
    np.testing.assert_array_equal(given.predict(machine.kernel(new, x)), machine.predict(new))
    given.fit(machine.kernel(x).numpy(), y.numpy())
    np.testing.assert_array_equal(given.predict(machine.kernel(new, x).numpy()), machine.predict(new))


def test_digits_and_a_support_vector_machine():
    x, y = load_digits(return_X_y=True)
    x, train, test = x.astype(np.float32) / 16, slice(0, 400), slice(400, 600)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    machine = NPKMachine(model).fit(x[train], y[train])
    kernel = machine.kernel(x[train])
    assert torch.equal(kernel, kernel.T)
    support = SVC(kernel="precomputed", C=1000).fit(kernel, y[train])
    scores = machine.score(x[test], y[test]), support.score(machine.kernel(x[test], x[train]), y[test])
    assert min(scores) > 0.8, scores


def test_parameters_as_scikit_learn_has_them():
    machine = NPKMachine(network(), ridge=0.5, chunk_size=7)
    assert set(machine.get_params()) == {"network", "ridge", "chunk_size", "dtype", "progress"}
    copied = clone(machine)
    assert copied is not machine and copied.ridge == 0.5 and copied.chunk_size == 7
    assert machine.set_params(ridge=2.0) is machine and machine.ridge == 2
    with pytest.raises(ValueError, match="alpha: not a parameter; want one of network, ridge"):
        machine.set_params(alpha=1)


def test_searches_of_scikit_learn():
    x, y = samples(90)
    machine = NPKMachine(network(), dtype=torch.float64)
    search = GridSearchCV(machine, {"ridge": [1e-4, 1e-2, 1e6]}, cv=3).fit(x.numpy(), y.numpy())
    assert search.best_params_["ridge"] < 1e6
    given = cross_val_score(NPKMachine(ridge=1e-2), machine.kernel(x).numpy(), y.numpy(), cv=3)
    each = [search.cv_results_[f"split{i}_test_score"][1] for i in range(3)]
    np.testing.assert_allclose(given, each)


def test_bad_input():
    (x, y), model = samples(6), network()
    kernel = torch.eye(6)
    with pytest.raises(NotFittedError, match="not fitted"):
        NPKMachine(model).predict(x)
    with pytest.raises(ValueError, match="ridge: got -1"):
        NPKMachine(ridge=-1).fit(kernel, y)
    with pytest.raises(ValueError, match="2 entries that are not finite"):
        NPKMachine().fit(torch.tensor([[1.0, torch.nan], [torch.inf, 1.0]]), [0, 1])
    with pytest.raises(ValueError, match=r"kernel of shape \(6, 5\), want \(n, n\)"):
        NPKMachine().fit(kernel[:, :5], y)
    with pytest.raises(ValueError, match="as there is no network"):
        NPKMachine().fit(torch.ones(6), y)
    with pytest.raises(ValueError, match=r"y: got shape \(5,\), want \(6,\)"):
        NPKMachine().fit(kernel, y[:5])
    with pytest.raises(ValueError, match="y: got only 1 class"):
        NPKMachine().fit(kernel, [1] * 6)
    with pytest.raises(ValueError, match="y: has values that are not finite"):
        NPKMachine().fit(kernel, [torch.nan] * 6)
    with pytest.raises(ValueError, match="want classes of shape"):
        NPKMachine().fit(kernel, torch.ones(6, 2).long())
    with pytest.raises(ValueError, match=r"ridge: got 0, .*positive definite"):
        NPKMachine(ridge=0).fit(torch.zeros(6, 6), y)
    with pytest.raises(ValueError, match=r"want \(n, 6\), to the training samples"):
        NPKMachine().fit(kernel, y).predict(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"y: got shape \(5,\), want \(6,\)"):
        NPKMachine().fit(kernel, y).score(kernel, y[:5])


def test_alignment_by_hand():
    kernel, labels = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]]), torch.tensor([0, 0, 1])
    same = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    cosine = lambda a, b: float((a * b).sum() / a.norm() / b.norm())  # noqa: E731
    assert kernel_alignment(kernel, labels, centered=False) == pytest.approx(cosine(kernel, same), rel=1e-6)
    assert kernel_alignment(kernel, same, centered=False) == pytest.approx(cosine(kernel, same), rel=1e-6)
    centre = torch.eye(3) - 1 / 3
    want = cosine(centre @ kernel @ centre, centre @ same @ centre)
    assert kernel_alignment(kernel, labels) == pytest.approx(want, rel=1e-5)
    values = torch.tensor([1.0, 2, 4])
    assert kernel_alignment(kernel, values, centered=False) == pytest.approx(
        cosine(kernel, values.outer(values)), rel=1e-6
    )


def test_alignment_does_not_see_scale_nor_a_constant():
    x, y = samples(20)
    kernel = x @ x.T
    assert kernel_alignment(kernel, kernel * 7 + 100) == pytest.approx(1, abs=1e-5)
    assert kernel_alignment(kernel, -kernel) == pytest.approx(-1, abs=1e-6)
    assert -1 < kernel_alignment(kernel, y) < 1


def test_alignment_refuses():
    with pytest.raises(ValueError, match=r"kernel: got shape \(2, 3\)"):
        kernel_alignment(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"target: got shape \(3,\), want \(2,\) or \(2, 2\)"):
        kernel_alignment(torch.eye(2), torch.ones(3))
    with pytest.raises(ValueError, match="target: has entries that are not finite"):
        kernel_alignment(torch.eye(2), torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="kernel: is constant, so that nothing is left"):
        kernel_alignment(torch.ones(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="kernel: is zero"):
        kernel_alignment(torch.zeros(2, 2), torch.tensor([0, 1]), centered=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_targets_of_any_floating_dtype_with_or_without_a_gradient(dtype):
    X = torch.randn(20, 20, dtype=torch.float64)
    kernel, y = X @ X.T, torch.randn(20).to(dtype).requires_grad_()
    machine = NPKMachine().fit(kernel, y)
    assert machine.score(kernel, y) == NPKMachine().fit(kernel, y.detach().double()).score(kernel, y.tolist())
