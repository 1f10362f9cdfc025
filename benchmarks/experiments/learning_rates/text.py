"""Text for a language model of characters: the reference of Python that every installation of it carries for `help()`."""

from __future__ import annotations

import functools
import hashlib
import math
import pydoc_data.topics
from typing import NamedTuple

import torch
from torch import Tensor, nn

BATCH, CONTEXT = 8, 128


class Corpus(NamedTuple):
    """Characters as numbers (n,) int64: the first nine tenths of the topics by name, and the last. `digest` is of all."""

    train: Tensor
    validation: Tensor
    characters: int
    digest: str


@functools.cache
def corpus() -> Corpus:
    """Read `pydoc_data.topics`, which differs between Python's versions."""
    topics = [body for _, body in sorted(pydoc_data.topics.topics.items())]
    alphabet = sorted(set("".join(topics)))
    number = {character: i for i, character in enumerate(alphabet)}
    split = 9 * len(topics) // 10
    train, validation = (torch.tensor([number[c] for c in "".join(part)]) for part in (topics[:split], topics[split:]))
    return Corpus(train, validation, len(alphabet), hashlib.sha256("".join(topics).encode()).hexdigest()[:16])


def batch(tokens: Tensor, draw: torch.Generator) -> Tensor:
    """Draw texts with one more character than the context (batch, context + 1)."""
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=draw)
    return tokens[starts + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def validation_loss(network: nn.Module, tokens: Tensor) -> float:
    """Return the mean cross entropy in nats of the same 64 texts, spread evenly."""
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, 64).long()[:, None]
    texts = tokens[starts + torch.arange(CONTEXT + 1)]
    return float(nn.functional.cross_entropy(network(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten()))


def schedule(step: int, steps: int) -> float:
    """Return the share of the rate in a step: linear for 5 % of the steps, then a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
