"""Learning with a kernel alone: ridge regression on it, and how well it is aligned with a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.estimator import Estimator, NotFittedError
from interp_nn.explain.paths.path_kernel import npk_model


class NPKMachine(Estimator):
    """Kernel ridge regression with the neural path kernel of a network, in scikit-learn's manner.

    It is what the network could learn with its gates as they are: f(x) = sum_i a_i H(x, x_i) + the mean of the targets.
    network: whose gates make the kernel, as `npk_model` takes it; None where fit and predict are given kernels, (n, n) between
    the training samples and (m, n) from new ones to them, of any kind. ridge: the penalty, as a multiple of the mean of the
    kernel's diagonal. chunk, dtype: `npk_model`'s. The system is solved in fp64.

    y decides: floating-point is regression, of one target (n,) or several (n, k); anything else (n,) is classes, each of which
    is regressed against the rest. After `fit`: classes_ (classes,), or None; dual_coef_ (n, targets) and intercept_ (targets,),
    fp64; X_fit_: the training samples, or None where kernels were given.
    """

    classes_: np.ndarray | None
    dual_coef_: Tensor
    intercept_: Tensor
    X_fit_: Tensor | None

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        ridge: float = 1e-3,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.network, self.ridge, self.chunk, self.dtype = network, ridge, chunk, dtype

    def fit(self, X: object, y: object) -> NPKMachine:
        """Solve (K + ridge mean(diag K) I) a = y - mean(y); returns self.

        X: samples (n, ...) or a kernel (n, n). y: (n,) or (n, k). Raises ValueError for a negative ridge, a kernel that is not
        square or finite, another number of targets, targets that are not finite, and a system that has no stable solution.
        """
        if not self.ridge >= 0:
            raise ValueError(f"ridge: got {self.ridge}, want at least 0")
        kernel = self.kernel(X).double()
        n = len(kernel)
        if kernel.shape != (n, n) or not n:
            raise ValueError(f"X: got a kernel of shape {tuple(kernel.shape)}, want (n, n) with n > 0")
        classes, targets = _targets(y, n)
        targets = targets.to(kernel.device)
        intercept = targets.mean(0)
        system = kernel.clone()
        system.diagonal().add_(self.ridge * kernel.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:
            raise ValueError(
                f"ridge: got {self.ridge}, with which the kernel is not positive definite to rounding; want a larger one"
            )
        self.classes_, self.intercept_ = classes, intercept
        self.dual_coef_ = torch.cholesky_solve((targets - intercept).reshape(n, -1), factor).reshape(targets.shape)
        self.X_fit_ = None if self.network is None else self._samples(X)
        return self

    def kernel(self, X: object, Y: object = None) -> Tensor:
        """The kernel (n, m) of samples X and Y (default: X), what sklearn.svm.SVC(kernel="precomputed") takes; without a network,
        X itself. Raises ValueError where it is not finite.
        """
        if self.network is None:
            kernel = _tensor(X)
            if kernel.dim() != 2:
                raise ValueError(f"X: got shape {tuple(kernel.shape)}, want a kernel (n, m), as there is no network")
        else:
            right = None if Y is None else self._samples(Y)
            kernel = npk_model(self.network, self._samples(X), right, chunk=self.chunk, dtype=self.dtype)
        if not bool(kernel.isfinite().all()):
            raise ValueError(f"X: its kernel has {int((~kernel.isfinite()).sum())} entries that are not finite")
        return kernel

    def decision_function(self, X: object) -> np.ndarray:
        """The fitted values, fp64: of regression (n,) or (n, k); (n,) of two classes, positive for the second; (n, classes)."""
        if "dual_coef_" not in vars(self):
            raise NotFittedError("NPKMachine: not fitted yet; call fit(X, y) first")
        kernel = self.kernel(X, self.X_fit_).double()
        if kernel.shape[1] != len(self.dual_coef_):
            raise ValueError(
                f"X: got a kernel of shape {tuple(kernel.shape)}, want (n, {len(self.dual_coef_)}), to the training samples"
            )
        values = (kernel @ self.dual_coef_ + self.intercept_).cpu().numpy()
        return values[:, 1] - values[:, 0] if self.classes_ is not None and len(self.classes_) == 2 else values

    def predict(self, X: object) -> np.ndarray:
        """The classes (n,), of classes_'s dtype, or the regressed values. Raises NotFittedError before `fit`."""
        values = self.decision_function(X)
        if self.classes_ is None:
            return values
        return self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)]

    def score(self, X: object, y: object) -> float:
        """The share of classes that are told right, or R² of regression (the mean over its targets)."""
        predicted = self.predict(X)
        truth = _array(y)
        if truth.shape != predicted.shape:
            raise ValueError(f"y: got shape {truth.shape}, want {predicted.shape}")
        if self.classes_ is not None:
            return float((predicted == truth).mean())
        residual, spread = ((truth - predicted) ** 2).sum(0), ((truth - truth.mean(0)) ** 2).sum(0)
        return float(np.mean(1 - residual / spread))

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn (1.6 and later) asks before cross-validation; only classes are then dealt out evenly."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True, multi_output=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(pairwise=self.network is None),
        )

    def _samples(self, X: object) -> Tensor:
        """X as the network takes it."""
        like = None if self.network is None else next(self.network.parameters(), None)
        x = _tensor(X)
        return x.to(torch.get_default_dtype()) if like is None else x.to(like.device, like.dtype)


def kernel_alignment(kernel: Tensor, target: Tensor, *, centered: bool = True) -> float:
    """The cosine of the angle between a kernel (n, n) and a target, as matrices: in [-1, 1], and 1 where one is a multiple of
    the other (Cristianini et al., 2001, "On kernel-target alignment").

    target: another kernel (n, n); labels (n,) of whole numbers, whose kernel is 1 for two of one class and 0 else; or values
    (n,) of floating point, whose kernel is their products. centered: both are taken about the mean of their features, without
    which a constant in the kernel passes for alignment (Cortes, Mohri & Rostamizadeh, 2012). In fp64.
    Raises ValueError for other shapes, for values that are not finite, and for a kernel or target without variation.
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
            raise ValueError(f"{name}: is {'constant once centred' if centered else 'zero'}, and aligned with nothing")
        matrices.append(matrix / norm)
    return float((matrices[0] * matrices[1]).sum())


def _targets(y: object, n: int) -> tuple[np.ndarray | None, Tensor]:
    """The classes, None for regression; and the targets (n,) or (n, targets), fp64."""
    values = _array(y)
    if len(values) != n or values.ndim not in (1, 2):
        raise ValueError(f"y: got shape {values.shape}, want ({n},) or ({n}, k)")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("y: has values that are not finite")
        return None, torch.from_numpy(values.astype(np.float64))
    if values.ndim != 1:
        raise ValueError(f"y: got {values.dtype} of shape {values.shape}, want classes of shape ({n},)")
    classes, which = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y: got the one class {classes[0]!r}, want at least two")
    return classes, torch.nn.functional.one_hot(torch.from_numpy(which), len(classes)).double()


def _array(y: object) -> np.ndarray:
    """y for numpy, which has no bfloat16."""
    if isinstance(y, Tensor):
        y = y.detach().cpu()
        y = y.double() if y.is_floating_point() else y
    return np.asarray(y)


def _tensor(values: Any) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
