"""The Gram matrix that a summary's own launch has formed."""

from __future__ import annotations

from torch import Tensor

from interp_nn.engines import eager
from interp_nn.engines.orders import KEEPS
from interp_nn.ops.library import apply, nested_forward_mode
from interp_nn.ops.summary import _summary_function, as_rows


def summary_and_square(x: Tensor, b: Tensor, bias: Tensor | None, plan: str) -> tuple[Tensor, Tensor | None]:
    """Y = X b (bᵀb) + bias for checked arguments, and the smaller of bᵀb and bbᵀ, detached; None where the plan forms neither.

    Forms A and B form bᵀb, D and E bbᵀ, and on every engine it is an output of the forward's launch, for the backward.
    """
    form = plan.partition(":")[2]
    if form[-1] == "*" or nested_forward_mode():
        _, rows, kept = eager.forward(as_rows(x), b, bias, form, False)
        y = rows.view(*x.shape[:-1], b.shape[1])
    else:
        y, *kept = apply(_summary_function(), x, b, bias, plan, False)
    found = dict(zip(KEEPS[form.rstrip("*")], kept, strict=True))
    square = found.get("G" if b.shape[1] <= b.shape[0] else "K")
    return y, None if square is None else square.detach()
