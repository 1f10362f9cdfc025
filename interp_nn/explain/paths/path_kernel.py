"""The neural path kernel: the number of paths through a network that are active for both of two inputs.

A path leads from an input through one unit of each layer to the output. It is active where all of its gates are on, and then it
adds its input times its weights to the output. So the output is y = <phi, v>. The features phi(p) = x(i_0) prod_l G(i_l) hold
the path's input and gates. The values v(p) hold its weights. The kernel is H(x, x') = <phi, phi'>. It can be computed without an
enumeration of the paths. See Lakshminarayanan & Singh (2020), "Neural path features and neural path kernel", arXiv 2006.10529.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from interp_nn.explain.following.scikit_learn import from_estimator
from interp_nn.explain.paths.covariances import Propagation
from interp_nn.explain.paths.monte_carlo import npk_montecarlo
from interp_nn.explain.paths.path_network import PathNetwork
from interp_nn.explain.paths.tiling import tiled
from interp_nn.gates.record import GateRecord

Gates = GateRecord | Sequence[Tensor]
_CHUNK_SIZE = 1024  # its tiles are 8 MiB each


def npk(
    model: nn.Module,
    x: Tensor,
    other_x: Tensor | None = None,
    *,
    method: Literal["closed", "montecarlo"] = "closed",
    draws: int = 100,
    seed: int = 0,
    normalize: bool = True,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Compute the neural path kernel H(x, x') = E[f(x) f(x')] of a network f with the gates that it has at the samples.

    The expectation is over independent weights of mean 0 and variance 1. For several outputs, H is their mean. A convolution has
    the same weights at all positions, so that paths which differ by a translation are one path. Paths begin at the inputs, at
    the biases and at the shifts of batch norms; the scales of batch norms are weights of the paths. For a network whose linear
    layers (without biases) and ReLUs alternate, H is `npk_from_gates(record(model, x), x)`; with biases, pass it `bias=True`.

    A layer that computes its weight from other parameters, as `SummaryLinear` does, counts with the entries of that weight.
    Operations on the input that read no parameters are preprocessing: paths begin at their results.

    Args:
        model: For "closed", a network of linear layers, convolutions, batch norm, ReLU, max- and average-pooling, flattening,
            sums and concatenations, a `GatedNetwork`, or scikit-learn's, see `from_sklearn`. For "montecarlo", any model that
            `frozen` takes.
        x: Samples of shape (n, ...), floating-point, finite, n > 0.
        other_x: Samples of shape (m, ...). Default: x.
        method: "closed" is exact and takes one pass through the graph. "montecarlo" is the mean over `draws` networks with random
            signs as weights; `npk_montecarlo` gives its standard error too.
        draws: Number of draws of "montecarlo".
        seed: Seed of "montecarlo".
        normalize: Let weights have variance 1 / fan-in instead of 1. Biases keep variance 1.
        chunk_size: Number of rows and of columns of H that are computed at a time; for "montecarlo", the number of samples.
            Default: tiles of 256 MiB; for "montecarlo", 256.
        dtype: Dtype of the arithmetic and of H: torch.float32 or torch.float64. Default: float64 for float64 samples, else
            float32. "montecarlo" computes in float64.
        progress: Show a progress bar. None shows one in a terminal or a notebook, where tqdm is installed.

    Returns:
        Tensor of shape (n, m).

    Raises:
        TypeError: The model is no `nn.Module`, or samples are not floating-point.
        UnsupportedOperation: "closed" does not follow a layer, which the message names.
        ValueError: Samples of another shape or that are not finite, an unknown method, a chunk_size below 1, a layer in training
            mode where that matters, or entries of H beyond the range of the dtype.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> _ = nn.init.ones_(model[0].weight)  # all gates are on at positive inputs
        >>> npk(model, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # <x, x'> / 2 * 3 / 3
        tensor([[ 2.5000,  5.5000],
                [ 5.5000, 12.5000]])

    Source: Lakshminarayanan & Singh (2020), arXiv 2006.10529.
    """
    if other_x is not None:
        _, other_x = from_estimator(model, other_x)
    model, x = from_estimator(model, x)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module; npk_from_gates takes gates")
    for name, samples in (("x", x), *((("other_x", other_x),) if other_x is not None else ())):
        _check_samples(samples, name)
    work = dtype or torch.promote_types(x.dtype, torch.float32)
    if method == "montecarlo":
        sampled = npk_montecarlo(
            model, x, other_x, draws=draws, seed=seed, normalize=normalize, chunk_size=chunk_size, progress=progress
        )
        return sampled.kernel.to(work)
    if method != "closed":
        raise ValueError(f"method: got {method!r}, want 'closed' or 'montecarlo'")
    network = PathNetwork(model, work)
    propagation = Propagation(network.layers(x[:1]), normalize)
    return tiled(
        (len(x), len(x if other_x is None else other_x)),
        propagation.chunk_size() if chunk_size is None else chunk_size,
        lambda rows: propagation.prepared(network.layers(x[rows])),
        None if other_x is None else lambda columns: propagation.prepared(network.layers(other_x[columns])),
        propagation.tile,
        work,
        x.device,
        progress=progress,
    )


