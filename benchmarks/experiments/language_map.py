"""The linear map of a language model: errors, and time and memory of explanations with and without W.

The model is a small Llama of random weights: RMS norms, grouped-query attention with rotary positions, SwiGLU, no bias.
CPU seconds are those of one call on one thread, under a profiler that counts its memory besides the model. `gradient` is the
least that a product with Wᵀ takes: the model, and the logit's derivative by the embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.experiments import common
from benchmarks.timing.footprint import peak_bytes
from interp_nn.explain.linear.affine_map import AffineMap, linearize
from interp_nn.explain.linear.language_models import singular_directions, token_contributions

NAME = "language_map"
ROWS = 64  # of W at a time
DIRECTIONS = 4
_Result = TypeVar("_Result")


class Size(NamedTuple):
    """The model's, and the numbers of tokens at which W is formed and is not."""

    layers: int = 8
    width: int = 512
    hidden: int = 1376
    heads: int = 8
    groups: int = 4
    vocabulary: int = 4096
    formed: int = 256
    products: int = 2048


QUICK = Size(2, 32, 48, 4, 2, 64, 8, 16)


class Block(nn.Module):
    """Attention and SwiGLU, each after a norm and beside a shortcut."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, hidden, narrow = size.width, size.hidden, size.groups * size.width // size.heads
        self.heads, self.groups = size.heads, size.groups
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, narrow, bias=False), nn.Linear(width, narrow, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute the block's output for x (n, t, width)."""
        h = self.before(x)
        query = _rotated(_split(self.query(h), self.heads), cos, sin)
        key = _rotated(_split(self.key(h), self.groups), cos, sin)
        value = _split(self.value(h), self.groups)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Token ids (n, t) to logits (n, t, vocabulary)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.width), nn.Linear(size.width, size.vocabulary, bias=False)
        self.pairs = size.width // size.heads // 2

    def state(self, x: Tensor) -> Tensor:
        """Compute the last hidden states (n, t, width) of embeddings x."""
        places, steps = (torch.arange(k, dtype=x.dtype) for k in (x.shape[1], self.pairs))
        angles = places.unsqueeze(1) * 10000.0 ** -(steps / self.pairs)
        for block in self.blocks:
            x = block(x, angles.cos(), angles.sin())
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits."""
        return self.head(self.state(self.tokens(ids)))


class States(nn.Module):
    """Token ids (n, t) to the last position's hidden state (n, width)."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the state."""
        return self.model.state(self.model.tokens(ids))[:, -1]


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def measured(call: Callable[[], _Result]) -> tuple[dict[str, float], _Result]:
    """Return CPU seconds and peak memory of a call, and its result."""
    start = time.process_time()
    peak, result = peak_bytes(call, torch.device("cpu"))
    return {"cpu_seconds": time.process_time() - start, "peak_mb": peak / 1e6}, result


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    size = QUICK if given.quick else Size()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    model = Llama(size).eval()
    ids = torch.randint(size.vocabulary, (1, size.products))
    token_contributions(model, ids[:, :2])  # imports what the first of all calls imports
    results = {
        "error_of_the_state": {},
        f"{size.formed} tokens": _formed(model, ids[:, : size.formed]),
        f"{size.products} tokens, by products": _by_products(model, ids),
    }
    results["error_of_the_state"] = {
        "float32": _error(model, ids[:, : size.formed]),
        "float64": _error(model.double(), ids[:, : size.formed]),
    }
    run.finish({**size._asdict(), "rows_of_W_at_a_time": ROWS, "directions": DIRECTIONS}, results)
    return 0


def _error(model: Llama, ids: Tensor) -> float:
    """Return Golden's measure |h - (W e + b)| / |h| for the last position's state h."""
    with torch.no_grad():
        wanted = States(model)(ids)
        return float((linearize(States(model), ids)(model.tokens(ids)) - wanted).norm() / wanted.norm())


def _by_products(model: Llama, ids: Tensor) -> dict[str, Any]:
    """Measure what does not form W, at all tokens."""

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids)

    def gradient() -> Tensor:
        e = model.tokens(ids).detach().requires_grad_()
        return torch.autograd.grad(model.head(model.state(e))[0, -1, 0], e)[0]

    rows: dict[str, Any] = {}
    rows["forward"], _ = measured(forward)
    rows["gradient"], _ = measured(gradient)
    rows["token contributions"], found = measured(lambda: token_contributions(model, ids))
    rows["token contributions"]["check"] = found.check()
    rows["token contributions"]["over_gradient"] = (
        rows["token contributions"]["cpu_seconds"] / rows["gradient"]["cpu_seconds"]
    )
    rows["W_of_a_state_would_have_mb"] = model.tokens(ids).numel() * model.head.in_features * 4 / 1e6
    return rows


def _formed(model: Llama, ids: Tensor) -> dict[str, Any]:
    """Measure the explanations with and without W."""
    rows = _by_products(model, ids)
    rows["directions by products"], found = measured(lambda: singular_directions(model, ids, DIRECTIONS))

    def weight() -> tuple[AffineMap, Tensor]:
        affine = linearize(States(model), ids, chunk_size=ROWS)
        return affine, affine.weight

    rows["W of a state"], (affine, formed) = measured(weight)
    with torch.no_grad():
        wanted = States(model)(ids)
        error = torch.einsum("nktd,ntd->nk", formed, model.tokens(ids)) + affine.bias - wanted
    rows["W of a state"]["error_of_the_state"] = float(error.norm() / wanted.norm())
    rows["directions of W"], exact = measured(lambda: affine.svd(DIRECTIONS))
    values = exact.values
    rows["directions by products"]["error_of_the_values"] = float((found.values - values).abs().max() / values[0, 0])
    rows["directions of W"]["share_of_the_squares"] = float(values.square().sum() / formed.square().sum())
    return rows
