"""What scikit-learn's `clone` and its searches ask of an estimator, without scikit-learn."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Estimator")


class NotFittedError(ValueError, AttributeError):
    """A result was asked for before `fit`. Both of the errors that scikit-learn's is."""


class Estimator:
    """An estimator whose constructor's arguments are attributes of the same names."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments, for scikit-learn's `clone` and its searches."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self: _Self, **params: Any) -> _Self:
        """Set constructor's arguments; returns self. Raises ValueError for others."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ValueError(f"{name}: not a parameter; want one of {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self
