"""Digits, MNIST and CIFAR-10: heads with 24 latents on one network's features, and how well each can be read.

One convolutional network a data set is trained with a linear classifier; its 128 features are then held. On them, each head is
trained from several seeds: codes, then an output layer. A head of two linear layers is also read in rotated coordinates, which
change none of its outputs. The numbers are of held-out images.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.command_line import users_input
from benchmarks.experiments import common, datasets
from benchmarks.experiments.training import Recipe, accuracy, train
from benchmarks.records import report
from interp_nn.explain import HeadReading, read_head
from interp_nn.nn import SummaryHead, follow
from interp_nn.nn.orthogonality import constrain

NAME = "readable_heads"
FEATURES, LATENTS, CLASSES, SEEDS = 128, 24, 10, 3
WITHIN = 0.01  # of the accuracy with all latents
SHOWN = "summary, reconstruction"  # the head of the figure
ROTATIONS = ("variance", "classes", "varimax")


class Study(NamedTuple):
    """A data set's sizes: training images, epochs of the network and of the heads, and batch."""

    images: int
    network_epochs: int
    head_epochs: int
    batch: int = 64


STUDIES = {"digits": Study(1297, 20, 40), "mnist": Study(10_000, 3, 10), "cifar10": Study(10_000, 5, 10)}


class Head(nn.Module):
    """Codes of the features and an output layer, trained by cross entropy."""

    rotates = False  # True if orthogonal changes of the codes can be undone by the output layer

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(LATENTS, CLASSES)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, 24)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 10)."""
        return self.output(self.codes(x))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the training loss."""
        return nn.functional.cross_entropy(self(x), y)

    def prepare(self, x: Tensor) -> None:
        """Prepare the head for training on features x."""

    def read(self, x: Tensor, y: Tensor) -> HeadReading:
        """Return the reading of the codes; those that are not linear are read as they are."""
        same = nn.Linear(LATENTS, LATENTS, bias=False)
        with torch.no_grad():
            same.weight.copy_(torch.eye(LATENTS))
            codes = self.codes(x)
        return read_head(nn.Sequential(same, self.output).eval(), "0", codes, y, output="1")


class Linear(Head):
    """A linear layer."""

    rotates = True

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Linear(FEATURES, LATENTS)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, 24)."""
        return self.latent(x)


class Nonlinear(Linear):
    """A linear layer and a ReLU: an MLP."""

    rotates = False

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, 24)."""
        return self.latent(x).relu()


class Summary(Head):
    """A `SummaryHead` and its loss; with a weight of the reconstruction, b is also retracted to orthonormal columns."""

    rotates = True

    def __init__(self, reconstruction: float = 0.0) -> None:
        super().__init__()
        self.head, self.reconstruction = SummaryHead(FEATURES, LATENTS, CLASSES), reconstruction
        self.output = self.head.output
        if reconstruction:
            constrain(self.head, "retract")

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, 24)."""
        return self.head.projection(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the training loss."""
        return self.head.loss(x, y, reconstruction=self.reconstruction)


