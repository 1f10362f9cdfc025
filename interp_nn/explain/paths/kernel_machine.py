"""Learning with a kernel alone: kernel ridge regression, and the alignment of a kernel with a target."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.estimator import (
    Estimator,
    check_count,
    check_network,
    check_number,
    in_parameters_dtype,
    to_array,
    to_tensor,
)
from interp_nn.explain.following.scikit_learn import as_network
from interp_nn.explain.paths.path_kernel import npk


class NPKMachine(Estimator):
    """Kernel ridge regression with the neural path kernel of a network, as a scikit-learn estimator.

    f(x) = sum_i a_i H(x, x_i) + the mean of the targets. The machine shows how well the network could learn with its gates fixed.
    The dtype of the targets selects the task. Floating-point targets (n,) or (n, k) mean regression. Other targets (n,), integers
    or strings, are classes; each class is regressed against the rest. The linear system is solved in float64.

    scikit-learn sees a classifier until a fit to floating-point targets has made it a regressor.

    Args:
        network: The network whose gates make the kernel, as `npk` takes it. None: the methods take kernels of any kind instead of
            samples: (n, n) between the training samples, (m, n) from new samples to them.
        ridge: The penalty, as a multiple of the mean of the kernel's diagonal; at least 0.
        chunk_size: Number of rows and of columns of the kernel that `npk` computes at a time.
        dtype: Dtype of the kernel, as in `npk`.
        progress: Show a progress bar. None shows one in a terminal or a notebook, where tqdm is installed.

    Attributes:
        classes_: The classes, a sorted numpy array; None for regression.
        dual_coef_: The coefficients a, (n,) or (n, targets), float64.
        intercept_: The means of the targets, () or (targets,), float64.
        x_fit_: The training samples; None without a network.
        n_features_in_: Number of entries of a sample, or of training samples where the machine has no network.
        feature_names_in_: Names of the columns, where `fit` got a data frame. Other frames must have the same ones in this order.

    Example:
        >>> x, labels = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), ["no", "no", "yes", "yes"]
        >>> _ = torch.manual_seed(0)
        >>> network = nn.Sequential(nn.Linear(1, 9), nn.ReLU(), nn.Linear(9, 1))
        >>> NPKMachine(network).fit(x, labels).predict([[3.0]]).tolist()
        ['yes']

    Source: Lakshminarayanan & Singh (2020), arXiv 2006.10529.
    """

    classes_: np.ndarray | None
    dual_coef_: Tensor
    intercept_: Tensor
    x_fit_: Tensor | None
    _fitted = "dual_coef_"

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        ridge: float = 1e-3,
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
        progress: bool | None = None,
    ) -> None:
        self.network, self.ridge, self.chunk_size, self.dtype = network, ridge, chunk_size, dtype
        self.progress = progress

    def fit(self, x: object, y: object) -> NPKMachine:
        """Solve (K + ridge mean(diag K) I) a = y - mean(y) for the coefficients a.

        Args:
            x: Samples (n, ...), or the kernel K (n, n) where the machine has no network. Tensors, arrays and data frames.
            y: Targets (n,) or (n, k); (n, 1) for classes is read as (n,).

        Returns:
            The machine itself.

        Raises:
            TypeError: A network that is no `nn.Module`, another parameter of another type, or samples that are sparse or no
                numbers.
            ValueError: No y, a negative ridge, a kernel that is not square or not finite, another number of targets, targets that
                are not finite, a single class, or a system that is not positive definite.
        """
        check_number("ridge", self.ridge, least=0)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size, 1)
        if self.dtype not in (None, torch.float32, torch.float64):
            raise TypeError(f"dtype: got {self.dtype!r}, want torch.float32, torch.float64 or None")
        if y is None:
            raise ValueError("y: got None; NPKMachine requires y to be passed, but the target y is None")
        samples = self._samples(x, reset=True)
        kernel = self._kernel(samples, None).double()
        n = len(kernel)
        if kernel.shape != (n, n):
            raise ValueError(f"x: got a kernel of shape {tuple(kernel.shape)}, want (n, n) with n > 0")
        classes, targets = read_targets(y, n)
        targets = targets.to(kernel.device)
        intercept = targets.mean(0)
        system = kernel.clone()
        system.diagonal().add_(self.ridge * kernel.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            raise ValueError(
                f"ridge: got {self.ridge}, but then the system is not positive definite to rounding; want a larger ridge"
            )
        self.classes_, self.intercept_ = classes, intercept
        self.dual_coef_ = torch.cholesky_solve((targets - intercept).reshape(n, -1), factor).reshape(targets.shape)
        self.x_fit_ = None if self.network is None else samples
        return self

    def kernel(self, x: object, other_x: object = None) -> Tensor:
        """Compute the kernel between samples, for instance for sklearn.svm.SVC(kernel="precomputed").

        Args:
            x: Samples (n, ...), or a kernel (n, m) where the machine has no network. A kernel is returned as it is.
            other_x: Samples (m, ...). Default: x.

        Returns:
            Tensor of shape (n, m).

        Raises:
            ValueError: The kernel has another shape or is not finite.
        """
        return self._kernel(self._plain(x), None if other_x is None else self._plain(other_x))

    def _kernel(self, x: Tensor, other_x: Tensor | None) -> Tensor:
        kernel = x
        if self.network is not None:
            kernel = npk(self.network, x, other_x, chunk_size=self.chunk_size, dtype=self.dtype, progress=self.progress)
        elif x.dim() != 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want a kernel (n, m), as there is no network")
        if not bool(kernel.isfinite().all()):
            raise ValueError(f"x: its kernel has {int((~kernel.isfinite()).sum())} entries that are not finite")
        return kernel

    def decision_function(self, x: object) -> np.ndarray:
        """Return the fitted values in float64: (n,) or (n, k) for regression, else one score for each class.

        Args:
            x: Samples (n, ...), or a kernel (n, m) to the m training samples where the machine has no network.

        Returns:
            For regression, an array of the targets' shape. For two classes (n,), positive for the second. For more (n, classes).

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: A kernel of another shape, or one that is not finite.
        """
        self._want_fitted()
        kernel = self._kernel(self._samples(x, reset=False), self.x_fit_).double()
        if kernel.shape[1] != len(self.dual_coef_):
            raise ValueError(
                f"x: got a kernel of shape {tuple(kernel.shape)}, want (n, {len(self.dual_coef_)}), to the training samples"
            )
        values = (kernel @ self.dual_coef_ + self.intercept_).cpu().numpy()
        return values[:, 1] - values[:, 0] if self.classes_ is not None and len(self.classes_) == 2 else values

    def predict(self, x: object) -> np.ndarray:
        """Return the classes (n,) in the dtype of `classes_`, or the fitted values of regression.

        Args:
            x: As in `decision_function`.

        Returns:
            Array of shape (n,) or (n, k).

        Raises:
            NotFittedError: `fit` was not called.
        """
        values = self.decision_function(x)
        if self.classes_ is None:
            return values
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]

    def score(self, x: object, y: object) -> float:
        """Return the accuracy for classes, or R² for regression (the mean over the targets).

        Args:
            x: As in `decision_function`.
            y: The true targets, in the shape of `predict`'s result.

        Returns:
            The score; 1 is best.

        Raises:
            ValueError: Targets of another shape.
        """
        predicted = self.predict(x)
        truth = to_array(y, "y")
        if truth.ndim == 2 and truth.shape[1] == 1 and predicted.ndim == 1:
            truth = truth[:, 0]
        if truth.shape != predicted.shape:
            raise ValueError(f"y: got shape {truth.shape}, want {predicted.shape}")
        if self.classes_ is not None:
            return float((predicted == truth).mean())
        truth = truth.astype(np.float64)
        residual, spread = ((truth - predicted) ** 2).sum(0), ((truth - truth.mean(0)) ** 2).sum(0)
        constant = np.where(residual > 0, 0.0, 1.0)  # as scikit-learn has it where the targets do not vary
        return float(np.mean(np.where(spread > 0, 1 - residual / np.where(spread > 0, spread, 1), constant)))

    @property
    def _kind(self) -> Any:  # type: ignore[override]
        return "regressor" if vars(self).get("classes_", self) is None else "classifier"

    def __sklearn_tags__(self) -> Any:
        """Return the tags that scikit-learn 1.6 and later reads."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = self._kind == "regressor"
        tags.input_tags.pairwise = self.network is None
        return tags

    def _samples(self, x: object, *, reset: bool) -> Tensor:
        """Return samples on the device and in the dtype of the network, or a kernel where it is none."""
        if self.network is not None:
            return self._plain(self._validated(x, reset=reset))
        kernel = self._plain(x)
        if reset:
            self.n_features_in_ = kernel.shape[-1] if kernel.dim() else 0
        return kernel

    def _plain(self, x: object) -> Tensor:
        if self.network is not None:
            return in_parameters_dtype(to_tensor(x, "x"), check_network(as_network(self.network), "network"))
        kernel = to_tensor(x, "x")
        return kernel if kernel.is_floating_point() else kernel.to(torch.get_default_dtype())


