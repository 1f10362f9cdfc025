"""A table row, a digit and an image: one logit, explained by linearize and by the methods of captum, shap and zennit.

Each method is compared with what it claims to add up to, in fp64 on one thread. captum, shap and zennit are optional: the record
names the methods that were skipped, and why.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from benchmarks.command_line import users_input
from benchmarks.experiments import common, datasets
from benchmarks.experiments.training import Recipe, train
from benchmarks.records import intervals, report
from benchmarks.timing.clocks import Sampler, Timing, interleave
from interp_nn.explain import linearize, plots
from interp_nn.explain.plots.canvas import heat_map

NAME = "explainers"
PACKAGES = ("captum", "shap", "zennit")
BACKGROUND = 100  # training samples that shap compares with
NOISE, NOISES = 0.05, 8  # of the features' standard deviation; samples of it
SECONDS = 60.0  # of the timing at each input
EQUAL = 1e-4  # of the largest contribution
OURS = "linearize"


class MLP(nn.Sequential):
    """An MLP with ReLU."""

    def __init__(self, features: int) -> None:
        super().__init__(
            nn.Linear(features, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2)
        )  # fmt: skip


class SmallCNN(nn.Module):
    """Two convolutions with batch norm, ReLU and pooling, and two linear layers; each module is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.body(x).flatten(1))


class Plus(nn.Module):
    """The sum of a residual block, as a module: LRP needs a rule for it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        return a + b


class Block(nn.Module):
    """A residual block; `modules=False` writes its ReLUs and its sum as functions."""

    relu: Any
    last: Any
    plus: Any

    def __init__(self, inputs: int, outputs: int, stride: int, modules: bool) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU() if modules else torch.relu
        self.second, self.second_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut, self.shortcut_norm = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.plus = Plus() if modules else torch.add
        self.last = nn.ReLU() if modules else torch.relu

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        h = self.second_norm(self.second(self.relu(self.first_norm(self.first(x)))))
        return self.last(self.plus(h, self.shortcut_norm(self.shortcut(x))))


class ResidualCNN(nn.Module):
    """A small ResNet."""

    def __init__(self, channels: int, modules: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1, modules), Block(16, 32, 2, modules), Block(32, 32, 2, modules))
        self.pool, self.output = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.output(self.pool(self.blocks(self.stem(x))).flatten(1))


class Case(NamedTuple):
    """A network in fp64, the explained sample x (1, ...), the predicted class, and samples (100, ...) to compare with."""

    network: nn.Module
    x: Tensor
    target: int
    background: Tensor
    spread: Tensor  # the features' standard deviation
    accuracy: float
    about: str
    features: tuple[str, ...] = ()

    def logit(self, x: Tensor) -> Tensor:
        """Return the explained logit (n,) at inputs."""
        with torch.no_grad():
            return self.network(x)[:, self.target]


# A method returns the function that is timed: from an input to attributions of its shape. What it prepares is not timed.
Explain = Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """A method: its package, what its attributions claim to add up to ("" for nothing), and how to make it."""

    package: str
    claim: str
    make: Callable[[Case], Explain]
    dimensions: int | None = None  # of its inputs: 2 for tables, 4 for images, None for both


class Chosen(nn.Module):
    """The explained logit as the only output (n, 1)."""

    def __init__(self, network: nn.Module, target: int) -> None:
        super().__init__()
        self.network, self.target = network, target

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit."""
        return self.network(x)[:, self.target : self.target + 1]


def _linearize(case: Case) -> Explain:
    def explain(x: Tensor) -> Tensor:
        affine = linearize(case.network, x, case.target, progress=False)
        affine.bias_by_layer()
        return affine.contributions(x)

    return explain


def _captum(name: str, case: Case) -> Explain:
    attr = importlib.import_module("captum.attr")
    network = case.network
    if name == "LRP":  # it leaves its rules in the network, and has one for a sum that is a module of its own
        network = _with_sums(network, importlib.import_module("captum.attr._utils.custom_modules").Addition_Module)
    method = getattr(attr, name)(network)
    return lambda x: method.attribute(x.clone(), target=case.target).detach()


