"""Handwritten digits: the share of a ReLU network's accuracy that is in its gates, in each regime of gating.

Every regime of the papers on gated networks at one size, a kernel machine on gates alone, and how well the path kernel is
aligned with the classes as training goes on. Logistic regression is the floor: digits alone are not evidence.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.experiments import common, datasets, gating_regimes
from benchmarks.experiments.gating_regimes import relu_mlp
from benchmarks.experiments.training import Recipe, accuracy
from interp_nn.explain import plots
from interp_nn.explain.following.gate_record import record
from interp_nn.explain.paths.kernel_machine import NPKMachine, kernel_alignment
from interp_nn.explain.paths.path_kernel import npk_from_gates
from interp_nn.nn.gated.gates import SoftGate
from interp_nn.nn.gated.networks import DLGN, GatedNetwork
from interp_nn.nn.gated.regimes import permute_gates

NAME = "gated_digits"
WIDTHS = (64, 64, 64, 64, 64, 10)
RECIPE = Recipe(epochs=40, batch=32, learning_rate=1e-3)
MEANINGS = {
    **gating_regimes.MEANINGS,
    "DLGN(1), permuted": "as DLGN(1), but the gates' layers are permuted, by the seed",
    "DLGN-SF": "as DLGN(1), but each layer of gates sees the input itself",
}
ALIGNED = ("ReLU", "DLNPF", "DLGN(1)", "FRNPF (II)")
ALIGNED_ON, DRAWN = 300, 100  # test images


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.training_parser(NAME, __doc__).parse_args(arguments)
    given.seeds = given.seeds or (1 if given.quick else 3)
    recipe = RECIPE._replace(epochs=given.epochs or (2 if given.quick else RECIPE.epochs))
    run = common.Run(NAME, given)
    images = datasets.digits()
    # Ink is 0 to 1.
    x_train, x = ((part.flatten(1).to(given.device) + 1) / 2 for part in (images.x_train, images.x_test))
    y_train, y = images.y_train.to(given.device), images.y_test.to(given.device)

    def measure(network: nn.Module) -> dict[str, float]:
        kernel = _kernel(network, x[:ALIGNED_ON])
        return {"accuracy": accuracy(network, x, y), "alignment": kernel_alignment(kernel, y[:ALIGNED_ON])}

    trainer = common.Trainer(NAME, given, given.seeds * len(MEANINGS))
    machines: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        trained: dict[str, nn.Module] = {}
        for regime in MEANINGS:
            build = partial(_network, regime, trained.get("ReLU"), seed)
            source = "ReLU" if regime == "FLNPF" else None
            trained[regime] = trainer(regime, seed, build, x_train, y_train, recipe, measure, source=source)
        torch.manual_seed(seed)
        sources = {
            "random gates": gating_regimes.initialised(relu_mlp(*WIDTHS)).to(x),
            **{f"gates of {name}": trained[name] for name in ("ReLU", "DLGN(1)")},
        }
        for name, network in sources.items():
            machine = NPKMachine(network).fit(x_train, y_train)
            machines.setdefault(name, []).append(machine.score(x, y.cpu()))
        if seed == 0:
            _draw_kernels(run, {name: _kernel(net, x[:DRAWN]) for name, net in sources.items()}, y[:DRAWN])

    table = trainer.table()
    results: dict[str, Any] = {
        "regimes": {name: {"meaning": MEANINGS[name], **row} for name, row in table.items()},
        "kernel_machines": {name: common.spread(scores) for name, scores in machines.items()},
        "logistic_regression": _logistic_regression(x_train, y_train, x, y),
        "alignment": {name: _before_and_after(_alignments(trainer, name)) for name in MEANINGS},
        "required": _required({name: row["mean"] for name, row in trainer.compared()[1].items()}),
        "trainings": trainer.record(),
    }
    _draw(run, trainer)
    budget = {
        **recipe._asdict(), "initialisation": "He normal", "minutes": given.minutes, "train_images": len(y_train),
        "widths": WIDTHS,
    }  # fmt: skip
    run.finish(budget, results, recipe.epochs)
    return 0


def _network(regime: str, trained: nn.Module | None, seed: int) -> nn.Module:
    if regime == "DLGN-SF":
        return gating_regimes.initialised(DLGN(WIDTHS, gating="shallow", gate=SoftGate(4.0)))
    if regime == "DLGN(1), permuted":
        return permute_gates(gating_regimes.initialised(DLGN(WIDTHS, gate=SoftGate(4.0))), seed)
    return gating_regimes.build(regime, partial(relu_mlp, *WIDTHS), trained)


def _kernel(network: nn.Module, x: Tensor) -> Tensor:
    """Return the path kernel of the samples; of gates alone where the weights' input is all ones."""
    if not isinstance(network, GatedNetwork):
        return npk_from_gates(record(network, x), x)
    with torch.no_grad():
        gates = network.gate_values(x)
    return npk_from_gates(gates, None if network.value_input == "ones" else x)


def _alignments(trainer: common.Trainer, regime: str) -> Tensor:
    """Return alignment before training and after each epoch that all seeds reached, (seeds, epochs + 1)."""
    reached = min(trainer.of(regime, "epochs"))
    pairs = zip(trainer.of(regime, "before"), trainer.of(regime, "history"), strict=True)
    return torch.tensor([[before["alignment"], *history["alignment"][:reached]] for before, history in pairs])


def _before_and_after(alignments: Tensor) -> dict[str, Any]:
    return {"before": common.spread(alignments[:, 0].tolist()), "after": common.spread(alignments[:, -1].tolist())}


def _logistic_regression(x_train: Tensor, y_train: Tensor, x: Tensor, y: Tensor) -> float:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=2000).fit(x_train.cpu().numpy(), y_train.cpu().numpy())
    return float(model.score(x.cpu().numpy(), y.cpu().numpy()))


def _required(accuracy: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return the value of each of the papers' claims, and whether it holds."""
    relu = accuracy["ReLU"]
    ratio = accuracy["DLGN(1)"] / relu
    below = relu - max(accuracy["FRNPF (II)"], accuracy["FRNPF (DI)"])
    moved = abs(accuracy["DLGN(1), permuted"] - accuracy["DLGN(1)"])
    return {
        "DLGN(1) over ReLU, at least 0.97": {"value": ratio, "holds": ratio >= 0.97},
        "random fixed gates below ReLU, at least 0.02": {"value": below, "holds": below >= 0.02},
        "permuted gates off DLGN(1), at most 0.015": {"value": moved, "holds": moved <= 0.015},
    }


def _draw_kernels(run: common.Run, kernels: dict[str, Tensor], labels: Tensor) -> None:
    figure, panels = plt.subplots(1, len(kernels), figsize=(4.6 * len(kernels), 3.9), layout="constrained")
    for axes, (name, kernel) in zip(panels, kernels.items(), strict=True):
        plots.kernel_matrix(kernel, labels, axes=axes)
        axes.set_title(f"{name}:\n{axes.get_title()}", fontsize=9)
    figure.suptitle(f"Neural path kernels of {len(labels)} test digits")
    run.figure(figure, "kernels")


def _draw(run: common.Run, trainer: common.Trainer) -> None:
    figure, (bars, curves) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", width_ratios=(5, 4))
    plots.regime_bars({name: trainer.of(name, "last_accuracy") for name in MEANINGS}, axes=bars)
    bars.set(xlabel="test accuracy, %")
    plots.alignment_curves({name: _alignments(trainer, name) for name in ALIGNED}, axes=curves)
    run.figure(figure, "regimes")
