"""The regimes of the papers on gated networks: a network's gates, whether they learn, and the input of its weights.

The papers are Lakshminarayanan & Singh (2020), arXiv 2006.10529 (FRNPF, DLNPF, FLNPF), and arXiv 2110.03403 and 2203.16455
(DGN and DLGN, whose weights see the input or ones).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

from torch import nn

from interp_nn.nn.gated.from_relu import to_dgn
from interp_nn.nn.gated.gates import HardGate, SoftGate
from interp_nn.nn.gated.regimes import copy_gates, fix_gates

MEANINGS = {
    "ReLU": "the network itself",
    "FRNPF (II)": "gates of a random network, fixed; weights with an initialisation of their own",
    "FRNPF (DI)": "gates of a random network, fixed; weights begin as that network's",
    "DLNPF": "gates (1.1 sigmoid(4 q)) and weights learn together",
    "FLNPF": "gates of the trained ReLU network, fixed; weights learn anew",
    "DGN(x)": "gates (sigmoid(4 q)) and weights learn together",
    "DGN(1)": "the same, the weights' input all ones",
    "DLGN(x)": "gates of a deep linear network (sigmoid(4 q)) and weights learn together",
    "DLGN(1)": "the same, the weights' input all ones",
}

_HARD, _SOFT = HardGate(), SoftGate(4.0)
_DUALS = {
    "FRNPF (II)": ("relu", "x", _HARD), "FRNPF (DI)": ("relu", "x", _HARD), "DLNPF": ("relu", "x", SoftGate(4.0, 0.1)),
    "FLNPF": ("relu", "x", _HARD), "DGN(x)": ("relu", "x", _SOFT), "DGN(1)": ("relu", "ones", _SOFT),
    "DLGN(x)": ("linear", "x", _SOFT), "DLGN(1)": ("linear", "ones", _SOFT),
}  # fmt: skip
Network = TypeVar("Network", bound=nn.Module)


def build(regime: str, backbone: Callable[[], nn.Module], trained: nn.Module | None = None) -> nn.Module:
    """Build the backbone, a ReLU network, in a regime of `MEANINGS` with new weights; FLNPF has the gates of `trained`."""
    network = initialised(backbone())
    if regime == "ReLU":
        return network
    gating, value_input, gate = _DUALS[regime]
    dual = to_dgn(network, gating=gating, value_input=value_input, gate=copy.deepcopy(gate), reset=False)
    if regime != "FRNPF (DI)":
        initialised(dual)
    if regime == "FLNPF":
        if trained is None:
            raise ValueError("trained: got None, want the trained network that FLNPF takes its gates from")
        copy_gates(trained, dual)
    return fix_gates(dual) if isinstance(gate, HardGate) else dual


def initialised(network: Network) -> Network:
    """Draw the network's weights as He et al. (2015) do: without biases, signals fade with depth from PyTorch's own weights."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight)
    return network


def relu_mlp(*widths: int) -> nn.Sequential:
    """Build linear layers of these widths without biases, with ReLU between."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def gconv(channels: int, classes: int = 10, stride: int = 1) -> nn.Sequential:
    """Build GCONV of arXiv 2006.10529, without biases: four convolutions 3 x 3, the mean of all positions, two hidden layers.

    The published stride of the second and the fourth convolution is 1; with 2 the network is 7 times cheaper.
    """
    layers: list[nn.Module] = []
    for (fan_in, fan_out), step in zip(pairwise((channels, 64, 64, 128, 128)), (1, stride) * 2, strict=True):
        layers += [nn.Conv2d(fan_in, fan_out, 3, step, padding=1, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *relu_mlp(128, 256, 256, classes))
