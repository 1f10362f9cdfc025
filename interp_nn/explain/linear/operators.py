"""Affine operators v -> W v + b, one for each of n samples, which apply W without forming it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from interp_nn.explain.following.calls import UnsupportedOperation
from interp_nn.explain.following.replay import over_copies
from interp_nn.gates.jvp import jvp

_OF_AUTOGRAD = ("inplace operation", "in-place", "invalid gradient", "not implemented")  # in its errors
Vectors = tuple[Tensor, ...]  # one tensor (r, n, *input) for each input


class AffineOperator(ABC):
    """A linear operator W and a constant for each of n samples.

    Attributes:
        n: Number of samples.
        inputs: Shape of one sample of each input.
        output: Shape of one sample of the output.
        sources: For each input a tensor of its dtype and device.
        result: A tensor of the output's dtype and device.
    """

    n: int
    inputs: tuple[torch.Size, ...]
    output: torch.Size
    sources: tuple[Tensor, ...]
    result: Tensor

    @abstractmethod
    def columns(self, v: Vectors) -> Tensor:
        """Return W v (r, n, *output) for r vectors of each sample."""

    @abstractmethod
    def pullback(self) -> Callable[[Tensor], Vectors]:
        """Return the function u (r, n, *output) -> Wᵀ u, which keeps autograd's graph while it is alive."""

    @abstractmethod
    def bias(self) -> Tensor:
        """Return b (n, *output)."""

    def products(self) -> tuple[Callable[[Vectors], Tensor], Callable[[Tensor], Vectors]]:
        """Return the functions v -> W v and u -> Wᵀ u, as `columns` and `pullback` have them, for many products."""
        return self.columns, self.pullback()

    def bias_by_layer(self) -> dict[str, Tensor]:
        """Return b's parts by layer. Raises ValueError for an operator without a model."""
        raise ValueError("bias_by_layer: got a map without layers, want one that `linearize` returned in secant mode")


