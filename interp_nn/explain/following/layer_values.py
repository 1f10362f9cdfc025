"""What a layer of a network computes, as features x samples: its own values, or what the next layer receives of them."""

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


def has_rows(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight is (out, in, ...), as all are but transposed convolutions."""
    return isinstance(module, (nn.Linear, _ConvNd, LinearForm)) and not isinstance(module, _ConvTransposeNd)


class Wiring(NamedTuple):
    """A layer and its number of features; the next one that receives a function of its values alone, if there is one, and the
    modules that are called between. direct: the next one is given the layer's own tensor, which nothing wrote to since, so that
    no function lies between, whatever it would do to other samples.
    """

    layer: str
    features: int
    following: str | None
    between: tuple[str, ...]
    direct: bool


class _Event(NamedTuple):
    path: str
    value: Any
    start: bool  # of the call, with what it is given; else its end, with what it gives
    direct: bool  # whether what it is given is the layer's last result, not written to


def wiring(model: nn.Module, name: str, x: Tensor) -> Wiring:
    """How a layer is wired, found by running the model on x (n, ...) again with the layer's values exchanged between samples.

    Raises ValueError for a name that does not exist (with those nearest to it) and for a layer that is not called, TypeError for
    one that does not give a tensor.
    """
    path, layer = find_layer(model, name)
    events, exchanged = _events(model, x, layer), _events(model, x, layer, exchange=True)
    place = next((i for i, event in enumerate(events) if event.path == path and not event.start), None)
    if place is None:
        raise ValueError(f"name: layer {name!r} is not called by the model")
    out = events[place].value
    if not isinstance(out, Tensor) or out.dim() < 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"name: layer {name!r} gives {got}, want one that gives a tensor (n, ...)")
    features = out.shape[1 if isinstance(layer, _ConvNd) else -1]
    between: list[str] = []
    for event, other in zip(events[place + 1 :], exchanged[place + 1 :], strict=False):
        if not event.start:
            continue
        alike = event.path == other.path  # or the values decide what is called
        if alike and has_rows(find_layer(model, event.path)[1]) and _follows(event.value, other.value):
            return Wiring(path, features, event.path, tuple(between), event.direct)
        between.append(event.path)
    return Wiring(path, features, None, (), False)


def find_layer(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """A layer and its first name. Raises ValueError with the nearest names where there is none."""
    modules = {path: module for path, module in model.named_modules(remove_duplicate=False) if path}
    if name not in modules:
        near = difflib.get_close_matches(str(name), modules, n=3, cutoff=0.4) or list(modules)[:3]
        raise ValueError(f"name: got {name!r}, which the model does not have; nearest are {', '.join(near)}")
    return next((path, module) for path, module in modules.items() if module is modules[name])


def tapped(model: nn.Module, wires: Wiring, tap: Tap, x: Tensor) -> Tensor:
    """The values (features, n, positions) that a layer gives for x (n, ...), or that the next one receives.

    Channels are the features of a convolution, and the last dimension those of any other layer. A layer that is called
    several times has all its calls among the positions.
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
            elif isinstance(layer, _ConvNd):  # flattened, channels first
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
            f"name: layer {wires.following!r} receives {len(values)} features, want the {wires.features} of {wires.layer!r}"
        )
    return values


def batches(data: Any, model: nn.Module, at_once: int = 256) -> Iterator[Tensor]:
    """The inputs in a tensor (n, ...), or in an iterable of them or of tuples that begin with them, as the model takes them.

    Raises TypeError for batches of another kind, ValueError for none.
    """
    if not isinstance(data, Iterable):
        raise TypeError(f"data: got {type(data).__name__}, want a tensor or an iterable of batches")
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    empty = True
    for batch in data.split(at_once) if isinstance(data, Tensor) else data:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor) or x.dim() < 1:
            raise TypeError(
                f"data: got a batch of {type(x).__name__}, want tensors (n, ...), or tuples that begin with one"
            )
        if len(x):
            empty = False
            yield x if like is None else x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)
    if empty:
        raise ValueError("data: got no samples")


def reinitialised(model: nn.Module) -> nn.Module:
    """A copy of a model with weights as before training: by each module's `reset_parameters`, and where it has none, by dealing
    the entries of each of its parameters anew. PyTorch's generators are left as they were.
    """
    fresh = copy.deepcopy(model).cpu()  # where the draws are the same whatever the device
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
    last: list[tuple[Tensor, int]] = []  # what the layer gave, and its version

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
    """Whether what a layer is given moved from sample to sample as the other layer's values did."""
    if not isinstance(given, Tensor) or not isinstance(swapped, Tensor) or given.shape != swapped.shape:
        return False
    if len(given) < 2:
        return True  # nothing to exchange: taken on trust
    return not torch.equal(given, swapped) and torch.allclose(given.roll(1, 0), swapped)


def _features_first(h: Tensor, axis: int) -> Tensor:
    """(features, n, positions), a copy: the model may write over its own."""
    return (h.movedim(axis, 0).flatten(2) if h.dim() > 2 else h.movedim(axis, 0).unsqueeze(2)).clone()


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
