"""MNIST on a plane: a parametric t-SNE, and for each image the two that show how its pixels move it.

The network of van der Maaten (AISTATS 2009), 500-500-2000-2, trained on the divergence by Adam from a random start: a fifth of
the epochs with attraction counted four times, then, with Adam begun anew, the rest, in which its rate falls to 0.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experiments import common, embedding, images
from benchmarks.experiments.images import Budget
from interp_nn.explain.linear.affine_map import linearize
from interp_nn.explain.tsne import joint_probabilities, tsne_loss

NAME = "mnist_tsne"
LEARNING_RATE = 1e-3
PERPLEXITY = 30.0
EXAGGERATION, EXAGGERATED = "attraction x 4", 4.0
TSNE = "t-SNE"
EXPLAINED = 200  # test images
CPU = Budget(10_000, 2000, 50, batch=500)
GPU = Budget(None, None, 100, batch=500)
QUICK = Budget(120, 60, 5, batch=60)


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status, 2 without the data."""
    options = images.parser(NAME, __doc__)
    options.add_argument("--perplexity", type=float, default=PERPLEXITY, help="below the images of a batch, less one")
    given = options.parse_args(arguments)
    found = images.load(given, "mnist")
    run = common.Run(NAME, given)
    chosen, recipe = images.within(found, given, CPU, GPU, QUICK, LEARNING_RATE)
    recipe = recipe._replace(batch=min(recipe.batch, len(chosen.y_train)))
    if not 1 < given.perplexity < recipe.batch - 1:
        options.error(f"--perplexity: got {given.perplexity:g} for batches of {recipe.batch} images")
    whole = len(chosen.y_train) - len(chosen.y_train) % recipe.batch  # all batches of one size
    x_train, x = ((part + 1) / 2 for part in (chosen.x_train[:whole], chosen.x_test))  # ink is 0 to 1
    y_train, y = chosen.y_train[:whole], chosen.y_test
    first = recipe.epochs // 5
    phases = {EXAGGERATION: (first, EXAGGERATED), TSNE: (recipe.epochs - first, 1.0)}
    phases = {name: phase for name, phase in phases.items() if phase[0]}

    def measure(network: nn.Module) -> dict[str, float]:
        return {"accuracy": embedding.accuracy(_placed(network, x_train), y_train, _placed(network, x), y)}

    settings = {**images.settings(chosen), "perplexity": given.perplexity, "exaggeration": EXAGGERATED}
    trainer = common.Trainer(NAME, given, given.seeds * len(phases), settings)
    planes: list[dict[str, Any]] = []
    untrained = partial(embedding.published_encoder, x[0].numel())
    for seed in range(given.seeds):
        network: nn.Module | None = None
        for name, (epochs, exaggeration) in phases.items():
            source = None if network is None else EXAGGERATION
            build = untrained if network is None else partial(copy.deepcopy, network)
            objective = partial(_loss, given.perplexity, exaggeration)
            steps = recipe._replace(epochs=epochs, decay=name == TSNE)
            network = trainer(name, seed, build, x_train, y_train, steps, measure, objective, source)
        assert network is not None
        divergence = trainer.rows[-1]["history"]["loss"]
        placed = _placed(network, x_train), _placed(network, x)
        linear = linearize(network.double(), x[:EXPLAINED].double())
        planes.append(
            {
                "divergence": divergence,
                **embedding.quality(*placed, x_train, y_train, x, y),
                "exactness_float64": embedding.errors(network, linear, x[:EXPLAINED].double(), seed),
            }
        )
        if seed == 0:
            share = planes[0]["neighbour_accuracy"]["new points"]
            title = f"t-SNE of MNIST: {share:.1%} of new images (with a rim) lie among fitted ones of their class"
            fitted, new = ((points.cpu(), labels.cpu()) for points, labels in zip(placed, (y_train, y), strict=True))
            embedding.draw_plane(run, title, fitted, new, divergence)
            embedding.draw_movement(run, x[:EXPLAINED], y[:EXPLAINED], linear.weight)
    results = {"points": {"fitted": whole, "new": len(y)}, "planes": planes, "trainings": trainer.record()}
    budget = {**images.budget(chosen, recipe, given), "phases": phases, "perplexity": given.perplexity}
    run.finish({**budget, "images_explained": min(EXPLAINED, len(y))}, results, recipe.epochs)
    return 0


def _loss(perplexity: float, exaggeration: float, network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return tsne_loss(network(x), joint_probabilities(x, perplexity), exaggeration)


@torch.no_grad()
def _placed(network: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([network(part) for part in x.split(1000)])