def _with_sums(network: nn.Module, sums: Callable[[], nn.Module]) -> nn.Module:
    """Return a copy of a network in which each `Plus` is another module."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, Block) and isinstance(module.plus, Plus):
            module.plus = sums()
    return network


def _deep_explainer(case: Case) -> Explain:
    network = Chosen(copy.deepcopy(case.network), case.target)
    explainer = importlib.import_module("shap").DeepExplainer(network, case.background)
    return lambda x: _like(explainer.shap_values(x), x)


def _gradient_explainer(case: Case) -> Explain:
    network = Chosen(copy.deepcopy(case.network).float(), case.target)  # it computes in single precision
    explainer = importlib.import_module("shap").GradientExplainer(network, case.background.float())
    return lambda x: _like(explainer.shap_values(x.float(), rseed=0), x)


def _kernel_explainer(case: Case) -> Explain:
    explainer = importlib.import_module("shap").KernelExplainer(
        lambda x: case.logit(torch.as_tensor(x)).numpy(), case.background.numpy()
    )

    def explain(x: Tensor) -> Tensor:
        np.random.seed(0)
        return _like(explainer.shap_values(x.numpy(), silent=True), x)

    return explain


def _like(values: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values)).to(x.dtype).reshape(x.shape)


class _Stacked(nn.Module):
    """zennit's sum, of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = importlib.import_module("zennit.layer").Sum()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        return self.sum(torch.stack((a, b), -1))


def _zennit(composite: str | None, case: Case) -> Explain:
    for part in ("attribution", "canonizers", "composites", "rules", "types"):
        importlib.import_module(f"zennit.{part}")
    zennit = importlib.import_module("zennit")
    network = _with_sums(case.network, _Stacked if composite else Plus)
    if composite is not None:
        merged = [zennit.canonizers.SequentialMergeBatchNorm()]
        if composite == "EpsilonPlus":
            rules = zennit.composites.EpsilonPlus(canonizers=merged)
        else:
            linear = (zennit.types.Convolution, zennit.types.Linear)
            layers = [*zennit.composites.layer_map_base(), (linear, zennit.rules.Epsilon())]
            rules = zennit.composites.LayerMapComposite(layer_map=layers, canonizers=merged)
        rules.register(network)
    attributor = zennit.attribution.Gradient(network)

    def explain(x: Tensor) -> Tensor:
        def relevance(outputs: Tensor) -> Tensor:
            one = nn.functional.one_hot(torch.tensor([case.target]), outputs.shape[1]).to(outputs)
            return one if composite is None else one * outputs.detach()

        found = attributor(x.clone().requires_grad_(), relevance)[1].detach()
        return found * x if composite is None else found

    return explain


LOGIT, BASELINE, MEAN, NOTHING = "the logit", "the logit less that at 0", "the logit less its mean over samples", ""
METHODS = {
    OURS: Method("interp_nn", LOGIT, _linearize),
    "captum InputXGradient": Method("captum", NOTHING, partial(_captum, "InputXGradient")),
    "captum IntegratedGradients": Method("captum", BASELINE, partial(_captum, "IntegratedGradients")),
    "captum DeepLift": Method("captum", BASELINE, partial(_captum, "DeepLift")),
    "captum LRP": Method("captum", LOGIT, partial(_captum, "LRP")),
    "shap DeepExplainer": Method("shap", MEAN, _deep_explainer),
    "shap GradientExplainer": Method("shap", MEAN, _gradient_explainer),
    "shap KernelExplainer": Method("shap", MEAN, _kernel_explainer, 2),
    "zennit gradient x input": Method("zennit", NOTHING, partial(_zennit, None)),
    "zennit LRP-ε": Method("zennit", LOGIT, partial(_zennit, "LRP")),
    "zennit EpsilonPlus": Method("zennit", LOGIT, partial(_zennit, "EpsilonPlus"), 4),
}