def kernel_alignment(kernel: Tensor, target: Tensor, *, centered: bool = True) -> float:
    """Compute the alignment <K, T> / (|K| |T|) of a kernel K with a target T: the cosine of the angle between the matrices.

    Args:
        kernel: K, of shape (n, n).
        target: T, another kernel (n, n). Class labels (n,) of an integer or bool dtype make T 1 for two samples of one class and
            0 else. Values (n,) of a floating dtype make T their outer product.
        centered: Center both matrices in feature space first. Without this, a constant in the kernel counts as alignment.

    Returns:
        A number in [-1, 1], computed in float64. It is 1 where K is a positive multiple of T.

    Raises:
        ValueError: Another shape, entries that are not finite, or a matrix that is zero (after the centering, if any).

    Example:
        >>> kernel = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
        >>> round(kernel_alignment(kernel, torch.tensor([0, 0, 1]), centered=False), 4)
        0.9562

    Source: Cristianini et al. (2001), "On kernel-target alignment"; Cortes, Mohri & Rostamizadeh (2012).
    """
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel: got shape {tuple(kernel.shape)}, want (n, n)")
    if target.shape not in (kernel.shape, kernel.shape[:1]):
        raise ValueError(f"target: got shape {tuple(target.shape)}, want ({len(kernel)},) or {tuple(kernel.shape)}")
    if target.dim() == 1:
        classes = not target.is_floating_point()
        target = target.unsqueeze(1) == target if classes else target.double().outer(target.double())
    matrices = []
    for name, matrix in (("kernel", kernel), ("target", target)):
        matrix = matrix.detach().to(kernel.device, torch.float64)
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"{name}: has entries that are not finite")
        size = float(matrix.abs().amax()) if len(matrix) else 0.0
        if centered and size:
            rows, columns = matrix.mean(1, keepdim=True), matrix.mean(0)
            matrix = matrix - rows - columns + rows.mean()
        norm = float(torch.linalg.matrix_norm(matrix))
        if not norm > len(matrix) * torch.finfo(torch.float64).eps * size:
            problem = "constant, so that nothing is left after centering" if centered else "zero"
            raise ValueError(f"{name}: is {problem}; want one that varies")
        matrices.append(matrix / norm)
    return float((matrices[0] * matrices[1]).sum())


