"""Base class of estimators as scikit-learn has them: parameters, tags, and samples from arrays, tensors and data frames.

It does not need scikit-learn.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

_Self = TypeVar("_Self", bound="Estimator")


class NotFittedError(ValueError, AttributeError):
    """A result was read before `fit`. Where scikit-learn is loaded, the error is an instance of its NotFittedError too.

    Example:
        >>> from interp_nn.explain import ActivationClusters
        >>> try:
        ...     ActivationClusters(model=None).labels_
        ... except NotFittedError:
        ...     print("call fit first")
        call fit first
    """


def not_fitted(message: str) -> NotFittedError:
    """Return the error to raise, which scikit-learn's `except NotFittedError` catches too."""
    peer = sys.modules.get("sklearn.exceptions")
    return NotFittedError(message) if peer is None else _shared(peer.NotFittedError)(message)


@cache
def _shared(peer: type[Exception]) -> type[NotFittedError]:
    def reduced(self: Exception) -> Any:  # pickled by the function that makes it, as its class has no name to import
        return not_fitted, self.args

    return type("NotFittedError", (NotFittedError, peer), {"__reduce__": reduced})


class Estimator:
    """An estimator that keeps its constructor's arguments as attributes of the same names, and changes none of them in `fit`.

    A subclass takes samples by `_validated`, which sets `n_features_in_` and `feature_names_in_`.
    """

    n_features_in_: int
    feature_names_in_: np.ndarray
    _kind: ClassVar[Literal["classifier", "regressor", "clusterer", "transformer"] | None] = None
    _fitted: ClassVar[str]  # the name of an attribute that `fit` sets

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the constructor's arguments by name; `deep` has no effect."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self: _Self, **params: Any) -> _Self:
        """Set constructor's arguments by name, and return self. Raises ValueError for another name."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"{name}: not a parameter; want one of {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return vars(self).get(self._fitted) is not None

    def __sklearn_tags__(self) -> Any:
        """Return the tags that scikit-learn 1.6 and later reads."""
        from sklearn.utils import ClassifierTags, InputTags, RegressorTags, Tags, TargetTags, TransformerTags

        supervised = self._kind in ("classifier", "regressor")
        return Tags(
            estimator_type=None if self._kind == "transformer" else self._kind,
            target_tags=TargetTags(required=supervised),
            classifier_tags=ClassifierTags() if self._kind == "classifier" else None,
            regressor_tags=RegressorTags() if self._kind == "regressor" else None,
            transformer_tags=TransformerTags(preserves_dtype=[]) if self._kind == "transformer" else None,
            input_tags=InputTags(three_d_array=True),
        )

    def _want_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise not_fitted(f"{type(self).__name__}: not fitted yet; call fit(x) first")

    def _validated(self, x: object, *, reset: bool) -> Tensor:
        """Return samples (n, ...) as a tensor of real numbers, finite. With `reset` they define the features, else they must fit.

        Raises:
            TypeError: Sparse data, columns or entries that are no numbers.
            ValueError: Complex data, no samples or features, values that are not finite, or other features than in `fit`.
        """
        samples, names = to_tensor(x, "x"), feature_names(x)
        if samples.dim() < 2:
            raise ValueError(
                f"x: got shape {tuple(samples.shape)}, want (n, ...) with n > 0. Reshape your data: x.reshape(-1, 1) for samples "
                "of one feature, x.reshape(1, -1) for one sample"
            )
        n, features = len(samples), samples.shape[1:].numel()
        if not n:
            raise ValueError(f"x: got shape {tuple(samples.shape)}, want (n, ...) with n > 0")
        if not features:
            raise ValueError(f"x: 0 feature(s) (shape={tuple(samples.shape)}) while a minimum of 1 is required.")
        if not all_finite(samples):
            finite = samples.isfinite().flatten(1).all(1)
            raise ValueError(
                f"x: {int((~finite).sum())} of its samples have values that are not finite (NaN or inf), want finite samples"
            )
        if reset:
            self.n_features_in_ = features
            vars(self).pop("feature_names_in_", None)
            if names is not None:
                self.feature_names_in_ = names
        else:
            self._match(samples.shape, names)
        return samples

    def _match(self, shape: torch.Size, names: np.ndarray | None) -> None:
        name, known = type(self).__name__, vars(self).get("feature_names_in_")
        if known is not None and names is None:
            warnings.warn(
                f"X does not have valid feature names, but {name} was fitted with feature names", stacklevel=4
            )
        elif known is None and names is not None:
            warnings.warn(f"X has feature names, but {name} was fitted without feature names", stacklevel=4)
        elif known is not None and names is not None and not np.array_equal(known, names):
            new, gone = sorted(set(names) - set(known)), sorted(set(known) - set(names))
            text = "The feature names should match those that were passed during fit.\n"
            text += "".join(f"Feature names unseen at fit time:\n{_listed(new)}" if new else "")
            text += "".join(f"Feature names seen at fit time, yet now missing:\n{_listed(gone)}" if gone else "")
            raise ValueError(
                text if new or gone else f"{text}Feature names must be in the same order as they were in fit.\n"
            )
        if shape[1:].numel() != self.n_features_in_:
            raise ValueError(
                f"x: got shape {tuple(shape)}, want (n, {self.n_features_in_}): X has {shape[1:].numel()} features, but "
                f"{name} is expecting {self.n_features_in_} features as input"
            )


class Transformer(Estimator):
    """An estimator with `transform`, which returns a tensor for a tensor, and a numpy array for data of any other kind."""

    _kind = "transformer"

    def fit_transform(self, x: Any, y: object = None) -> Any:
        """Fit to samples, and return their transform."""
        return self.fit(x, y).transform(x)  # type: ignore[attr-defined]


def as_given(result: Tensor, x: object) -> Tensor | np.ndarray:
    """Return the result as a tensor where x is one, or holds tensors, else as a numpy array."""
    given = x[0] if isinstance(x, (list, tuple)) and x else x
    return result if isinstance(given, Tensor) else result.cpu().numpy()


def _listed(names: list[str]) -> str:
    return "".join(f"- {name}\n" for name in names[:5]) + ("- ...\n" if len(names) > 5 else "")


def feature_names(x: object) -> np.ndarray | None:
    """Return the names of a data frame's columns, (features,) of objects; None without a frame or without strings as names."""
    columns = getattr(x, "columns", None)
    if columns is None or isinstance(x, (Tensor, np.ndarray)):
        return None
    names = list(columns)
    return np.array(names, dtype=object) if names and all(isinstance(name, str) for name in names) else None


