"""Multilayer perceptrons of scikit-learn as PyTorch networks. It does not import scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interp_nn.explain.estimator import feature_names, in_parameters_dtype, not_fitted, to_tensor

_ACTIVATIONS = {"identity": None, "relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid}
_NETWORKS = ("MLPClassifier", "MLPRegressor")
_SCALERS = ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler")
_OUTPUTS = ("identity", "logistic", "softmax", "exp")  # what scikit-learn applies to the output of the last layer


class ColumnScaler(nn.Module):
    """Compute (x - shift) * scale for each column of x (n, d); it has no parameters.

    Args:
        shift: Tensor (d,).
        scale: Tensor (d,).

    Example:
        >>> ColumnScaler(torch.tensor([1.0]), torch.tensor([2.0]))(torch.tensor([[3.0]]))
        tensor([[4.]])
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scaled columns."""
        return (x - self.shift) * self.scale

    def extra_repr(self) -> str:
        """Return the number of columns for repr."""
        return f"{len(self.shift)}"


def from_sklearn(model: Any, *, fold: bool = False) -> nn.Sequential:
    """Convert scikit-learn's MLPClassifier or MLPRegressor, or a Pipeline that ends in one, to a PyTorch network.

    The network has copies of the weights, in their dtype, and is in evaluation mode. It computes the last layer's output before
    scikit-learn's output activation: logits for a classifier, and for a regressor the prediction, or its logarithm with
    loss="poisson". A binary classifier has one output, the logit of `classes_[1]`.

    A network with activation="relu" is piecewise linear. With "identity" it is affine and has no gates. "tanh" and "logistic" are
    secants, without gates.

    Args:
        model: A fitted MLPClassifier or MLPRegressor, or a Pipeline of StandardScaler, MinMaxScaler, MaxAbsScaler and
            RobustScaler steps before one.
        fold: Multiply the scalers of a Pipeline into the first layer, which then takes the columns as they are. False makes them
            one layer before it, without parameters; the path kernel begins at its result.

    Returns:
        The network, from (n, d) to (n, outputs).

    Raises:
        TypeError: A model, or a step of a Pipeline, of another class.
        ValueError: An activation, or a scaler's setting, that has no exact conversion.
        NotFittedError: The model is not fitted.

    Example:
        >>> from sklearn.neural_network import MLPRegressor
        >>> x = [[0.0], [1.0], [2.0]]
        >>> mlp = MLPRegressor(hidden_layer_sizes=(8,), solver="lbfgs", random_state=0).fit(x, [0.0, 1.0, 4.0])
        >>> y = from_sklearn(mlp)(torch.tensor(x, dtype=torch.float64))
        >>> bool((y.detach().numpy()[:, 0] - mlp.predict(x) < 1e-12).all())
        True
    """
    steps = [step for _, step in model.steps] if type(model).__name__ == "Pipeline" and is_sklearn(model) else [model]
    *scalers, last = [step for step in steps if step is not None and not isinstance(step, str)] or [model]
    _check_class(last, _NETWORKS, "model")
    layers = _layers(last)
    first = layers[0]
    shift, scale = torch.zeros(first.in_features).double(), torch.ones(first.in_features).double()
    for scaler in scalers:
        own_shift, own_scale = _scaling(scaler, len(shift))
        shift, scale = shift + own_shift / scale, scale * own_scale
    if scalers and not fold:
        layers.insert(0, ColumnScaler(shift.to(first.weight), scale.to(first.weight)))
    elif scalers:
        with torch.no_grad():
            weight = first.weight.double() * scale
            first.bias.copy_(first.bias.double() - weight @ shift)
            first.weight.copy_(weight)
    return nn.Sequential(*layers).eval()


def is_sklearn(model: object) -> bool:
    """Return True for an object of a class of scikit-learn, or of one that is derived from it, that is no nn.Module."""
    return not isinstance(model, nn.Module) and any(
        cls.__module__.partition(".")[0] == "sklearn" for cls in type(model).__mro__
    )


def as_network(model: Any) -> Any:
    """Return scikit-learn's models as networks, scalers not folded, and others as they are."""
    return from_sklearn(model) if is_sklearn(model) else model


