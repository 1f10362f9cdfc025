"""`demo`: a small CNN on real images, once with an MLP head and once with a summary head, compared in full."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import interp_nn
from benchmarks import command_line
from benchmarks.experiments import datasets
from benchmarks.experiments.training import Recipe, accuracy, train
from benchmarks.records import environment, files
from benchmarks.records.rows import Writer, common, write_json
from benchmarks.timing import tolerances
from benchmarks.timing.measure import TIMERS, Asked, measure
from benchmarks.timing.problems import Problem
from benchmarks.timing.reference_networks import NETWORKS, Network, SummaryNetwork
from interp_nn.explain import report
from interp_nn.explain.plots.canvas import PALETTE

BATCH = 64
LEARNING_RATE = 1e-3
_EXPLAINED = 500  # images of the page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks demo`."""
    names = ("digits", "mnist", "cifar10", "cifar100")
    parser.add_argument("--dataset", choices=names, help="default: the dataset in --data, else digits")
    datasets.add_folder(parser, "folder with MNIST or CIFAR-10 (default: $INTERP_NN_DATA)")
    number = command_line.at_least(1)
    parser.add_argument("--epochs", type=number, help="default: 20 for digits, 1 for the others")
    parser.add_argument("--seeds", type=number, help="networks of each kind (default: 3 for digits, 1 for the others)")
    parser.add_argument("--train-size", type=number, help="train on the first images only (default: all)")
    parser.add_argument("--device", type=command_line.device, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="for the PNG and the JSON")


def run(given: argparse.Namespace) -> int:
    """Train, check, time, print, and save a figure and a record; the exit status is 1 when the gradient check fails."""
    start, device, output = time.perf_counter(), given.device, given.output
    with command_line.users_input():
        images = datasets.load(given.dataset, given.data)
        figure, json_file = output / f"demo-{images.name}.png", output / f"demo-{images.name}.json"
        files.check_writable(figure, json_file)
    epochs = given.epochs or (20 if images.name == "digits" else 1)
    seeds = given.seeds or (3 if images.name == "digits" else 1)
    if size := given.train_size:
        images = images._replace(x_train=images.x_train[:size], y_train=images.y_train[:size])
    images = images.to(device)
    channels, size = images.x_train.shape[1:3]
    print(
        f"{images.name}: {len(images.y_train):,} training and {len(images.y_test):,} test images, {channels} x {size} x {size}; "
        f"{epochs} epochs of Adam {LEARNING_RATE:g} at batch {BATCH}, {seeds} seeds, on {environment.device_name(device)}"
    )

    runs: list[dict[str, Any]] = []
    last: dict[str, Network] = {}
    for seed in range(seeds):
        for name in NETWORKS:
            result, last[name] = _train(name, seed, images, epochs, device)
            runs.append(result)

    trained = last["summary"]
    assert isinstance(trained, SummaryNetwork)
    gradients = _check_gradients(trained, images)
    features = trained.head.in_features
    timings = [_timings(*shape, device) for shape in ((BATCH, features, trained.head.out_features), (4096, 512, 64))]
    whole = {
        "experiment": f"demo-{images.name}", **environment.facts(device), "seeds": list(range(seeds)), "epochs": epochs,
        "seconds": round(time.perf_counter() - start, 1),
        "budget": {"batch": BATCH, "learning_rate": LEARNING_RATE, "train_images": len(images.y_train)},
        "results": {"runs": runs, "gradients": gradients, "timings": timings},
    }  # fmt: skip
    spectrum = trained.head.spectrum().cpu().numpy()
    _print(whole)
    write_json(json_file, whole)
    _draw(whole, spectrum, figure)
    print(f"\nwrote {json_file} and {figure}; {whole['seconds']:.0f} s in all")
    _explain(trained, images, output / f"demo-{images.name}.html")
    return 0 if gradients["passed"] else 1


def _explain(network: SummaryNetwork, images: datasets.Images, file: Path) -> None:
    """Write the page about the summary network, and print its place and three findings."""
    page = report(
        network.cpu().eval(), images.x_test[:_EXPLAINED].cpu(), images.y_test[:_EXPLAINED].cpu(),
        title=f"{images.name}: a small CNN with a summary head",
    )  # fmt: skip
    page.save(file)
    print(f"\nwrote {file}: one page about this network. It says:")
    for title in ("How good it is", "Single samples", "The head"):
        print(f"- {page.findings[title]}")


