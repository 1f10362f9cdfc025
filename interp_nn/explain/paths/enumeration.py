"""The paths of a small network, one by one: their features, which depend on the sample, and their values, which do not.

A path is a choice of weights, one a layer, from an input or a bias to the output; what shares weights, as a convolution does at
all of its positions, is one path. phi(p) sums its input and gates over the ways it is taken, v(p) is the product of its
weights, and y = <phi, v> (Lakshminarayanan & Singh, 2020, arXiv 2006.10529).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interp_nn.explain.paths.path_network import PathNetwork
from interp_nn.explain.paths.path_terms import Layer, Term

_MOST = 1_000_000


class PathFeatures(NamedTuple):
    """features (n, paths), values (outputs, paths) and output (n, outputs), the network's own, which is features @ values.T."""

    features: Tensor
    values: Tensor
    output: Tensor

    def check(self) -> float:
        """max |<phi, v> - y|, relative to the largest |y|: rounding."""
        error = (self.features @ self.values.T - self.output).abs().amax()
        return float(error / self.output.abs().amax().clamp_min(torch.finfo(error.dtype).tiny))


class _Paths(NamedTuple):
    """Those that reach a layer's outputs: features (n, groups of outputs, positions, paths), values (outputs, paths)."""

    features: Tensor
    values: Tensor


@torch.no_grad()
def path_features(model: nn.Module, x: Tensor) -> PathFeatures:
    """The path features and values of a network at samples x (n, ...), of x's dtype, by enumeration.

    The network must end in a layer of weights, perhaps followed by a mean over positions. Raises UnsupportedOperation for layers
    that `npk_model` does not follow either; ValueError for more than a million paths, and for layers in training mode.
    """
    layers = PathNetwork(model, x.dtype).layers(x)
    reached: list[_Paths] = []
    for layer in layers[:-1]:
        reached.append(_reaching(layer, reached, len(x)) if layer.terms else _beginning(layer, x))
    last = layers[-1]
    if last.window.numel() > 1:
        raise ValueError(
            "model: its outputs have positions; want a model that ends in a linear layer, or in a mean over them"
        )
    parts = [(_arriving(term, reached[term.layer], 1), term) for term in last.terms]
    if any(term.shift or not torch.equal(part, part[:, :1].expand_as(part)) for part, term in parts):
        raise ValueError("model: its outputs have gates of their own; want a model that ends in a linear layer")
    features = torch.cat([part[:, 0, 0] for part, _ in parts], 1)
    values = torch.cat([term.scale.unsqueeze(1) * reached[term.layer].values for _, term in parts], 1)
    return PathFeatures(features, values, model(x).reshape(len(x), -1))


def _beginning(layer: Layer, x: Tensor) -> _Paths:
    """The input, which is 1 here, or a batch norm's shift: one path to each channel."""
    values = layer.biases[0].unsqueeze(1) if layer.biases else x.new_ones(1, 1)
    return _Paths(x.new_ones(len(x), 1, 1, 1), values)


def _reaching(layer: Layer, reached: list[_Paths], n: int) -> _Paths:
    """The paths to a layer's outputs: each one that arrives at its input, times each of the weights that it then may take."""
    inputs = layer.weight.shape[1]
    count = len(layer.biases)
    for term in layer.terms:
        before = reached[term.layer].values
        channels = len(before) if term.layer else term.profile.shape[2]
        count += layer.window.shape[0] * channels // layer.groups * before.shape[1]
    if count > _MOST:
        raise ValueError(f"model: layer {layer.name!r} is reached by {count} paths, want at most {_MOST}")
    positions = 1 + max(int(t.max()) for t in (layer.window, *(term.taps.outputs for term in layer.terms)))
    arriving = [_arriving(term, reached[term.layer], positions) for term in layer.terms]
    features, values = [], []
    for group in range(layer.groups):
        own = layer.weight[group * len(layer.weight) // layer.groups :][: len(layer.weight) // layer.groups]
        parts, products = [], []
        for term, part in zip(layer.terms, arriving, strict=True):
            before = reached[term.layer].values
            first, stop = group * inputs, (group + 1) * inputs
            if term.layer:  # the channels that the term has
                first, stop = max(first, term.shift), min(stop, term.shift + len(before))
            if first >= stop:
                continue
            # (outputs, K, channels, paths)
            along = before[first - term.shift : stop - term.shift] if term.layer else before.expand(stop - first, 1)
            along = along * term.scale[first:stop, None]
            weight = own[:, first - group * inputs : stop - group * inputs].mT.unsqueeze(3)
            products.append((weight * along).flatten(2))
            parts.append(part[:, first:stop].transpose(1, 2).flatten(2))
        at_edge = F.pad(torch.cat(parts, 2), (0, 0, 0, 1))  # -1 is the last
        begun = at_edge.new_ones(n, layer.positions, len(layer.biases))
        biases = [bias[group * len(own) : (group + 1) * len(own), None] for bias in layer.biases]
        features.append(torch.cat([at_edge[:, layer.window.T].flatten(2), begun], 2))
        values.append(torch.cat([torch.cat(products, 2).flatten(1), *biases], 1))
    if len({part.shape for part in features}) > 1:
        raise ValueError(f"model: the groups of layer {layer.name!r} are reached by different numbers of paths")
    return _Paths(torch.stack(features, 1), torch.cat(values))


def _arriving(term: Term, paths: _Paths, positions: int) -> Tensor:
    """The features (n, channels, positions, paths) of what a term adds to each channel and position."""
    n, groups, _, count = paths.features.shape
    channels = term.profile.shape[2]
    if term.layer and len(paths.values):
        own = torch.arange(channels, device=term.profile.device) - term.shift
        group = own.clamp(0, len(paths.values) - 1) // (len(paths.values) // groups)
    else:
        group = torch.zeros(channels, dtype=torch.int64, device=term.profile.device)
    along = paths.features[:, group][:, :, term.taps.inputs] * term.profile.permute(1, 2, 0).unsqueeze(3)
    return along.new_zeros(n, channels, positions, count).index_add_(2, term.taps.outputs, along)
