"""A physics-informed network, descrambled: are the functions of its hidden layers the modes of the equation?

The network solves -u'' = f on an interval by its residual; both derivatives come from autograd. The same network is trained on u
itself, for comparison. Untrained networks give the p-values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.command_line import users_input
from benchmarks.experiments import common
from benchmarks.experiments.operator_learning import OVERLAP_AT_LEAST, P_AT_MOST, p_value, verdict
from benchmarks.records import report
from interp_nn.explain.descramble.derivatives import derivative_operator
from interp_nn.explain.descramble.descrambler import Descrambler

NAME = "physics_informed"
ITERATIONS, COLLOCATED, UNITS, LEADING = 1000, 64, 32, 8
SEEDS, UNTRAINED = 3, 39
BLUE, ORANGE = "#0072B2", "#E69F00"  # Okabe & Ito's, which colour-blind people tell apart


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    options.add_argument("--page", type=Path, metavar="FILE", help="write the table between the marks of this file")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    run = common.Run(NAME, given)
    seeds = range(given.seed, given.seed + (1 if given.quick else SEEDS))
    iterations, untrained = (2, 3) if given.quick else (ITERATIONS, UNTRAINED)
    results = {
        "rule": {"p at most": P_AT_MOST, "overlap at least": OVERLAP_AT_LEAST},
        "networks": physics_informed(seeds, iterations, untrained),
    }
    _draw(run, results["networks"])
    given.seeds = len(seeds)
    budget = {
        "iterations": iterations, "optimizer": "L-BFGS", "collocation_points": COLLOCATED, "units": UNITS, "waves": WAVES,
        "untrained": untrained,
    }  # fmt: skip
    run.finish(budget, results)
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", markdown(results))
    return 0


class Solution(nn.Module):
    """u(x) = x (1 - x) v(x), which is 0 at both ends, with a network v of two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Sequential(nn.Linear(1, UNITS), nn.Tanh(), nn.Linear(UNITS, UNITS), nn.Tanh(), nn.Linear(UNITS, 1))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Compute u (n, 1) at places x (n, 1)."""
        return x * (1 - x) * self.v(x)


WAVES = {1: 1.0, 2: 0.5, 3: 0.25}  # u = sum of a sin(k pi x)


def _u(x: Tensor, power: int = 0) -> Tensor:
    """Return u at places, or with power=2 the right-hand side -u''."""
    return torch.stack([a * (k * torch.pi) ** power * (k * torch.pi * x).sin() for k, a in WAVES.items()]).sum(0)


def residual(net: nn.Module, x: Tensor) -> Tensor:
    """Return the mean square of -u'' - f, with both derivatives by autograd."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (curvature + _u(x, 2)).square().mean()


def bases(place: Tensor) -> dict[str, Tensor]:
    """Return the first functions of three bases at places on the interval, one a column; the sines are the operator's modes."""
    k = torch.arange(LEADING, dtype=place.dtype)
    angle = torch.pi * place[:, None]
    powers = torch.linalg.qr((2 * place[:, None] - 1) ** k).Q  # Legendre's
    found = {"sines": (angle * (k + 1)).sin(), "cosines": (angle * k).cos(), "polynomials": powers}
    return {name: nn.functional.normalize(own, dim=0) for name, own in found.items()}


FUNCTIONS = ("hidden layer 1", "hidden layer 2", "functions that u sums")


@torch.no_grad()
def read_functions(net: Solution, place: Tensor) -> dict[str, dict[str, float]]:
    """Return how far the leading components of each hidden layer, as functions of the place, are those of each basis.

    It is the mean squared cosine of components and functions in the best pairs, whatever their order. The functions that u sums
    are those of the second layer times x (1 - x). energy exponent: the energies of the components grow as this power of the
    operator's gains 1 / (k pi)²; components without energy are left out.
    """
    known, found = bases(place), {}
    second = net.v[:4](place[:, None])
    layers = (net.v[:2](place[:, None]), second, second * (place * (1 - place))[:, None])
    for layer, values in zip(FUNCTIONS, layers, strict=True):
        with warnings.catch_warnings():  # of the rank
            warnings.simplefilter("ignore")
            fit = Descrambler(operator="dst").fit(values)
        turned = derivative_operator(UNITS, "dst").transform(fit.transform(values).mT)[:LEADING]
        turned = nn.functional.normalize(turned)
        energies = fit.spectrum_.energies[:LEADING]
        energies = energies[energies > 0]
        gains = -2 * torch.arange(1, len(energies) + 1).double().log()
        found[layer] = {
            **{name: _paired((turned @ own).square()) for name, own in known.items()},
            "energy exponent": float(np.polyfit(gains.numpy(), energies.log().numpy(), 1)[0]),
        }
    return found