def all_finite(x: Tensor) -> bool:
    """Return True if all entries are finite. A sum that is finite proves it in one pass; one that is not may have overflowed."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def to_tensor(values: object, name: str) -> Tensor:
    """Return numbers as a tensor without a gradient, of a real dtype that is floating-point unless the numbers are whole.

    Raises TypeError for sparse data and for what are no numbers, and ValueError for complex numbers and masked entries.
    """
    if isinstance(values, (list, tuple)) and values and all(isinstance(value, Tensor) for value in values):
        values = torch.stack(list(values))
    if isinstance(values, Tensor):
        if values.layout != torch.strided:
            raise TypeError(
                f"{name}: got a sparse tensor; sparse data is not supported; want a dense one, as .to_dense() makes"
            )
        if values.is_complex():
            raise ValueError(f"{name}: Complex data not supported: got {values.dtype}, want real numbers")
        return values.detach()
    array = to_array(values, name)
    if array.dtype.kind not in "iufb":
        raise TypeError(f"{name}: got {array.dtype}, want numbers")
    whole = array.dtype.kind in "iub" and array.dtype != np.uint64
    size = np.int64 if whole else np.float64 if array.dtype.itemsize > 4 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, dtype=size))  # a copy, as from_numpy warns of arrays that are read-only


def to_array(values: object, name: str) -> np.ndarray:
    """Return values of any kind as a numpy array in this machine's byte order. Raises as `to_tensor`, but takes labels too."""
    if hasattr(values, "toarray") or hasattr(values, "sparse"):
        raise TypeError(
            f"{name}: got {type(values).__name__}; sparse data is not supported; want a dense array, as .toarray() makes"
        )
    if isinstance(values, Tensor):
        values = to_tensor(values, name).cpu()
        values = values.double().numpy() if values.is_floating_point() else values.numpy()
    elif hasattr(values, "columns"):
        alone = name == "y" and len(values.columns) == 1  # its entries may be labels
        values = _column(values.iloc[:, 0]) if alone and hasattr(values, "iloc") else _from_frame(values, name)
    elif hasattr(values, "dtype") and not isinstance(values, (np.ndarray, np.generic)) and hasattr(values, "to_numpy"):
        values = _column(values)  # a series
    if np.ma.is_masked(values):
        raise ValueError(f"{name}: has masked entries; want an array without them")
    array = np.asarray(values)
    if array.dtype.kind == "c":
        raise ValueError(f"{name}: Complex data not supported: got {array.dtype}, want real numbers")
    if array.dtype.kind == "O":
        inferred = np.array(array.tolist()) if not any(isinstance(value, str) for value in array.flat) else array
        if name == "x":
            array = array.astype(np.float64)  # which raises numpy's own error for entries that are no numbers
        elif inferred.dtype.kind in "iufb" and inferred.shape == array.shape:
            array = inferred
        elif any(_missing(value) for value in array.flat):
            raise ValueError(f"{name}: has missing values (None or NaN)")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _missing(value: Any) -> bool:
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def _from_frame(frame: Any, name: str) -> np.ndarray:
    """Return a data frame's columns as one array of numbers. Missing entries become NaN."""
    columns = []
    for i, label in enumerate(frame.columns):
        column = frame.iloc[:, i] if hasattr(frame, "iloc") else frame[label]
        array = _column(column)
        if array.dtype.kind not in "iufb" or "sparse" in str(column.dtype).lower():
            raise TypeError(
                f"{name}: column {label!r} is {column.dtype}, want numbers; encode it first, for instance as one column of 0 and "
                "1 for each category"
            )
        columns.append(array)
    return np.column_stack(columns) if columns else np.empty((len(frame), 0))


