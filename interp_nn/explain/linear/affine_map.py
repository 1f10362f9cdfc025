"""Instance-wise linearization: the affine map F(x) = W x + b that a network is at each input (Li et al., arXiv 2310.16295)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.explain.following.gate_record import check_mode
from interp_nn.explain.following.replay import Replay, Tangent, run_recorded, unchanged
from interp_nn.explain.linear.operators import Composed, Dense, Operator, Traced, Vectors
from interp_nn.gates.patterns import as_index

Target = int | slice | Tensor | Callable[[Any], Tensor] | None
_AT_ONCE = 1 << 22  # numbers of W that are computed at a time


class SingularTriplets(NamedTuple):
    """The largest singular values (n, k) of each sample's W, with left (n, k, *output) and right (n, k, *input) vectors."""

    left: Tensor
    values: Tensor
    right: Tensor


def linearize(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    target: Target = None,
    *,
    mode: str = "secant",
    upto: str | int | None = None,
    chunk_size: int | None = None,
) -> AffineMap:
    """The affine map F(x) = W x + b of a model at each sample of x (n, ...), or of a tuple of inputs.

    target: the outputs to explain: None for all, an int or a slice along the first dimension of a sample's output, a tensor (n,)
    int64 of one for each sample, or a function of the model's output that returns a tensor (n, ...). Take logits: softmax is
    not affine. upto: a gate site, by name or index, whose preactivation is explained in place of the output.

    mode 'secant': W and b of the replay with frozen gates (see `frozen`), b from the replay at 0, for piecewise linear networks
    the map of the region of x. 'tangent': W is the Jacobian and b = F(x) - W x, so that F(x) = W x + b holds by construction
    and says nothing of a smooth network around x. The samples must not depend on one another, as in evaluation mode they do
    not; `check` finds those that do. chunk_size: rows or columns of W that are computed at a time.

    What is read of the map is computed from the model at that time, and kept: read it before the model is trained further. Where
    a parameter has changed since, RuntimeError is raised; what is written by `.data` or to a buffer is not seen.

    Raises what `record` raises; ValueError or TypeError for a target or site that the model does not have.
    """
    select, secant = _selector(target), check_mode(mode) == "secant"
    if upto is not None and target is not None:
        raise ValueError(f"target, upto: got {target!r} and {upto!r}, want one of them")
    strict = secant and upto is None
    recording = run_recorded(model, x, select, strict=strict, differentiable=secant, keep=upto is not None)
    site = None if upto is None else recording.site(upto)
    output = recording.output if site is None else recording.recorder.sites[site].preactivations
    output = _check_selected(output, recording.inputs[0].shape[0])
    itself, still = Tangent(model, select, site), unchanged(model)
    if not secant:
        return AffineMap(Traced(itself, recording.inputs, output, affine=False, check=still), itself, chunk_size)
    recording.refuse(site)
    replay = Replay(recording, select)

    def function(*v: Tensor) -> Tensor:
        return replay(*v) if site is None else replay.preactivations(v, site)

    operator = Traced(
        function,
        recording.inputs,
        output,
        affine=True,
        check=still,
        start=(recording.inputs, output),
        parts=lambda: replay.constants_by_layer(site),
    )
    return AffineMap(operator, itself, chunk_size)