def read_targets(y: object, n: int) -> tuple[np.ndarray | None, Tensor]:
    """Return the classes (None for regression) and the targets (n,) or (n, targets) in float64."""
    values = to_array(y, "y")
    if values.ndim not in (1, 2) or len(values) != n:
        raise ValueError(f"y: got shape {values.shape}, want ({n},) or ({n}, k)")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("y: has values that are not finite (NaN or inf)")
        return None, torch.from_numpy(values.astype(np.float64))
    if values.ndim == 2 and values.shape[1] == 1:
        peer = sys.modules.get("sklearn.exceptions")
        warnings.warn(
            f"A column-vector y was passed when a 1d array was expected: y has shape {values.shape}, want ({n},)",
            UserWarning if peer is None else peer.DataConversionWarning,
            stacklevel=3,
        )
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(f"y: got {values.dtype} of shape {values.shape}, want classes of shape ({n},)")
    try:
        classes, which = np.unique(values, return_inverse=True)
    except TypeError as error:
        raise TypeError(f"y: its labels cannot be sorted: {error}; want labels of one type") from error
    if len(classes) < 2:
        raise ValueError(f"y: got only 1 class, {classes[0]!r}, want at least two")
    return classes, torch.nn.functional.one_hot(torch.from_numpy(which), len(classes)).double()