class PrincipalComponents(Head):
    """The principal components of the training features, which are not trained."""

    rotates = True
    basis: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.zeros(FEATURES, LATENTS))
        self.register_buffer("mean", torch.zeros(FEATURES))

    def prepare(self, x: Tensor) -> None:
        """Prepare the head for training on features x."""
        self.mean.copy_(x.mean(0))
        self.basis.copy_(torch.linalg.svd(x - self.mean, full_matrices=False).Vh[:LATENTS].mT)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, 24)."""
        return (x - self.mean) @ self.basis


class Bilinear(Head):
    """Products of two linear layers: each logit is a quadratic form of the features.

    Source: Pearce et al., "Bilinear MLPs enable weight-based mechanistic interpretability", arXiv 2410.08417.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Linear(FEATURES, LATENTS, bias=False) for _ in range(2))

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, 24)."""
        return self.left(x) * self.right(x)

    @torch.no_grad()
    def accuracy_of_eigenvectors(self, x: Tensor, y: Tensor, most: int) -> list[float]:
        """Return the accuracy with the 1, 2, ..., `most` largest eigenvectors of each logit's form, found from the weights."""
        forms = torch.einsum("ck,ki,kj->cij", self.output.weight, self.left.weight, self.right.weight)
        values, vectors = torch.linalg.eigh((forms + forms.mT) / 2)
        order = values.abs().argsort(1, descending=True)[:, :most]
        found = torch.stack([vectors[c][:, order[c]] for c in range(CLASSES)])
        parts = torch.einsum("nd,cdj->ncj", x, found).square() * values.gather(1, order)
        logits = parts.cumsum(2) + self.output.bias.view(1, -1, 1)
        return [float((logits[:, :, j].argmax(1) == y).double().mean()) for j in range(most)]


class BCos(Head):
    """B-cos units with B = 2: |cos(x, w)| wᵀx with w of norm 1.

    Source: Böhle et al., "B-cos Networks", CVPR 2022.
    """

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Linear(FEATURES, LATENTS, bias=False)

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes (n, 24)."""
        z = x @ nn.functional.normalize(self.latent.weight, dim=1).mT
        return z * z.abs() / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-6)


HEADS: dict[str, Callable[[], Head]] = {
    "MLP": Nonlinear,
    "linear latent": Linear,
    "summary": Summary,
    "summary, reconstruction": lambda: Summary(1.0),
    "PCA, then linear": PrincipalComponents,
    "bilinear": Bilinear,
    "B-cos": BCos,
}


def network(channels: int, side: int) -> nn.Sequential:
    """Build two convolutions with pooling, 128 features and a linear classifier."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, stride=1 if side < 16 else 2), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.LazyLinear(FEATURES), nn.ReLU(), nn.Linear(FEATURES, CLASSES),
    )  # fmt: skip


@torch.no_grad()
def features_of(net: nn.Sequential, x: Tensor) -> Tensor:
    """Return the features (n, 128) of images."""
    return torch.cat([net[:-1](part) for part in x.split(1000)])


def fit(head: Head, x: Tensor, y: Tensor, study: Study, seed: int) -> float:
    """Train a head by Adam, and return the milliseconds of a step."""
    head.prepare(x)
    optimizer = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], 1e-3)
    follow(optimizer, head)
    shuffle, steps = torch.Generator().manual_seed(seed), 0
    start = time.perf_counter()
    for _ in range(study.head_epochs):
        for index in torch.randperm(len(y), generator=shuffle).split(study.batch):
            optimizer.zero_grad()
            head.loss(x[index], y[index]).backward()
            optimizer.step()
            steps += 1
    seconds = time.perf_counter() - start
    head.eval()
    return 1000 * seconds / steps


@torch.no_grad()
def measures(head: Head, x: Tensor, y: Tensor, x_train: Tensor) -> dict[str, Any]:
    """Return the measures of a head on held-out features."""
    own = head.read(x, y)
    out: dict[str, Any] = {"accuracy": accuracy(head, x, y), "error_of_the_sum": own.check()}
    out["explained_variance"] = explained_variance(head.codes(x_train), x_train, head.codes(x), x)
    out["correlation"] = own.correlation()
    out["flipped_by_one_latent"] = flipped(own)
    for name in ("own", *(ROTATIONS if head.rotates else ())):
        reading = own if name == "own" else own.rotate(name)
        kept = reading.kept_latents()
        assert kept.accuracy is not None
        enough = int((kept.accuracy >= kept.accuracy[-1] - WITHIN).nonzero()[0])
        out[name] = {
            "sparsity": reading.sparsity(), "latents_enough": enough, "error_of_the_sum": reading.check(),
            "accuracy_by_latents": kept.accuracy.tolist(),
        }  # fmt: skip
    if isinstance(head, Bilinear):
        out["accuracy_by_eigenvectors"] = head.accuracy_of_eigenvectors(x, y, LATENTS)
    if isinstance(head, Summary):
        out["tied_explained_variance"] = tied(head.head, x)
    return out


