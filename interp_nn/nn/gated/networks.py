"""Gated networks: a gating network computes gates, and a value network computes the output with them.

DGN and DLGN are those of Lakshminarayanan & Singh (NeurIPS 2020, arXiv 2006.10529; arXiv 2110.03403). With L hidden layers:

    gating  q(l) = Theta^f(l) z^f(l-1),  z^f(0) = x      G(l) = gate(q(l))
    value   z^v(l) = G(l) * (Theta^v(l) z^v(l-1)),       y = Theta^v(L+1) z^v(L),   z^v(0) = x or all ones

y is a sum over paths, each a product of its gates, input and weights. The gating is 'relu' (z^f = relu(q)), 'linear'
(z^f = q), or 'shallow' (q(l) = Theta^f(l) x). In the last two each gate is on in a half-space of inputs.
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
from interp_nn.nn.gated.oblique_tree import ObliqueTree, Task, grow
from interp_nn.nn.gated.strongest_paths import Paths, strongest_paths

_MAX_ENTRIES = 1 << 28  # of a value tensor: 1 GiB in fp32, four times that when Adam trains it


class GateWeights(NamedTuple):
    """Hold the half-spaces of one layer's gates: gate i is on where weight[i] x + bias[i] > 0.

    Attributes:
        weight: Weight of the preactivations as a function of the input, (units, inputs).
        bias: Bias of the preactivations, (units,).

    Example:
        >>> first, second = DLGN((4, 8, 6, 3)).effective_gate_weights()
        >>> second.weight.shape, second.bias.shape
        (torch.Size([6, 4]), torch.Size([6]))
    """

    weight: Tensor
    bias: Tensor


class GatedNetwork(nn.Module):
    """Compute y = value(z, gates) with gates = gate(gating(x)): the base class of `DGN`, `DLGN` and converted networks.

    Args:
        gating: Maps x to the preactivations q(l) of the gates, one tensor (n, ...) a layer, followed by other tensors that
            the value network needs (the choices of max-poolings).
        value: Maps (z, gates) to y. It shares no parameters with the gating network.
        gate: Module that maps preactivations to gates; None is `SoftGate()`.
        value_input: The value network's input z: 'x', or 'ones' of x's shape.
        layers: Names of the gating layers.

    Attributes:
        gate_order: gate_order[l] is the gating layer whose gates multiply value layer l.
        gates_fixed: True after `fix_gates`.

    Raises:
        ValueError: `value_input` is something else.

    Example:
        >>> model = DGN((4, 8, 3))
        >>> isinstance(model, GatedNetwork), model.layers
        (True, ('gating.layers.0',))
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
        """Compute the output (n, out) of x (n, ...)."""
        return self._output(x, self.gating(x))

    def gate_values(self, x: Tensor) -> list[Tensor]:
        """Compute the gates (n, ...) that multiply each value layer, soft or hard as `gate` makes them."""
        return self.value_gates(self.gating(x))[: len(self.layers)]

    def value_gates(self, seen: Sequence[Tensor]) -> list[Tensor]:
        """Compute the value network's second argument from `seen`, the result of `gating(x)`."""
        return [*(self.gate(seen[i]) for i in self.gate_order), *seen[len(self.layers) :]]

    @torch.no_grad()
    def gates(self, x: Tensor) -> GateRecord:
        """Record the gates that are on (q > 0) in each gating layer, and the network's output.

        Args:
            x: Input of shape (n, ...).

        Returns:
            The record. Its sites are named as in `layers`.

        Raises:
            ValueError: A batch norm or dropout is in training mode: it would couple samples or draw random numbers.
        """
        self._check_evaluating()
        seen = self.gating(x)
        qs = seen[: len(self.layers)]
        sites = [GateSite(name, "gate", q.shape[1:]) for name, q in zip(self.layers, qs, strict=True)]
        return GateRecord(self._output(x, seen), sites, qs, len(x))

    @torch.no_grad()
    def gate_sharpness(self, x: Tensor) -> float:
        """Compute the sharpness of the gates at x (n, ...), from 0 (all half open) to 1 (each open or closed).

        Raises:
            ValueError: A batch norm or dropout is in training mode.
        """
        self._check_evaluating()
        values = torch.cat([g.flatten() for g in self.gate_values(x)])
        return float((2 / getattr(self.gate, "ceiling", 1.0) * values - 1).abs().mean())

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode; return the module. A fixed gating network stays in evaluation mode."""
        super().train(mode)
        if self.gates_fixed:
            self.gating.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Return the gate order for the state_dict."""
        return torch.tensor(self.gate_order)

    def set_extra_state(self, state: Tensor) -> None:
        """Set the gate order from a state_dict."""
        self.gate_order = tuple(int(i) for i in state)

    def extra_repr(self) -> str:
        """Return the value input and a permuted gate order for repr."""
        order = "" if self.gate_order == tuple(range(len(self.layers))) else f", gate_order={self.gate_order}"
        return f"value_input={self.value_input!r}{order}"

    def _output(self, x: Tensor, seen: Sequence[Tensor]) -> Tensor:
        return self.value(self._value_input(x), self.value_gates(seen))

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
    """Compute the preactivations [q(1), ..., q(L)] of a fully connected gating network from x (n, d_in); see `DGN`."""

    def __init__(self, widths: Sequence[int], kind: str, bias: bool, device: object, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.kind, self.inputs = kind, widths[0]
        pairs = ((widths[0], w) for w in widths[1:]) if kind == "shallow" else pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(i, o, bias, device, dtype) for i, o in pairs)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the preactivations, (n, w_l) each."""
        if x.dim() != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"x: got shape {tuple(x.shape)}, want (n, {self.inputs})")
        seen: list[Tensor] = []
        for layer in self.layers:
            seen.append(layer(x))
            if self.kind != "shallow":
                x = torch.relu(seen[-1]) if self.kind == "relu" else seen[-1]
        return seen


class ValueNetwork(nn.Module):
    """Compute y (n, out) from z (n, d_in) and gates [(n, w_1), ..., (n, w_L)], linear in z."""

    def __init__(self, widths: Sequence[int], bias: bool, device: object, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias, device, dtype) for i, o in pairwise(widths))

    def forward(self, z: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Compute the output. Raises ValueError for another number of gates, or gates of other shapes."""
        *hidden, last = self.layers
        if len(gates) != len(hidden):
            raise ValueError(f"gates: got those of {len(gates)} layers, want {len(hidden)}")
        for i, (layer, gate) in enumerate(zip(hidden, gates, strict=True)):
            z = apply_gates(layer(z), gate, f"value.layers.{i}")
        return last(z)


