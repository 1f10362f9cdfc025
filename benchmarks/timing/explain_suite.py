"""Suite `explain`: the affine map of a network, and the grouping of activation patterns, against PyTorch's own functions.

"ours" linearizes all ten rows of W for a batch; "backwards" takes ten backward passes, the floor; "jacrev" is torch.func's
Jacobian under vmap. "ours" groups patterns by their packed bits; "unique" is torch.unique over rows of booleans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.records.report import REPEAT
from benchmarks.records.rows import Writer
from benchmarks.timing import footprint, tolerances
from benchmarks.timing.clocks import on_events, on_wall
from benchmarks.timing.measure import Asked, WrongError, time_calls
from benchmarks.timing.problems import products
from benchmarks.timing.reference_networks import ARCHITECTURES, CLASSES, MLPNetwork
from interp_nn.display import track
from interp_nn.explain import ActivationPatterns, linearize

PROVIDERS = ("ours", "backwards", "jacrev", "unique", REPEAT)
_CHANNELS, _SIZE = 3, 32
_BATCH = {"cnn": 16, "vgg11": 4}
_SAMPLES, _UNITS, _KINDS = 100_000, 256, 5_000  # of patterns

_Call = Callable[[], Tensor]


def run(asked: Asked, writer: Writer, quick: bool = False) -> None:
    """Time linearization of the reference networks and grouping of patterns."""
    kinds = [*([] if quick else ARCHITECTURES), "patterns"]
    for kind in track(kinds, "explain", None, "problem"):
        if kind == "patterns":
            _patterns(asked, writer, _SAMPLES // (100 if quick else 1))
        else:
            with products("fp32"):  # tf32 moves gates, and W with them
                _linearize(kind, asked, writer)


def _linearize(architecture: str, asked: Asked, writer: Writer) -> None:
    torch.manual_seed(0)
    network = MLPNetwork(_CHANNELS, _SIZE, architecture).to(asked.device).eval()
    images = torch.randn(_BATCH[architecture], _CHANNELS, _SIZE, _SIZE).to(asked.device)
    calls: dict[str, _Call] = {
        "ours": lambda: linearize(network, images).weight,
        "backwards": lambda: _backwards(network, images),
        "jacrev": lambda: _jacobian(network, images),
    }
    exact = _backwards(
        MLPNetwork(_CHANNELS, _SIZE, architecture).to(asked.device).eval().double(), images.double(), network
    )
    sizes = {"n": len(images), "d": images[0].numel(), "k": CLASSES}
    _measure(
        f"linearize_{architecture}", sizes, calls, lambda got: tolerances.errors(got, exact)[0], 1e-4, asked, writer
    )


def _backwards(network: nn.Module, images: Tensor, state: nn.Module | None = None) -> Tensor:
    """Return W (n, 10, channels, height, width) by a backward pass a row, with the parameters of `state` if it is given."""
    if state is not None:
        network.load_state_dict(state.state_dict())
    x = images.detach().requires_grad_()
    logits = network(x).sum(0)
    return torch.stack([torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in logits], 1)


def _jacobian(network: nn.Module, images: Tensor) -> Tensor:
    def one(image: Tensor) -> Tensor:
        return network(image.unsqueeze(0)).squeeze(0)

    with torch.no_grad():  # of the parameters
        return torch.func.vmap(torch.func.jacrev(one))(images)


def _patterns(asked: Asked, writer: Writer, samples: int) -> None:
    draw = torch.Generator().manual_seed(0)
    kinds = torch.rand(_KINDS, _UNITS, generator=draw) < 0.5
    gates = kinds[torch.randint(_KINDS, (samples,), generator=draw)].to(asked.device)
    calls: dict[str, _Call] = {
        "ours": lambda: ActivationPatterns.from_gates(gates).groups().labels,
        "unique": lambda: torch.unique(gates, dim=0, return_inverse=True)[1],
    }
    expected = calls["unique"]()

    def differing(labels: Tensor) -> float:
        """Return 0.0 where both labellings have the same groups, else 1.0."""
        pairs = torch.stack((labels, expected), 1).unique(dim=0)
        same = len(pairs) == len(labels.unique()) == len(expected.unique())
        return 0.0 if same else 1.0

    sizes = {"n": samples, "d": _UNITS, "k": 1}
    _measure("group_patterns", sizes, calls, differing, 0.0, asked, writer)


def _measure(
    op: str, sizes: dict[str, int], calls: dict[str, _Call], error: Callable[[Tensor], float], limit: float,
    asked: Asked, writer: Writer,
) -> None:  # fmt: skip
    """Check every call, time all in turn, check again, and write their rows; a larger error than `limit` is wrong."""
    # On a GPU always by events: these calls wait for the device.
    calls = {**calls, REPEAT: calls["ours"]}
    timer, clock = ("events", on_events) if asked.device.type == "cuda" else ("wall", on_wall)

    def enter(name: str) -> tuple[_Call, Callable[[], dict[str, Any]]]:
        call = calls[name]
        if (off := error(call())) > limit:
            raise WrongError(f"relative error {off:.2g}")

        def facts() -> dict[str, Any]:
            off = error(call())
            return {
                "plan": "ours" if name == REPEAT else None, "err_fro": off,
                "peak_delta_mb": footprint.peak_bytes(call, asked.device)[0] / 1e6,
                "launches": footprint.launches(call, asked.device), "status": "ok" if off <= limit else "wrong",
                "note": None if off <= limit else f"after timing: relative error {off:.2g}",
            }  # fmt: skip

        return call, facts

    found = time_calls(calls, enter, clock, asked)
    fields = {"op": op, "mode": "explain", "dtype": "fp32", **sizes, **asked.fields(), "timer": timer}
    for name in [name for name in PROVIDERS if name in found]:
        writer.write(**fields, provider=name, **found[name])
