"""The exactness of W x + c: at x, anywhere in a network with the gates of x, and near x in the network; and its constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments import common
from interp_nn.explain.following.gate_record import frozen
from interp_nn.explain.linear.affine_map import linearize

STEPS = (1e-6, 1e-4, 1e-2)


def apply(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Compute W x + c of images (n, c, h, w), for a weight (n, k, c, h, w) and a constant (n, k)."""
    return torch.einsum("nkchw,nchw->nk", weight, x) + bias


def errors(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Return the error of W x + c at x, and against the replay with the gates of x at a distant point."""
    linear = linearize(network, x)
    far = torch.randn_like(x)
    with torch.no_grad():
        logits, replayed = network(x), frozen(network, x)(far)
    return {
        "at_x": common.relative_error(apply(linear.weight, linear.bias, x), logits),
        "replay_at_a_far_point": common.relative_error(apply(linear.weight, linear.bias, far), replayed),
    }


def neighbourhood(network: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """Return the error of W (x + s) + b for steps s of some sizes, over the change of the output: medians over images.

    On images without noise any step can leave the region: in flat areas, all pixels that a pooling compares are equal.
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


def constants(network: nn.Module, x: Tensor, predicted: Tensor, chunk_size: int) -> dict[str, Any]:
    """Return the share of the constant c in the logits F, and in the predicted logit by layer."""
    biases, logits, layers = [], [], []
    for part in x.split(chunk_size):
        linear = linearize(network, part)
        with torch.no_grad():
            logits.append(network(part))
        biases.append(linear.bias.detach())
        layers.append({name: one.detach() for name, one in linear.bias_by_layer().items()})
    b, outputs = torch.cat(biases), torch.cat(logits)
    by_layer = {name: torch.cat([one[name] for one in layers]) for name in layers[0]}
    rows = torch.arange(len(x), device=x.device)
    constant, logit = b[rows, predicted], outputs[rows, predicted]
    outweighs = constant.abs() > (logit - constant).abs()
    return {
        "norm_of_b_over_norm_of_logits": (b.norm() / outputs.norm()).item(),
        "mean_predicted_logit": logit.mean().item(),
        "mean_of_its_constant": constant.mean().item(),
        "median_share_of_its_constant": (constant / logit).median().item(),
        "images_whose_constant_outweighs_the_pixels": outweighs.double().mean().item(),
        "mean_of_its_constant_by_layer": {name: one[rows, predicted].mean().item() for name, one in by_layer.items()},
        "sum_of_layers_error": common.relative_error(torch.stack(list(by_layer.values())).sum(0), b),
    }
