"""The engines that compute: `eager`, `triton` and `cuda`, each a module with the four functions of `Engine`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor

from interp_nn.engines import eager, verify
from interp_nn.engines.devices import interpreting
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.limits import unsupported_reason
from interp_nn.engines.problem import ENGINES as ENGINES
from interp_nn.engines.problem import EngineName, LossOptions, Plan


class Engine(Protocol):
    """The four functions of an engine.

    x is (n, d), b (d, k) with any strides, a (m, k) and c (m,) an output layer. "Saved" are the tensors that
    `orders.saved_names` lists for the plan. Given q the engines with kernels compute the polynomial X b q(bᵀb); the eager
    engine's polynomials are `eager_polynomial`.
    """

    def forward(
        self, x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool, q: Polynomial | None = None
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Return (P, Y, saved): the projection P where the plan forms it or `pair` asks for it, the summary, and the saved."""

    def backward(
        self,
        dp: Tensor | None,
        dy: Tensor | None,
        x: Tensor,
        b: Tensor,
        saved: Sequence[Tensor],
        plan: Plan,
        need_x: bool,
        need_b: bool,
        need_bias: bool = False,
        need_c: bool = False,
        q: Polynomial | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Return (dX, db, dbias) for upstream dP and dY, either of which may be None (zero); None where not needed.

        With q a fourth gradient is that of its coefficients, in fp32.
        """

    def loss(
        self,
        x: Tensor,
        b: Tensor,
        a: Tensor | None,
        c: Tensor | None,
        target: Tensor,
        options: LossOptions,
        plan: Plan,
        upstream: Tensor | None = None,
        needs: Sequence[bool] | None = None,
        q: Polynomial | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (loss, gradients): the three-term loss and the gradients that `needs` asks for of (x, b, a, c), in that order.

        With q a fifth gradient is that of its coefficients, in fp32.

        Gradients are for `upstream`, a scalar, or (n,) for reduction "none"; None means 1. A target outside of [0, classes) that
        is not ignored raises ValueError on a CPU and fails an assertion on a GPU.
        """

    def scale(self, grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        """Return the gradients for an upstream of 1 times another upstream. May overwrite them."""


_engines: dict[EngineName, Engine] = {"eager": cast(Engine, eager)}  # of the summary alone

if TYPE_CHECKING:  # mypy compares each module with the protocol
    from interp_nn.engines.cuda import engine as cuda_engine
    from interp_nn.engines.triton import engine as triton_engine

    _all: tuple[Engine, ...] = (cuda_engine, triton_engine)


def get(name: EngineName) -> Engine:
    """Return an engine. It is imported when it is first needed, and its kernels are verified at their first use."""
    if name not in _engines:
        module = unverified(name)
        _engines[name] = module if os.environ.get("INTERP_NN_VERIFY") == "0" else verify.Verified(name, module)
    return _engines[name]


def unverified(name: EngineName) -> Engine:
    """Return an engine's module, whose kernels run as they are."""
    return cast(
        Engine,
        importlib.import_module("interp_nn.engines.eager" if name == "eager" else f"interp_nn.engines.{name}.engine"),
    )


def availability() -> dict[str, str]:
    """Return "available", or the reason why not, for each engine."""
    out: dict[str, str] = {}
    for name in ENGINES:
        reason = unsupported_reason(name)
        out[name] = "available" if reason is None else f"off: {reason}"
    out["eager"] += " (PyTorch operators, every device)"
    if unsupported_reason("triton") is None:
        where = "interpreted on the CPU" if interpreting() else "CUDA devices of compute capability 8.0 or newer"
        out["triton"] += f" ({where})"
    if unsupported_reason("cuda") is None:
        out["cuda"] += " (CUDA devices of compute capability 7.5 or newer)"
    return out
