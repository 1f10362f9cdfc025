"""Networks that learn solution operators, descrambled: are their modes the operator's, and is their spectrum?

The operators are those of the heat and the Poisson equation on an interval and on a ring, by second differences. Every
measure stands beside that of untrained networks, which gives its p-value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.command_line import users_input
from benchmarks.experiments import common, training
from benchmarks.records import report
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.explain.descramble.descrambler import Descrambler
from interp_nn.explain.following.layer_values import Tap

NAME = "operator_learning"
POINTS, WIDTH, LEADING = 32, 64, 8  # places, hidden units, modes that are judged
TIME, LENGTH = 0.005, 0.1  # of the heat equation; of the smooth inputs' covariance
SAMPLES, TEST = 8192, 1000
RECIPE = training.Recipe(epochs=25, batch=128, learning_rate=3e-3, decay=True)
SEEDS, UNTRAINED = 3, 39
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"linear": nn.Identity, "tanh": nn.Tanh, "ReLU": nn.ReLU}
LAYERS = ("input filters", "output functions")
_TAPS: tuple[Tap, ...] = ("pre", "post")
# The rule of the verdicts, the same for all networks: p in each seed, and the mean over seeds of the measure.
P_AT_MOST, OVERLAP_AT_LEAST, GAIN_ERROR_AT_MOST = 0.05, 0.9, 0.1
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"  # Okabe & Ito's, which colour-blind people tell apart


class Problem(NamedTuple):
    """A solution operator: its modes (POINTS, POINTS), one a column, largest gain first; their gains, the first of which is 1.

    kind: of the derivative whose modes P takes. leading: the number of modes that are judged, whole eigenspaces. spaces: of each
    of them, the modes of the same gain [start, stop).
    """

    kind: str
    modes: Tensor
    gains: Tensor
    leading: int
    spaces: list[tuple[int, int]]


def problem(equation: str, domain: str) -> Problem:
    """Return the solution operator of the "heat" or "Poisson" equation on an "interval" or a "ring" of length 1."""
    differences = derivative_operator(POINTS, "diff1_dirichlet" if domain == "interval" else "diff1_periodic")
    step = 1 / (POINTS + 1) if domain == "interval" else 1 / POINTS
    rates = differences.eigenvalues / step**2
    # Around a ring Poisson's equation has a solution for f of mean 0; the constant is left out.
    gains = (-TIME * rates).exp() if equation == "heat" else torch.where(rates > 1e-9, 1 / rates, 0.0)
    gains, order = gains.sort(descending=True, stable=True)
    spaces = [
        (int((gains > value * (1 + 1e-9)).sum()), int((gains >= value * (1 - 1e-9)).sum())) for value in gains.tolist()
    ]
    leading = next(stop for _, stop in spaces if stop >= LEADING)
    kind = "dst" if domain == "interval" else "fourier2"
    return Problem(kind, differences.eigenvectors()[:, order], gains / gains[0], leading, spaces[:leading])


PROBLEMS = {
    f"{equation}, {domain}": (equation, domain) for equation in ("Poisson", "heat") for domain in ("interval", "ring")
}


def inputs(kind: str, domain: str, n: int, generator: torch.Generator) -> Tensor:
    """Return n right-hand sides: "white", or "smooth", a Gaussian process whose covariance knows no boundary condition."""
    drawn = torch.randn(n, POINTS, generator=generator, dtype=torch.float64)
    if kind == "white":
        return drawn
    place = torch.arange(POINTS, dtype=torch.float64) / POINTS
    distance = (place - place[:, None]).abs()
    if domain == "ring":
        distance = (torch.pi * distance).sin() / torch.pi
    values, vectors = torch.linalg.eigh((-(distance**2) / (2 * LENGTH**2)).exp())
    return drawn @ (vectors * values.clamp_min(0).sqrt()).mT


def network(activation: str, kind: str) -> nn.Sequential:
    """Build a network with one hidden layer; the linear one has no biases. For "small start" its weights start at a tenth."""
    bias = activation != "linear"
    net = nn.Sequential(nn.Linear(POINTS, WIDTH, bias), ACTIVATIONS[activation](), nn.Linear(WIDTH, POINTS, bias))
    if kind == "small start":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(0.1)
    return net


class Reading(NamedTuple):
    """Results of descrambling a network.

    overlaps: of each layer and leading component, the share of it that lies in the operator's eigenspace of the same place.
    gains: of the network along each leading input filter. exponent: the energies of the components before the activation grow
    as this power of the operator's gains. squared: squared cosines of the first 12 input filters (rows) and modes (columns).
    """

    overlaps: dict[str, Tensor]
    gains: Tensor
    exponent: float
    squared: Tensor

    def measures(self, task: Problem) -> dict[str, float]:
        """Return the measures of the verdicts: overlaps are best at 1, the error of the gains at 0."""
        found = {f"overlap of {layer}": float(own.mean()) for layer, own in self.overlaps.items()}
        errors = (self.gains / task.gains[: task.leading] - 1).abs()
        return {**found, "gain error": float(errors.median())}


@torch.no_grad()
def read(net: nn.Sequential, x: Tensor, task: Problem, unit: float) -> Reading:
    """Descramble the hidden layer before and after its activation; unit: of the network's outputs.

    P turns component i of the hidden layer into mode i of D. So row i of Tᵀ P W is the filter of component i along the inputs,
    and column i of W Pᵀ T of the next layer its function of the place.
    """
    operator = derivative_operator(WIDTH, task.kind)
    first, last = net[0], net[2]
    z = first(x)
    rows: list[Tensor] = []
    energies: list[Tensor] = []
    for values in (z, net[1](z)):
        with warnings.catch_warnings():  # of the rank, which is that of the inputs
            warnings.simplefilter("ignore")
            fit = Descrambler(operator=task.kind, center=True).fit(values)
        weights = fit.weights(first, last)
        assert weights.following is not None
        turned = weights.weight if not rows else weights.following.mT
        rows.append(nn.functional.normalize(operator.transform(turned)))
        energies.append(fit.spectrum_.energies)
    squared = [(own @ task.modes).square() for own in rows]
    overlaps = {
        layer: torch.stack([own[i, slice(*space)].sum() for i, space in enumerate(task.spaces)])
        for layer, own in zip(LAYERS, squared, strict=True)
    }
    step = rows[0][: task.leading].to(x)
    beside = torch.stack([net(x + one) - net(x - one) for one in step]).mean(1) / 2
    gains = unit * beside.double().norm(dim=1)
    logs = task.gains[: task.leading].log(), energies[0][: task.leading].log()
    exponent = float(np.polyfit(logs[0].numpy(), logs[1].numpy(), 1)[0])
    return Reading(overlaps, gains, exponent, squared[0][:12, :12])


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    options.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the marks of this file")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    run = common.Run(NAME, given)
    recipe, sizes = (RECIPE._replace(epochs=1), (640, 100)) if given.quick else (RECIPE, (SAMPLES, TEST))
    seeds = range(given.seed, given.seed + (1 if given.quick else SEEDS))
    untrained = 3 if given.quick else UNTRAINED
    chosen = ["Poisson, ring"] if given.quick else list(PROBLEMS)
    # The controls are of tanh alone, shuffled data of one seed.
    kinds = {
        "white": (tuple(ACTIVATIONS), seeds), "small start": (tuple(ACTIVATIONS), seeds), "smooth": (("tanh",), seeds),
        "shuffled": (("tanh",), seeds[:1]),
    }  # fmt: skip
    cells = [
        Cell(name, kind, activation, seed)
        for name in chosen for kind, (activations, own) in kinds.items() for activation in activations for seed in own
    ]  # fmt: skip
    rows = [measured(cell, sizes, recipe, untrained) for cell in tqdm(cells, mininterval=10)]
    results: dict[str, Any] = {
        "rule": {
            "p at most": P_AT_MOST,
            "overlap at least": OVERLAP_AT_LEAST,
            "gain error at most": GAIN_ERROR_AT_MOST,
        },
        "operators": list(summaries(rows)),
        "trainings": [{key: value for key, value in row.items() if key != "squared"} for row in rows],
    }
    _draw(run, rows, chosen)
    given.seeds = len(seeds)
    budget = {
        **recipe._asdict(), "samples": sizes[0], "test_samples": sizes[1], "points": POINTS, "width": WIDTH,
        "time": TIME, "length": LENGTH,
        "untrained": untrained,
    }  # fmt: skip
    run.finish(budget, results, recipe.epochs)
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", markdown(results))
    return 0


class Cell(NamedTuple):
    """A training: the problem, the inputs, the network and the seed.

    inputs: "white"; "small start", white ones and weights that start at a tenth; "smooth"; "shuffled", white ones, each with the
    solution of another.
    """

    problem: str
    inputs: str
    activation: str
    seed: int


def measured(cell: Cell, sizes: tuple[int, int], recipe: training.Recipe, untrained: int) -> dict[str, Any]:
    """Train a network, descramble it and as many untrained ones as are asked for, and return its row."""
    equation, domain = PROBLEMS[cell.problem]
    task = problem(equation, domain)
    generator = torch.Generator().manual_seed(cell.seed)
    f = inputs("smooth" if cell.inputs == "smooth" else "white", domain, sum(sizes), generator)
    u = f @ task.modes * task.gains @ task.modes.mT
    unit = float(u.std())
    x, y = f.float(), (u / unit).float()
    x_train, x_test = x.split(sizes)
    y_train, y_test = y.split(sizes)
    if cell.inputs == "shuffled":
        y_train = y_train[torch.randperm(sizes[0], generator=generator)]
    torch.manual_seed(cell.seed)
    net = network(cell.activation, cell.inputs)
    training.train(net, x_train, y_train, recipe, label=", ".join(map(str, cell)), seed=cell.seed, loss=_squared_error)
    with torch.no_grad():
        error = float((net(x_test) - y_test).square().sum() / y_test.square().sum())
    reading = read(net, x_test, task, unit)
    own = reading.measures(task)
    nulls = [read(network(cell.activation, cell.inputs), x_test, task, unit).measures(task) for _ in range(untrained)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = {
            tap: Descrambler(operator=task.kind, center=True).fit_layer(net, "0", x_test, tap=tap) for tap in _TAPS
        }
    return {
        **cell._asdict(),
        "test_error": error,
        "measures": own,
        "untrained": {key: common.spread([null[key] for null in nulls]) for key in own},
        "p": {key: p_value(own[key], [null[key] for null in nulls], key == "gain error") for key in own},
        "overlaps": {layer: values.tolist() for layer, values in reading.overlaps.items()},
        "gains": reading.gains.tolist(),
        "operator_gains": task.gains[: task.leading].tolist(),
        "energy_exponent": reading.exponent,
        "nulls": {tap: fit.nulls_._asdict() for tap, fit in layers.items()},
        "squared": (reading.squared, read(network(cell.activation, cell.inputs), x_test, task, unit).squared),
    }


def _squared_error(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(net(x), y)


def p_value(own: float, nulls: list[float], less: bool) -> float:
    """Return the share of a network and the untrained ones that are as good as it is."""
    return (1 + sum((null <= own) if less else (null >= own) for null in nulls)) / (1 + len(nulls))


def verdict(values: list[float], ps: list[float], enough: Callable[[float], bool]) -> str:
    """Return "yes", "partly" (beyond chance in each seed, but not enough) or "no"."""
    if max(ps) > P_AT_MOST:
        return "no"
    return "yes" if enough(sum(values) / len(values)) else "partly"


def summaries(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield mean and spread over seeds, and the verdicts, of each problem, kind of inputs and network."""
    for key in dict.fromkeys((row["problem"], row["inputs"], row["activation"]) for row in rows):
        own = [row for row in rows if (row["problem"], row["inputs"], row["activation"]) == key]
        verdicts = {}
        for measure in own[0]["measures"]:

            def enough(value: float, gain: bool = measure == "gain error") -> bool:
                return value <= GAIN_ERROR_AT_MOST if gain else value >= OVERLAP_AT_LEAST

            verdicts[measure] = verdict([r["measures"][measure] for r in own], [r["p"][measure] for r in own], enough)
        yield {
            **dict(zip(("problem", "inputs", "activation"), key, strict=True)),
            "test_error": common.spread([row["test_error"] for row in own]),
            "measures": {m: common.spread([row["measures"][m] for row in own]) for m in own[0]["measures"]},
            "untrained": {m: common.spread([row["untrained"][m]["mean"] for row in own]) for m in own[0]["measures"]},
            "largest_p": {m: max(row["p"][m] for row in own) for m in own[0]["measures"]},
            "energy_exponent": common.spread([row["energy_exponent"] for row in own]),
            "verdicts": verdicts,
        }