class ValueTensor(nn.Module):
    """Compute y (n, out) = <V, G(1) x ... x G(L)> from gates [(n, w_1), ..., (n, w_L)], with one weight for each path.

    `weight` is V (w_1, ..., w_L, out). It starts such that y has unit variance if all gates are half open.
    """

    def __init__(self, widths: Sequence[int], device: object, dtype: torch.dtype | None) -> None:
        super().__init__()
        if (entries := math.prod(widths)) > _MAX_ENTRIES:
            raise ValueError(
                f"widths: got a value tensor of shape {tuple(widths)}, {entries:.2e} entries; want at most {_MAX_ENTRIES:.2e}"
            )
        self.weight = nn.Parameter(torch.empty(*widths, device=device, dtype=dtype))  # type: ignore[call-overload]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw V from a normal distribution."""
        *hidden, _ = self.weight.shape
        nn.init.normal_(self.weight, std=2 ** len(hidden) / math.sqrt(math.prod(hidden)))

    def forward(self, z: Tensor, gates: Sequence[Tensor]) -> Tensor:
        """Compute the output; z is not used."""
        # Half of the layers at each side of V, so that the intermediate is (n, half of the paths, out).
        half = (len(gates) + 1) // 2
        left, right = reduce(_outer, gates[:half]), reduce(_outer, gates[half:], gates[0].new_ones(len(gates[0]), 1))
        between = (left @ self.weight.reshape(left.shape[1], -1)).unflatten(1, (right.shape[1], -1))
        return torch.einsum("nr,nro->no", right, between)