def table_row(quick: bool) -> Case:
    """Return an MLP on scikit-learn's breast cancer data, and a row that it has not seen."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x, y = torch.as_tensor(data.data).float(), torch.as_tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = (x - x[:400].mean(0)) / x[:400].std(0)
    network = MLP(x.shape[1])
    train(network, x[:400], y[:400], Recipe(2 if quick else 30, 32, 3e-3), label="table row")
    about = "a row of breast cancer, 30 features; MLP of 32 and 16 units"
    return _case(network, x[:400], x[400:], y[400:], about, tuple(data.feature_names))


def digit(quick: bool) -> Case:
    """Return a CNN on scikit-learn's digits, and an image that it has not seen."""
    images = datasets.digits()
    x, x_test = (images.x_train + 1) / 2, (images.x_test + 1) / 2  # empty paper is 0
    network = SmallCNN()
    train(network, x, images.y_train, Recipe(1 if quick else 15, 64, 2e-3), label="digit")
    return _case(network, x, x_test, images.y_test, "a digit, 8 x 8; CNN with batch norm")


def image(quick: bool, folder: Path | None) -> Case:
    """Return a small ResNet on CIFAR-10, or on digits without data, and an image that it has not seen."""
    images = datasets.digits() if folder is None else datasets.load("cifar10", folder)
    count = 200 if quick else 10_000
    x, x_test = (images.x_train[:count] + 1) / 2, (images.x_test[:1000] + 1) / 2  # black is 0
    network = ResidualCNN(x.shape[1])
    train(network, x, images.y_train[:count], Recipe(1 if quick else 5, 64, 2e-3), label="image")
    about = f"an image of {images.name}, {x.shape[1]} x {x.shape[2]} x {x.shape[3]}; ResNet of three blocks"
    return _case(network, x, x_test, images.y_test[:1000], about)


def _case(network: nn.Module, x: Tensor, x_test: Tensor, y: Tensor, about: str, features: tuple[str, ...] = ()) -> Case:
    """Explain the first held-out sample that the network gets right."""
    with torch.no_grad():
        predicted = network(x_test).argmax(1)
    right = predicted == y
    first = int(right.nonzero()[0])
    return Case(
        network.double(), x_test[first : first + 1].double(), int(y[first]), x[:BACKGROUND].double(),
        x.double().std(0, keepdim=True), float(right.double().mean()), about, features,
    )  # fmt: skip


