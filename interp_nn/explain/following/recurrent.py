"""The recurrent kernels of PyTorch as their steps in time, so that each step's calls are followed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from interp_nn.explain.following.calls import RANDOM, Call, UnsupportedCallError

State = tuple[Tensor, ...]  # the hidden state, and for an LSTM the cell's state
Step = Callable[[Tensor, State, Tensor, "Tensor | None"], State]
_ARGUMENTS, _CELL_ARGUMENTS = 9, (4, 6)


def _simple(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda given, state, weight, bias: (activation(given + F.linear(state[0], weight, bias)),)


def _lstm(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    i, f, g, o = (given + F.linear(state[0], weight, bias)).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    r, z, n = given.chunk(3, -1)
    to_r, to_z, to_n = F.linear(state[0], weight, bias).chunk(3, -1)
    update = (z + to_z).sigmoid()
    return ((1 - update) * (n + (r + to_r).sigmoid() * to_n).tanh() + update * state[0],)


_STEPS: dict[str, Step] = {"rnn_relu": _simple(F.relu), "rnn_tanh": _simple(torch.tanh), "lstm": _lstm, "gru": _gru}
KERNELS = frozenset((*_STEPS, *(f"{name}_cell" for name in _STEPS)))


def unrolled(call: Call) -> Callable[[], Any]:
    """Return a function that computes the result of one of KERNELS by other calls.

    Raises UnsupportedCallError for a packed sequence, for dropout, and for arguments by name.
    """
    name, args = call.name.removesuffix("_cell"), call.args
    if call.name.endswith("_cell"):
        if call.kwargs or len(args) not in _CELL_ARGUMENTS:
            raise UnsupportedCallError("it has other arguments than nn.RNNCell, nn.LSTMCell and nn.GRUCell give")
        return lambda: _cell(_STEPS[name], *args)
    if call.kwargs or len(args) != _ARGUMENTS or isinstance(args[3], (Tensor, tuple, list)):
        raise UnsupportedCallError("its sequences are packed, or its arguments have names; want padded sequences")
    *_, layers, dropout, training, _, _ = args
    if training and dropout > 0 and layers > 1:
        raise UnsupportedCallError(RANDOM)
    return lambda: _sequence(_STEPS[name], name == "lstm", *args)


def _cell(
    step: Step, x: Tensor, state: Any, w_x: Tensor, w_h: Tensor, b_x: Tensor | None = None, b_h: Tensor | None = None
) -> Any:
    several = isinstance(state, (tuple, list))
    found = step(F.linear(x, w_x, b_x), tuple(state) if several else (state,), w_h, b_h)
    return found if several else found[0]


def _sequence(
    step: Step,
    has_cells: bool,
    x: Tensor,
    states: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> State:
    x, directions, ends = x.transpose(0, 1) if batch_first else x, 1 + bidirectional, []
    starts = tuple(states) if has_cells else (states,)
    count = len(weights) // (layers * directions)
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            w_x, w_h, *rest = weights[index * count : (index + 1) * count]
            b_x, b_h = rest[:2] if has_biases else (None, None)
            projection = rest[2 * has_biases :]  # of an LSTM, or none
            given, state = F.linear(x, w_x, b_x), tuple(start[index] for start in starts)
            hidden: list[Any] = [None] * len(x)
            for t in reversed(range(len(x))) if direction else range(len(x)):
                state = step(given[t], state, w_h, b_h)
                if projection:
                    state = (F.linear(state[0], projection[0]), *state[1:])
                hidden[t] = state[0]
            outputs.append(torch.stack(hidden))
            ends.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    last = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *last)
