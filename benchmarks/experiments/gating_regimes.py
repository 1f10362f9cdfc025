"""The regimes of the papers on gated networks: which gates a network has, whether they learn, and what its weights see.

Lakshminarayanan & Singh (2020), arXiv 2006.10529 (FRNPF, DLNPF, FLNPF); arXiv 2110.03403 and 2203.16455 (DGN and DLGN, whose
weights see the input or ones).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
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
    "FRNPF (II)": ("relu", "x", _HARD),
    "FRNPF (DI)": ("relu", "x", _HARD),
    "DLNPF": ("relu", "x", SoftGate(4.0, 0.1)),
    "FLNPF": ("relu", "x", _HARD),
    "DGN(x)": ("relu", "x", _SOFT),
    "DGN(1)": ("relu", "ones", _SOFT),
    "DLGN(x)": ("linear", "x", _SOFT),
    "DLGN(1)": ("linear", "ones", _SOFT),
}
Network = TypeVar("Network", bound=nn.Module)


def build(regime: str, backbone: Callable[[], nn.Module], trained: nn.Module | None = None) -> nn.Module:
    """The backbone, a ReLU network, in a regime of `MEANINGS`, with new weights.

    trained: the backbone after its training, whose gates FLNPF has. Raises ValueError for FLNPF without it, KeyError for another
    regime.
    """
    network = initialised(backbone())
    if regime == "ReLU":
        return network
    gating, value_input, gate = _DUALS[regime]
    dual = to_dgn(network, gating=gating, value_input=value_input, gate=copy.deepcopy(gate), reset=False)
    if regime != "FRNPF (DI)":
        initialised(dual)
    if regime == "FLNPF":
        if trained is None:
            raise ValueError("trained: got None, want the trained network, whose gates FLNPF has")
        copy_gates(trained, dual)
    return fix_gates(dual) if isinstance(gate, HardGate) else dual


def initialised(network: Network) -> Network:
    """The network with weights drawn anew as He et al. (2015) do: PyTorch's own fade with depth where there are no biases."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight)
    return network
