"""Gated networks: one network computes the gates, another the output that they let through.

DGN and DLGN are those of Lakshminarayanan & Singh (NeurIPS 2020, arXiv 2006.10529; arXiv 2110.03403): with L hidden layers,

    gating  q(l) = Theta^f(l) z^f(l-1),  z^f(0) = x      G(l) = gate(q(l))
    value   z^v(l) = G(l) * (Theta^v(l) z^v(l-1)),       y = Theta^v(L+1) z^v(L),   z^v(0) = x or all ones

so that y is a sum over paths, each with its gates, input and weights. The gating is a ReLU network (z^f = relu(q)), deep and
linear (z^f = q), or shallow (q(l) = Theta^f(l) x); in the last two each gate is on in a half-space of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.gates.graph import apply_gates
from interp_nn.gates.record import GateRecord, GateSite
from interp_nn.nn.gated.gates import SoftGate
from interp_nn.nn.gated.strongest_paths import Paths, strongest_paths

GATINGS = ("relu", "linear", "shallow")
_LARGEST = 1 << 28  # entries of a value tensor: 1 GiB in fp32, four times that when Adam trains it


class GateWeights(NamedTuple):
    """The preactivations of one layer's gates as they depend on the input, q = weight x + bias.

    weight (units, inputs), bias (units,): the half-space in which gate i is on is weight[i] x + bias[i] > 0.
    """

    weight: Tensor
    bias: Tensor


class GatedNetwork(nn.Module):
    """y = value(z, gates) with gates = gate(gating(x)): what `DGN`, `DLGN` and converted networks have in common.

    gating: x -> the preactivations q(l) of the gates, one tensor (n, ...) a layer (and whatever else the value network must be
    told). value: (z, gates) -> y. The two share no parameters. `layers`: the names of the gating layers. `gate_order[l]`: the
    gating layer whose gates multiply value layer l. value_input: z, the input 'x' itself or 'ones' of its shape.
    """

    def __init__(
        self, gating: nn.Module, value: nn.Module, gate: nn.Module | None, value_input: str, layers: Sequence[str]
    ) -> None:
        super().__init__()
        if value_input not in ("x", "ones"):
            raise ValueError(f"value_input: got {value_input!r}, want 'x' or 'ones'")
        self.gating, self.value = gating, value
        self.gate = SoftGate() if gate is None else gate
        self.value_input, self.layers = value_input, tuple(layers)
        self.gate_order = tuple(range(len(self.layers)))
        self.gates_fixed = False

    def forward(self, x: Tensor) -> Tensor:
        return self._output(x, self.gating(x))

    def gate_values(self, x: Tensor) -> list[Tensor]:
        """The gates (n, ...) that multiply each value layer, soft or hard as the network has them."""
        return self.applied(self.gating(x))[: len(self.layers)]

    def applied(self, seen: Sequence[Tensor]) -> list[Tensor]:
        """What the value network is given of `gating(x)`: the gates in its layers' order, and what else it must be told."""
        return [*(self.gate(seen[i]) for i in self.gate_order), *seen[len(self.layers) :]]

    @torch.no_grad()
    def gates(self, x: Tensor) -> GateRecord:
        """Which gates are on (q > 0) at each sample of x (n, ...), by gating layer, and the network's output.

        Raises ValueError where a batch norm or dropout is in training mode, and would couple samples or draw random numbers.
        """
        self._check_evaluating()
        seen = self.gating(x)
        qs = seen[: len(self.layers)]
        sites = [GateSite(name, "gate", q.shape[1:]) for name, q in zip(self.layers, qs, strict=True)]
        return GateRecord(self._output(x, seen), sites, qs, len(x))

    @torch.no_grad()
    def gate_sharpness(self, x: Tensor) -> float:
        """How hard the gates are at x, from 0 (all of them half open) to 1 (each of them open or closed).

        Raises ValueError where a batch norm or dropout is in training mode.
        """
        self._check_evaluating()
        values = torch.cat([g.flatten() for g in self.gate_values(x)])
        return float((2 / getattr(self.gate, "ceiling", 1.0) * values - 1).abs().mean())

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.gates_fixed:
            self.gating.eval()
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.gate_order)

    def set_extra_state(self, state: Tensor) -> None:
        self.gate_order = tuple(int(i) for i in state)

    def extra_repr(self) -> str:
        order = "" if self.gate_order == tuple(range(len(self.layers))) else f", gate_order={self.gate_order}"
        return f"value_input={self.value_input!r}{order}"

    def _output(self, x: Tensor, seen: Sequence[Tensor]) -> Tensor:
        return self.value(self._value_input(x), self.applied(seen))

    def _value_input(self, x: Tensor) -> Tensor:
        return torch.ones_like(x) if self.value_input == "ones" else x

    def _check_evaluating(self) -> None:
        for name, module in self.named_modules():
            random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            if module.training and (random or isinstance(module, nn.modules.batchnorm._BatchNorm)):
                raise ValueError(
                    f"model: layer {name!r} ({type(module).__name__}) is in training mode; want model.eval()"
                )


