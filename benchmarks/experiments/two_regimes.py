"""Two made regimes, y = 2 x2 where x1 > 0 and -x3 elsewhere: a network's clusters against them."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib import pyplot as plt
from tqdm import tqdm

from benchmarks.experiments import common, tabular
from interp_nn.explain import plots
from interp_nn.explain.clusters.activation_clusters import ActivationClusters

NAME = "two_regimes"
WIDTHS = (3, 16, 16, 1)
LEARNING_RATE = 5e-3
HEIGHT = 0.8  # of the plane that is drawn
CLEAR = 0.2  # from the border between the regimes
TRUTH = {"x1 > 0.2": (0.0, 2.0, 0.0), "x1 < -0.2": (0.0, 0.0, -1.0)}


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    table = tabular.two_regimes(500 if given.quick else 5000, seed=given.seed)
    network = tabular.mlp(*WIDTHS, seed=given.seed)
    steps = 100 if given.quick else 4000
    mse = tabular.train(
        network, table, steps=steps, learning_rate=LEARNING_RATE, progress=lambda r: tqdm(r, desc="training")
    )

    clusters = ActivationClusters(network.eval()).fit(table.x)
    coverage = clusters.coverage()
    coefficients = clusters.importance(kind="coef")[clusters.labels_]
    side = dict(zip(TRUTH, (table.x[:, 0] > CLEAR, table.x[:, 0] < -CLEAR), strict=True))
    # Four: the regimes, and the two steep walls between them, where the network joins one to the other.
    merged = clusters.merge(min(4, len(clusters.counts_)), by="coef")
    results: dict[str, Any] = {
        "samples": len(table.y),
        "mse": mse,
        "variance": table.y.var().item(),
        "clusters": len(clusters.counts_),
        "coverage_of_10_largest": coverage[min(10, len(coverage)) - 1].item(),
        "check": clusters.check(),
        "median_coefficients": {name: coefficients[where].median(0).values.tolist() for name, where in side.items()},
        "truth": TRUTH,
        "merged": {
            "samples": merged.counts_.tolist(),
            "coefficients": merged.importance(kind="coef").tolist(),
            **merged.fidelity()._asdict(),
        },
    }
    print(f"\n{clusters.table(feature_names=table.features, rows=5)}")
    _draw(run, network, clusters, table)
    run.finish({"widths": WIDTHS, "steps": steps, "learning_rate": LEARNING_RATE}, results)
    return 0


def _draw(run: common.Run, network: torch.nn.Module, clusters: ActivationClusters, table: tabular.Table) -> None:
    figure, (regions, output) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=(1, 1.2))
    u, v, w = torch.eye(3, dtype=table.x.dtype)
    resolution = 60 if run.given.quick else 300
    for axes, chosen in ((regions, None), (output, 0)):
        plots.region_plot(network, plane=(HEIGHT * w, u, v), output=chosen, resolution=resolution, axes=axes)
        axes.set(xlabel="x1", ylabel="x2")
    output.set_title("The network's output, and where units flip")
    figure.suptitle(f"The plane x3 = {HEIGHT}: the data are 2 x2 where x1 > 0, and -{HEIGHT} elsewhere")
    run.figure(figure, "regions")

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(3, 2))
    plots.cluster_coefficients(
        clusters.importance(kind="coef"), clusters.counts_, features=table.features, most=12, axes=left
    )
    plots.coverage_curve(clusters.coverage(), axes=right)
    run.figure(figure, "clusters")
