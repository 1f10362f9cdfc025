"""The paths of a small network, one by one: their features, which depend on the sample, and their values, which do not.

A path is a choice of one weight in each layer, from an input or a bias to the output. A convolution uses the same weights at all
positions, so that one path can be taken in several ways. The feature phi(p) sums the path's input times its gates over these
ways. The value v(p) is the product of its weights. Then y = <phi, v> (Lakshminarayanan & Singh, 2020, arXiv 2006.10529).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interp_nn.explain.paths.path_network import PathNetwork
from interp_nn.explain.paths.path_terms import Layer, Term

_MAX_PATHS = 1_000_000


class PathFeatures(NamedTuple):
    """The path features and values of a network, the result of `path_features`.

    Attributes:
        features: phi, of shape (n, paths).
        values: v, of shape (outputs, paths).
        output: The network's own output y = features @ values.T, of shape (n, outputs).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
        >>> paths = path_features(model, torch.tensor([[1.0, 2.0]]))
        >>> paths.features, torch.equal(paths.values, model[0].weight.detach())
        (tensor([[1., 2.]]), True)
    """

    features: Tensor
    values: Tensor
    output: Tensor

    def check(self) -> float:
        """Return max |<phi, v> - y| / max |y|, which is rounding error."""
        error = (self.features @ self.values.T - self.output).abs().amax()
        return float(error / self.output.abs().amax().clamp_min(torch.finfo(error.dtype).tiny))


class _Paths(NamedTuple):
    """The paths to a layer's outputs: features (n, groups of outputs, positions, paths), values (outputs, paths)."""

    features: Tensor
    values: Tensor


@torch.no_grad()
def path_features(model: nn.Module, x: Tensor) -> PathFeatures:
    """Enumerate the paths of a small network, and compute their features at samples and their values.

    Args:
        model: A network of the operations that `npk` follows in closed form. It must end in a layer of weights, or in a mean over
            the positions of one.
        x: Samples of shape (n, ...), in the model's dtype.

    Returns:
        `PathFeatures` in the dtype of x.

    Raises:
        TypeError: The model is no `nn.Module`.
        UnsupportedOperation: An operation whose paths are not known.
        ValueError: More than a million paths, outputs with positions or gates of their own, or a layer in training mode where
            that matters.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
        >>> paths = path_features(model, torch.ones(4, 2, dtype=torch.float64))
        >>> paths.features.shape, paths.check() < 1e-12  # 2 inputs times 3 units
        (torch.Size([4, 6]), True)

    Source: Lakshminarayanan & Singh (2020), arXiv 2006.10529.
    """
    layers = PathNetwork(model, x.dtype).layers(x)
    reached: list[_Paths] = []
    for layer in layers[:-1]:
        reached.append(_reaching(layer, reached, len(x)) if layer.terms else _beginning(layer, x))
    last = layers[-1]
    if last.window.numel() > 1:
        raise ValueError(
            "model: its outputs have positions; want a model that ends in a linear layer, or in a mean over positions"
        )
    parts = [(_arriving(term, reached[term.layer], 1), term) for term in last.terms]
    if any(term.shift or not torch.equal(part, part[:, :1].expand_as(part)) for part, term in parts):
        raise ValueError("model: its outputs have gates of their own; want a model that ends in a linear layer")
    features = torch.cat([part[:, 0, 0] for part, _ in parts], 1)
    values = torch.cat([term.scale.unsqueeze(1) * reached[term.layer].values for _, term in parts], 1)
    return PathFeatures(features, values, model(x).reshape(len(x), -1))


def _beginning(layer: Layer, x: Tensor) -> _Paths:
    """Return the path to each channel of the input, which is 1 here, or of a batch norm's shift."""
    values = layer.biases[0].unsqueeze(1) if layer.biases else x.new_ones(1, 1)
    return _Paths(x.new_ones(len(x), 1, 1, 1), values)


def _reaching(layer: Layer, reached: list[_Paths], n: int) -> _Paths:
    """Extend each path that arrives at a layer's input by each of the weights that it can take there."""
    inputs = layer.weight.shape[1]
    count = len(layer.biases)
    for term in layer.terms:
        before = reached[term.layer].values
        channels = len(before) if term.layer else term.profile.shape[2]
        count += layer.window.shape[0] * channels // layer.groups * before.shape[1]
    if count > _MAX_PATHS:
        raise ValueError(f"model: layer {layer.name!r} is reached by {count} paths, want at most {_MAX_PATHS}")
    positions = 1 + max(int(t.max()) for t in (layer.window, *(term.position_map.outputs for term in layer.terms)))
    arriving = [_arriving(term, reached[term.layer], positions) for term in layer.terms]
    features, values = [], []
    for group in range(layer.groups):
        own = layer.weight[group * len(layer.weight) // layer.groups :][: len(layer.weight) // layer.groups]
        parts, products = [], []
        for term, part in zip(layer.terms, arriving, strict=True):
            before = reached[term.layer].values
            first, stop = group * inputs, (group + 1) * inputs
            if term.layer:  # only the channels that the term has
                first, stop = max(first, term.shift), min(stop, term.shift + len(before))
            if first >= stop:
                continue
            # (outputs, K, channels, paths)
            along = before[first - term.shift : stop - term.shift] if term.layer else before.expand(stop - first, 1)
            along = along * term.scale[first:stop, None]
            weight = own[:, first - group * inputs : stop - group * inputs].mT.unsqueeze(3)
            products.append((weight * along).flatten(2))
            parts.append(part[:, first:stop].transpose(1, 2).flatten(2))
        at_edge = F.pad(torch.cat(parts, 2), (0, 0, 0, 1))  # the window's -1 is the last row, of zeros
        begun = at_edge.new_ones(n, layer.positions, len(layer.biases))
        biases = [bias[group * len(own) : (group + 1) * len(own), None] for bias in layer.biases]
        features.append(torch.cat([at_edge[:, layer.window.T].flatten(2), begun], 2))
        values.append(torch.cat([torch.cat(products, 2).flatten(1), *biases], 1))
    if len({part.shape for part in features}) > 1:
        raise ValueError(f"model: the groups of layer {layer.name!r} are reached by different numbers of paths")
    return _Paths(torch.stack(features, 1), torch.cat(values))


def _arriving(term: Term, paths: _Paths, positions: int) -> Tensor:
    """Return the features (n, channels, positions, paths) of the paths that a term adds to each channel and position."""
    n, groups, _, count = paths.features.shape
    channels = term.profile.shape[2]
    if term.layer and len(paths.values):
        own = torch.arange(channels, device=term.profile.device) - term.shift
        group = own.clamp(0, len(paths.values) - 1) // (len(paths.values) // groups)
    else:
        group = torch.zeros(channels, dtype=torch.int64, device=term.profile.device)
    along = paths.features[:, group][:, :, term.position_map.inputs] * term.profile.permute(1, 2, 0).unsqueeze(3)
    return along.new_zeros(n, channels, positions, count).index_add_(2, term.position_map.outputs, along)
