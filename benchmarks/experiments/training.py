"""The training loop of the experiments: Adam on batches, resumable after every epoch, within a limit of time."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.command_line import users_input
from benchmarks.records import environment, files


class Recipe(NamedTuple):
    """The recipe of a training by Adam; with `decay` the learning rate falls linearly, to 0 after the last step.

    Without `shuffle` each epoch has the same batches, in the samples' order.
    """

    epochs: int
    batch: int
    learning_rate: float
    decay: bool = False
    shuffle: bool = True


History = dict[str, list[float]]  # a value for each epoch of "loss", of training "seconds", and of each measure


class Trained(NamedTuple):
    """A history, and the environments that made its epochs in turn: each with its number of "epochs"."""

    history: History
    made: list[dict[str, Any]]


def cross_entropy(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross entropy of the logits (n, k)."""
    return nn.functional.cross_entropy(network(x), y)


def train(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    *,
    label: str,
    seed: int = 0,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = cross_entropy,
    measure: Callable[[nn.Module], dict[str, float]] = lambda network: {},
    seconds: float | None = None,
    checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Trained:
    """Train the parameters that require gradients, and leave the network in evaluation mode.

    Args:
        network: The network.
        x: The inputs.
        y: The targets.
        recipe: The recipe.
        label: The name of the training.
        seed: The seed of the order of batches.
        loss: Returns the loss of (network, x, y) of a batch.
        measure: Returns measures of the network, called after each epoch.
        seconds: A limit of time. After the first epoch none begins that would end later, by the slowest so far.
        checkpoint: A file that is written after each epoch. If it exists, training continues from it exactly, with the network,
            Adam's state, the order of batches, PyTorch's generators and the history (bit by bit on the CPU).
        settings: Numbers that loss and measure depend on. A checkpoint keeps them with label, seed, samples, batch, learning
            rate and the epochs that it decays over; where it has them, they must be equal.

    Returns:
        A history with one value for each epoch that was reached, and the environments that made them.

    Raises:
        ValueError: The batch is below 1, or the checkpoint is of another training or of more epochs than the recipe's.
        FloatingPointError: The loss is not finite.
    """
    from tqdm import tqdm

    if recipe.batch < 1:
        raise ValueError(f"batch: got {recipe.batch}, want at least 1")
    start = time.perf_counter()
    parameters = [p for p in network.parameters() if p.requires_grad]
    adam = torch.optim.Adam(parameters, recipe.learning_rate, fused=True)  # one pass over weights and state
    shuffle = torch.Generator().manual_seed(seed)
    history: History = {"loss": [], "seconds": []}
    made: list[dict[str, Any]] = []
    here = {name: value for name, value in environment.facts(str(x.device)).items() if name != "utc"}
    settings = {
        "label": label, "seed": seed, "samples": len(y), "batch": recipe.batch, "learning_rate": recipe.learning_rate,
        "decayed_over_epochs": recipe.epochs if recipe.decay else None, "shuffle": recipe.shuffle, **(settings or {}),
    }  # fmt: skip
    if checkpoint is not None and checkpoint.exists():
        with users_input():
            history, made = _resume(checkpoint, settings, recipe.epochs, network, adam, shuffle)
        made = made or [{"epochs": len(history["loss"]), **dict.fromkeys(here)}]  # an old checkpoint
    done = len(history["loss"])
    slowest, steps = 0.0, math.ceil(len(y) / recipe.batch)
    with tqdm(total=recipe.epochs * steps, initial=done * steps, desc=label, unit="step", leave=False) as progress:
        for epoch in range(done, recipe.epochs):
            begun = time.perf_counter()
            if seconds is not None and epoch > done and begun - start + slowest > seconds:
                break
            network.train()
            total = torch.zeros((), device=x.device)
            order = torch.randperm(len(y), generator=shuffle) if recipe.shuffle else torch.arange(len(y))
            order = order.to(x.device)
            for step, index in enumerate(order.split(recipe.batch), epoch * steps):
                for group in adam.param_groups if recipe.decay else ():
                    group["lr"] = recipe.learning_rate * (1 - step / (recipe.epochs * steps))
                adam.zero_grad()
                value = loss(network, x[index], y[index])
                value.backward()
                adam.step()
                total += len(index) * value.detach()
                progress.update()
            mean = float(total) / len(y)  # waits for the device, whose time counts
            taken = time.perf_counter() - begun
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{label}: the loss is {mean} in epoch {epoch + 1}; a lower learning rate may help"
                )
            network.eval()
            measures = {"loss": mean, "seconds": taken, **measure(network)}
            for name, one in measures.items():
                history.setdefault(name, []).append(one)
            if not made or made[-1] != {"epochs": made[-1]["epochs"], **here}:
                made.append({"epochs": 0, **here})
            made[-1]["epochs"] += 1
            progress.set_postfix({name: f"{one:.4g}" for name, one in measures.items()})
            if checkpoint is not None:
                _save(checkpoint, settings, network, adam, shuffle, Trained(history, made))
            slowest = max(slowest, time.perf_counter() - begun)
    network.eval()
    return Trained(history, made)


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor, batch: int = 1000) -> float:
    """Return the share of samples that are right by the largest of k outputs (n, k), or by the sign of one (n, 1)."""
    right = 0
    for inputs, target in zip(x.split(batch), y.split(batch), strict=True):
        output = network(inputs)
        right += int(((output[:, 0] > 0 if output.shape[1] == 1 else output.argmax(1)) == target).sum())
    return right / len(y)


