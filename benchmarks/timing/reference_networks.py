"""The reference networks: a small CNN and a vgg11, each with its base head and with a summary head."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.nn import SummaryHead

CLASSES = 10
_VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")


def cnn_body(channels: int, size: int) -> nn.Sequential:
    """Build two convolutions with ReLU and pooling: 5 x 5 as in the reference, padded 3 x 3 for images under 16 pixels."""
    kernel, padding = (3, 1) if size < 16 else (5, 0)
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel, padding=padding), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip


class HeConv2d(nn.Conv2d):
    """A convolution initialised as in the reference's vgg11: He et al. (2015) by fan-out, zero biases."""

    def reset_parameters(self) -> None:
        """Draw the weights, and set the biases to zero."""
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def vgg11_body(channels: int, size: int) -> nn.Sequential:
    """Build the convolutions of vgg11 without batch norm, which halve images of 32 pixels or more five times."""
    layers: list[nn.Module] = []
    for width in _VGG11:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [HeConv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten())


class Architecture(NamedTuple):
    """A body, the hidden widths of its base head and the dropout before each, and the latent width of its summary head."""

    body: Callable[[int, int], nn.Sequential]
    hidden: tuple[int, ...]
    dropout: float
    latent: int


ARCHITECTURES = {
    "cnn": Architecture(cnn_body, (120, 84), 0.0, 120),
    "vgg11": Architecture(vgg11_body, (512, 512), 0.5, 100),
}


class MLPNetwork(nn.Module):
    """A body and the reference's base head, with ReLU between its layers, trained by cross entropy."""

    def __init__(self, channels: int, size: int, architecture: str = "cnn", classes: int = CLASSES) -> None:
        super().__init__()
        body, hidden, dropout, _ = ARCHITECTURES[architecture]
        self.body = body(channels, size)
        layers: list[nn.Module] = []
        width = _features(self.body, channels, size)
        for units in hidden:
            layers += [*([nn.Dropout(dropout)] if dropout else []), nn.Linear(width, units), nn.ReLU()]
            width = units
        self.head = nn.Sequential(*layers, nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.body(images))

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy of the logits."""
        return nn.functional.cross_entropy(self(images), target)


class SummaryNetwork(nn.Module):
    """The same body and a SummaryHead, features-latent-classes, trained by the three-term loss.

    The attribute `reconstruction` is the weight of a fourth term, by which the codes come to explain the features.
    """

    reconstruction = 0.0

    def __init__(self, channels: int, size: int, architecture: str = "cnn", classes: int = CLASSES) -> None:
        super().__init__()
        found = ARCHITECTURES[architecture]
        self.body = found.body(channels, size)
        self.head = SummaryHead(_features(self.body, channels, size), found.latent, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the pair of logits in training mode, the projection's logits in evaluation mode."""
        return self.head(self.body(images))

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Return CE(o1) + CE(o2) + MSE(o1, o2) from the features, and the reconstruction's term."""
        return self.head.loss(self.body(images), target, reconstruction=self.reconstruction)


class LinearNetwork(nn.Module):
    """The same body and two layers with as many parameters as the summary head's, features-latent-classes, without a ReLU."""

    def __init__(self, channels: int, size: int, architecture: str = "cnn", classes: int = CLASSES) -> None:
        super().__init__()
        found = ARCHITECTURES[architecture]
        self.body = found.body(channels, size)
        features = _features(self.body, channels, size)
        self.head = nn.Sequential(nn.Linear(features, found.latent, bias=False), nn.Linear(found.latent, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.body(images))

    def loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy of the logits."""
        return nn.functional.cross_entropy(self(images), target)


Network = MLPNetwork | SummaryNetwork
NETWORKS: dict[str, type[MLPNetwork] | type[SummaryNetwork]] = {"mlp": MLPNetwork, "summary": SummaryNetwork}


def _features(module: nn.Module, channels: int, size: int) -> int:
    with torch.no_grad():
        return module(torch.zeros(1, channels, size, size)).shape[1]
