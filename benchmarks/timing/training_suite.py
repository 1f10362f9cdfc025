"""Suite `train`: training steps of the reference networks on random images, with forward, backward and Adam at batch 32.

"ours" is the network with a summary head, "unfused" the same head in PyTorch's operations, "linear" the same body with two plain
layers of as many parameters, and "base-head" the one with the published head, an MLP of more parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import interp_nn
from benchmarks.records.report import REPEAT
from benchmarks.records.rows import Writer
from benchmarks.timing import footprint, tolerances
from benchmarks.timing.clocks import on_events, on_wall
from benchmarks.timing.measure import Asked, time_calls
from benchmarks.timing.problems import Problem, products
from benchmarks.timing.providers import OURS, UnsupportedError, chosen, planned, repeated
from benchmarks.timing.reference_networks import ARCHITECTURES, CLASSES, LinearNetwork, MLPNetwork, SummaryNetwork
from interp_nn.display import track

ABOUT = {"base-head": "the published head of the reference networks, an MLP with more parameters; in training steps"}
PROVIDERS = (*OURS, "linear", "unfused", *ABOUT, REPEAT)
BATCH, CHANNELS, SIZE = 32, 3, 32
_RATE = 1e-5  # hundreds of steps on the same images then change almost nothing
_Network = LinearNetwork | MLPNetwork | SummaryNetwork
_Loss = Callable[[_Network, Tensor, Tensor], Tensor]


def run(
    names: Sequence[str], asked: Asked, writer: Writer, architectures: Sequence[str] = tuple(ARCHITECTURES)
) -> None:
    """Time a step of each network with each head."""
    found = chosen([name for name in PROVIDERS if name in names], PROVIDERS)
    for architecture in track(architectures, "train", None, "network"):
        with products("fp32"):
            _measure(architecture, found, asked, writer)


def _measure(architecture: str, names: Sequence[str], asked: Asked, writer: Writer) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=draw).to(asked.device)
    target = torch.randint(CLASSES, (BATCH,), generator=draw).to(asked.device)

    features, twin = SummaryNetwork(CHANNELS, SIZE, architecture).head.in_features, repeated(names)

    def enter(name: str) -> tuple[_Step, Callable[[], dict[str, Any]]]:
        step = _Step(twin if name == REPEAT else name, architecture, features, images, target, asked)
        return step, lambda: step.facts() | ({"plan": twin} if name == REPEAT else {})

    found = time_calls(names, enter, on_events if asked.timer == "events" else on_wall, asked)
    for name in names:
        writer.write(
            op=f"train_{architecture}", mode="step", provider=name, dtype="fp32", n=BATCH, d=features,
            k=ARCHITECTURES[architecture].latent, m=CLASSES, **asked.fields(), **found[name],
        )  # fmt: skip


class _Step:
    """A training step of one provider. A call takes it; it is right when its gradients are."""

    def __init__(
        self, name: str, architecture: str, features: int, images: Tensor, target: Tensor, asked: Asked
    ) -> None:
        if asked.timer not in ("wall", "events"):
            raise UnsupportedError("a step with its optimizer is timed by events")
        torch.manual_seed(0)
        self._engine = (OURS[name] or asked.engine) if name in OURS else "auto"
        kinds: dict[str, type[LinearNetwork] | type[MLPNetwork]] = {"linear": LinearNetwork, "base-head": MLPNetwork}
        kind = kinds.get(name, SummaryNetwork)
        self._network: _Network = kind(CHANNELS, SIZE, architecture).to(asked.device)
        self._loss: _Loss = _unfused if name == "unfused" else _own
        self._inputs, self._asked = (images, target), asked
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=_RATE)
        self._plan = None
        if name in OURS:
            problem = Problem("head", BATCH, features, ARCHITECTURES[architecture].latent, CLASSES)
            self._plan = planned(self._engine, problem, "loss", asked.device)
        self()

    def __call__(self) -> None:
        with interp_nn.use_engine(self._engine):
            self._optimizer.zero_grad()
            self._loss(self._network, *self._inputs).backward()
            self._optimizer.step()

    def facts(self) -> dict[str, Any]:
        """Return a row without its time: the error of the gradients, and the memory and launches of a step."""
        images, _ = self._inputs
        plain = _unfused if isinstance(self._network, SummaryNetwork) else _own
        exact = self._gradients(copy.deepcopy(self._network).double(), plain, images.double())
        with interp_nn.use_engine(self._engine):
            ours = tolerances.errors(self._gradients(self._network, self._loss, images), exact)
        theirs = tolerances.errors(self._gradients(self._network, plain, images), exact)
        why = tolerances.exceeds(ours, theirs, tolerances.floor(torch.float32, tolerances.SPLIT_ULPS))
        return {
            "plan": self._plan, "parameters": sum(p.numel() for p in self._network.parameters()),
            "err_fro": ours[0], "err_ratio": ours[0] / theirs[0] if theirs[0] else None,
            "peak_delta_mb": self._peak() / 1e6, "launches": footprint.launches(self, self._asked.device),
            "status": "ok" if why is None else "wrong", "note": why,
        }  # fmt: skip

    def _peak(self) -> int:
        self._optimizer.zero_grad()  # so that a step only adds to the memory in use
        return footprint.peak_bytes(self, self._asked.device)[0]

    def _gradients(self, network: _Network, loss: _Loss, images: Tensor) -> Tensor:
        """Return all gradients in one vector, without dropout: its masks differ between precisions."""
        network.eval()
        value = loss(network, images, self._inputs[1])
        found = torch.autograd.grad(value, list(network.parameters()))
        network.train()
        return torch.cat([gradient.flatten() for gradient in found])


def _own(network: _Network, images: Tensor, target: Tensor) -> Tensor:
    return network.loss(images, target)


def _unfused(network: _Network, images: Tensor, target: Tensor) -> Tensor:
    assert isinstance(network, SummaryNetwork)
    head, output = network.head, network.head.output
    return tolerances.naive_head_cross_entropy(network.body(images), head.b, output.weight, output.bias, target)