class DenseOperator(AffineOperator):
    """Weights (n, *output, *input), one for each input, and a bias (n, *output)."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor) -> None:
        self.weights, self._bias = tuple(weights), bias
        self.n, self.output = bias.shape[0], bias.shape[1:]
        self.inputs = tuple(w.shape[bias.dim() :] for w in weights)
        self.sources, self.result = self.weights, bias

    def columns(self, v: Vectors) -> Tensor:
        """Return W v (r, n, *output)."""
        k = self.output.numel()
        parts = [
            torch.einsum("nkd,rnd->rnk", w.reshape(self.n, k, -1), t.reshape(len(t), self.n, -1).to(w))
            for w, t in zip(self.weights, v, strict=True)
        ]
        return (
            sum(parts[1:], parts[0]).unflatten(2, self.output) if self.output else sum(parts[1:], parts[0]).squeeze(2)
        )

    def pullback(self) -> Callable[[Tensor], Vectors]:
        """Return the function u -> Wᵀ u."""
        k = self.output.numel()

        def pull(u: Tensor) -> Vectors:
            rows = u.reshape(len(u), self.n, k)
            return tuple(
                torch.einsum("nkd,rnk->rnd", w.reshape(self.n, k, -1), rows.to(w)).reshape(len(u), self.n, *shape)
                for w, shape in zip(self.weights, self.inputs, strict=True)
            )

        return pull

    def bias(self) -> Tensor:
        """Return b (n, *output)."""
        return self._bias


class ComposedOperator(AffineOperator):
    """The composition of two operators: W = W₂ W₁ and b = W₂ b₁ + b₂."""

    def __init__(self, second: AffineOperator, first: AffineOperator) -> None:
        self._second, self._first = second, first
        self.n, self.inputs, self.output = first.n, first.inputs, second.output
        self.sources, self.result = first.sources, second.result

    def columns(self, v: Vectors) -> Tensor:
        """Return W v (r, n, *output)."""
        return self._second.columns((self._first.columns(v),))

    def pullback(self) -> Callable[[Tensor], Vectors]:
        """Return the function u -> Wᵀ u."""
        second, first = self._second.pullback(), self._first.pullback()
        return lambda u: first(second(u)[0])

    def bias(self) -> Tensor:
        """Return b (n, *output)."""
        return self._second.columns((self._first.bias().unsqueeze(0),))[0] + self._second.bias()


class JacobianOperator(AffineOperator):
    """The Jacobian of a function at x; the function must not mix samples.

    Args:
        function: The function.
        x: Its inputs, (n, *input) each.
        output: Its value at x, (n, *output).
        affine: True if the function is affine; then b is its value at 0. Otherwise b = F(x) - W x. Also an attribute.
        check: Raises if the function has changed. It is called before each use of the function.
        start: Leaf tensors and the function's value with its autograd graph, if it exists already. It is used once.
        parts: Computes `bias_by_layer`.
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
        self._function, self.affine, self._start, self._parts = function, affine, start, parts
        self._check = check
        self.x = tuple(t.detach() for t in x)
        self.n, self.inputs, self.output = x[0].shape[0], tuple(t.shape[1:] for t in x), output.shape[1:]
        self.sources, self.result = self.x, output.detach().new_empty(())

    def columns(self, v: Vectors) -> Tensor:
        """Return W v (r, n, *output)."""
        self._check()
        if len(v[0]) == 1:
            return self._push(*(t[0] for t in v)).unsqueeze(0)
        return over_copies(self._push, *v)

    def pullback(self, keep: bool = False) -> Callable[[Tensor], Vectors]:
        """Return the function u -> Wᵀ u; with `keep`, a later call gets the same graph."""
        return self._pullback(*self._graph(keep))

    def products(self) -> tuple[Callable[[Vectors], Tensor], Callable[[Tensor], Vectors]]:
        """Return the functions v -> W v and u -> Wᵀ u, on one graph.

        W v is the derivative by u of vᵀ Wᵀ u, in reverse mode, which does not run the model again. Where autograd cannot
        differentiate twice, it is `columns`.
        """
        x, out = self._graph(keep=False)
        pull = self._pullback(x, out)
        if not out.requires_grad:
            return self.columns, pull
        with torch.inference_mode(False), torch.enable_grad():
            u = torch.zeros_like(out, requires_grad=True)
            rows = torch.autograd.grad(out, x, u, create_graph=True, materialize_grads=True)

        def push(v: Vectors) -> Tensor:
            return torch.autograd.grad(rows, u, v, retain_graph=True, is_grads_batched=True, materialize_grads=True)[
                0
            ].expand(len(v[0]), *out.shape)

        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        try:
            terms = probe * push(tuple(t.unsqueeze(0) for t in self.x))[0]
        except RuntimeError:
            return self.columns, pull
        pulled = sum(float((row[0] * t).sum()) for row, t in zip(pull(probe.unsqueeze(0)), self.x, strict=True))
        # A backward written by hand may hide its own derivative from autograd.
        close = abs(float(terms.sum()) - pulled) <= torch.finfo(out.dtype).eps ** 0.5 * (
            float(terms.abs().sum()) + abs(pulled)
        )
        return push if close else self.columns, pull

    def _graph(self, keep: bool) -> tuple[Vectors, Tensor]:
        """Return leaf tensors x and the function's value with its graph; with `keep`, a later call gets the same."""
        self._check()
        if self._start is not None:
            x, out = self._start
            self._start = self._start if keep else None
            return x, out
        with torch.inference_mode(False), torch.enable_grad():
            x = tuple(t.clone().requires_grad_() for t in self.x)
            return x, self._function(*x)

    def _pullback(self, x: Vectors, out: Tensor) -> Callable[[Tensor], Vectors]:
        def pull(u: Tensor) -> Vectors:
            if not out.requires_grad:  # the output does not depend on the input
                return tuple(t.new_zeros(len(u), *t.shape) for t in x)
            try:
                if len(u) > 1:
                    rows = torch.autograd.grad(
                        out, x, u, retain_graph=True, is_grads_batched=True, materialize_grads=True
                    )
                    return tuple(row.expand(len(u), *t.shape) for row, t in zip(rows, x, strict=True))
                rows = torch.autograd.grad(out, x, u[0], retain_graph=True, materialize_grads=True)
            except RuntimeError as error:
                if not any(word in str(error) for word in _OF_AUTOGRAD):
                    raise
                raise UnsupportedOperation(
                    f"model: autograd cannot follow its calls back, want others: {str(error).splitlines()[0]}"
                ) from error
            return tuple(row.unsqueeze(0) for row in rows)

        return pull

    def bias(self) -> Tensor:
        """Return b (n, *output)."""
        self._check()
        with torch.no_grad():
            if self.affine:
                return self._function(*(torch.zeros_like(t) for t in self.x))
            return self._function(*self.x) - self._push(*self.x)

    def bias_by_layer(self) -> dict[str, Tensor]:
        """Return b's parts by layer, if they are known."""
        self._check()
        return super().bias_by_layer() if self._parts is None else self._parts()

    def of_output(self, select: Callable[[Tensor], Tensor]) -> JacobianOperator:
        """Return the operator of a linear function of the output, (n, *output) -> (n, *selected)."""
        function, parts = self._function, self._parts
        return JacobianOperator(
            lambda *v: select(function(*v)),
            self.x,
            select(self.result.new_empty(self.n, *self.output)),
            affine=self.affine,
            check=self._check,
            parts=None if parts is None else lambda: {layer: select(part) for layer, part in parts().items()},
        )

    def _push(self, *v: Tensor) -> Tensor:
        return jvp(self._function, self.x, v)[1].detach()