def explained_variance(codes: Tensor, x: Tensor, test_codes: Tensor, test_x: Tensor) -> float:
    """Return the share of the held-out features' variance that the best affine map of the codes, by training, predicts."""

    def with_one(z: Tensor) -> Tensor:
        return torch.cat((z, z.new_ones(len(z), 1)), 1).double()

    found = torch.linalg.lstsq(with_one(codes), x.double(), driver="gelsd").solution
    missed = test_x.double() - with_one(test_codes) @ found
    return float(1 - missed.square().sum() / (test_x - test_x.mean(0)).double().square().sum())


def tied(head: SummaryHead, x: Tensor) -> float:
    """Return the share of the features' square that the tied reconstruction X b bᵀ explains; it may be below 0."""
    missed = x - head.projection(x) @ head.b.mT
    return float(1 - missed.square().sum() / x.square().sum())


def flipped(reading: HeadReading) -> float:
    """Return the share of samples whose class changes if the latent that adds most to it is held at its mean."""
    outputs = reading.contributions().sum(1) + reading.bias
    predicted = outputs.argmax(1)
    centred = reading.codes - reading.codes.mean(0)
    latent = (centred * reading.weight[predicted]).argmax(1)
    removed = centred.gather(1, latent.unsqueeze(1)) * reading.weight.mT[latent]
    return float(((outputs - removed).argmax(1) != predicted).double().mean())


def stability(readings: list[HeadReading]) -> float:
    """Return the mean, over pairs of seeds and latents, of the largest absolute correlation with a latent of the other seed."""
    found = []
    for i, one in enumerate(readings):
        for j, other in enumerate(readings):
            if i != j:
                both = torch.corrcoef(torch.cat((one.codes, other.codes), 1).double().mT)[:LATENTS, LATENTS:]
                alive = one.importance > 1e-6
                found.append(both.abs().nan_to_num(0).max(1).values[alive].mean())
    return float(torch.stack(found).mean()) if found else float("nan")


def study(data: datasets.Images, settings: Study, seeds: int) -> tuple[dict[str, Any], HeadReading]:
    """Train the network and the heads on a data set; return the results, and the reading of the last reconstructing head."""
    torch.manual_seed(0)
    x, y = data.x_train[: settings.images], data.y_train[: settings.images]
    net = network(x.shape[1], x.shape[2])
    net(x[:2])
    train(net, x, y, Recipe(settings.network_epochs, settings.batch, 1e-3), label=data.name)
    features, held_out = features_of(net, x), features_of(net, data.x_test)
    shown: HeadReading | None = None
    out: dict[str, Any] = {"accuracy_of_the_network": accuracy(net, data.x_test, data.y_test), "heads": {}}
    for name, build in HEADS.items():
        found, readings = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            head = build()
            step = fit(head, features, y, settings, seed)
            found.append({"ms_per_step": step, **measures(head, held_out, data.y_test, features)})
            readings.append(head.read(held_out, data.y_test))
        if name == SHOWN:
            shown = readings[-1].rotate("varimax")
        stable = {"own": stability(readings)}
        if head.rotates:
            stable |= {r: stability([one.rotate(r) for one in readings]) for r in ROTATIONS}
        out["heads"][name] = {**means(found), "stability": stable}
    assert shown is not None
    return out, shown