class _FullyConnected(GatedNetwork):
    """Base class of the networks of given widths: a fully connected gating network, and a value network of a subclass."""

    gating: GatingNetwork
    _gatings: tuple[str, ...] = ("relu", "linear", "shallow")

    def __init__(
        self,
        widths: Sequence[int],
        gating: str,
        value_input: str,
        gate: nn.Module | None,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if len(widths) < 3 or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ValueError(f"widths: got {tuple(widths)}, want positive integers (d_in, w_1, ..., w_L, out), L > 0")
        if gating not in self._gatings:
            *others, last = map(repr, self._gatings)
            raise ValueError(f"gating: got {gating!r}, want {', '.join(others)} or {last}")
        network = GatingNetwork(widths[:-1], gating, bias, device, dtype)
        value = self._value_network(widths, bias, device, dtype)
        super().__init__(network, value, gate, value_input, [f"gating.layers.{i}" for i in range(len(network.layers))])
        self.widths = tuple(widths)

    @staticmethod
    def _value_network(widths: Sequence[int], bias: bool, device: object, dtype: torch.dtype | None) -> nn.Module:
        return ValueNetwork(widths, bias, device, dtype)

    def effective_gate_weights(self) -> list[GateWeights]:
        """Return the half-spaces of the gates, a `GateWeights` for each gating layer, differentiable.

        Raises:
            ValueError: The gating is 'relu', whose gates are not affine in the input.
        """
        if self.gating.kind == "relu":
            raise ValueError("gating: is 'relu', whose gates are not affine in the input; want 'linear' or 'shallow'")
        found: list[GateWeights] = []
        for layer in self.gating.layers:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            bias: Tensor = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias  # type: ignore[assignment]
            if found and self.gating.kind == "linear":
                weight, bias = weight @ found[-1].weight, weight @ found[-1].bias + bias
            found.append(GateWeights(weight, bias))
        return found

    def to_tree(self, x: Tensor, *, task: Task = "classification", min_samples: int = 1) -> ObliqueTree:
        """Read the network back as an oblique decision tree, whose splits are hyperplanes of its gates.

        Each node is divided by the gate across whose hyperplane the network's response jumps most, at the samples of the node.
        The tree grows until the response is constant in each leaf, or no gate divides its samples. Prune it to read it.

        With hard gates and `min_samples=1`, the tree is equal to the network at the samples. Elsewhere, and with soft gates, it
        approximates the network: see `ObliqueTree.fidelity`.

        Args:
            x: Samples (n, d_in) in the network's dtype: the data that the tree is for.
            task: 'classification': the tree approximates the largest output, or the sign of a single one. 'regression': it
                approximates the outputs.
            min_samples: Smallest number of samples in a leaf.

        Returns:
            The tree.

        Raises:
            TypeError: Samples of another dtype.
            ValueError: The gating is 'relu', or the value network's input is 'x', so that outputs vary between gates; samples
                that do not fit, or another task.
        """
        hyperplanes = self.effective_gate_weights()
        if self.value_input != "ones":
            raise ValueError(
                "value_input: is 'x', with which the output varies where no gate changes; a tree needs value_input='ones'"
            )
        return grow(self, self._hard_output, hyperplanes, x, task, min_samples)

    def _hard_output(self, x: Tensor) -> Tensor:
        """Compute the output with gates that are 0 or open."""
        seen, ceiling = self.gating(x), getattr(self.gate, "ceiling", 1.0)
        return self.value(self._value_input(x), [ceiling * (seen[i] > 0).to(x.dtype) for i in self.gate_order])

    def extra_repr(self) -> str:
        """Return the settings for repr."""
        return f"widths={self.widths}, gating={self.gating.kind!r}, {super().extra_repr()}"


class DGN(_FullyConnected):
    """Compute a fully connected deep gated network: x (n, d_in) -> y (n, out).

    With hard gates, a ReLU gating and equal weights in both networks it is that ReLU network itself.

    Args:
        widths: Sizes (d_in, w_1, ..., w_L, out), with at least one hidden layer.
        gating: 'relu', 'linear' or 'shallow', see the module's docstring.
        value_input: Input of the value network, 'x' or 'ones'.
        gate: Module that maps preactivations to gates; None is `SoftGate()`.
        bias: If True, the layers of both networks have biases.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: A floating dtype; None is PyTorch's default dtype.

    Raises:
        ValueError: Another setting, or widths without a hidden layer.

    Example:
        >>> model, x = DGN((4, 8, 8, 3)), torch.ones(2, 4)
        >>> model(x).shape, [tuple(gates.shape) for gates in model.gate_values(x)]
        (torch.Size([2, 3]), [(2, 8), (2, 8)])

    Source: Lakshminarayanan and Singh, NeurIPS 2020, arXiv 2006.10529.
    """

    value: ValueNetwork

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
        super().__init__(widths, gating, value_input, gate, bias, device, dtype)

    def paths(self, x: Tensor, topk: int = 10) -> Paths:
        """Find the paths of largest |contribution| to each output of each sample.

        Args:
            x: Input of shape (n, d_in).
            topk: Number of paths, k; all paths if there are fewer.

        Returns:
            The paths, strongest first.

        Raises:
            ValueError: `topk` is below 1, or there is no sample.
        """
        if topk < 1 or len(x) == 0:
            raise ValueError(f"topk, x: got {topk} paths of {len(x)} samples, want at least one of each")
        layers = [layer for layer in self.value.layers if isinstance(layer, nn.Linear)]
        return strongest_paths(layers, self._value_input(x), self.gate_values(x), topk)

    def _value_input(self, x: Tensor) -> Tensor:
        # All samples have the same ones, so one row is enough until the first gates.
        return x.new_ones(1, x.shape[1]) if self.value_input == "ones" else x


class DLGN(DGN):
    """Compute a deep linearly gated network: a `DGN` whose gates are half-spaces of the input.

    By default the value network sees only ones, so that the gates alone depend on the input.

    Args:
        widths: Sizes (d_in, w_1, ..., w_L, out), with at least one hidden layer.
        gating: 'linear', or 'shallow' (DLGN-SF): each gating layer sees the input itself.
        value_input: Input of the value network, 'ones' or 'x'.
        gate: Module that maps preactivations to gates; None is `SoftGate()`.
        bias: If True, the layers of both networks have biases.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: A floating dtype; None is PyTorch's default dtype.

    Raises:
        ValueError: Another setting, or widths without a hidden layer.

    Example:
        >>> model = DLGN((4, 8, 8, 3))
        >>> [tuple(layer.weight.shape) for layer in model.effective_gate_weights()]
        [(8, 4), (8, 4)]

    Source: Lakshminarayanan and Singh, arXiv 2110.03403.
    """

    _gatings = ("linear", "shallow")

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
        super().__init__(
            widths, gating=gating, value_input=value_input, gate=gate, bias=bias, device=device, dtype=dtype
        )


class DLGNValueTensor(_FullyConnected):
    """Compute y = <V, G(1) x ... x G(L)>: a `DLGN` with a free tensor V in place of the value network.

    Args:
        widths: Sizes (d_in, w_1, ..., w_L, out), with at least one hidden layer. V has the shape (w_1, ..., w_L, out).
        gating: 'linear', or 'shallow': each gating layer sees the input itself.
        gate: Module that maps preactivations to gates; None is `SoftGate()`.
        bias: If True, the gating layers have biases.
        device: Device of the parameters; None is PyTorch's default device.
        dtype: A floating dtype; None is PyTorch's default dtype.

    Raises:
        ValueError: Another setting, widths without a hidden layer, or a V of more than 2^28 entries.

    Example:
        >>> model = DLGNValueTensor((4, 8, 8, 3))
        >>> model(torch.ones(2, 4)).shape, model.value.weight.shape
        (torch.Size([2, 3]), torch.Size([8, 8, 3]))
    """

    value: ValueTensor
    _gatings = ("linear", "shallow")

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
        super().__init__(widths, gating, "ones", gate, bias, device, dtype)

    @staticmethod
    def _value_network(widths: Sequence[int], bias: bool, device: object, dtype: torch.dtype | None) -> nn.Module:
        return ValueTensor(widths[1:], device, dtype)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Compute the outer products (n, i j) of (n, i) and (n, j)."""
    return (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1)