def from_estimator(model: Any, x: Any) -> tuple[Any, Any]:
    """Return scikit-learn's model as a network with samples of any kind as its tensors; others as they are.

    Raises as `from_sklearn` and `to_tensor`, and ValueError for other columns than the model was fitted to.
    """
    if not is_sklearn(model):
        return model, x
    network = from_sklearn(model)
    check_columns(model, x)
    samples = to_tensor(x, "x")
    if samples.dim() != 2 or samples.shape[1] != model.n_features_in_:
        raise ValueError(f"x: got shape {tuple(samples.shape)}, want (n, {model.n_features_in_})")
    return network, in_parameters_dtype(samples, network)


def check_columns(model: Any, x: object) -> None:
    """Raise ValueError for a data frame whose columns are not those that scikit-learn's model was fitted to, in their order."""
    known, names = getattr(model, "feature_names_in_", None), feature_names(x)
    if is_sklearn(model) and known is not None and names is not None and list(known) != list(names):
        raise ValueError(f"x: got columns {list(names)}, want {list(known)}, those that the model was fitted to")


def _check_class(step: Any, wanted: tuple[str, ...], name: str) -> None:
    # Not isinstance: a derived class may compute something else.
    if type(step).__name__ not in wanted or not type(step).__module__.startswith("sklearn."):
        *others, last = wanted
        raise TypeError(
            f"{name}: got {type(step).__name__}, want scikit-learn's {', '.join(others)} or {last}"
            + (", or a Pipeline that ends in one" if wanted is _NETWORKS else "; other steps have no exact conversion")
        )


def _layers(model: Any) -> list[Any]:
    """Return the linear layers of a fitted MLP, and the activations between them."""
    if not hasattr(model, "coefs_"):
        raise not_fitted(
            f"model: {type(model).__name__} is not fitted yet; call fit(x, y) first. A copy by scikit-learn's clone is not "
            "fitted: there pass from_sklearn(model)"
        )
    if model.activation not in _ACTIVATIONS or model.out_activation_ not in _OUTPUTS:
        raise ValueError(
            f"model: got activation={model.activation!r} and out_activation_={model.out_activation_!r}, want one of "
            f"{', '.join(_ACTIVATIONS)} and one of {', '.join(_OUTPUTS)}"
        )
    activation = _ACTIVATIONS[model.activation]
    layers: list[Any] = []
    for weight, bias in zip(model.coefs_, model.intercepts_, strict=True):
        if layers and activation is not None:
            layers.append(activation())
        tensors = torch.tensor(np.ascontiguousarray(weight.T)), torch.tensor(bias)
        linear = nn.utils.skip_init(nn.Linear, *weight.shape, dtype=tensors[0].dtype)
        with torch.no_grad():
            linear.weight.copy_(tensors[0])
            linear.bias.copy_(tensors[1])
        layers.append(linear)
    return layers


def _scaling(scaler: Any, columns: int) -> tuple[Tensor, Tensor]:
    """Return shift and scale (d,) float64 of a fitted scaler: it computes (x - shift) * scale."""
    _check_class(scaler, _SCALERS, "model: a step of the Pipeline")
    kind = type(scaler).__name__
    if getattr(scaler, "clip", False):
        raise ValueError(f"model: {kind} has clip=True, whose result is not affine; want clip=False")
    if not hasattr(scaler, "n_features_in_"):
        raise not_fitted(f"model: {kind} of the Pipeline is not fitted yet; call fit(x, y) first")
    scale, shift = scaler.scale_, None
    if kind == "MinMaxScaler":
        return torch.from_numpy(-scaler.min_ / scale).double(), torch.from_numpy(scale).double()
    if kind == "StandardScaler":
        shift, scale = (scaler.mean_ if scaler.with_mean else None), (scale if scaler.with_std else None)
    elif kind == "RobustScaler":
        shift, scale = scaler.center_, scale
    shift = np.zeros(columns) if shift is None else shift
    scale = np.ones(columns) if scale is None else scale
    return torch.from_numpy(np.array(shift)).double(), 1 / torch.from_numpy(np.array(scale)).double()
