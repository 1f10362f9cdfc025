"""Handwritten digits on a plane: a parametric t-SNE, and for each digit the two images that show how its pixels move it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.experiments import common, datasets, embedding
from interp_nn.explain.tsne import ParametricTSNE

NAME = "digits_tsne"
LEARNING_RATE = 1e-3


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    images = datasets.digits()
    x_train, x = (images.x_train.double() + 1) / 2, (images.x_test.double() + 1) / 2  # ink is 0 to 1
    if given.quick:
        x_train, x = x_train[:200], x[:60]
    y_train, y = images.y_train[: len(x_train)], images.y_test[: len(x)]

    epochs = 3 if given.quick else 100
    torch.manual_seed(given.seed)
    tsne = ParametricTSNE(
        embedding.published_encoder(x_train[0].numel()), epochs=epochs, learning_rate=LEARNING_RATE,
        exaggeration_epochs=epochs // 5, seed=given.seed, progress=True,
    )  # fmt: skip
    placed_train, placed = tsne.fit_transform(x_train.float()), tsne.transform(x.float())
    tsne.encoder_.double()
    linear = tsne.linearize(x)
    results: dict[str, Any] = {
        "points": {"fitted": len(x_train), "new": len(x)},
        "divergence": tsne.kl_,
        **embedding.quality(placed_train, placed, x_train, y_train, x, y),
        "exactness_float64": embedding.errors(tsne.encoder_, linear, x, given.seed),
    }
    share = results["neighbour_accuracy"]["new points"]
    title = f"t-SNE of digits: {share:.1%} of new points (with a rim) lie among fitted ones of their class"
    embedding.draw_plane(run, title, (placed_train, y_train), (placed, y), tsne.kl_)
    embedding.draw_movement(run, x, y, linear.weight)
    run.finish({"epochs": epochs, "batch": tsne.batch_size, "learning_rate": tsne.learning_rate}, results, epochs)
    return 0
