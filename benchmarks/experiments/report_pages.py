"""Four networks and one page about each: a table, images, ResNet-18 and a language model.

The networks of the table and of the digits are trained here, for seconds. ResNet-18 (where torchvision is installed) and the
language model have random weights: their pages show what a page says of such networks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from benchmarks.experiments import common, datasets
from benchmarks.experiments.language_map import Llama, Size
from benchmarks.experiments.training import Recipe, train
from interp_nn.explain import Report, report
from interp_nn.nn import SummaryHead

NAME = "report_pages"
LANGUAGE_MODEL = Size(layers=3, width=64, hidden=128, heads=4, groups=2, vocabulary=97)


def breast_cancer(epochs: int) -> Report:
    """Explain an MLP on scikit-learn's breast cancer data."""
    data = load_breast_cancer()
    x, y = torch.as_tensor(data.data).float(), torch.as_tensor(data.target)
    x = (x - x[:400].mean(0)) / x[:400].std(0)
    network = nn.Sequential(nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 2))
    train(network, x[:400], y[:400], Recipe(epochs, 32, 3e-3), label="breast cancer")
    names = {"feature_names": list(data.feature_names), "class_names": list(data.target_names)}
    return report(network, x[400:], y[400:], title="Breast cancer: an MLP", **names)


def digits(epochs: int) -> Report:
    """Explain a CNN with a summary head on scikit-learn's digits."""
    images = datasets.digits()
    body = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 64), nn.ReLU()
    )
    head = SummaryHead(64, 16, 10)
    network = nn.Sequential(*body, head)

    def loss(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return head.loss(body(x), y, reconstruction=1.0)

    train(network, images.x_train, images.y_train, Recipe(epochs, 64, 1e-3), label="digits", loss=loss)
    return report(network, images.x_test, images.y_test, title="Digits: a CNN with a summary head")


def resnet18(_: int) -> Report:
    """Explain ResNet-18 with random weights at 64 x 64 pixels."""
    import torchvision  # type: ignore[import-not-found, import-untyped, unused-ignore]

    network = torchvision.models.resnet18().eval()
    return report(network, torch.randn(8, 3, 64, 64), title="ResNet-18, random weights")


def language_model(_: int) -> Report:
    """Explain a small language model with random weights."""
    ids = torch.randint(0, LANGUAGE_MODEL.vocabulary, (6, 24))
    return report(Llama(LANGUAGE_MODEL).eval(), ids, title="A language model, random weights")


PAGES: dict[str, Callable[[int], Report]] = {
    "breast_cancer": breast_cancer, "digits": digits, "resnet18": resnet18, "language_model": language_model,
}  # fmt: skip


def pages(epochs: int) -> Iterator[tuple[str, Report | None, float]]:
    """Yield each page with its name and the seconds that it took, training included; None without torchvision."""
    for name, build in PAGES.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            page = build(epochs)
        except ImportError:
            yield name, None, 0.0
            continue
        yield name, page, time.perf_counter() - start


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = common.parser(NAME, __doc__).parse_args(arguments)
    run = common.Run(NAME, given)
    epochs = 1 if given.quick else 20
    results: dict[str, Any] = {}
    for name, page, seconds in pages(epochs):
        if page is None:
            results[name] = "not made: torchvision is not installed"
            continue
        page.save(given.output / f"{NAME}-{name}.html")
        results[name] = {"seconds": seconds, "characters": len(page.html), "findings": page.findings}
    run.finish({"threads": torch.get_num_threads()}, results, epochs)
    return 0
