"""Two linear layers with nothing between them: found in a model, run, and rotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interp_nn.explain.following.calls import tensors
from interp_nn.explain.following.replay import check_model
from interp_nn.nn import SummaryClassifier, SummaryHead, SummaryLayer, SummaryLinear

Inputs = tuple[Tensor, ...]
Layer = str | nn.Module


class PairRun(NamedTuple):
    """One run of a model: features H (n, d), codes Z (n, k), outputs (n, m), and the weights W (d, k), A (m, k) and c (m,)."""

    features: Tensor
    codes: Tensor
    outputs: Tensor
    encoder: Tensor
    decoder: Tensor
    bias: Tensor


class LinearPair:
    """A layer that computes codes Z = H W + e, and a layer that computes outputs Z Aᵀ + c from the same codes.

    Args:
        model: The network that holds both.
        layer: The first layer, or its path in the model: a SummaryHead, which holds both, an nn.Linear or a SummaryLinear.
        output: The second layer, or its path; None for a SummaryHead.

    Raises:
        TypeError: A layer of another type.
        ValueError: A layer that the model does not have, or a missing or superfluous `output`.
    """

    def __init__(self, model: nn.Module, layer: Layer, output: Layer | None = None) -> None:
        check_model(model)
        self.model = model
        self.name, self.layer = _find(model, "layer", layer)
        if isinstance(self.layer, SummaryClassifier):
            raise TypeError(
                "layer: got SummaryClassifier, whose codes are its logits; want a layer before an output layer"
            )
        if isinstance(self.layer, SummaryHead):
            if output is not None:
                raise ValueError("output: got a layer, want None for a SummaryHead, which has one")
            if self.layer.training:
                raise ValueError(
                    "model: the SummaryHead is in training mode, in which it returns a pair; want model.eval()"
                )
            self.output_name, self.output = f"{self.name}.output".lstrip("."), self.layer.output
            return
        if isinstance(self.layer, SummaryLayer) or not isinstance(self.layer, nn.Linear | SummaryLinear):
            heads = [name for name, m in self.layer.named_modules() if isinstance(m, SummaryHead)]
            inner = heads[-1:] or _linear_layers(self.layer)[-2:]
            paths = [repr(".".join(filter(None, (self.name, name)))) for name in inner]
            hint = ", ".join(f"{argument}={path}" for argument, path in zip(("layer", "output"), paths, strict=False))
            raise TypeError(
                f"layer: got {type(self.layer).__name__}, want SummaryHead, nn.Linear or SummaryLinear"
                + (f": for example {hint}" if hint else "")
            )
        if output is None:
            names = _linear_layers(model)
            later = names[names.index(self.name) + 1 :]
            raise ValueError(
                f"output: got None, want the layer that reads the codes of {self.name!r}: a head is two linear layers without a "
                "nonlinearity between them; linear layers after it: "
                + (", ".join(map(repr, later[:10])) or "none; SummaryHead.from_linear makes a head of one nn.Linear")
            )
        self.output_name, self.output = _find(model, "output", output)
        if not isinstance(self.output, nn.Linear | SummaryLinear):
            raise TypeError(f"output: got {type(self.output).__name__}, want nn.Linear or SummaryLinear")

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of W (d, k), A (m, k) and c (m,)."""
        encoder = self.layer.b if isinstance(self.layer, SummaryHead) else _weight(self.layer).mT
        decoder, bias = _weight(self.output), self.output.bias
        return tuple(
            t.detach().clone() for t in (encoder, decoder, decoder.new_zeros(len(decoder)) if bias is None else bias)
        )  # type: ignore[return-value]

    def run(self, x: Inputs) -> PairRun:
        """Run the model once, and once more with other codes, by which a nonlinearity between the layers is found.

        Raises:
            ValueError: A layer that is not called exactly once, codes that change between the layers, features that are no rows
                of samples, or outputs that are not those of the second layer.
        """
        features, codes, read, outputs, result = self._calls(x)
        n = len(x[0])
        if features.dim() != 2 or len(features) != n:
            raise ValueError(f"layer: {self.name!r} gets features of shape {tuple(features.shape)}, want ({n}, d)")
        if isinstance(self.layer, SummaryHead):
            codes = read
        else:
            moved = torch.randn(codes.shape, generator=torch.Generator().manual_seed(0)).to(codes)
            if not (torch.equal(codes, read) and torch.equal(self._calls(x, moved)[2], moved)):
                raise ValueError(
                    f"layer, output: the codes change between {self.name!r} and {self.output_name!r}, want two linear layers "
                    "with nothing between them"
                )
        if not (isinstance(result, Tensor) and torch.equal(result, outputs)):
            raise ValueError(
                f"model: its outputs are not those of {self.output_name!r}; want a model that returns this layer's logits"
            )
        return PairRun(features.detach(), codes.detach(), outputs.detach(), *self.weights())

    def codes_of(self, x: Inputs) -> Tensor:
        """Return the codes by a run that a recorder may follow."""
        with self._captured() as calls:
            self.model(*x)
        if isinstance(self.layer, SummaryHead):
            return calls["output"][0][0]
        return calls["layer"][0][1]

    @torch.no_grad()
    def rotate_(self, rotation: Tensor) -> None:
        """Write W R, e R and A R into the layers: for an orthogonal R the model computes the same function.

        Raises:
            ValueError: Parameters that are computed, sharded, or used by another layer as well.
        """
        written: list[tuple[nn.Module, str, Callable[[Tensor], Tensor]]] = []
        r = rotation.double()
        if isinstance(self.layer, nn.Linear):
            written.append((self.layer, "weight", lambda t: r.mT @ t))
        else:
            written.append((self.layer, "b", lambda t: t @ r))
        if getattr(self.layer, "bias", None) is not None:
            written.append((self.layer, "bias", lambda t: t @ r))
        if isinstance(self.output, nn.Linear):
            written.append((self.output, "weight", lambda t: t @ r))
        else:  # (Rᵀ b) q((Rᵀ b)ᵀ Rᵀ b) = Rᵀ b q(bᵀb)
            written.append((self.output, "b", lambda t: r.mT @ t))
        parameters = [self._own_parameter(module, name) for module, name, _ in written]
        for parameter, (_, _, rotated) in zip(parameters, written, strict=True):
            parameter.copy_(rotated(parameter.double()))
        for layer in (self.layer, self.output):
            if isinstance(layer, SummaryLinear):
                layer.reset_norm(keep=True)

    def _own_parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        parameter = module._parameters.get(name)
        path = f"{self.name if module is self.layer else self.output_name}.{name}"
        if type(parameter) is not nn.Parameter:
            kind = "parametrized" if parametrize.is_parametrized(module, name) else "no plain parameter"
            raise ValueError(f"model: {path} is {kind}; want a parameter that can be written")
        places = [
            f"{prefix}.{key}"
            for prefix, other in self.model.named_modules()
            for key, held in other._parameters.items()
            if held is parameter
        ]
        if len(places) > 1:
            raise ValueError(f"model: {path} is shared by {places}; want a parameter that these two layers alone use")
        return parameter

    def _calls(self, x: Inputs, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
        """Return the first layer's input and output, the second one's, and the result; `codes` replace the first's output."""
        with self._captured(codes) as calls, torch.no_grad():
            result = self.model(*x)
        for name, path in (("layer", self.name), ("output", self.output_name)):
            if len(calls[name]) != 1:
                raise ValueError(f"{name}: the model calls {path!r} {len(calls[name])} times, want once")
        (features, made), (read, outputs) = calls["layer"][0], calls["output"][0]
        return features, made, read, outputs, result

    @contextmanager
    def _captured(self, codes: Tensor | None = None) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
        calls: dict[str, list[tuple[Any, Any]]] = {"layer": [], "output": []}

        def hook(name: str, replaced: Tensor | None) -> Callable[..., Any]:
            def seen(module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
                calls[name].append((next(tensors((args, kwargs))), result))
                return replaced

            return seen

        handles = [
            layer.register_forward_hook(hook(name, replaced), with_kwargs=True)
            for name, layer, replaced in (("layer", self.layer, codes), ("output", self.output, None))
        ]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


class Encoder(nn.Module):
    """The part of a model that computes a pair's codes, in rotated coordinates."""

    rotation: Tensor

    def __init__(self, pair: LinearPair, rotation: Tensor) -> None:
        super().__init__()
        self.model, self._pair = pair.model, pair
        self.register_buffer("rotation", rotation, persistent=False)
        self.train(pair.model.training)

    def forward(self, *x: Tensor) -> Tensor:
        """Return the codes (n, k) of the samples."""
        return self._pair.codes_of(x) @ self.rotation


def _weight(layer: nn.Module) -> Tensor:
    """Return the weight (out, in) of a linear layer, without gradient."""
    weight = layer.effective_weight() if isinstance(layer, SummaryLinear) else layer.weight
    return weight.detach()  # type: ignore[operator]


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | SummaryLinear)]


def _find(model: nn.Module, argument: str, layer: Layer) -> tuple[str, Any]:
    layers = dict(model.named_modules())
    if isinstance(layer, str):
        if layer not in layers:
            raise ValueError(
                f"{argument}: got {layer!r}, which the model does not have; want one of {list(layers)[:20]}"
            )
        return layer, layers[layer]
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{argument}: got {type(layer).__name__}, want a layer or its path in the model")
    for name, module in layers.items():
        if module is layer:
            return name, layer
    raise ValueError(f"{argument}: got a {type(layer).__name__} that the model does not have, want one of its layers")