# Tables and figures


def markdown(results: dict[str, Any]) -> str:
    """Return the tables of the guide."""
    found = {(row["problem"], row["activation"], row["inputs"]): row for row in results["operators"]}
    lines = [
        "| operator | network | test error | input filters | small start | output functions | gain error | modes, spectrum |",
        "|---" * 8 + "|",
    ]
    for (name, activation, kind), row in found.items():
        if kind == "small start":
            plain, own = found[name, activation, "white"]["measures"], row["measures"]
            first, second = (f"overlap of {layer}" for layer in LAYERS)
            error = f"{100 * own['gain error']['mean']:.0f} %"
            lines.append(
                f"| {name} | {activation} | {100 * row['test_error']['mean']:.1g} % | {plain[first]['mean']:.2f} | "
                f"{own[first]['mean']:.2f} | {own[second]['mean']:.2f} | {error} | {_verdicts(row)} |"
            )
    lines += [
        "",
        "| inputs | operator | test error | input filters | untrained | largest p | modes |",
        "|---" * 7 + "|",
    ]
    for row in results["operators"]:
        if row["inputs"] in ("smooth", "shuffled"):
            key = f"overlap of {LAYERS[0]}"
            lines.append(
                f"| {row['inputs']} | {row['problem']} | {100 * row['test_error']['mean']:.1g} % | "
                f"{row['measures'][key]['mean']:.2f} | {row['untrained'][key]['mean']:.2f} | {row['largest_p'][key]:.2f} | "
                f"{row['verdicts'][key]} |"
            )
    return "\n".join(lines)


