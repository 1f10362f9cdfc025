"""Linear operators W and their constants b, one for each of n samples, which are applied without W being formed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from interp_nn.explain.following.replay import over_copies
from interp_nn.gates.jvp import jvp

Vectors = tuple[Tensor, ...]  # one tensor (r, n, *input) for each of the inputs


class Operator(ABC):
    """W: inputs of per-sample shapes `inputs` to outputs of per-sample shape `output`, for n samples; and b.

    sources, result: tensors of the dtypes and devices of inputs and output.
    """

    n: int
    inputs: tuple[torch.Size, ...]
    output: torch.Size
    sources: tuple[Tensor, ...]
    result: Tensor

    @abstractmethod
    def columns(self, v: Vectors) -> Tensor:
        """W v (r, n, *output) for r vectors a sample."""

    @abstractmethod
    def pullback(self) -> Callable[[Tensor], Vectors]:
        """The map u (r, n, *output) to Wᵀ u, which keeps what it needs for as long as it lives."""

    @abstractmethod
    def bias(self) -> Tensor:
        """b (n, *output)."""

    def bias_by_layer(self) -> dict[str, Tensor]:
        """b's parts by layer, where they are known."""
        raise ValueError("bias_by_layer: got a map without layers, want one that `linearize` returned in secant mode")


class Dense(Operator):
    """Weights (n, *output, *input), one for each input, and a bias (n, *output)."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor) -> None:
        self.weights, self._bias = tuple(weights), bias
        self.n, self.output = bias.shape[0], bias.shape[1:]
        self.inputs = tuple(w.shape[bias.dim() :] for w in weights)
        self.sources, self.result = self.weights, bias

    def columns(self, v: Vectors) -> Tensor:
        k = self.output.numel()
        parts = [
            torch.einsum("nkd,rnd->rnk", w.reshape(self.n, k, -1), t.reshape(len(t), self.n, -1))
            for w, t in zip(self.weights, v, strict=True)
        ]
        return (
            sum(parts[1:], parts[0]).unflatten(2, self.output) if self.output else sum(parts[1:], parts[0]).squeeze(2)
        )

    def pullback(self) -> Callable[[Tensor], Vectors]:
        k = self.output.numel()

        def pull(u: Tensor) -> Vectors:
            rows = u.reshape(len(u), self.n, k)
            return tuple(
                torch.einsum("nkd,rnk->rnd", w.reshape(self.n, k, -1), rows).reshape(len(u), self.n, *shape)
                for w, shape in zip(self.weights, self.inputs, strict=True)
            )

        return pull

    def bias(self) -> Tensor:
        return self._bias


class Composed(Operator):
    """W = W₂ W₁ and b = W₂ b₁ + b₂."""

    def __init__(self, second: Operator, first: Operator) -> None:
        self._second, self._first = second, first
        self.n, self.inputs, self.output = first.n, first.inputs, second.output
        self.sources, self.result = first.sources, second.result

    def columns(self, v: Vectors) -> Tensor:
        return self._second.columns((self._first.columns(v),))

    def pullback(self) -> Callable[[Tensor], Vectors]:
        second, first = self._second.pullback(), self._first.pullback()
        return lambda u: first(second(u)[0])

    def bias(self) -> Tensor:
        return self._second.columns((self._first.bias().unsqueeze(0),))[0] + self._second.bias()


class Traced(Operator):
    """The derivative of a function at x, of samples that do not depend on one another.

    affine: whether the function is affine, so that b is its value at 0; otherwise b = F(x) - W x. start: leaves and the
    function of them with its graph, where there is one already; it is used once. parts: computes `bias_by_layer`. check: raises
    where the function is no longer what it was; called before it is used.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        x: Vectors,
        output: Tensor,
        *,
        affine: bool,
        check: Callable[[], None],
        start: tuple[Vectors, Tensor] | None = None,
        parts: Callable[[], dict[str, Tensor]] | None = None,
    ) -> None:
        self._function, self._affine, self._start, self._parts = function, affine, start, parts
        self._check = check
        self.x = tuple(t.detach() for t in x)
        self.n, self.inputs, self.output = x[0].shape[0], tuple(t.shape[1:] for t in x), output.shape[1:]
        self.sources, self.result = self.x, output.detach().new_empty(())

    def columns(self, v: Vectors) -> Tensor:
        self._check()
        if len(v[0]) == 1:
            return self._push(*(t[0] for t in v)).unsqueeze(0)
        return over_copies(self._push, *v)

    def pullback(self) -> Callable[[Tensor], Vectors]:
        self._check()
        if self._start is not None:
            (x, out), self._start = self._start, None
        else:
            with torch.inference_mode(False), torch.enable_grad():
                x = tuple(t.clone().requires_grad_() for t in self.x)
                out = self._function(*x)

        def pull(u: Tensor) -> Vectors:
            if not out.requires_grad:  # a model without a gradient
                return tuple(t.new_zeros(len(u), *t.shape) for t in x)
            if len(u) > 1:
                return torch.autograd.grad(out, x, u, retain_graph=True, is_grads_batched=True, materialize_grads=True)
            rows = torch.autograd.grad(out, x, u[0], retain_graph=True, materialize_grads=True)
            return tuple(row.unsqueeze(0) for row in rows)

        return pull

    def bias(self) -> Tensor:
        self._check()
        with torch.no_grad():
            if self._affine:
                return self._function(*(torch.zeros_like(t) for t in self.x))
            return self._function(*self.x) - self._push(*self.x)

    def bias_by_layer(self) -> dict[str, Tensor]:
        self._check()
        return super().bias_by_layer() if self._parts is None else self._parts()

    def _push(self, *v: Tensor) -> Tensor:
        return jvp(self._function, self.x, v)[1].detach()
