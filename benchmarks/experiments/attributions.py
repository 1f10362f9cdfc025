"""Attributions of one output per sample to the pixels, and deletion and insertion curves of pixels in their order.

Deletion and insertion are those of Petsiuk, Das & Saenko (BMVC 2018): the probability of the class that was predicted, as pixels
go to 0 from the one that supports it most on, or come back from an image of zeros; a good order has a small area under the first
curve and a large one under the second.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.explain.linear.instance_linearization import InstanceLinearization

PATH = 32  # points between 0 and x, of integrated gradients
AT_ONCE = 50  # images


class Curves(NamedTuple):
    """The mean probability of the predicted class at each share of the pixels, and the area under it: mean and standard error."""

    probability: list[float]
    area: float
    standard_error: float


def exact(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Return W[k] * x of the affine map of each x, for output k."""
    found = InstanceLinearization(network).attribute(x, target=target, internal_batch_size=AT_ONCE)
    assert isinstance(found, Tensor)
    return found.detach()


def gradient_times_input(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Compute gradient x input by autograd (Shrikumar et al. 2016)."""
    return torch.cat(
        [part * _gradient(network, part, k) for part, k in zip(x.split(AT_ONCE), target.split(AT_ONCE), strict=True)]
    )


def integrated_gradients(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Integrate gradients from a baseline of 0 (Sundararajan et al. 2017), by the midpoint rule."""
    total = torch.zeros_like(x)
    for step in range(PATH):
        total += gradient_times_input(_Scaled(network, (step + 0.5) / PATH), x, target)
    return total / PATH


def curves(network: nn.Module, x: Tensor, target: Tensor, scores: Tensor, shares: list[float]) -> dict[str, Curves]:
    """Compute deletion and insertion by scores (n, height, width), at shares of the pixels from 0 to 1."""
    order = scores.flatten(1).argsort(1, descending=True)
    found: dict[str, list[Tensor]] = {"deletion": [], "insertion": []}
    for share in shares:
        chosen = order[:, : round(share * order.shape[1])]
        first = torch.zeros_like(order, dtype=x.dtype).scatter(1, chosen, 1.0).view_as(scores).unsqueeze(1)
        for name, kept in (("deletion", 1 - first), ("insertion", first)):
            found[name].append(_probability(network, x * kept, target))
    widths = torch.tensor(shares, dtype=torch.float64).diff()
    results = {}
    for name, points in found.items():
        each = torch.stack(points, 1).double().cpu()  # (n, shares)
        areas = ((each[:, 1:] + each[:, :-1]) / 2) @ widths
        error = areas.std().item() / len(areas) ** 0.5 if len(areas) > 1 else 0.0
        results[name] = Curves(each.mean(0).tolist(), areas.mean().item(), error)
    return results


class _Scaled(nn.Module):
    """A network at scale * x, divided by scale, so that its gradient in x is the gradient at the point."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.scale * x) / self.scale


def _gradient(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    points = x.detach().requires_grad_()
    chosen = network(points).gather(1, target.unsqueeze(1))
    return torch.autograd.grad(chosen.sum(), points)[0]


@torch.no_grad()
def _probability(network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits = torch.cat([network(part) for part in x.split(250)])
    return logits.softmax(1).gather(1, target.unsqueeze(1)).squeeze(1)
