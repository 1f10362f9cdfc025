"""The reference's small CNN, with its MLP head and with a summary head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interp_nn.nn import SummaryHead

CLASSES = 10
LATENT = 120


def body(channels: int, size: int) -> nn.Sequential:
    """Two convolutions with ReLU and pooling: 5 x 5 as in the reference, padded 3 x 3 for images under 16 pixels."""
    kernel, padding = (3, 1) if size < 16 else (5, 0)
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )


class MLPNetwork(nn.Module):
    """The body and the reference's base head, features-120-84-10 with ReLU, trained by cross entropy."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.body = body(channels, size)
        self.head = nn.Sequential(
            nn.Linear(_features(self.body, channels, size), LATENT),
            nn.ReLU(),
            nn.Linear(LATENT, 84),
            nn.ReLU(),
            nn.Linear(84, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.body(images))

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the logits."""
        return nn.functional.cross_entropy(self(images), target)


class SummaryNetwork(nn.Module):
    """The same body and a SummaryHead features-120-10, trained by the three-term loss."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.body = body(channels, size)
        self.head = SummaryHead(_features(self.body, channels, size), LATENT, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """The pair of logits in training mode, the projection's in evaluation mode."""
        return self.head(self.body(images))

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """CE(o1) + CE(o2) + MSE(o1, o2), from the features."""
        return self.head.loss(self.body(images), target)


Network = MLPNetwork | SummaryNetwork
NETWORKS: dict[str, type[MLPNetwork] | type[SummaryNetwork]] = {"mlp": MLPNetwork, "summary": SummaryNetwork}


def _features(module: nn.Module, channels: int, size: int) -> int:
    with torch.no_grad():
        return module(torch.zeros(1, channels, size, size)).shape[1]
