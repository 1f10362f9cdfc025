"""The networks of the sweep, built with a candidate in the place of their linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.experiments.learning_rates.layers import Candidate, conv2d, linear


def mlp(candidate: Candidate) -> nn.Module:
    """Build layers of 64, 128, 64 and 10 units for digits of 8 x 8."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise((64, 128, 64, 10)):
        layers += [linear(fan_in, fan_out, candidate), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(candidate: Candidate) -> nn.Module:
    """Build two convolutions and two linear layers for digits of 8 x 8."""
    return nn.Sequential(
        conv2d(1, 16, 3, 1, candidate), nn.ReLU(), conv2d(16, 32, 3, 2, candidate), nn.ReLU(), nn.Flatten(),
        linear(512, 64, candidate), nn.ReLU(), linear(64, 10, candidate),
    )  # fmt: skip


class Attention(nn.Module):
    """Self-attention; queries, keys and values are three layers."""

    def __init__(self, width: int, heads: int, causal: bool, layer: Callable[[int, int], nn.Module], qkv: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        inner = layer if qkv else nn.Linear
        self.q, self.k, self.v = (inner(width, width) for _ in range(3))
        self.out = layer(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, tokens, width) for (n, tokens, width)."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block; the candidate is in the MLP, after attention, and with `qkv` before it too."""

    def __init__(self, width: int, heads: int, hidden: int, candidate: Candidate, causal: bool, qkv: bool) -> None:
        super().__init__()

        def layer(fan_in: int, fan_out: int) -> nn.Module:
            return linear(fan_in, fan_out, candidate)

        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal, layer, qkv)
        self.mlp = nn.Sequential(layer(width, hidden), nn.GELU(), layer(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, tokens, width) for (n, tokens, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Two blocks over the eight rows of a digit; all layers of the blocks are replaced."""

    def __init__(self, candidate: Candidate) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.position = nn.Parameter(0.02 * torch.randn(8, 64))
        self.blocks = nn.Sequential(*(Block(64, 4, 128, candidate, causal=False, qkv=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 10) of digits (n, 1, 8, 8)."""
        x = self.blocks(self.embed(x.squeeze(1)) + self.position)
        return self.head(self.norm(x.mean(1)))


class GPT(nn.Module):
    """A language model of characters; the candidate is in the MLPs and after attention, as in the PC-layer paper.

    Args:
        characters: Size of the alphabet.
        candidate: The candidate.
        width: Size of a token.
        depth: Number of blocks.
        context: Most tokens of a text.
    """

    def __init__(
        self, characters: int, candidate: Candidate, width: int = 160, depth: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        blocks = (Block(width, 4, 4 * width, candidate, causal=True, qkv=False) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (n, tokens, characters) of tokens (n, tokens) int64."""
        x = self.blocks(self.embed(tokens) + self.position[: tokens.shape[1]])
        return self.head(self.norm(x))


NETWORKS: dict[str, Callable[[Candidate], nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Transformer}
