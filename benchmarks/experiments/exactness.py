"""How exact W x + b is: at x, anywhere in a network with the gates of x, and near x in the network itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.experiments import common
from interp_nn.explain.following.gate_record import frozen
from interp_nn.explain.linear.affine_map import linearize

STEPS = (1e-6, 1e-4, 1e-2)


def apply(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """W x + b of images (n, c, h, w), for W (n, k, c, h, w) and b (n, k)."""
    return torch.einsum("nkchw,nchw->nk", weight, x) + bias


def errors(network: nn.Module, x: Tensor) -> dict[str, float]:
    """How far W x + b is from the network at x, and from the replay with the gates of x at a point far away."""
    linear = linearize(network, x)
    far = torch.randn_like(x)
    with torch.no_grad():
        logits, replayed = network(x), frozen(network, x)(far)
    return {
        "at_x": common.relative_error(apply(linear.weight, linear.bias, x), logits),
        "replay_at_a_far_point": common.relative_error(apply(linear.weight, linear.bias, far), replayed),
    }


def neighbourhood(network: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """The error of W (x + s) + b for steps s of some sizes, over the change of the output: medians over images.

    On images as they are, any step can leave the region: where they are flat, all pixels that a pooling compares are equal.
    """
    steps = torch.randn_like(x)
    found: dict[str, dict[str, float]] = {}
    for name, points in (("images", x), ("images with noise of 0.01", x + 0.01 * torch.randn_like(x))):
        linear = linearize(network, points)
        found[name] = {}
        for size in STEPS:
            with torch.no_grad():
                moved, still = network(points + size * steps), network(points)
            error = (moved - apply(linear.weight, linear.bias, points + size * steps)).norm(dim=1)
            found[name][f"{size:g}"] = (error / (moved - still).norm(dim=1)).median().item()
    return found
