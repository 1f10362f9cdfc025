"""A cell of the sweep: one network with one layer, trained by one optimizer at one rate from one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.experiments import datasets
from benchmarks.experiments.learning_rates import text
from benchmarks.experiments.learning_rates.architectures import GPT, NETWORKS
from benchmarks.experiments.learning_rates.layers import CANDIDATES, Linear
from benchmarks.experiments.training import accuracy
from interp_nn.nn import SummaryLinear, update_spectral_norms

BATCH = 32
REST_RATE = 3e-3  # of AdamW beside Muon, for parameters that are not weights of the compared layers


class Cell(NamedTuple):
    """The names of a cell; `length` is the number of epochs, of steps for the GPT."""

    network: str
    layer: str
    optimizer: str
    rate: float
    seed: int
    length: int


Optimizers = list[torch.optim.Optimizer]


def _grouped(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices decay, vectors and gains do not."""
    gains = {id(gain) for m in network.modules() if isinstance(m, Linear) for gain in m.gains}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in network.parameters():
        groups[parameter.ndim > 1 and id(parameter) not in gains].append(parameter)
    return [{"params": groups[True], "weight_decay": decay}, {"params": groups[False], "weight_decay": 0.0}]


def _muon(network: nn.Module, rate: float) -> Optimizers:
    """Return PyTorch's Muon, with its own decay of 0.1, for the weights of the layers, and AdamW for the rest.

    Muon takes matrices, so that b of SummaryConv2d, which has the layout of kernels, is among the rest.
    """
    weights = [m.weight for m in network.modules() if isinstance(m, Linear)]
    weights += [m.b for m in network.modules() if isinstance(m, SummaryLinear)]
    rest = [p for p in network.parameters() if all(p is not weight for weight in weights)]
    return [torch.optim.Muon(weights, rate), torch.optim.AdamW(rest, REST_RATE, weight_decay=0.0, fused=True)]


def _adamw(decay: float) -> Callable[[nn.Module, float], Optimizers]:
    return lambda network, rate: [torch.optim.AdamW(_grouped(network, decay), rate, fused=True)]


_ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
OPTIMIZERS: dict[str, tuple[tuple[float, ...], Callable[[nn.Module, float], Optimizers]]] = {
    "SGD": (
        (0.01, 0.03, 0.1, 0.3, 1.0),
        lambda network, rate: [torch.optim.SGD(network.parameters(), rate, fused=True)],
    ),
    "SGD, momentum 0.9": (
        (0.003, 0.01, 0.03, 0.1, 0.3),
        lambda network, rate: [torch.optim.SGD(network.parameters(), rate, momentum=0.9, fused=True)],
    ),
    "Adam": (_ADAM_RATES, _adamw(0.0)),
    "AdamW, decay 0.01": (_ADAM_RATES, _adamw(0.01)),
    "AdamW, decay 0.1": (_ADAM_RATES, _adamw(0.1)),
    "AdamW, decay 0.1 of all": (
        _ADAM_RATES,
        lambda network, rate: [torch.optim.AdamW(network.parameters(), rate, weight_decay=0.1, fused=True)],
    ),
    "Muon": ((0.003, 0.01, 0.03, 0.1, 0.3), _muon),
}


def train(cell: Cell) -> dict[str, Any]:
    """Train the cell on one thread and return its row."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    return {**cell._asdict(), **(_language(cell) if cell.network == "gpt" else _digits(cell))}


class _Steps:
    """The steps of a training: the loss's gradient, the optimizers, and what the layers do after them."""

    def __init__(self, cell: Cell, network: nn.Module) -> None:
        self.optimizers = OPTIMIZERS[cell.optimizer][1](network, cell.rate)
        self.network = network
        self.layers = [m for m in network.modules() if isinstance(m, Linear)]

    def __call__(self, loss: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        for layer in self.layers:
            layer.after_step()
        update_spectral_norms(self.network)


def _digits(cell: Cell) -> dict[str, Any]:
    images = datasets.digits()
    x, y = images.x_train, images.y_train
    network = NETWORKS[cell.network](CANDIDATES[cell.layer])
    step = _Steps(cell, network)
    shuffle = torch.Generator().manual_seed(cell.seed)
    begun = time.process_time()
    mean, steps = math.nan, cell.length * math.ceil(len(y) / BATCH)
    rates = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, steps) for o in step.optimizers]
    for _ in range(cell.length):
        total = 0.0
        for index in torch.randperm(len(y), generator=shuffle).split(BATCH):
            loss = nn.functional.cross_entropy(network(x[index]), y[index])
            step(loss)
            for rate in rates:
                rate.step()
            total += len(index) * float(loss.detach())
        mean = total / len(y)
        if not math.isfinite(mean):
            break
    return {
        "accuracy": accuracy(network, images.x_test, images.y_test),
        "loss": mean,
        "finite": math.isfinite(mean),
        "seconds": time.process_time() - begun,
    }


def _language(cell: Cell) -> dict[str, Any]:
    """Train a GPT on texts of 128 characters, with a warm-up of 5 % of the steps and a cosine to a tenth of the rate."""
    data = text.corpus()
    network = GPT(data.characters, CANDIDATES[cell.layer])
    step = _Steps(cell, network)
    rates = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: text.schedule(i, cell.length)) for o in step.optimizers]
    draw = torch.Generator().manual_seed(cell.seed)
    curve: list[tuple[int, float, float]] = []  # steps, seconds, validation loss
    seconds, loss = 0.0, torch.zeros(())
    for i in range(cell.length):
        begun = time.process_time()
        tokens = text.batch(data.train, draw)
        loss = nn.functional.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        step(loss)
        for rate in rates:
            rate.step()
        seconds += time.process_time() - begun
        if (i + 1) % 50 == 0 or i + 1 == cell.length:
            curve.append((i + 1, seconds, text.validation_loss(network, data.validation)))
            if not math.isfinite(curve[-1][2]):
                break
    spectra = {}
    for name, module in network.named_modules():
        if isinstance(module, Linear):
            values = torch.linalg.svdvals(module.effective_weight().detach())
            spectra[name] = [float(values[int(q * (len(values) - 1))]) for q in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)]
    return {
        "validation_loss": curve[-1][2], "loss": float(loss.detach()), "finite": math.isfinite(curve[-1][2]),
        "seconds": seconds, "curve": curve, "spectra": spectra,
    }  # fmt: skip