def means(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and spread over seeds of the numbers of nested dictionaries; lists become their mean."""
    out: dict[str, Any] = {}
    for key, value in found[0].items():
        values = [one[key] for one in found]
        if isinstance(value, dict):
            out[key] = means(values)
        elif isinstance(value, list):
            out[key] = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        else:
            out[key] = common.spread(values)
    return out


def draw(results: dict[str, Any]) -> Figure:
    """Draw the accuracy over the latents that are kept, one panel for each data set."""
    figure, panels = plt.subplots(
        1, len(results), figsize=(4.2 * len(results) + 1.6, 3.6), layout="constrained", squeeze=False
    )
    for axes, (name, found) in zip(panels[0], results.items(), strict=True):
        enough: dict[bool, list[float]] = {True: [], False: []}
        for i, (head, one) in enumerate(found["heads"].items()):
            turned = "varimax" in one
            best = one.get("varimax", one["own"])
            enough[turned].append(best["latents_enough"]["mean"])
            # Turned heads lie on each other: later lines are thinner, so that those below are seen.
            axes.plot(
                100 * torch.tensor(best["accuracy_by_latents"]),
                color=f"C{i}",
                marker="" if turned else ".",
                markersize=3,
                linewidth=max(4.0 - 0.8 * len(enough[True]), 1.0) if turned else 1.5,
                label=head + (" (varimax)" if turned else ""),
            )
        few, many = (
            " to ".join(dict.fromkeys(f"{of:.0f}" for of in (min(these), max(these)))) for these in enough.values()
        )
        axes.set_title(f"{name}: {few} latents with varimax lose\nat most 1 point, {many} without", fontsize=10)
        axes.set(xlabel="latents kept", ylabel="accuracy on held-out images, %")
        axes.grid(alpha=0.3)
    panels[0, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def markdown(results: dict[str, Any]) -> str:
    """Return the guide's table: means over seeds."""
    columns = (
        "data", "head", "accuracy", "explained variance", "correlation", "sparsity: own → varimax",
        "latents for 1 point: own → varimax", "stability: own → varimax", "ms a step",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "--:|" * (len(columns) - 2)]
    for data, found in results.items():
        for name, one in found["heads"].items():
            turned = one.get("varimax")
            stable = one["stability"]
            cells = [
                data, name, f"{100 * one['accuracy']['mean']:.1f} %", f"{100 * one['explained_variance']['mean']:.0f} %",
                f"{one['correlation']['mean']:.2f}",
                _arrow(one["own"]["sparsity"]["mean"], turned and turned["sparsity"]["mean"], ".2f"),
                _arrow(one["own"]["latents_enough"]["mean"], turned and turned["latents_enough"]["mean"], ".0f"),
                _arrow(stable["own"], stable.get("varimax"), ".2f"), f"{one['ms_per_step']['mean']:.2f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _arrow(own: float, turned: float | None, spec: str) -> str:
    return format(own, spec) + ("" if turned is None else f" → {turned:{spec}}")


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    options = common.parser(NAME, __doc__)
    datasets.add_folder(options, "folder of MNIST and CIFAR-10 (default: $INTERP_NN_DATA); without it, digits alone")
    options.add_argument("--page", type=Path, metavar="FILE", help="write the table between the marks of this file")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    run = common.Run(NAME, given)
    given.seeds = 1 if given.quick else SEEDS
    names = ["digits"] if given.quick or given.data is None else list(STUDIES)
    results = {}
    for name in names:
        settings = STUDIES[name]._replace(images=300, network_epochs=2, head_epochs=2) if given.quick else STUDIES[name]
        data = datasets.digits() if name == "digits" else datasets.load(name, given.data)
        results[name], shown = study(data, settings, given.seeds)
        if name == "digits":
            figure = shown.plot().figure
            assert isinstance(figure, Figure)
            run.figure(figure, "head")
    run.figure(draw(results), "latents")
    budget = {name: STUDIES[name]._asdict() for name in names} | {"features": FEATURES, "latents": LATENTS}
    run.finish(budget, results)
    if given.page is not None:
        with users_input():
            report.between(given.page, f"experiments {NAME}", markdown(results))
    return 0
