"""Providers of one layer: a SummaryLinear with a polynomial, and the layers that a user could take instead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.records.report import REPEAT
from benchmarks.timing import providers, tolerances
from benchmarks.timing.problems import LAYERS, MICROBATCHES, Data, Problem
from benchmarks.timing.providers import OURS, Provider, UnsupportedError
from interp_nn.nn import SummaryLinear, cached_weights, update_spectral_norms
from interp_nn.nn.polynomials import NAMED as POLYNOMIALS
from interp_nn.nn.polynomials import SUMMARY

# The others of NAMES are described in `providers.ABOUT`.
ABOUT = {
    "ours-cached": "ours, with the weight formed once for all microbatches by cached_weights",
    "compile-ours": "torch.compile of ours; `compile` is that of the layer's unfused expression",
    "pc-layer": "PC-layer's module (arXiv 2606.06470): Horner's rule on the smaller Gram matrix, σ = uᵀWv differentiated",
    "spectral-norm": "nn.Linear with torch's spectral_norm, which takes a power iteration in each forward",
}
NAMES = (*OURS, "linear", "unfused", "compile", "orthogonal", *providers.INVERSES, *ABOUT, REPEAT)


class Unfused(nn.Module):
    """The function of a SummaryLinear without a bias as PyTorch's operations, m X a b q(a² bᵀb), with the layer's parameters."""

    scale: Tensor | None

    def __init__(self, layer: SummaryLinear) -> None:
        super().__init__()
        self.b, self.gain, self.restore = layer.b, layer.gain, layer.normalize == "restore"
        self.coefficients = POLYNOMIALS[str(layer.polynomial)]
        self.register_buffer("scale", layer.scale if layer.normalize else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of inputs (..., d)."""
        if self.coefficients == SUMMARY:
            return tolerances.naive(x, self.b)
        assert self.scale is not None and self.gain is not None
        *rest, second, last = self.coefficients
        b = self.b * self.scale
        gram, eye = b.mT @ b, torch.eye(b.shape[1], dtype=b.dtype, device=b.device)
        q = second * eye + last * gram
        for c in reversed(rest):
            q = gram @ q + c * eye
        return (self.gain / self.scale if self.restore else self.gain) * (x @ b @ q)


def build(name: str, problem: Problem, mode: str, sets: Sequence[Data], engine: str, best: str | None) -> Provider:
    """Build one of NAMES for a problem of LAYERS, with the weights of the sets; raises UnsupportedError."""
    if name == "ours-cached" and mode != "step":
        raise UnsupportedError("it forms the weight once for several microbatches")
    if name in providers.INVERSES and LAYERS[problem.op] != "summary":
        raise UnsupportedError("the inverse is a baseline of the summary")
    if name in ("orthogonal", *providers.INVERSES):
        if mode in ("step", "update"):
            raise UnsupportedError("not timed in this mode")
        return providers.build(name, problem, mode, sets, engine, best)
    plan = None
    if (ours := "ours" in name) and mode != "update":
        engine = OURS.get(name) or engine
        plan = providers.planned(engine, problem, mode, sets[0].x.device)
    layers = [_layer(name, problem, t) for t in sets]
    plain = layers
    if isinstance(layers[0], SummaryLinear):
        plain = [Unfused(layer) for layer in layers if isinstance(layer, SummaryLinear)]
    used, call = layers if ours else plain, _call
    if name.startswith("compile"):
        call = providers.compiled(problem, name, _call)
    if mode == "update":
        provider = _update(name, layers)
    elif mode == "step":
        provider = _microbatches(used, plain[0], sets, call, name == "ours-cached")
    else:
        provider = providers.of_layers(used, plain[0], sets, call)
    family = "ours" if isinstance(layers[0], SummaryLinear) else name
    return provider._replace(family=family, plan=plan, engine=engine if ours else None)


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


def _layer(name: str, problem: Problem, t: Data) -> nn.Module:
    """Make a layer without a bias and with the weight of a set. Its spectral norm has converged."""
    d, k, polynomial = problem.d, problem.k, LAYERS[problem.op]
    layer: nn.Module
    if name == "pc-layer":
        from benchmarks.experiments.learning_rates.layers import CANDIDATES, Linear  # with packages that draw figures

        if polynomial.upper() not in CANDIDATES:
            raise UnsupportedError("PC-layer has other polynomials")
        layer = Linear(d, k, CANDIDATES[polynomial.upper()], bias=False)
    elif name in ("linear", "spectral-norm"):
        layer = nn.Linear(d, k, bias=False)
    else:
        layer = SummaryLinear(d, k, bias=False, polynomial=polynomial)
    layer.to(t.x.device, t.x.dtype)
    with torch.no_grad():
        if isinstance(layer, SummaryLinear):
            layer.b.copy_(t.w.mT)
        else:
            layer.get_parameter("weight").copy_(t.w)
        if name == "spectral-norm":
            spectral_norm(layer)
        left, _, right = torch.linalg.svd(t.w.double(), full_matrices=False)
        vectors = {"u": left[:, 0], "v": right[0]}
        if isinstance(layer, SummaryLinear):  # of b, the transpose
            vectors = {"u": right[0], "v": left[:, 0]}
        for key, buffer in layer.named_buffers():
            if (vector := vectors.get(key.rpartition(".")[2].strip("_"))) is not None:
                buffer.copy_(vector)
    update_spectral_norms(layer)
    return layer


def _update(name: str, layers: Sequence[nn.Module]) -> Provider:
    """Make the provider of the power iterations that follow a step, which set one over the spectral norm of b."""
    if name != "ours":
        raise UnsupportedError("ours alone has an update to call")

    def call(i: int) -> list[Tensor]:
        update_spectral_norms(layers[i])
        return [layers[i].get_buffer("scale")]

    b = layers[0].get_parameter("b")

    def scale() -> Tensor:
        return 1 / torch.linalg.matrix_norm(b.double(), 2)

    return Provider(
        lambda i: call(i)[0], lambda i: (b,), "", lambda _: scale().to(b.dtype), lambda: (scale, (b,)), direct=call
    )  # fmt: skip


def _microbatches(
    layers: Sequence[nn.Module], plain: nn.Module, sets: Sequence[Data], call: Callable[[nn.Module, Tensor], Tensor], cached: bool
) -> Provider:  # fmt: skip
    """Make the provider of a step's forwards and backwards, whose results are the gradients of the parameters."""
    parts = [
        [
            (x.detach().requires_grad_(), dy)
            for x, dy in zip(t.x.tensor_split(MICROBATCHES), t.dy.tensor_split(MICROBATCHES), strict=True)
        ]
        for t in sets
    ]

    def step(i: int) -> list[Tensor]:
        leaves = list(layers[i].parameters())
        for leaf in (*leaves, *(x for x, _ in parts[i])):
            leaf.grad = None
        with cached_weights(layers[i]) if cached else contextlib.nullcontext():
            for x, dy in parts[i]:
                call(layers[i], x).backward(dy)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    whole = providers.of_layers(layers, plain, sets, call)

    def exact() -> tuple[Callable[[], Tensor], tuple[Tensor, ...]]:
        function, leaves = whole.exact()
        return function, leaves[1:]

    return whole._replace(leaves=lambda i: whole.leaves(i)[1:], exact=exact, direct=step, gradients=whole.gradients[1:])