class AffineMap:
    """F(x) = W x + b for each of n samples, with W applied without being formed until `weight` is asked for.

    Made by `linearize` or `from_tensors`; maps are composed by @ and samples selected by an index. Where the model takes a
    tuple of inputs, so do the methods, and weights and contributions are tuples.
    """

    def __init__(
        self, operator: Operator, function: Callable[..., Tensor] | None = None, chunk_size: int | None = None
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: got {chunk_size}, want a positive number")
        self._operator, self._function, self._chunk_size = operator, function, chunk_size

    @classmethod
    def from_tensors(cls, weight: Tensor | tuple[Tensor, ...], bias: Tensor) -> AffineMap:
        """The map of given weight (n, *output, *input) and bias (n, *output)."""
        weights = weight if isinstance(weight, tuple) else (weight,)
        for w in weights:
            if bias.dim() < 1 or w.shape[: bias.dim()] != bias.shape:
                raise ValueError(f"weight: got shape {tuple(w.shape)}, want {tuple(bias.shape)} first, as bias has it")
        return cls(Dense(weights, bias))

    @cached_property
    def weight(self) -> Any:
        """W (n, *output, *input), by rows or by columns, whichever is fewer."""
        operator = self._operator
        if isinstance(operator, Dense):
            return _single(operator.weights)
        rows, columns = operator.output.numel(), sum(shape.numel() for shape in operator.inputs)
        return _single(self._by_rows() if rows <= columns else self._by_columns())

    @cached_property
    def bias(self) -> Tensor:
        """b (n, *output)."""
        return self._operator.bias().detach()

    @property
    def shape(self) -> Any:
        """The shape of `weight`."""
        operator = self._operator
        return _single(tuple(torch.Size((operator.n, *operator.output, *shape)) for shape in operator.inputs))

    def matvec(self, v: Tensor | tuple[Tensor, ...]) -> Tensor:
        """W v (n, *output) for v (n, *input)."""
        return self._operator.columns(tuple(t.unsqueeze(0) for t in self._vectors(v)))[0]

    def rmatvec(self, u: Tensor) -> Any:
        """Wᵀ u (n, *input) for u (n, *output)."""
        wanted = (self._operator.n, *self._operator.output)
        if tuple(u.shape) != wanted:
            raise ValueError(f"u: got shape {tuple(u.shape)}, want {wanted}")
        return _single(tuple(t[0] for t in self._operator.pullback()(u.unsqueeze(0))))

    def __call__(self, x: Tensor | tuple[Tensor, ...]) -> Tensor:
        """W x + b (n, *output)."""
        return self.matvec(x) + self.bias

    def __matmul__(self, first: AffineMap) -> AffineMap:
        """The map that applies `first` and then this one."""
        if not isinstance(first, AffineMap):
            return NotImplemented
        left, right = self._operator, first._operator
        if left.n != right.n or left.inputs != (right.output,):
            raise ValueError(
                f"@: got maps of shapes {self.shape} and {first.shape}, want outputs that are the other's inputs"
            )
        return AffineMap(Composed(left, right), None, self._chunk_size)

    def contributions(self, x: Tensor | tuple[Tensor, ...]) -> Any:
        """Each input's share of each output, W * x (n, *output, *input): over the inputs they sum to F(x) - b."""
        vectors = self._vectors(x)
        operator = self._operator
        if operator.output.numel() == 1:
            one = operator.result.new_ones(operator.n, *operator.output)
            weights = tuple(
                t.reshape(s) for t, s in zip(_several(self.rmatvec(one)), _several(self.shape), strict=True)
            )
        else:
            weights = _several(self.weight)
        middle = [1] * len(operator.output)
        return _single(
            tuple(w * t.reshape(operator.n, *middle, *t.shape[1:]) for w, t in zip(weights, vectors, strict=True))
        )

    def bias_by_layer(self) -> dict[str, Tensor]:
        """b split exactly over the layers that contribute a constant, by module path: {path: (n, *output)}, in call order.

        Biases, batch norms' shifts, non-zero padding and the offsets of clipped units; they sum to `bias`. Those of FullGrad
        (Srinivas & Fleuret, NeurIPS 2019), summed over a layer. Raises ValueError for a map without its model, or a tangent.
        """
        return self._operator.bias_by_layer()

    def contrast(self, k: int, k2: int) -> AffineMap:
        """The map of output k less output k2, of outputs (n, classes): for logits, the log-odds of the two classes."""
        output = self._operator.output
        if len(output) != 1 or not all(-output[0] <= i < output[0] for i in (k, k2)):
            raise ValueError(
                f"k, k2: got {k} and {k2}, want indices of one dimension of outputs; they are {tuple(output)}"
            )
        row = self._operator.result.new_zeros(self._operator.n, output[0])
        row[:, k] += 1
        row[:, k2] -= 1
        return AffineMap(Composed(Dense((row,), row.new_zeros(len(row))), self._operator), None, self._chunk_size)

    def svd(self, k: int) -> SingularTriplets:
        """The k largest singular values of each sample's W and their vectors; one input only, and W is formed."""
        operator = self._operator
        if len(operator.inputs) != 1:
            raise ValueError(f"svd: got a map of {len(operator.inputs)} inputs, want one")
        rows, columns = operator.output.numel(), operator.inputs[0].numel()
        if not 1 <= k <= min(rows, columns):
            raise ValueError(f"k: got {k}, want between 1 and {min(rows, columns)}")
        left, values, right = torch.linalg.svd(self.weight.reshape(operator.n, rows, columns), full_matrices=False)
        shape = (operator.n, k)
        return SingularTriplets(
            left.mT[:, :k].reshape(*shape, *operator.output),
            values[:, :k],
            right[:, :k].reshape(*shape, *operator.inputs[0]),
        )

    def check(self) -> float:
        """max |F(x) - (W x + b)| / max |F(x)| at the linearized x, or the defect of the rows if that is larger.

        F is the model itself, W x a forward-mode derivative of the replay, b the replay at 0. The rows, by reverse mode, are
        compared with it in one direction a sample; they differ where samples of a batch depend on one another.
        """
        operator = self._operator
        if self._function is None or not isinstance(operator, Traced):
            raise ValueError("check: got a map without its model, want one as `linearize` returned it")
        with torch.no_grad():
            wanted = self._function(*operator.x)
            moved = operator.columns(tuple(t.unsqueeze(0) for t in operator.x))[0]
            scale = wanted.abs().max()
            residual = (moved + self.bias - wanted).abs().max() / torch.where(scale > 0, scale, 1)
            pushed = (wanted * moved).reshape(operator.n, -1)
            pulled = torch.cat(
                [
                    (r * x).reshape(operator.n, -1)
                    for r, x in zip(_several(self.rmatvec(wanted)), operator.x, strict=True)
                ],
                1,
            )
            size = torch.maximum(
                pushed.abs().sum(1) + pulled.abs().sum(1), wanted.square().reshape(operator.n, -1).sum(1)
            )
            defect = (pushed.sum(1) - pulled.sum(1)).abs() / size.clamp_min(torch.finfo(size.dtype).tiny)
        return float(torch.maximum(residual, defect.max()))

    def to(self, dtype: torch.dtype) -> AffineMap:
        """The map in another dtype; forms W."""
        return AffineMap(Dense(tuple(w.to(dtype) for w in _several(self.weight)), self.bias.to(dtype)))

    def __getitem__(self, samples: int | slice | Tensor) -> AffineMap:
        """The maps of some samples; forms W."""
        samples = as_index(samples)
        if isinstance(samples, int):
            if not -len(self) <= samples < len(self):
                raise IndexError(f"samples: got {samples}, want an index below {len(self)}")
            samples = slice(samples, samples + 1 or None)
        return AffineMap(Dense(tuple(w[samples] for w in _several(self.weight)), self.bias[samples]))

    def __len__(self) -> int:
        return self._operator.n

    def __repr__(self) -> str:
        operator = self._operator
        inputs = ", ".join(str(tuple(shape)) for shape in operator.inputs)
        return f"AffineMap({operator.n} samples, {inputs} -> {tuple(operator.output)})"

    def _vectors(self, v: Tensor | tuple[Tensor, ...]) -> Vectors:
        vectors, operator = _several(v), self._operator
        wanted = [(operator.n, *shape) for shape in operator.inputs]
        if [tuple(t.shape) for t in vectors] != wanted:
            raise ValueError(f"x: got shapes {[tuple(t.shape) for t in vectors]}, want {wanted}")
        return vectors

    def _by_rows(self) -> Vectors:
        operator = self._operator
        pull, k = operator.pullback(), operator.output.numel()
        parts = []
        for start, size in self._chunks(k, sum(shape.numel() for shape in operator.inputs)):
            u = operator.result.new_zeros(size, operator.n, k)
            u[torch.arange(size), :, torch.arange(start, start + size)] = 1
            parts.append(pull(u.view(size, operator.n, *operator.output)))
        return tuple(
            torch.cat(rows).transpose(0, 1).reshape(operator.n, *operator.output, *shape)
            for rows, shape in zip(zip(*parts, strict=True), operator.inputs, strict=True)
        )

    def _by_columns(self) -> Vectors:
        operator = self._operator
        weights = []
        for i, shape in enumerate(operator.inputs):
            d, parts = shape.numel(), []
            for start, size in self._chunks(d, operator.output.numel()):
                v = [t.new_zeros(size, operator.n, *s) for t, s in zip(operator.sources, operator.inputs, strict=True)]
                v[i].view(size, operator.n, d)[torch.arange(size), :, torch.arange(start, start + size)] = 1
                parts.append(operator.columns(tuple(v)))
            weights.append(torch.cat(parts).movedim(0, -1).reshape(operator.n, *operator.output, *shape))
        return tuple(weights)

    def _chunks(self, total: int, width: int) -> Iterator[tuple[int, int]]:
        size = self._chunk_size or max(1, _AT_ONCE // max(1, self._operator.n * width))
        return ((start, min(size, total - start)) for start in range(0, total, size))


def _selector(target: Target) -> Callable[[Any], Tensor]:
    """The function of a model's output that a target stands for."""
    target = target if isinstance(target, bool) else as_index(target)
    known = target is None or callable(target) or isinstance(target, (int, slice, Tensor))
    if not known or isinstance(target, bool):
        raise TypeError(f"target: got {type(target).__name__}, want None, an int, a slice, a tensor or a function")
    if isinstance(target, Tensor) and target.dtype != torch.int64:
        raise TypeError(f"target: got {target.dtype}, want int64")

    def select(output: Any) -> Tensor:
        if callable(target):
            return target(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model: returned {type(output).__name__}, want a tensor, or a target function that selects one"
            )
        if target is None:
            return output
        if output.dim() < 2:
            raise ValueError(f"target: got {target!r} for outputs of shape {tuple(output.shape)}, want None")
        n, outputs = output.shape[:2]
        if isinstance(target, slice):
            if not range(outputs)[target]:
                raise ValueError(f"target: got {target}, which selects nothing of {outputs}")
            return output[:, target]
        if isinstance(target, int):
            if not -outputs <= target < outputs:
                raise ValueError(f"target: got {target}, want an index below {outputs}")
            return output[:, target]
        if target.shape != (n,):
            raise ValueError(f"target: got shape {tuple(target.shape)}, want ({n},)")
        if not 0 <= int(target.min()) <= int(target.max()) < outputs:
            raise ValueError(
                f"target: got classes {int(target.min())} to {int(target.max())}, want them below {outputs}"
            )
        return output[torch.arange(n, device=output.device), target]

    return select


def _check_selected(output: Any, n: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"target: selected {type(output).__name__}, want a tensor")
    if not output.dtype.is_floating_point:
        raise TypeError(f"target: selected {output.dtype}, want floating-point outputs")
    if output.dim() == 0 or output.shape[0] != n:
        raise ValueError(f"target: selected shape {tuple(output.shape)}, want ({n}, ...)")
    return output


def _single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _several(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) and not isinstance(values, torch.Size) else (values,)