def npk_from_gates(
    gates: Gates,
    x: Tensor | None = None,
    other_gates: Gates | None = None,
    other_x: Tensor | None = None,
    *,
    normalize: bool = True,
    bias: bool = False,
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute the neural path kernel H = <x, x'> prod_l <G_l, G'_l> of a fully connected network, from its gates.

    Args:
        gates: Gates of n samples: one tensor (n, w_l) for each layer, in order, on/off (bool) or soft (floating-point, finite).
            Or a `GateRecord` of a network whose linear layers and ReLUs alternate. For other networks, use `npk`. A record does
            not hold the network: each layer is checked to be an affine function of the one before it, which shows a skip
            connection only where there are more samples than units.
        x: Inputs (n, ...) of the network that has the weights, floating-point. None: one input that is always 1.
        other_gates: Gates of m samples, as `gates`. Default: `gates`.
        other_x: Inputs (m, ...), where other_gates and x are given.
        normalize: Divide each layer's product by its width, and <x, x'> by the number of inputs, as for weights of variance
            1 / fan-in. H is then the mean over all paths instead of the sum.
        bias: Let paths begin at the biases of all layers too: S_0 = <x, x'>, S_l = (S_{l-1} + 1) <G_l, G'_l>, H = S + 1.
            Biases count 1, also with `normalize`.
        chunk_size: Number of rows and of columns of H that are computed at a time. Default: 1,024.
        dtype: Dtype of H and of the products of gates: torch.float32 or torch.float64. Default: float64 if any argument is,
            else float32. The products of on/off gates are whole numbers, so that H is rounded once.

    Returns:
        Tensor of shape (n, m).

    Raises:
        TypeError: Gates or inputs of another kind, or another dtype.
        ValueError: Layers or inputs that do not match, values that are not finite, a chunk_size below 1, a `GateRecord` of
            another network, or entries of H beyond the range of the dtype.

    Example:
        >>> gates, x = [torch.tensor([[True, True, False], [False, True, True]])], torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> npk_from_gates(gates, x, normalize=False)  # (5, 11; 11, 25) times the units in common, (2, 1; 1, 2)
        tensor([[10., 11.],
                [11., 50.]])

    Source: Lakshminarayanan & Singh (2020), arXiv 2006.10529.
    """
    left = _layers(gates, "gates")
    right = left if other_gates is None else _layers(other_gates, "other_gates")
    _check_match(left, right)
    if other_x is not None and x is None:
        raise ValueError("other_x: given without x, want both or x alone")
    if (other_gates is None) != (other_x is None) and x is not None:
        raise ValueError("other_x: want it where other_gates and x are given, and only there")
    inputs = None
    if x is not None:
        others = x if other_x is None else other_x
        inputs = _inputs(x, len(left[0]), "x"), _inputs(others, len(right[0]), "other_x")
        if inputs[0].shape[1] != inputs[1].shape[1]:
            raise ValueError(f"other_x: got {inputs[1].shape[1]} inputs a sample, want {inputs[0].shape[1]}, as x has")
    given = [*left, *right, *(inputs or ())]
    work = dtype or (torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32)
    if work not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: got {work}, want torch.float32 or torch.float64")

    def side(layers: list[Tensor], x: Tensor | None) -> Callable[[slice], list[Tensor]]:
        factors = layers if x is None else [x, *layers]
        return lambda rows: [t[rows].to(work) for t in factors]

    def tile(a: list[Tensor], b: list[Tensor]) -> Tensor:
        # In fp64, because products on the way may be beyond the range of fp32. The result is rounded once.
        block = torch.ones(len(a[0]), len(b[0]), dtype=torch.float64, device=a[0].device)
        for place, (g, h) in enumerate(zip(a, b, strict=True)):
            if bias and (inputs is None or place > 0):
                block += 1
            block *= (g @ h.T).double() / (max(1, g.shape[1]) if normalize else 1)
        return block + 1 if bias else block

    return tiled(
        (len(left[0]), len(right[0])),
        _CHUNK_SIZE if chunk_size is None else chunk_size,
        side(left, inputs and inputs[0]),
        None if other_gates is None else side(right, inputs and inputs[1]),
        tile,
        work,
        left[0].device,
    )


def _layers(gates: Gates, name: str) -> list[Tensor]:
    """Return the gates of each layer, (n, w_l)."""
    if isinstance(gates, GateRecord):
        for site in gates.sites:
            if len(site.shape) != 1 or site.operation not in ("relu", "gate"):
                raise ValueError(
                    f"{name}: layer {site.name!r} is {site.operation} with gates of shape {tuple(site.shape)}, want ReLU on "
                    "the units of linear layers; npk(model, x) takes other networks"
                )
        _check_chain(gates, name)
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


def _check_chain(record: GateRecord, name: str) -> None:
    """Check that each layer and the output are affine functions of the ReLUs before them, as far as the samples can tell."""
    values = [(site.name, record.preactivations(site)) for site in record.sites]
    if isinstance(record.output, Tensor) and record.output.dim() == 2:
        values.append(("output", record.output))
    for site, (_, z), (then, wanted) in zip(record.sites, values, values[1:], strict=False):
        z, wanted = (value.detach()[: z.shape[1] + 65] for value in (z, wanted))  # as many samples as it takes
        n, width = z.shape
        if site.operation != "relu" or len(wanted) != n:
            continue
        h = torch.nn.functional.normalize(
            torch.cat([z.double().relu(), z.new_ones(n, 1).double()], 1), dim=0, eps=1e-300
        )
        u, s, _ = torch.linalg.svd(h, full_matrices=False)
        u = u[:, s > width * torch.finfo(z.dtype).eps * s[0]]
        wanted = wanted.double()
        rest = wanted - u @ (u.T @ wanted)  # zero for as few samples as there are dimensions
        if float(rest.norm()) > torch.finfo(z.dtype).eps ** 0.5 * float(wanted.norm()):
            raise ValueError(
                f"{name}: {then!r} is not an affine function of layer {site.name!r} alone, as where a skip connection leads "
                "around it; want linear layers and ReLUs that alternate; npk(model, x) takes other networks"
            )


def _check_match(left: list[Tensor], right: list[Tensor]) -> None:
    if len(left) != len(right):
        raise ValueError(f"other_gates: got {len(right)} layers, want {len(left)}, as gates has")
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"other_gates: layer {i} has {b.shape[1]} units, want {a.shape[1]}, as gates has")


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