class GatingNetwork(nn.Module):
    """x (n, d_in) -> the preactivations [q(1), ..., q(L)] of a fully connected gating network; see `DGN`."""

    def __init__(self, widths: Sequence[int], kind: str, bias: bool, device: object, dtype: torch.dtype | None) -> None:
        super().__init__()
        if kind not in GATINGS:
            raise ValueError(f"gating: got {kind!r}, want one of {GATINGS}")
        self.kind, self.inputs = kind, widths[0]
        pairs = ((widths[0], w) for w in widths[1:]) if kind == "shallow" else pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias, device, dtype) for i, o in pairs)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.dim() != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (n, {self.inputs})")
        seen: list[Tensor] = []
        for layer in self.layers:
            seen.append(layer(x))
            if self.kind != "shallow":
                x = torch.relu(seen[-1]) if self.kind == "relu" else seen[-1]
        return seen


class ValueNetwork(nn.Module):
    """(z (n, d_in), gates [(n, w_1), ..., (n, w_L)]) -> y (n, out), linear in z."""

    def __init__(self, widths: Sequence[int], bias: bool, device: object, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias, device, dtype) for i, o in pairwise(widths))

    def forward(self, z: Tensor, gates: Sequence[Tensor]) -> Tensor:
        *hidden, last = self.layers
        if len(gates) != len(hidden):
            raise ValueError(f"gates: got those of {len(gates)} layers, want {len(hidden)}")
        for i, (layer, gate) in enumerate(zip(hidden, gates, strict=True)):
            z = apply_gates(layer(z), gate, f"value.layers.{i}")
        return last(z)


class ValueTensor(nn.Module):
    """(z, gates [(n, w_1), ..., (n, w_L)]) -> y (n, out) = <V, G(1) x ... x G(L)>, with a weight of its own for each path.

    weight: V (w_1, ..., w_L, out). It starts with y of unit variance where gates are half open.
    """

    def __init__(self, widths: Sequence[int], device: object, dtype: torch.dtype | None) -> None:
        super().__init__()
        if (entries := math.prod(widths)) > _LARGEST:
            raise ValueError(
                f"widths: got a value tensor of shape {tuple(widths)}, {entries:.2e} entries; want at most {_LARGEST:.2e}"
            )
        self.weight = nn.Parameter(torch.empty(*widths, device=device, dtype=dtype))  # type: ignore[call-overload]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        *hidden, _ = self.weight.shape
        nn.init.normal_(self.weight, std=2 ** len(hidden) / math.sqrt(math.prod(hidden)))

    def forward(self, z: Tensor, gates: Sequence[Tensor]) -> Tensor:
        # Half of the layers at each side of V: what lies between the two products is (n, half of the paths, out).
        half = (len(gates) + 1) // 2
        left, right = reduce(_outer, gates[:half]), reduce(_outer, gates[half:], gates[0].new_ones(len(gates[0]), 1))
        between = (left @ self.weight.reshape(left.shape[1], -1)).unflatten(1, (right.shape[1], -1))
        return torch.einsum("nr,nro->no", right, between)


