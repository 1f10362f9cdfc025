"""Deep linearly gated networks as scikit-learn's classifiers and regressors, which are read back as oblique trees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.clusters.table import r2
from interp_nn.explain.estimator import Estimator, check_count, check_number, to_array
from interp_nn.explain.paths.kernel_machine import read_targets
from interp_nn.nn.gated.gates import SoftGate
from interp_nn.nn.gated.networks import DLGN
from interp_nn.nn.gated.oblique_tree import ObliqueTree, Task

_Self = TypeVar("_Self", bound="DLGNEstimator")


class DLGNEstimator(Estimator):
    """Base class of `DLGNClassifier` and `DLGNRegressor`, which document the parameters.

    `fit` trains on standardised columns. Afterwards the scaling is in the network's layers, so that `network_` and its
    hyperplanes take the columns as they are.
    """

    network_: DLGN
    loss_: list[float]
    classes_: np.ndarray | None
    _fitted = "network_"
    _task: Task

    def __init__(
        self,
        hidden: Sequence[int] = (16, 16, 16),
        *,
        gating: str = "shallow",
        beta: float = 4.0,
        epochs: int = 100,
        batch_size: int = 64,
        learning_rate: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.hidden, self.gating, self.beta, self.epochs = hidden, gating, beta, epochs
        self.batch_size, self.learning_rate, self.seed = batch_size, learning_rate, seed

    def fit(self: _Self, x: object, y: object) -> _Self:
        """Train a network. PyTorch's own random state does not change, and equal seeds give equal networks.

        Args:
            x: Samples (n, d): a tensor, an array or a data frame of numbers.
            y: Classes (n,), or targets (n,) or (n, k).

        Returns:
            self.

        Raises:
            TypeError: A parameter of another type, sparse samples, or samples that are no numbers.
            ValueError: A number of the constructor out of range, samples of another shape or that are not finite, no y, or a y
                that does not fit.
        """
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name), 1)
        check_count("seed", self.seed)
        check_number("learning_rate", self.learning_rate)
        check_number("beta", self.beta)
        if not isinstance(self.hidden, Iterable):
            raise TypeError(f"hidden: got {self.hidden!r}, want a sequence of widths")
        if y is None:
            name = type(self).__name__
            raise ValueError(f"y: got None; {name} requires y to be passed, but the target y is None")
        samples = self._rows(x, reset=True)
        classes, targets = self._targets(y, len(samples))
        targets = targets.to(samples)
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._train(samples.clone(), targets.reshape(len(samples), -1))
        self.classes_, self._single = classes, targets.dim() == 1
        return self

    def to_tree(self, x: object, *, min_samples: int = 1) -> ObliqueTree:
        """Read the network back as an oblique tree, see `DLGN.to_tree`.

        Args:
            x: Samples (n, d), for example those of `fit`.
            min_samples: Smallest number of samples in a leaf.

        Returns:
            The tree. Its hyperplanes are in the columns' own units. Its classes are the indices of `classes_`.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: Samples that do not fit, or `min_samples` below 1.
        """
        self._want_fitted()
        return self.network_.to_tree(self._rows(x, reset=False), task=self._task, min_samples=min_samples)

    def _outputs(self, x: object) -> Tensor:
        self._want_fitted()
        with torch.no_grad():
            return self.network_(self._rows(x, reset=False))

    def _rows(self, x: object, *, reset: bool) -> Tensor:
        """Return samples (n, d) in the network's dtype; float64 for whole numbers."""
        rows = self._validated(x, reset=reset)
        if rows.dim() != 2:
            raise ValueError(f"x: got shape {tuple(rows.shape)}, want (n, d)")
        if not reset:
            like = self.network_.gating.layers[0].weight
            return rows.to(like.device, like.dtype)  # type: ignore[arg-type]
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.double()

    def _targets(self, y: object, n: int) -> tuple[np.ndarray | None, Tensor]:
        raise NotImplementedError

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def _scaling(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the targets."""
        return targets.new_zeros(targets.shape[1]), targets.new_ones(targets.shape[1])

    def _train(self, x: Tensor, targets: Tensor) -> None:
        (mean, std), (centre, scale) = _moments(x), self._scaling(targets)
        z, wanted = (x - mean) / std, (targets - centre) / scale
        widths = (x.shape[1], *self.hidden, targets.shape[1])
        network = DLGN(widths, gating=self.gating, gate=SoftGate(self.beta), bias=True, dtype=x.dtype, device=x.device)
        adam = torch.optim.Adam(network.parameters(), self.learning_rate)
        losses = []
        for epoch in range(self.epochs):
            adam.param_groups[0]["lr"] = self.learning_rate * (1 - epoch / self.epochs)
            total = 0.0
            for batch in torch.randperm(len(x)).to(x.device).split(self.batch_size):
                adam.zero_grad()
                loss = self._loss(network(z[batch]), wanted[batch])
                loss.backward()
                adam.step()
                total += float(loss.detach()) * len(batch)
            losses.append(total / len(x))
        with torch.no_grad():
            for layer in network.gating.layers if self.gating == "shallow" else network.gating.layers[:1]:
                layer.weight.div_(std)  # type: ignore[operator]
                layer.bias.sub_(layer.weight @ mean)  # type: ignore[operator]
            last: Any = network.value.layers[-1]
            last.weight.mul_(scale.unsqueeze(1))
            last.bias.mul_(scale).add_(centre)
        self.network_, self.loss_ = network.eval(), losses


class DLGNClassifier(DLGNEstimator):
    """A `DLGN` as a scikit-learn classifier, which `to_tree` reads back as an oblique decision tree.

    Args:
        hidden: Widths of the hidden layers: the tree's hyperplanes are those of their gates.
        gating: 'shallow': each gate is a linear layer of the columns; or 'linear', see `DLGN`.
        beta: Steepness of the soft gates; steep gates are nearer to a tree.
        epochs: Number of passes over the samples.
        batch_size: Number of samples in a step of Adam.
        learning_rate: Adam's learning rate, which falls linearly to 0.
        seed: Seed of the initial weights and of the batches.

    Attributes:
        network_: The trained network, from columns to logits: (n, 1) for two classes, else (n, classes).
        classes_: The classes, a sorted numpy array.
        loss_: Mean loss in each epoch.
        n_features_in_: Number of columns.
        feature_names_in_: Names of the columns, where `fit` got a data frame.

    Example:
        >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), ["no", "no", "yes", "yes"]
        >>> model = DLGNClassifier((4,)).fit(x, y)
        >>> model.predict([[3.0]]).tolist(), model.to_tree(x).leaves
        (['yes'], 2)
    """

    _kind, _task = "classifier", "classification"

    def decision_function(self, x: object) -> np.ndarray:
        """Return the logits: (n,) for two classes, positive for the second, else (n, classes)."""
        out = self._outputs(x).cpu().numpy()
        return out[:, 0] if out.shape[1] == 1 else out

    def predict_proba(self, x: object) -> np.ndarray:
        """Return the probabilities (n, classes)."""
        out = self._outputs(x)
        return torch.softmax(torch.cat([torch.zeros_like(out), out], 1) if out.shape[1] == 1 else out, 1).cpu().numpy()

    def predict(self, x: object) -> np.ndarray:
        """Return the classes (n,), in the dtype of `classes_`."""
        values = self.decision_function(x)
        assert self.classes_ is not None
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]

    def score(self, x: object, y: object) -> float:
        """Return the accuracy."""
        return float((self.predict(x) == to_array(y, "y").reshape(-1)).mean())

    def _targets(self, y: object, n: int) -> tuple[np.ndarray | None, Tensor]:
        values = to_array(y, "y")
        if values.dtype.kind == "f":
            if not np.isfinite(values).all() or (values != np.floor(values)).any():
                raise ValueError("y: Unknown label type: continuous; want classes")
            values = values.astype(np.int64)
        classes, targets = read_targets(values, n)
        return classes, targets[:, 1] if targets.shape[1] == 2 else targets

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(outputs, targets)
        return F.cross_entropy(outputs, targets)


class DLGNRegressor(DLGNEstimator):
    """A `DLGN` as a scikit-learn regressor, which `to_tree` reads back as an oblique regression tree.

    The arguments are those of `DLGNClassifier`.

    Attributes:
        network_: The trained network, from columns to targets (n, k).
        loss_: Mean loss in each epoch, of standardised targets.
        n_features_in_: Number of columns.
        feature_names_in_: Names of the columns, where `fit` got a data frame.

    Example:
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> model = DLGNRegressor((8,), learning_rate=0.1).fit(x, (x[:, 0] > 0).float())
        >>> bool(model.score(x, (x[:, 0] > 0).float()) > 0.9)
        True
    """

    _kind, _task = "regressor", "regression"

    def predict(self, x: object) -> np.ndarray:
        """Return the targets (n,) or (n, k)."""
        out = self._outputs(x).cpu().numpy()
        return out[:, 0] if self._single else out

    def score(self, x: object, y: object) -> float:
        """Return R², the mean over the targets; NaN for a constant target."""
        found, wanted = self._outputs(x).cpu(), torch.from_numpy(to_array(y, "y").astype(np.float64))
        if wanted.reshape(len(wanted), -1).shape != found.shape:
            raise ValueError(f"y: got shape {tuple(wanted.shape)}, want ({len(found)}, {found.shape[1]})")
        columns = zip(found.T, wanted.reshape(len(wanted), -1).T, strict=True)
        return float(np.mean([r2(a, b) for a, b in columns]))

    def __sklearn_tags__(self) -> Any:
        """Return the tags that scikit-learn 1.6 and later reads."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _targets(self, y: object, n: int) -> tuple[np.ndarray | None, Tensor]:
        return read_targets(to_array(y, "y").astype(np.float64), n)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def _scaling(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        return _moments(targets)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column; 1 for a constant column."""
    mean, std = x.mean(0), x.std(0, correction=0)
    return mean, torch.where(std > 64 * torch.finfo(x.dtype).eps * mean.abs(), std, 1)