def _train(name: str, seed: int, images: datasets.Images, epochs: int, device: str) -> tuple[dict[str, Any], Network]:
    torch.manual_seed(seed)
    channels, size = images.x_train.shape[1:3]
    network = NETWORKS[name](channels, size, classes=images.classes).to(device)
    first: list[float] = []

    def loss(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = network.loss(x, y)
        if not first:
            first.append(value.item())
        return value

    history, _ = train(
        network, images.x_train, images.y_train, Recipe(epochs, BATCH, LEARNING_RATE), label=f"{name} head, seed {seed}",
        seed=seed, loss=loss, measure=lambda _: {"accuracy": accuracy(network, images.x_test, images.y_test)},
    )  # fmt: skip
    result = {
        "head": name, "seed": seed, "first_loss": first[0], "loss": history["loss"],
        "test_accuracy": history["accuracy"], "epoch_seconds": history["seconds"],
    }  # fmt: skip
    if isinstance(network, SummaryNetwork):
        result |= _summary_measures(network, images)
    return result, network


@torch.no_grad()
def _summary_measures(network: SummaryNetwork, images: datasets.Images) -> dict[str, float]:
    """Return the orthogonality defect of b, and how far the two logits agree on the test images."""
    network.train()  # both logits
    agree, difference, norm = 0, 0.0, 0.0
    for x in images.x_test.split(1000):
        o1, o2 = network(x)
        agree += int((o1.argmax(1) == o2.argmax(1)).sum())
        difference += float((o1 - o2).square().sum())
        norm += float(o1.square().sum())
    return {
        "orthogonality_defect": network.head.orthogonality_defect(),
        "agreement": agree / len(images.y_test),
        "relative_difference": (difference / norm) ** 0.5,
    }


def _check_gradients(network: SummaryNetwork, images: datasets.Images) -> dict[str, Any]:
    """Compare the gradients of the head's loss on a training batch with fp64: ours, and autograd's of the expression."""
    with torch.no_grad():
        features = network.body(images.x_train[:BATCH])
    target = images.y_train[:BATCH]
    head = network.head
    tensors = (features, head.b, head.output.weight, head.output.bias)

    def gradients(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        return list(torch.autograd.grad(loss(*inputs, target), inputs))

    plain = tolerances.naive_head_cross_entropy
    rows = {}
    for name, ours, autograd, exact in zip(
        ("features", "b", "output weight", "output bias"),
        gradients(interp_nn.functional.summary_head_cross_entropy, torch.float32),
        gradients(plain, torch.float32),
        gradients(plain, torch.float64),
        strict=True,
    ):
        rows[name] = {"interp_nn": tolerances.errors(ours, exact)[0], "autograd": tolerances.errors(autograd, exact)[0]}
    floor = 16 * torch.finfo(torch.float32).eps
    passed = all(row["interp_nn"] <= 2 * row["autograd"] + floor for row in rows.values())
    return {"relative_error_to_fp64": rows, "passed": passed}


def _timings(n: int, d: int, k: int, device: str) -> dict[str, Any]:
    """Time forward + backward of the summary, the unfused expression, an inverse-based baseline and nn.Linear, in fp32."""
    at = torch.device(device)
    names = ("ours", "unfused", "inverse-inv", "linear")
    writer = Writer(None, common(device))
    measure(Problem("summary", n, d, k), ("fwdbwd",), names, Asked(at, TIMERS[at.type][0]), None, writer)
    found = {row["provider"]: row for row in writer.rows}
    medians = {name: found[name]["ms_p50"] for name in names}
    return {"n": n, "d": d, "k": k, "plan": found["ours"]["plan"], "ms_p50": medians}


def _of(whole: dict[str, Any], head: str, key: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([run[key] for run in whole["results"]["runs"] if run["head"] == head])


def _print(whole: dict[str, Any]) -> None:
    results = whole["results"]
    print(f"\n{'head':8} {'test accuracy':>18} {'epoch':>9} {'first loss':>11} {'defect':>8} {'o1/o2 agree':>12}")
    for head in NETWORKS:
        last = 100 * _of(whole, head, "test_accuracy")[:, -1]
        spread = f" ± {last.std(ddof=1):.2f}" if len(last) > 1 else ""
        seconds = np.median(_of(whole, head, "epoch_seconds"))
        line = f"{head:8} {f'{last.mean():.2f}{spread} %':>18} {seconds:7.2f} s {_of(whole, head, 'first_loss').mean():11.2f}"
        if head == "summary":
            defect, agreement = (_of(whole, head, key).mean() for key in ("orthogonality_defect", "agreement"))
            line += f" {defect:8.3f} {100 * agreement:10.2f} %"
        print(line)
    check = results["gradients"]
    print(f"\ngradients on a training batch, relative error to fp64 ({'passed' if check['passed'] else 'FAILED'}):")
    for name, errors in check["relative_error_to_fp64"].items():
        print(f"  {name:14} interp_nn {errors['interp_nn']:.1e}   autograd {errors['autograd']:.1e}")
    print("\nforward + backward, ms (medians, interleaved):")
    for row in results["timings"]:
        times = "   ".join(f"{name} {ms:.3g}" for name, ms in row["ms_p50"].items())
        print(f"  n, d, k = {row['n']}, {row['d']}, {row['k']}:   {times}")


def _draw(whole: dict[str, Any], spectrum: np.ndarray[Any, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"mlp": "0.5", "summary": PALETTE[0]}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    (losses, rates), (values, bars) = axes
    for head, colour in colours.items():
        relative = _of(whole, head, "loss") / _of(whole, head, "first_loss")[:, None]
        for axis, curves in ((losses, relative), (rates, 100 * _of(whole, head, "test_accuracy"))):
            epochs = np.arange(1, curves.shape[1] + 1)
            axis.plot(epochs, curves.T, color=colour, alpha=0.3, linewidth=1)
            axis.plot(epochs, curves.mean(0), color=colour, marker="." if len(epochs) < 3 else "", label=f"{head} head")
    losses.set(yscale="log", xlabel="epoch", ylabel="training loss / first step's")
    losses.set_title("Each head's loss over its own first value: their terms differ", fontsize=10)
    rates.set(xlabel="epoch", ylabel="test accuracy, %")
    ends = [f"{head} {100 * _of(whole, head, 'test_accuracy')[:, -1].mean():.1f} %" for head in reversed(colours)]
    rates.set_title(f"Test accuracy: {', '.join(ends)}", fontsize=10)
    rates.legend()
    for axis in (losses, rates):
        axis.xaxis.get_major_locator().set_params(integer=True)

    index = np.arange(1, len(spectrum) + 1)
    values.plot(index, spectrum, color=PALETTE[0], label="b")
    values.plot(index, spectrum**3, color=PALETTE[1], label="effective weight b (bᵀb)")
    values.axhline(1, color="black", linewidth=0.5)
    values.set(xlabel="index", ylabel="singular value")
    values.set_title(f"b of the last seed is {np.abs(spectrum - 1).max():.2f} from orthonormal columns", fontsize=10)
    values.legend()

    rows = whole["results"]["timings"]
    names = list(rows[0]["ms_p50"])
    for i, row in enumerate(rows):
        ratios = np.array([row["ms_p50"][name] for name in names]) / row["ms_p50"]["linear"]
        label = f"n, d, k = {row['n']:,}, {row['d']}, {row['k']}"
        drawn = bars.bar(np.arange(len(names)) + 0.4 * i - 0.2, ratios, 0.4, color=PALETTE[i], label=label)
        bars.bar_label(drawn, fmt="%.2g", fontsize=8)
    bars.axhline(1, color="black", linewidth=0.5)
    bars.set_xticks(np.arange(len(names)), names)
    bars.set(ylabel="time / nn.Linear's")
    bars.margins(y=0.1)
    ratios = [f"{row['ms_p50']['ours'] / row['ms_p50']['linear']:.2g} at {row['n']:,} rows" for row in rows]
    bars.set_title(f"Forward + backward: ours {', '.join(ratios)}", fontsize=10)
    bars.legend(fontsize=9)
    figure.suptitle(f"{whole['experiment']}, {whole['epochs']} epochs, {len(whole['seeds'])} seeds, {whole['device']}")
    with files.replacing(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