class DGN(GatedNetwork):
    """A deep gated network, fully connected: x (n, d_in) -> y (n, out), with widths (d_in, w_1, ..., w_L, out).

    gating: 'relu', 'linear' or 'shallow'; value_input: 'x' or 'ones'; gate: a module of q, SoftGate() by default. bias: of both
    networks. Hard gates of a ReLU gating whose weights are those of the value network give that ReLU network itself.
    Raises ValueError for other settings, or widths without a hidden layer.
    """

    value: ValueNetwork
    gating: GatingNetwork

    def __init__(
        self,
        widths: Sequence[int],
        *,
        gating: str = "relu",
        value_input: str = "x",
        gate: nn.Module | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        network = GatingNetwork(_checked(widths)[:-1], gating, bias, device, dtype)
        value = ValueNetwork(widths, bias, device, dtype)
        super().__init__(network, value, gate, value_input, [f"gating.layers.{i}" for i in range(len(network.layers))])
        self.widths = tuple(widths)

    def effective_gate_weights(self) -> list[GateWeights]:
        """The half-spaces of the gates, a `GateWeights` for each gating layer, differentiable.

        Raises ValueError for a ReLU gating, whose gates are not affine in the input.
        """
        return _effective(self.gating)

    def paths(self, x: Tensor, topk: int = 10) -> Paths:
        """The `topk` paths of largest |contribution| to each output, of each sample of x (n, d_in); see `Paths`."""
        if topk < 1 or len(x) == 0:
            raise ValueError(f"topk, x: got {topk} paths of {len(x)} samples, want at least one of each")
        layers = [layer for layer in self.value.layers if isinstance(layer, nn.Linear)]
        return strongest_paths(layers, self._value_input(x), self.gate_values(x), topk)

    def extra_repr(self) -> str:
        return f"widths={self.widths}, gating={self.gating.kind!r}, {super().extra_repr()}"

    def _value_input(self, x: Tensor) -> Tensor:
        # One row of ones is every sample's, until the first gates tell them apart.
        return x.new_ones(1, x.shape[1]) if self.value_input == "ones" else x


class DLGN(DGN):
    """A deep linearly gated network: a `DGN` whose gates are half-spaces of the input, and whose value network sees only ones.

    gating='shallow' is DLGN-SF, whose gating layers see the input itself.
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        gating: str = "linear",
        value_input: str = "ones",
        gate: nn.Module | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if gating not in ("linear", "shallow"):
            raise ValueError(f"gating: got {gating!r}, want 'linear' or 'shallow' (of ReLU: DGN)")
        super().__init__(
            widths, gating=gating, value_input=value_input, gate=gate, bias=bias, device=device, dtype=dtype
        )


class DLGNValueTensor(GatedNetwork):
    """y = <V, G(1) x ... x G(L)> with a free tensor V (w_1, ..., w_L, out) where a DLGN has a value network.

    widths (d_in, w_1, ..., w_L, out); gating, gate, bias (of the gating) as in `DLGN`. Raises ValueError for a V of more than
    2^28 entries.
    """

    value: ValueTensor
    gating: GatingNetwork

    def __init__(
        self,
        widths: Sequence[int],
        *,
        gating: str = "linear",
        gate: nn.Module | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if gating not in ("linear", "shallow"):
            raise ValueError(f"gating: got {gating!r}, want 'linear' or 'shallow'")
        network = GatingNetwork(_checked(widths)[:-1], gating, bias, device, dtype)
        value = ValueTensor(widths[1:], device, dtype)
        super().__init__(network, value, gate, "ones", [f"gating.layers.{i}" for i in range(len(network.layers))])
        self.widths = tuple(widths)

    def effective_gate_weights(self) -> list[GateWeights]:
        """The half-spaces of the gates, a `GateWeights` for each gating layer, differentiable."""
        return _effective(self.gating)

    def extra_repr(self) -> str:
        return f"widths={self.widths}, gating={self.gating.kind!r}"


def _checked(widths: Sequence[int]) -> Sequence[int]:
    if len(widths) < 3 or not all(isinstance(w, int) and w > 0 for w in widths):
        raise ValueError(f"widths: got {tuple(widths)}, want positive integers (d_in, w_1, ..., w_L, out), L > 0")
    return widths


def _effective(gating: GatingNetwork) -> list[GateWeights]:
    if gating.kind == "relu":
        raise ValueError("gating: is 'relu', whose gates are not affine in the input; want 'linear' or 'shallow'")
    found: list[GateWeights] = []
    for layer in gating.layers:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        bias: Tensor = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias  # type: ignore[assignment]
        if found and gating.kind == "linear":
            weight, bias = weight @ found[-1].weight, weight @ found[-1].bias + bias
        found.append(GateWeights(weight, bias))
    return found


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """(n, i) and (n, j) -> (n, i j)."""
    return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
