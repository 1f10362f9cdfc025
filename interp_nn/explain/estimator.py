"""Base class of estimators that scikit-learn's `clone` and searches accept; it does not need scikit-learn."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Estimator")


class NotFittedError(ValueError, AttributeError):
    """A result was read before `fit`; like scikit-learn's error, it is a ValueError and an AttributeError.

    Example:
        >>> from interp_nn.explain import ActivationClusters
        >>> try:
        ...     ActivationClusters(model=None).labels_
        ... except NotFittedError:
        ...     print("call fit first")
        call fit first
    """


class Estimator:
    """An estimator that keeps its constructor's arguments as attributes of the same names."""

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