def compare(case: Case, seconds: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Measure each method at a case; return rows by method, and the attributions."""
    methods, rows, attributions = _ready(case)
    affine = linearize(case.network, case.x, case.target, progress=False)
    ours = affine.contributions(case.x)
    by_layer = {name: float(part) for name, part in affine.bias_by_layer().items()}
    logit = float(case.logit(case.x))
    for name, explain in methods.items():
        found = attributions[name]
        rows[name] = _claim(case, name, found, float(affine.bias)) | {
            "difference_to_linearize": common.relative_error(found, ours), "change_by_noise": _change(case, explain),
        }  # fmt: skip
    calls: dict[str, Callable[[], object]] = {name: partial(explain, case.x) for name, explain in methods.items()}
    calls["alone"] = lambda: linearize(case.network, case.x, case.target, progress=False).contributions(case.x)
    times = {name: _time(one) for name, one in interleave(calls, seconds=seconds, least=5, clock=_on_cpu).items()}
    rows[OURS] |= {f"{key}_without_constants": value for key, value in times.pop("alone").items()}
    for name, one in times.items():
        rows[name] |= one
    out = {
        "about": case.about, "accuracy": case.accuracy, "logit": logit, "constants_by_layer": by_layer,
        "error_of_the_constants_sum": abs(sum(by_layer.values()) - float(affine.bias)) / abs(logit),
        "methods": {name: rows[name] for name in METHODS if name in rows},
    }  # fmt: skip
    return out, attributions


def _ready(case: Case) -> tuple[dict[str, Explain], dict[str, Any], dict[str, Tensor]]:
    """Return the methods that run at a case, a note for each of the others, and the attributions."""
    methods: dict[str, Explain] = {}
    notes: dict[str, Any] = {}
    attributions = {}
    for name, method in METHODS.items():
        if method.dimensions not in (None, case.x.dim()):
            continue
        try:
            explain = method.make(case)
            attributions[name] = explain(case.x)
            methods[name] = explain
        except ImportError as error:
            notes[name] = {"skipped": f"{method.package} cannot be imported: {error}"}
        except Exception as error:
            notes[name] = {"raised": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
    return methods, notes, attributions


def _claim(case: Case, name: str, found: Tensor, constant: float) -> dict[str, Any]:
    """Return the sum of attributions beside the logit and beside what the method claims."""
    logit, total = float(case.logit(case.x)), float(found.sum())
    claim = METHODS[name].claim
    claimed = {
        LOGIT: logit,
        BASELINE: logit - float(case.logit(torch.zeros_like(case.x))),
        MEAN: logit - float(case.logit(case.background).mean()),
    }.get(claim)
    whole = total + (constant if name == OURS else 0.0)
    return {
        "sum": total, "outside": (logit - total) / logit, "claim": claim, "claimed": claimed,
        "claim_error": None if claimed is None else abs(whole - claimed) / abs(logit),
    }  # fmt: skip


def _change(case: Case, explain: Explain) -> float:
    """Return |a(x + noise) - a(x)| / |a(x)|, the mean over noises."""
    draw = torch.Generator().manual_seed(0)
    still, found = explain(case.x), []
    for _ in range(NOISES):
        noise = NOISE * case.spread * torch.randn(case.x.shape, generator=draw, dtype=case.x.dtype)
        found.append((explain(case.x + noise) - still).norm() / still.norm())
    return float(torch.stack(found).mean())


def _on_cpu(work: Callable[[], object], calls: int) -> Sampler:
    """Time the CPU time of `work`, which other programs on the machine lengthen less than the wall clock's."""

    def sample() -> float:
        start = time.process_time()
        work()
        return 1e3 * (time.process_time() - start) / calls

    return sample


def _time(timing: Timing) -> dict[str, Any]:
    low, high = intervals.interval(intervals.resampled(timing.groups, [1.0] * len(timing.groups)))
    return {"ms": timing.p50, "ms_interval": [low, high], "rounds": timing.samples}


def functions(case: Case) -> dict[str, Any]:
    """Compare each method on the same residual network with its ReLUs and sums written as functions."""
    channels = case.x.shape[1]
    network = ResidualCNN(channels, modules=False).double().eval()
    network.load_state_dict(case.network.state_dict())
    other = case._replace(network=network)
    _, notes, attributions = _ready(other)
    _, _, before = _ready(case)
    constant = float(linearize(network, case.x, case.target, progress=False).bias)
    for name, found in attributions.items():
        row = _claim(other, name, found, constant)
        row["change"] = common.relative_error(found, before[name]) if name in before else None
        notes[name] = row
    return {name: notes[name] for name in METHODS if name in notes}


def markdown(results: dict[str, Any]) -> str:
    """Return the guide's tables, one for each input, and one for the spelling."""
    parts = []
    for case in results["cases"].values():
        lines = [
            f"**{case['about']}** ({100 * case['accuracy']:.1f} % right on held-out data). Logit {case['logit']:.2f}. "
            f"Without its constants `linearize` takes {_milliseconds(case['methods'][OURS], '_without_constants')} ms.", "",
            "| method | error of its own claim | outside the attributions | difference to linearize | change by noise | CPU ms |",
            "|---|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        lines += [f"| {name} | {_cells(row)} |" for name, row in case["methods"].items()]
        parts.append("\n".join(lines))
    lines = ["**The same ResNet with `torch.relu` and `+` in place of modules**", ""]
    lines += ["| method | error of its own claim | change of the attributions |", "|---|--:|--:|"]
    for name, row in results["functions"].items():
        cells = f"{_noted(row)} | -" if "sum" not in row else f"{_size(row['claim_error'])} | {_size(row['change'])}"
        lines.append(f"| {name} | {cells} |")
    parts.append("\n".join(lines))
    return "\n\n".join(parts)


def short(results: dict[str, Any]) -> str:
    """Return the short table of the page on explaining: the share outside the attributions, and time, by input."""
    cases = results["cases"]
    lines = [
        "| method | " + " | ".join(f"{name}: outside, CPU ms" for name in cases) + " |",
        "|---|" + "--:|" * len(cases),
    ]
    for name in (OURS, *(f"captum {one}" for one in ("InputXGradient", "IntegratedGradients", "DeepLift", "LRP"))):
        found = [case["methods"][name] for case in cases.values()]
        cells = [
            f"{100 * row['outside']:.0f} %, {row['ms']:.2f}" if "ms" in row else f"{_noted(row)}, -" for row in found
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _noted(row: dict[str, Any]) -> str:
    return "skipped" if "skipped" in row else row["raised"].partition(":")[0]


def _cells(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"{_noted(row)} | - | - | - | -"
    return (
        f"{_size(row['claim_error'])} | {100 * row['outside']:.1f} % | {_size(row['difference_to_linearize'])} | "
        f"{100 * row['change_by_noise']:.0f} % | {_milliseconds(row)}"
    )


def _milliseconds(row: dict[str, Any], which: str = "") -> str:
    (low, high), median = row[f"ms_interval{which}"], row[f"ms{which}"]
    digits = 2 if median < 10 else 0
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _size(value: float | None) -> str:
    """Write an error: as a factor from 10 on, in percent from 0.1 % on, else as a power of ten."""
    if value is None:
        return "no claim"
    if value >= 10:
        return f"{value:.0f} times"
    return f"{100 * value:.1f} %" if value >= 1e-3 else "0" if value == 0 else f"{value:.0e}"


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    datasets.add_folder(options, "folder of CIFAR-10 (default: $INTERP_NN_DATA); without it, the image is a digit")
    options.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the marks of this file")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    run = common.Run(NAME, given)
    makers: dict[str, Callable[[bool], Case]] = {
        "table row": table_row,
        "digit": digit,
        "image": partial(image, folder=given.data),
    }
    results: dict[str, Any] = {"packages": _versions(), "cases": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's and shap's, of hooks
        for name, make in makers.items():
            torch.manual_seed(given.seed)
            case = make(given.quick)
            found, attributions = compare(case, 0.0 if given.quick else SECONDS)
            results["cases"][name] = found
            _draw(run, name, case, found, attributions)
        results["functions"] = functions(case)
    budget = {"background": BACKGROUND, "noise": NOISE, "threads": 1, "dtype": "float64"}
    run.finish(budget, results)
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", markdown(results))
    return 0


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _draw(
    run: common.Run, name: str, case: Case, found: dict[str, Any], attributions: dict[str, Tensor]
) -> None:  # fmt: skip
    """Draw the attributions of all methods, in one scale."""
    equal = sum(row.get("difference_to_linearize", 1.0) < EQUAL for row in found["methods"].values()) - 1
    finding = f"{equal} of {len(attributions) - 1} other methods give linearize's contributions"
    finding += f" to the logit {found['logit']:.1f} of this {name}"
    values = torch.stack(list(attributions.values()), 1)  # (1, methods, ...)
    if case.features:
        most = values[0].abs().mean(0).argsort(descending=True)[:10]
        figure, axes = plt.subplots(figsize=(11, 5.4), layout="constrained")
        columns = [case.features[i] for i in most]
        heat_map(axes, values[0][:, most].numpy(), list(attributions), columns, "attribution, units of the logit")
        axes.set_title(finding, fontsize=10)
    else:
        figure = plt.figure(figsize=(14, 2.4), layout="constrained")
        titles = [re.sub(r" (?!input)|(?<=[a-z])(?=[A-Z])", "\n", title) for title in attributions]
        plots.attribution_maps(values, case.x, columns=titles, label="units of the logit", figure=figure)
        figure.suptitle(finding, fontsize=10)
    run.figure(figure, name.replace(" ", "_"))