def _column(series: Any) -> np.ndarray:
    """Return a column as an array; a nullable one as float64 with NaN for missing entries, or as it is where none is missing."""
    kind = getattr(series.dtype, "kind", "O")
    if isinstance(series.dtype, np.dtype) or kind not in "iufb":
        return np.asarray(series)
    if kind in "iub" and not series.isna().any():
        return np.asarray(series.to_numpy(dtype=np.int64))
    return np.asarray(series.to_numpy(dtype=np.float64, na_value=np.nan))


def check_network(network: object, name: str) -> nn.Module:
    """Return the network. Raises TypeError where it is no nn.Module."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"{name}: got {type(network).__name__}, want an nn.Module")
    return network


def check_count(name: str, value: object, least: int = -(2**63)) -> None:
    """Raise TypeError unless a parameter is an integer, also numpy's, and ValueError if it is less than `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: got {value!r}, want an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, want at least {least}")


def check_number(name: str, value: object, *, least: float | None = None, above: float = 0) -> None:
    """Raise TypeError unless a parameter is a number, also numpy's, and ValueError unless it is from `least` on, or `above`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, want a number")
    if not (float(value) > above if least is None else float(value) >= least):
        raise ValueError(f"{name}: got {value}, want {f'more than {above}' if least is None else f'at least {least}'}")


def in_parameters_dtype(x: Tensor, network: nn.Module) -> Tensor:
    """Return samples in the dtype and on the device of the network's first floating-point parameter, if it has one."""
    like = next((p for p in network.parameters() if p.is_floating_point()), None)
    if like is None:
        return x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return x.to(like.device, like.dtype)
