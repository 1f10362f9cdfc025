"""The neural path kernel: how many paths through a network are active for both of two inputs.

A path goes from an input through one unit a layer to the output. It is active where all of its gates are on, and carries its
input times its weights; a network's output is the sum over the active ones. With the gates and inputs in the features phi(p) =
x(i_0) prod_l G(i_l) and the weights in the values v(p), y = <phi, v>. The kernel is H(x, x') = <phi, phi'>, which needs no
enumeration of paths: Lakshminarayanan & Singh (2020), "Neural path features and neural path kernel", arXiv 2006.10529.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from interp_nn.explain.paths.covariances import Propagation
from interp_nn.explain.paths.monte_carlo import npk_montecarlo
from interp_nn.explain.paths.path_network import PathNetwork
from interp_nn.explain.paths.tiling import tiled
from interp_nn.gates.record import GateRecord

Gates = GateRecord | Sequence[Tensor]
_CHUNK = 1024  # its tiles are 8 MiB each


def npk(
    gates: Gates,
    other: Gates | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    *,
    normalize: bool = True,
    bias: bool = False,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """H = <x, y> prod_l <G_l, G'_l> (n, m) of a fully connected network, from its gates.

    gates: of n samples, one (n, w_l) tensor a layer in the layers' order, on/off (bool) or soft (floating-point, finite), or
    a `GateRecord` of a network of linear layers and ReLU, one after another. other: of m samples, and `gates` again without
    it. x (n, ...) and y (m, ...): the inputs of the network that has the weights; None is one input that is always 1.
    normalize: each layer's product is divided by its width and the inputs' by their size, as for weights of variance
    1 / fan-in, which makes H the mean over all paths and not their sum. bias: paths may also start at a layer's bias, which
    adds 1: S_0 = <x, y>, S_l = (S_{l-1} + 1) <G_l, G'_l>, H = S + 1; normalised, biases still count 1.
    chunk: the rows and columns of H made at a time. dtype: of the products of gates and of H; float64 where the gates or x
    are, and float32 else. Of on/off gates they are whole numbers, and H has one rounding.

    Networks with convolutions, pooling or skip connections: `npk_model`. Raises TypeError for gates and inputs of other kinds;
    ValueError for layers that do not match, which it names, for values that are not finite, and where H is beyond its dtype.
    """
    left = _layers(gates, "gates")
    right = left if other is None else _layers(other, "other")
    _check_match(left, right)
    if y is not None and x is None:
        raise ValueError("y: given without x, want both or x alone")
    if (other is None) != (y is None) and x is not None:
        raise ValueError("x, y: want y where other is given, and only there")
    inputs = None if x is None else (_inputs(x, len(left[0]), "x"), _inputs(x if y is None else y, len(right[0]), "y"))
    if inputs is not None and inputs[0].shape[1] != inputs[1].shape[1]:
        raise ValueError(f"y: got {inputs[1].shape[1]} inputs a sample, want {inputs[0].shape[1]}, as x has")
    given = [*left, *right, *(inputs or ())]
    work = dtype or (torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32)
    if work not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: got {work}, want torch.float32 or torch.float64")

    def side(layers: list[Tensor], x: Tensor | None) -> Callable[[slice], list[Tensor]]:
        factors = layers if x is None else [x, *layers]
        return lambda rows: [t[rows].to(work) for t in factors]

    def tile(a: list[Tensor], b: list[Tensor]) -> Tensor:
        # In fp64: products pass beyond the range of fp32 on the way, and so round once.
        block = torch.ones(len(a[0]), len(b[0]), dtype=torch.float64, device=a[0].device)
        for place, (g, h) in enumerate(zip(a, b, strict=True)):
            if bias and (inputs is None or place > 0):
                block += 1
            block *= (g @ h.T).double() / (max(1, g.shape[1]) if normalize else 1)
        return block + 1 if bias else block

    return tiled(
        (len(left[0]), len(right[0])),
        _CHUNK if chunk is None else chunk,
        side(left, inputs and inputs[0]),
        None if other is None else side(right, inputs and inputs[1]),
        tile,
        work,
        left[0].device,
    )


def npk_model(
    model: nn.Module,
    X: Tensor,
    Y: Tensor | None = None,
    *,
    method: Literal["closed", "montecarlo"] = "closed",
    draws: int = 100,
    seed: int = 0,
    normalize: bool = True,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """H (n, m) of a network's gates at samples X (n, ...) and Y (m, ...; default: X).

    It is E[f(x) f(x')] over independent weights of mean 0 and variance 1, with the gates that the model has; for several outputs,
    their mean. A convolution has the same weights at all positions, so that paths which differ by a translation are one.
    Further paths begin at biases and at the shifts of batch norms, whose scales are weights that paths pass.

    method: "closed" is exact: one pass through the graph, of linear layers, convolutions, batch norm, ReLU, max- and average-
    pooling, flattening, sums and concatenations. "montecarlo" is the mean over `draws` networks with random signs as weights,
    of any model that `frozen` takes; `npk_montecarlo` has its standard error.
    normalize: weights have variance 1 / fan-in, and biases 1. chunk: rows and columns of H made at a time; by default those of a
    tile of 256 MiB. dtype: of the arithmetic and of H; float32 or float64, by default that of X, in fp32 at least.

    Raises UnsupportedOperation naming a layer that "closed" does not follow; TypeError and ValueError for samples that are not
    floating-point or not finite, for layers in training mode, and where H is beyond its dtype.
    """
    for name, samples in (("X", X), *((("Y", Y),) if Y is not None else ())):
        _check_samples(samples, name)
    work = dtype or torch.promote_types(X.dtype, torch.float32)
    if method == "montecarlo":
        return npk_montecarlo(model, X, Y, draws=draws, seed=seed, normalize=normalize, chunk=chunk).kernel.to(work)
    if method != "closed":
        raise ValueError(f"method: got {method!r}, want 'closed' or 'montecarlo'")
    network = PathNetwork(model, work)
    propagation = Propagation(network.layers(X[:1]), normalize)
    return tiled(
        (len(X), len(X if Y is None else Y)),
        propagation.chunk(work) if chunk is None else chunk,
        lambda rows: network.layers(X[rows]),
        None if Y is None else lambda columns: network.layers(Y[columns]),
        propagation.tile,
        work,
        X.device,
    )


def _layers(gates: Gates, name: str) -> list[Tensor]:
    """The gates of each layer, (n, w_l)."""
    if isinstance(gates, GateRecord):
        for site in gates.sites:
            if len(site.shape) != 1 or site.operation not in ("relu", "gate"):
                raise ValueError(
                    f"{name}: site {site.name!r} is {site.operation} with gates of shape {tuple(site.shape)}, want ReLU on "
                    "the units of linear layers; of other networks: npk_model"
                )
        gates = [gates.gates(site) for site in gates.sites]
    layers = list(gates)
    if not layers:
        raise ValueError(f"{name}: got no layers, want at least one tensor of shape (n, w)")
    for i, layer in enumerate(layers):
        if not isinstance(layer, Tensor) or not (layer.dtype == torch.bool or layer.is_floating_point()):
            got = layer.dtype if isinstance(layer, Tensor) else type(layer).__name__
            raise TypeError(f"{name}: layer {i} is {got}, want a bool or floating-point tensor")
        if layer.dim() != 2 or len(layer) != len(layers[0]):
            raise ValueError(
                f"{name}: layer {i} has shape {tuple(layer.shape)}, want (n, w) with the n of layer 0, {len(layers[0])}"
            )
        if layer.dtype != torch.bool and not bool(layer.isfinite().all()):
            raise ValueError(f"{name}: layer {i} has values that are not finite")
    return [layer.detach() for layer in layers]


def _check_match(left: list[Tensor], right: list[Tensor]) -> None:
    if len(left) != len(right):
        raise ValueError(f"other: got {len(right)} layers, want {len(left)}, as gates has")
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"other: layer {i} has {b.shape[1]} units, want {a.shape[1]}, as gates has")


def _inputs(x: Tensor, n: int, name: str) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name}: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, want floating-point inputs"
        )
    if x.dim() < 1 or len(x) != n:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want ({n}, ...), as many samples as there are gates")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: has values that are not finite")
    return x.detach().reshape(n, x.shape[1:].numel())


def _check_samples(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{name}: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, want a floating-point tensor"
        )
    if x.dim() < 2 or not len(x):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, want (n, ...) with n > 0")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name}: has values that are not finite")
