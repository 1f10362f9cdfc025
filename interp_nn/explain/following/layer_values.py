"""Values of a layer of a network: its own output, or the next layer's input."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from interp_nn.nn.base import LinearForm

Tap = Literal["pre", "post"]
_CHUNK_SIZE = 256  # samples


def has_rows(module: nn.Module) -> bool:
    """Return True for a layer whose weight is (out, in, ...): a linear layer, or a convolution that is not transposed."""
    return isinstance(module, (nn.Linear, _ConvNd, LinearForm)) and not isinstance(module, _ConvTransposeNd)


class Wiring(NamedTuple):
    """A layer and the next layer with a weight.

    Attributes:
        layer: The layer's path.
        features: Its number of features.
        following: Path of the next layer whose input depends on this layer's values alone, or None.
        between: Paths of the modules that are called between the two.
        direct: True if the next layer receives this layer's own tensor and nothing wrote to it.
    """

    layer: str
    features: int
    following: str | None
    between: tuple[str, ...]
    direct: bool


class _Event(NamedTuple):
    path: str
    value: Any  # at the start of a call its first argument, at the end its result
    start: bool
    direct: bool  # the first argument is the layer's last result, and nothing wrote to it


def wiring(model: nn.Module, layer: str, x: Tensor) -> Wiring:
    """Find the layer that follows a layer: run the model on x twice, once with the layer's values exchanged between samples.

    Args:
        model: The network.
        layer: The layer's path.
        x: Samples (n, ...).

    Returns:
        The layer and the next layer with a weight.

    Raises:
        ValueError: The model has no such layer (the message has the nearest paths), or does not call it.
        TypeError: The layer does not return a tensor.
    """
    path, module = find_layer(model, layer)
    events, exchanged = _events(model, x, module), _events(model, x, module, exchange=True)
    place = next((i for i, event in enumerate(events) if event.path == path and not event.start), None)
    if place is None:
        raise ValueError(f"layer: the model does not call {layer!r}; want a layer that it calls")
    out = events[place].value
    if not isinstance(out, Tensor) or out.dim() < 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"layer: {layer!r} returns {got}, want a layer that returns a tensor (n, ...)")
    features = out.shape[1 if isinstance(module, _ConvNd) else -1]
    between: list[str] = []
    for event, other in zip(events[place + 1 :], exchanged[place + 1 :], strict=False):
        if not event.start:
            continue
        alike = event.path == other.path  # else the calls depend on the values
        if alike and has_rows(find_layer(model, event.path)[1]) and _follows(event.value, other.value):
            return Wiring(path, features, event.path, tuple(between), event.direct)
        between.append(event.path)
    return Wiring(path, features, None, (), False)


def find_layer(model: nn.Module, layer: str) -> tuple[str, nn.Module]:
    """Return a layer's first path and the layer. Raises ValueError with the nearest paths if there is none."""
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    if layer not in modules:
        near = difflib.get_close_matches(str(layer), modules, n=3, cutoff=0.4) or list(modules)[:3]
        raise ValueError(f"layer: got {layer!r}, which the model does not have; nearest are {', '.join(near)}")
    return next((path, module) for path, module in modules.items() if module is modules[layer])


def layer_values(model: nn.Module, wires: Wiring, tap: Tap, x: Tensor) -> Tensor:
    """Compute a layer's values on x.

    Args:
        model: The network.
        wires: The layer, and the next one.
        tap: "pre": the layer's output. "post": the next layer's input.
        x: Samples (n, ...).

    Returns:
        Tensor (features, n, positions). The features of a convolution are its channels, those of another layer its last
        dimension. The positions of a layer that is called several times are those of all calls.

    Raises:
        ValueError: The next layer receives another number of features.
    """
    kept: list[Tensor] = []
    _, layer = find_layer(model, wires.layer)
    if tap == "pre":
        axis = 1 if isinstance(layer, _ConvNd) else -1
        handle = layer.register_forward_hook(lambda module, args, out: kept.append(_features_first(out.detach(), axis)))
    else:
        assert wires.following is not None
        _, following = find_layer(model, wires.following)

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0].detach()
            if isinstance(following, _ConvNd):
                kept.append(_features_first(given, 1))
            elif isinstance(layer, _ConvNd):  # flattened, with the channels first
                kept.append(_features_first(given.unflatten(-1, (wires.features, -1)), -2))
            else:
                kept.append(_features_first(given, -1))

        handle = following.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    values = torch.cat(kept, 2)
    if len(values) != wires.features:
        raise ValueError(
            f"layer: {wires.following!r} receives {len(values)} features, want the {wires.features} of {wires.layer!r}"
        )
    return values


def batches(data: Any, model: nn.Module) -> Iterator[Tensor]:
    """Yield batches of inputs on the model's device and in its dtype.

    Args:
        data: Inputs (n, ...), or an iterable of batches, each of them inputs or a tuple that begins with inputs.
        model: The network.

    Yields:
        Inputs (n, ...).

    Raises:
        TypeError: Data of another kind.
        ValueError: No samples.
    """
    if not isinstance(data, Iterable):
        raise TypeError(f"data: got {type(data).__name__}, want a tensor or an iterable of batches")
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    empty = True
    for batch in data.split(_CHUNK_SIZE) if isinstance(data, Tensor) else data:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor) or x.dim() < 1:
            raise TypeError(
                f"data: got a batch of {type(x).__name__}, want tensors (n, ...), or tuples that begin with one"
            )
        if len(x):
            empty = False
            yield x if like is None else x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
    if empty:
        raise ValueError("data: got no samples, want at least one")


def reinitialised(model: nn.Module) -> nn.Module:
    """Return a copy of a model with weights as before training; PyTorch's random state does not change.

    Each module's `reset_parameters` draws the weights. A module without it gets its own entries in a random order.
    """
    fresh = copy.deepcopy(model).cpu()  # so that the draws do not depend on the device
    with torch.random.fork_rng([]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if reset is not None:
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    like = next(model.parameters(), None)
    return fresh if like is None else fresh.to(like.device)


def _events(model: nn.Module, x: Tensor, layer: nn.Module, exchange: bool = False) -> list[_Event]:
    events: list[_Event] = []
    last: list[tuple[Tensor, int]] = []  # the layer's result and its version

    def starts(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            given = args[0] if args else None
            direct = bool(last) and given is last[-1][0] and given._version == last[-1][1]
            events.append(_Event(path, _copy(given), True, direct))

        return hook

    def ends(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            if module is layer and isinstance(out, Tensor):
                out = out.roll(1, 0) if exchange else out
                last.append((out, out._version))
            events.append(_Event(path, _copy(out), False, False))
            return out

        return hook

    with ExitStack() as hooks, torch.inference_mode(False), torch.no_grad():
        for path, module in model.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(starts(path)).remove)
                hooks.callback(module.register_forward_hook(ends(path)).remove)
        model(x.clone())  # a normal tensor, whose results have versions
    return events


def _follows(given: Any, swapped: Any) -> bool:
    """Return True if a layer's input was exchanged between samples as the other layer's values were."""
    if not isinstance(given, Tensor) or not isinstance(swapped, Tensor) or given.shape != swapped.shape:
        return False
    if len(given) < 2:
        return True  # one sample: nothing to exchange
    return not torch.equal(given, swapped) and torch.allclose(given.roll(1, 0), swapped)


def _features_first(h: Tensor, axis: int) -> Tensor:
    """Return a copy (features, n, positions) of the values h; the model may write to h later."""
    return (h.movedim(axis, 0).flatten(2) if h.dim() > 2 else h.movedim(axis, 0).unsqueeze(2)).clone()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