class Allowance:
    """Minutes for some trainings, shared evenly by the remaining ones; None is no limit."""

    def __init__(self, minutes: float | None, trainings: int) -> None:
        self._end = None if minutes is None else time.perf_counter() + 60 * minutes
        self._left = trainings

    def seconds(self) -> float | None:
        """Return the seconds of the next training; called once for each."""
        self._left -= 1
        return None if self._end is None else max(0.0, self._end - time.perf_counter()) / (self._left + 1)


def _save(
    file: Path, settings: Mapping[str, Any], network: nn.Module, adam: torch.optim.Adam, shuffle: torch.Generator,
    trained: Trained,
) -> None:  # fmt: skip
    """Replace the file at once, so that it is always whole."""
    kept = {
        "settings": dict(settings),
        "network": network.state_dict(),
        "adam": adam.state_dict(),
        "shuffle": shuffle.get_state(),
        "generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        **trained._asdict(),
    }
    whole = io.BytesIO()  # because PyTorch's own writer does not say that a disk is full
    torch.save(kept, whole)
    with files.replacing(file) as part:
        part.write_bytes(whole.getbuffer())


def _resume(
    file: Path, settings: Mapping[str, Any], epochs: int, network: nn.Module, adam: torch.optim.Adam,
    shuffle: torch.Generator,
) -> Trained:  # fmt: skip
    try:
        kept = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler fails in many ways on damaged files
        raise ValueError(f"{file}: not a whole checkpoint; remove it to begin again") from error
    other = {name: value for name, value in kept["settings"].items() if value != settings.get(name)}
    if other:
        wanted = {name: settings.get(name) for name in other}
        raise ValueError(
            f"{file}: a checkpoint of another training, {other} instead of {wanted}; remove it or name another"
        )
    reached = len(kept["history"]["loss"])
    if reached > epochs:
        raise ValueError(f"{file}: a checkpoint after {reached} epochs, more than the {epochs} asked for")
    network.load_state_dict(kept["network"])
    adam.load_state_dict(kept["adam"])
    shuffle.set_state(kept["shuffle"])
    torch.set_rng_state(kept["generator"])
    if kept["cuda_generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(kept["cuda_generators"])
    return Trained(kept["history"], kept.get("made", []))
