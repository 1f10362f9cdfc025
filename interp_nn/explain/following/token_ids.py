"""Token ids as inputs: the model is followed from their embeddings on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn.explain.following.calls import tensors
from interp_nn.explain.following.dependence import storage_of
from interp_nn.explain.following.replay import Inputs, check_model
from interp_nn.explain.following.scikit_learn import from_estimator


def from_embeddings(
    model: nn.Module, x: Tensor | Inputs, embedding: str | None = None
) -> tuple[nn.Module, Tensor | Inputs]:
    """Return the model as a function of its embeddings, and the embeddings of x, for token ids x; else both as they are.

    Models of scikit-learn and their samples are converted first.

    Args:
        model: The network.
        x: Token ids (n, ...) of an integer dtype, or other inputs.
        embedding: Path of the layer that looks x up. By default, the nn.Embedding that the model calls with x.

    Returns:
        The model and its inputs.

    Raises:
        ValueError: A layer that does not exist, is not called, or returns no embeddings of x; or no ids.
        TypeError: No nn.Embedding looks x up.
    """
    model, x = from_estimator(model, x)
    if not isinstance(x, Tensor) or x.dtype not in _IDS:
        if embedding is not None:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"embedding: got {embedding!r} for inputs of {got}, want token ids of an integer dtype")
        return model, x
    check_model(model)
    if x.dim() == 0 or not x.numel():
        raise ValueError(f"x: got token ids of shape {tuple(x.shape)}, want (n, ...) with n > 0")
    layers = dict(model.named_modules())
    if embedding is not None and embedding not in layers:
        raise ValueError(f"embedding: got {embedding!r}, want one of {_embeddings(model)}")
    ids = x.detach().long()
    found: list[tuple[nn.Module, Any]] = []

    def seen(module: nn.Module, given: Tensor, args: Any, output: Any) -> Any:
        if embedding is not None or _looks_up(given, args):
            found.append((module, output))
            raise _FoundError

    wanted = [layers[embedding]] if embedding is not None else _lookups(model)
    with suppress(_FoundError), torch.inference_mode(False), torch.no_grad():
        if wanted:
            _run(model, ids, wanted, seen)
    if not found and embedding is None:
        raise TypeError(
            f"x: got {x.dtype}, want floating-point inputs, or token ids that an nn.Embedding of the model looks up; if another "
            "layer does, name it by embedding="
        )
    if not found:
        raise ValueError(
            f"embedding: got {embedding!r}, which the model does not call; want one of {_embeddings(model)}"
        )
    layer, values = found[0]
    if getattr(layer, "max_norm", None) is not None:
        raise ValueError(
            f"embedding: {embedding or 'the one of x'!r} changes its weight in each call; want max_norm=None"
        )
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape[:1] != ids.shape[:1]:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"embedding: {embedding!r} returns {shape}, want a layer that returns the embeddings ({len(x)}, ...) of x"
        )
    return FromEmbeddings(model, ids, layer, embedding is None), values.detach().clone()


class FromEmbeddings(nn.Module):
    """A model of token ids as a function of their embeddings: the layer that looks them up returns these instead.

    Its layers and parameters are those of the model, under the same names.

    Args:
        model: The model.
        ids: The ids (n, ...).
        layer: The layer that looks them up.
        alone: Raise ValueError for another nn.Embedding that looks the ids up.
    """

    def __init__(self, model: nn.Module, ids: Tensor, layer: nn.Module, alone: bool) -> None:
        super().__init__()
        self._model, self._layer = (model,), (layer,)  # in tuples, so that they are not submodules
        self._ids, self._alone = ids, alone

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the model's modules."""
        return self._model[0].named_modules(*args, **kwargs)

    def of_samples(self, places: Sequence[int]) -> FromEmbeddings:
        """Return the model of the ids of some samples."""
        return FromEmbeddings(self._model[0], self._ids[list(places)], self._layer[0], self._alone)

    def forward(self, values: Tensor) -> Any:
        """Compute the model's output for embeddings (n, ...)."""
        model, layer = self._model[0], self._layer[0]
        calls = []

        def given_values(module: nn.Module, given: Tensor, args: Any, output: Any) -> Any:
            path = next(path for path, m in model.named_modules() if m is module)
            if module is layer:
                calls.append(path)
                if len(calls) > 1:
                    raise ValueError(
                        f"model: calls its embedding {path!r} several times; want a model that calls it once"
                    )
                return values
            if _looks_up(given, args):
                raise ValueError(
                    f"embedding: the model also looks x up in {path!r}; want embedding= the layer to explain, "
                    "the values of others are then constants"
                )
            return output

        return _run(model, self._ids, _lookups(model) if self._alone else [layer], given_values)


_IDS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _FoundError(Exception):
    """Stops a model where it looks up its ids."""


def _run(model: nn.Module, ids: Tensor, layers: Sequence[nn.Module], change: Any) -> Any:
    """Run a model on ids with the outputs of some layers changed, for this thread."""
    given, thread = ids.clone(), threading.get_ident()

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return change(module, given, (args, kwargs), output) if threading.get_ident() == thread else output

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        return model(given)


def _lookups(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _embeddings(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Embedding)]


def _looks_up(ids: Tensor, args: Any) -> bool:
    """Return True if a call's argument is the ids, in any shape."""
    return any(storage_of(t) == storage_of(ids) and t.numel() == ids.numel() for t in tensors(args))