def _paired(squared: Tensor) -> float:
    """Return the mean of the entries of the best pairs of rows and columns."""
    rows, columns = linear_sum_assignment(squared.numpy(), maximize=True)
    return float(squared[rows, columns].mean())


def _fit(net: Solution, loss: Callable[[nn.Module], Tensor], iterations: int) -> None:
    """Minimise a loss by L-BFGS."""
    steps = torch.optim.LBFGS(
        net.parameters(), max_iter=iterations, history_size=50, tolerance_grad=1e-9, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        steps.zero_grad()
        value = loss(net)
        value.backward()
        return value

    steps.step(closure)


def physics_informed(seeds: Sequence[int], iterations: int, untrained: int) -> dict[str, Any]:
    """Train networks on the residual of -u'' = f, and the same networks on u itself; descramble both and untrained ones."""
    place = (torch.arange(1, 257, dtype=torch.float64)) / 257
    x = ((torch.arange(COLLOCATED, dtype=torch.float64) + 0.5) / COLLOCATED)[:, None]
    losses: dict[str, Callable[[nn.Module], Tensor]] = {
        "residual": lambda net: residual(net, x),
        "values of u": lambda net: (net(x) - _u(x)).square().mean(),
    }
    found: dict[str, Any] = {}
    torch.manual_seed(seeds[0])
    nulls = [read_functions(Solution(), place) for _ in range(untrained)]
    for name, loss in losses.items():
        readings, errors = [], []
        for seed in seeds:
            torch.manual_seed(seed)
            net = Solution()
            _fit(net, loss, iterations)
            readings.append(read_functions(net, place))
            with torch.no_grad():
                wanted = _u(place)
                errors.append(float((net(place[:, None]).squeeze(1) - wanted).norm() / wanted.norm()))
        found[name] = {"error_of_u": common.spread(errors), "layers": {}}
        for layer in readings[0]:
            ps = [p_value(one[layer]["sines"], [null[layer]["sines"] for null in nulls], False) for one in readings]
            overlaps = [one[layer]["sines"] for one in readings]
            found[name]["layers"][layer] = {
                **{key: common.spread([one[layer][key] for one in readings]) for key in readings[0][layer]},
                "p of sines": ps,
                "modes are sines": verdict(overlaps, ps, lambda value: value >= OVERLAP_AT_LEAST),
            }
    found["untrained"] = {
        "layers": {
            layer: {key: common.spread([n[layer][key] for n in nulls]) for key in own}
            for layer, own in nulls[0].items()
        }
    }
    return found


def markdown(results: dict[str, Any]) -> str:
    """Return the table of the guide."""
    lines = [
        "| trained on | functions | error of u | sines | largest p | cosines | polynomials | modes are sines |",
        "|---" * 8 + "|",
    ]
    for name, row in results["networks"].items():
        for layer, own in row["layers"].items():
            error = f"{row['error_of_u']['mean']:.0e}" if "error_of_u" in row else "-"
            p = f"{max(own['p of sines']):.2f}" if "p of sines" in own else "-"
            cells = [f"{own[key]['mean']:.2f}" for key in ("sines", "cosines", "polynomials")]
            shown, said = "nothing" if name == "untrained" else name, own.get("modes are sines", "-")
            lines.append(f"| {shown} | {layer} | {error} | {cells[0]} | {p} | {cells[1]} | {cells[2]} | {said} |")
    return "\n".join(lines)


def _draw(run: common.Run, found: dict[str, Any]) -> None:
    names = ("sines", "cosines", "polynomials")
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for axes, layer in zip(panels, FUNCTIONS, strict=True):
        styles = zip(found, (BLUE, ORANGE, "0.6"), ("residual", "values of u", "untrained"), strict=True)
        for i, (kind, colour, label) in enumerate(styles):
            own = [found[kind]["layers"][layer][name] for name in names]
            at = np.arange(len(names)) + 0.27 * (i - 1)
            spans = [one["std"] for one in own]
            axes.bar(at, [one["mean"] for one in own], 0.25, yerr=spans, color=colour, label=label)
        axes.set(title=layer.capitalize(), xlabel="basis on the interval", ylim=(0, 1), xticks=range(len(names)))
        axes.set_xticklabels(names)
    panels[0].set_ylabel(f"overlap with the first {LEADING} functions (1: equal)")
    panels[0].legend()
    figure.suptitle("A physics-informed network's layers do not become the equation's sines")
    run.figure(figure, "bases")