def _verdicts(row: dict[str, Any]) -> str:
    found = row["verdicts"]
    modes = [found[f"overlap of {layer}"] for layer in LAYERS]
    both = modes[0] if modes[0] == modes[1] else f"{modes[0]} / {modes[1]}"
    return f"{both}, {found['gain error']}"


def _draw(run: common.Run, rows: list[dict[str, Any]], chosen: list[str]) -> None:
    figure, panels = plt.subplots(4, len(chosen), figsize=(3.4 * len(chosen), 12), squeeze=False, layout="constrained")
    for column, name in zip(panels.T, chosen, strict=True):
        found = {(row["inputs"], row["activation"]): row for row in reversed(rows) if row["problem"] == name}
        plain, small = (found[start, "tanh"]["squared"] for start in ("white", "small start"))
        shown = {"untrained": plain[1], "trained": plain[0], "trained from a small start": small[0]}
        for axes, (title, squared) in zip(column, shown.items(), strict=False):
            image = axes.imshow(squared.numpy(), cmap="cividis", vmin=0, vmax=1, extent=(0.5, 12.5, 12.5, 0.5))
            axes.set(title=f"{name}\ntanh, {title}", xlabel="mode of the operator", ylabel="component")
        styles = zip(ACTIVATIONS, (BLUE, ORANGE, GREEN), ("o", "s", "^"), strict=True)
        gains = found["small start", "tanh"]["operator_gains"]
        column[3].plot(range(1, len(gains) + 1), gains, color="black", label="operator")
        for activation, colour, marker in styles:
            own = found["small start", activation]["gains"]
            column[3].plot(range(1, len(own) + 1), own, marker, color=colour, fillstyle="none", label=activation)
        column[3].set(
            yscale="log", xlabel="component", ylabel="gain (largest of the operator: 1)", title="small start: spectrum"
        )
        column[3].legend(fontsize=8)
    figure.colorbar(image, ax=panels[:3], label="squared cosine of input filter and mode")
    figure.suptitle(
        "Input filters become the operator's modes: the first few from PyTorch's start, nearly all from a small start"
    )
    run.figure(figure, "modes")
