"""Instance-wise linearization: the affine map F(x) = W x + c of a network at each input.

Source: Li et al., arXiv 2310.16295.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.display import html_table, track
from interp_nn.explain.estimator import feature_names
from interp_nn.explain.following.gate_record import check_mode
from interp_nn.explain.following.replay import (
    ModelFunction,
    Recording,
    Replay,
    check_independence,
    coupling,
    parameter_check,
    run_recorded,
)
from interp_nn.explain.following.token_ids import from_embeddings
from interp_nn.explain.linear.krylov import leading_triplets
from interp_nn.explain.linear.operators import (
    AffineOperator,
    ComposedOperator,
    DenseOperator,
    JacobianOperator,
    Vectors,
)
from interp_nn.gates.patterns import as_index

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Target = int | slice | Tensor | Callable[[Any], Tensor] | None
SameGates = Callable[[tuple[Tensor, ...]], Tensor]
_ENTRIES_PER_CHUNK = 1 << 22  # of W, by default
_STEPS = (-2, -7, -14)  # by which `check` moves x, as powers of two


class SingularTriplets(NamedTuple):
    """The k largest singular values and their vectors of each sample's W.

    Attributes:
        left: Left singular vectors (n, k, *output).
        values: Singular values (n, k), largest first.
        right: Right singular vectors (n, k, *input).

    Example:
        >>> affine = AffineMap.from_tensors(torch.diag(torch.tensor([3.0, 2.0])).unsqueeze(0), torch.zeros(1, 2))
        >>> affine.svd(1).values
        tensor([[3.]])
    """

    left: Tensor
    values: Tensor
    right: Tensor


def linearize(
    model: nn.Module,
    x: Tensor | tuple[Tensor, ...],
    target: Target = None,
    *,
    mode: str = "secant",
    layer: str | int | None = None,
    held: str = "activated",
    embedding: str | None = None,
    chunk_size: int | None = None,
    progress: bool | None = None,
) -> AffineMap:
    """Compute the affine map F(x) = W x + c of a model at each sample.

    The samples must not depend on one another; the first and the last sample are run alone to find models whose samples do.
    The map reads the model when one of its results is first asked for, and keeps the result. Read it before the model is
    trained further. A write by `.data` or to a buffer is not detected.

    Args:
        model: The network, in evaluation mode, or scikit-learn's, see `from_sklearn`; then x may be an array or a data frame.
        x: Samples (n, ...) of a floating-point dtype, or a tuple of inputs with n samples each. For token ids (n, ...) of an
            integer dtype, the map is that of their embeddings e: F = W e + c, and the result's `x` is e.
        target: The outputs to explain: None for all, an int or slice along the first dimension of a sample's output, a tensor
            (n,) int64 with one index for each sample, or a function of the model's output that returns a tensor (n, ...).
            Explain logits, because a softmax is not affine.
        mode: 'secant': W and c of the replay with frozen gates, see `frozen`. For a piecewise linear network, this is the map
            of the whole region of x. 'tangent': W is the Jacobian and c = F(x) - W x. In both, `detach` and `no_grad` in the
            model do not stop a derivative, as the value depends on the input all the same.
        layer: Explain the preactivations of this layer of gates instead of the output. A name or index of `GateRecord.sites`.
        held: In mode 'secant', the factor that a product of two values that depend on x holds: 'activated', 'left' or 'right',
            see `frozen`. F(x) = W x + c for each of them.
        embedding: For token ids, the path of the layer that looks them up. By default, the nn.Embedding that the model calls
            with x. The values of other layers that look x up are constants.
        chunk_size: Number of rows or columns of W to compute at a time. By default, 4 million entries.
        progress: Show a progress bar while W is computed. None shows one in a terminal or a notebook, where tqdm is installed.

    Returns:
        The maps of the n samples.

    Raises:
        UnsupportedOperation: An operation without an affine map, in 'secant' mode; in either mode, a value that depends on the
            input and leaves PyTorch.
        ValueError: A target, layer or embedding that the model does not have, samples that depend on one another, or as `record`
            raises it.
        TypeError: A target of another type, or as `record` raises it.
        RuntimeError: From the map's methods: a parameter of the model has changed.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 1), nn.ReLU())
        >>> _ = nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
        >>> linearize(network, torch.tensor([[2.0, 1.0], [-2.0, 1.0]])).weight
        tensor([[[1., 1.]],
        <BLANKLINE>
                [[0., 0.]]])

    Source: Li et al., arXiv 2310.16295.
    """
    select, secant = _selector(target), check_mode(mode, held) == "secant"
    columns = feature_names(x)
    features = None if columns is None else columns.tolist()
    model, x = from_embeddings(model, x, embedding)
    if layer is not None and target is not None:
        raise ValueError(f"target, layer: got {target!r} and {layer!r}, want one of them")
    strict, keep = secant and layer is None, layer is not None
    recording = run_recorded(
        model, x, select, strict=strict, differentiable=secant, keep_preactivations=keep, held=held
    )
    recording.check_stays_in_torch()
    gate_call = None if layer is None else recording.gate_call(layer)
    output = recording.output if gate_call is None else recording.recorder.gate_calls[gate_call].preactivations
    output = _check_selected(output, recording.inputs[0].shape[0])
    function, check = ModelFunction(model, select, gate_call), parameter_check(model)
    if secant:
        recording.check_affine(gate_call)
    check_independence(function, recording.inputs, output.detach())
    if not secant:
        operator = JacobianOperator(function, recording.inputs, output, affine=False, check=check)
        affine = AffineMap(operator, function, chunk_size, progress=progress)
        affine._layer, affine._features = layer, features
        return affine
    replay = Replay(recording, select)

    def replayed(*v: Tensor) -> Tensor:
        return replay(*v) if gate_call is None else replay.preactivations(v, gate_call)

    operator = JacobianOperator(
        replayed,
        recording.inputs,
        output,
        affine=True,
        check=check,
        start=(recording.inputs, output),
        parts=lambda: replay.constants_by_layer(gate_call),
    )
    exact = all(treatment in ("affine", "gate") for *_, treatment in recording.recorder.rows)
    affine = AffineMap(operator, function, chunk_size, _same_gates(recording) if exact else None, progress)
    affine._layer, affine._features = layer, features
    return affine


def _same_gates(recording: Recording) -> SameGates:
    """Return the function that finds the samples whose gates are those of the recording's inputs."""
    model, x = recording.model, recording.inputs

    def same(moved: tuple[Tensor, ...]) -> Tensor:
        n, here, there = len(x[0]), _gates(model, x), _gates(model, moved)
        if len(here) != len(there) or any(a.shape != b.shape for a, b in zip(here, there, strict=True)):
            return torch.zeros(n, dtype=torch.bool)
        found = torch.ones(n, dtype=torch.bool)
        for a, b in zip(here, there, strict=True):
            by_sample = a.dim() > 0 and len(a) % n == 0
            found &= (a == b).reshape(n, -1).all(1).cpu() if by_sample else torch.equal(a, b)
        return found

    return same


def _gates(model: nn.Module, x: tuple[Tensor, ...]) -> list[Tensor]:
    recorder = run_recorded(model, x, strict=False, keep_preactivations=True).recorder
    return [call.preactivations > 0 for call in recorder.gate_calls]


class AffineMap:
    """The affine map F(x) = W x + c of each of n samples.

    `linearize` and `from_tensors` make maps. `weight` forms W at first use; the other methods apply W without it where they
    can. `a @ b` composes two maps, and an index selects samples. For a model with a tuple of inputs, the methods take tuples,
    and weights and contributions are tuples.

    Args:
        operator: Applies W, and computes c.
        function: The model, which `check` compares with.
        chunk_size: Number of rows or columns of W to compute at a time. By default, 4 million entries.
        same_gates: Finds the samples of other inputs (n, ...) at which the map holds as well, (n,) bool; for `check`.
        progress: Show a progress bar while W is computed, as in `linearize`.

    Raises:
        ValueError: A `chunk_size` below 1.

    Example:
        >>> affine = AffineMap.from_tensors(torch.tensor([[[2.0, -1.0]]]), torch.tensor([[1.0]]))
        >>> affine(torch.tensor([[3.0, 4.0]])), affine.contributions(torch.tensor([[3.0, 4.0]]))
        (tensor([[3.]]), tensor([[[ 6., -4.]]]))
    """

    def __init__(
        self,
        operator: AffineOperator,
        function: Callable[..., Tensor] | None = None,
        chunk_size: int | None = None,
        same_gates: SameGates | None = None,
        progress: bool | None = None,
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: got {chunk_size}, want at least 1")
        self._operator, self._function, self._chunk_size = operator, function, chunk_size
        self._same_gates, self._progress = same_gates, progress
        self._layer: str | int | None = None
        self._features: Sequence[str] | None = None
        self._contrast: tuple[int, int, int] | None = None  # the two outputs, and of how many

    @classmethod
    def from_tensors(cls, weight: Tensor | tuple[Tensor, ...], bias: Tensor) -> AffineMap:
        """Make the map of a given weight and bias.

        Args:
            weight: W (n, *output, *input), or a tuple of one for each input.
            bias: c, a tensor (n, *output).

        Returns:
            The maps of the n samples.

        Raises:
            ValueError: Shapes that do not fit.
        """
        weights = weight if isinstance(weight, tuple) else (weight,)
        _check_tensors("weight", weights)
        _check_tensors("bias", (bias,))
        for w in weights:
            if bias.dim() < 1 or w.shape[: bias.dim()] != bias.shape:
                raise ValueError(f"weight: got shape {tuple(w.shape)}, want {tuple(bias.shape)} first, as bias has it")
        return cls(DenseOperator(weights, bias))

    @cached_property
    def weight(self) -> Any:
        """Weight W (n, *output, *input), computed at first use by rows or by columns, whichever are fewer."""
        operator = self._operator
        if isinstance(operator, DenseOperator):
            return _single(operator.weights)
        rows, columns = operator.output.numel(), sum(shape.numel() for shape in operator.inputs)
        return _single(self._by_rows() if rows <= columns else self._by_columns())

    @cached_property
    def bias(self) -> Tensor:
        """Constant c (n, *output), computed at first use by one run of the model."""
        return self._operator.bias().detach()

    @property
    def x(self) -> Any:
        """The inputs (n, *input) at which the model was linearized: for token ids, their embeddings.

        Raises ValueError for a map that `linearize` did not return.
        """
        if not isinstance(self._operator, JacobianOperator):
            raise ValueError("x: got a map without its inputs, want one as `linearize` returned it; plot(x) takes them")
        return _single(self._operator.x)

    @property
    def shape(self) -> Any:
        """The shape of `weight`."""
        operator = self._operator
        return _single(tuple(torch.Size((operator.n, *operator.output, *shape)) for shape in operator.inputs))

    def matvec(self, v: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Return W v (n, *output) for v (n, *input). Raises ValueError for other shapes."""
        return self._operator.columns(tuple(t.unsqueeze(0) for t in self._vectors(v)))[0]

    def rmatvec(self, u: Tensor) -> Any:
        """Return Wᵀ u (n, *input) for u (n, *output). Raises ValueError for other shapes."""
        wanted = (self._operator.n, *self._operator.output)
        _check_tensors("u", (u,))
        if tuple(u.shape) != wanted:
            raise ValueError(f"u: got shape {tuple(u.shape)}, want {wanted}")
        return _single(tuple(t[0] for t in self._operator.pullback()(u.unsqueeze(0))))

    def __call__(self, x: Tensor | tuple[Tensor, ...]) -> Tensor:
        """Return W x + c (n, *output) for x (n, *input)."""
        return self.matvec(x) + self.bias

    def __matmul__(self, first: AffineMap) -> AffineMap:
        """Return the map that applies `first` and then this one."""
        if not isinstance(first, AffineMap):
            return NotImplemented
        left, right = self._operator, first._operator
        if left.n != right.n or left.inputs != (right.output,):
            raise ValueError(
                f"@: got maps of shapes {self.shape} and {first.shape}, want the second map's outputs as the first's inputs"
            )
        return AffineMap(ComposedOperator(left, right), None, self._chunk_size)

    def contributions(self, x: Tensor | tuple[Tensor, ...]) -> Any:
        """Compute what each input adds to each output: W * x. Summed over the inputs this is F(x) - c.

        Args:
            x: Samples (n, *input), or a tuple of inputs.

        Returns:
            Tensor (n, *output, *input), or a tuple of one for each input.

        Raises:
            ValueError: Other shapes.
        """
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
        """Split the constant c exactly over the layers that contribute a constant.

        Constants are biases, shifts of batch norms, non-zero paddings and the offsets of clipped units. The split between a
        layer and a batch norm after it is arbitrary: a number added to the layer's bias and to the norm's running mean changes
        no output, but moves their parts. Only the sum of the two has a meaning.

        Returns:
            By module path, in call order, the layer's part of c (n, *output). The parts sum to `bias`.

        Raises:
            ValueError: A map without its model, or of mode 'tangent'.

        Source: bias terms of FullGrad (Srinivas & Fleuret, NeurIPS 2019), summed over each layer.
        """
        return self._operator.bias_by_layer()

    def contrast(self, k: int, k2: int) -> AffineMap:
        """Return the map of output k less output k2; for logits, these are the log-odds of the two classes.

        The map keeps the inputs and the model, so that `plot`, `check` and `bias_by_layer` answer why not class k2.

        Args:
            k: Index of an output, for outputs (n, classes).
            k2: Index of another one.

        Returns:
            The maps to one output (n,).

        Raises:
            TypeError: Indices that are not whole numbers.
            ValueError: Outputs of another shape, or indices out of range.
        """
        try:
            k, k2 = index(k), index(k2)
        except TypeError:
            kinds = " and ".join(type(of).__name__ for of in (k, k2))
            raise TypeError(
                f"k, k2: got {kinds}, want two indices of outputs, the same for all samples; for classes of each sample's own, "
                "take the difference of two maps' contributions, each from linearize(model, x, classes)"
            ) from None
        output = self._operator.output
        if len(output) != 1 or not all(-output[0] <= i < output[0] for i in (k, k2)):
            raise ValueError(
                f"k, k2: got {k} and {k2}, want two indices of outputs (n, classes); a sample's outputs are {tuple(output)}"
                + (": linearize(model, x), without a target, has all of them" if not output else "")
            )
        operator, function = self._operator, self._function
        pair = (k % output[0], k2 % output[0], output[0])
        if function is None or not isinstance(operator, JacobianOperator):
            row = operator.result.new_zeros(operator.n, output[0])
            row[:, k] += 1
            row[:, k2] -= 1
            affine = AffineMap(
                ComposedOperator(DenseOperator((row,), row.new_zeros(len(row))), operator), None, self._chunk_size
            )
            affine._contrast = pair
            return affine

        def difference(values: Tensor) -> Tensor:
            return values[:, k] - values[:, k2]

        affine = AffineMap(
            operator.of_output(difference),
            lambda *x: difference(function(*x)),
            self._chunk_size,
            self._same_gates,
            self._progress,
        )
        affine._layer, affine._features, affine._contrast = self._layer, self._features, pair
        return affine

    def svd(self, k: int, *, form_weight: bool = True) -> SingularTriplets:
        """Compute the k largest singular values and their vectors of each sample's W.

        Args:
            k: Number of singular values.
            form_weight: Form W, and decompose it. If False, compute products with W and Wᵀ, k at a time, until the residuals
                |W Wᵀ u - σ² u| / σ₁² are at most the square root of the dtype's eps. This holds the results of all products,
                at most 64 k vectors of the input's size, in place of W.

        Returns:
            Singular values (n, k) and vectors (n, k, ...).

        Raises:
            ValueError: A map of several inputs, or k out of range.
            RuntimeError: Without W, the residuals do not fall so far in 32 products of k vectors.
        """
        operator = self._operator
        if len(operator.inputs) != 1:
            raise ValueError(f"svd: got a map of {len(operator.inputs)} inputs, want one")
        rows, columns = operator.output.numel(), operator.inputs[0].numel()
        if not 1 <= k <= min(rows, columns):
            raise ValueError(f"k: got {k}, want between 1 and {min(rows, columns)}")
        if form_weight:
            left, values, right = torch.linalg.svd(self.weight.reshape(operator.n, rows, columns), full_matrices=False)
        else:
            left, values, right = leading_triplets(operator, k)
        shape = (operator.n, k)
        return SingularTriplets(
            left.mT[:, :k].reshape(*shape, *operator.output),
            values[:, :k],
            right[:, :k].reshape(*shape, *operator.inputs[0]),
        )

    def check(self) -> float:
        """Compute the relative error of the map: of the weight and bias that this object holds, if they were read.

        It is the largest of these errors, each relative to the largest value that it compares:

        - |F(x) - (W x + c)| at the linearized x.
        - The same at other points, along two directions, where the gates are those of x. For models without secants only.
        - W v by rows (reverse mode) against W v by columns (forward mode), along three directions.
        - The change of the first and the last sample's output when the other samples change.

        Returns:
            The error; rounding if the map is exact.

        Raises:
            ValueError: A map without its model.
        """
        operator, function = self._operator, self._function
        if function is None or not isinstance(operator, JacobianOperator):
            raise ValueError("check: got a map without its model, want one as `linearize` returned it")
        with torch.no_grad():
            wanted = function(*operator.x)
            errors: list[Tensor | float] = [_relative(self._applied(operator.x) + self.bias - wanted, wanted)]
            signs = [_signs((*operator.x, wanted), seed) for seed in range(2)]
            errors += self._errors_around(function, [v for *v, _ in signs])
            for *v, u in ([*operator.x, wanted], *signs):
                errors.append(self._defect(tuple(v), u))
            if operator.n > 1:
                errors += [coupling(function, operator.x, wanted, i) for i in (0, operator.n - 1)]
        return max(float(error) for error in errors)

    def _applied(self, v: Vectors) -> Tensor:
        """Return W v (n, *output) by the weight if it is formed."""
        held = self.__dict__.get("weight")
        operator = self._operator if held is None else DenseOperator(_several(held), self.bias)
        return operator.columns(tuple(t.unsqueeze(0) for t in v))[0]

    def _defect(self, v: Vectors, u: Tensor) -> Tensor:
        """Return the error of u W v for each sample, by columns against by rows, relative to its terms."""
        operator, held = self._operator, self.__dict__.get("weight")
        assert isinstance(operator, JacobianOperator)
        pull = operator.pullback(keep=True) if held is None else DenseOperator(_several(held), self.bias).pullback()
        moved = operator.columns(tuple(t.unsqueeze(0) for t in v))[0]
        by_columns = (u * moved).reshape(operator.n, -1)
        pulled = zip(pull(u.unsqueeze(0)), v, strict=True)
        by_rows = torch.cat([(r[0] * t).reshape(operator.n, -1) for r, t in pulled], 1)
        size = torch.maximum(by_columns.abs().sum(1) + by_rows.abs().sum(1), u.square().reshape(operator.n, -1).sum(1))
        return ((by_columns.sum(1) - by_rows.sum(1)).abs() / size.clamp_min(torch.finfo(size.dtype).tiny)).max()

    def _errors_around(self, function: Callable[..., Tensor], directions: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the map's errors at points around x with the gates of x: the farthest of three, for each sample."""
        errors: list[Tensor] = []
        operator = self._operator
        if self._same_gates is None or not isinstance(operator, JacobianOperator):
            return errors
        for direction in directions:
            left = torch.ones(operator.n, dtype=torch.bool)
            for exponent in _STEPS:
                x = tuple(t + _power_of_two(t) * 2.0**exponent * v for t, v in zip(operator.x, direction, strict=True))
                here = self._same_gates(x) & left
                left &= ~here
                if here.any():
                    wanted = function(*x)
                    errors.append(_relative((self._applied(x) + self.bias - wanted)[here], wanted))
                if not left.any():
                    break
        return errors

    def plot(
        self,
        x: Tensor | None = None,
        *,
        sample: int | None = None,
        output: int | None = None,
        features: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> Axes | Figure:
        """Draw the contributions: images as maps, features of one sample as a waterfall, those of several as a beeswarm.

        `interp_nn.explain.plots` has these functions, with more arguments.

        Args:
            x: Samples (n, *input); by default those at which the model was linearized.
            sample: Index of one sample. None: all; of images, the first 8.
            output: Index among the flattened outputs. None: the only one, or all of an image's outputs, at most 12.
            features: Names of the features; by default those of the data frame that was linearized, else x0, x1, ...
            class_names: Names of all flattened outputs; by default output 0, output 1, ... For a `contrast`, its own name, or
                those of all outputs that it was made from: its name is then "first - second".

        Returns:
            The figure of images, or the axes.

        Raises:
            ValueError: A map of several inputs, an x of another shape, no output where there are several, an index out of
                range, or another number of names.
            ImportError: matplotlib is not installed.

        Example:
            >>> affine = AffineMap.from_tensors(torch.tensor([[[2.0, -1.0]]]), torch.tensor([[1.0]]))
            >>> affine.plot(torch.tensor([[3.0, 4.0]])).get_title()
            'output 3 = constant 1 + contributions 2'
        """
        from interp_nn.explain.plots.attribution import affine_plot

        names = self._features if features is None else features
        x = self.x if x is None else x
        return affine_plot(self, x, sample, output, names, class_names, self._contrast)

    def to(self, dtype: torch.dtype) -> AffineMap:
        """Return the map in another dtype; forms W."""
        return AffineMap(DenseOperator(tuple(w.to(dtype) for w in _several(self.weight)), self.bias.to(dtype)))

    def __getitem__(self, samples: int | slice | Tensor) -> AffineMap:
        """Return the maps of some samples; forms W."""
        samples = as_index(samples)
        if isinstance(samples, int):
            if not -len(self) <= samples < len(self):
                raise IndexError(f"samples: got {samples}, want an index below {len(self)}")
            samples = slice(samples, samples + 1 or None)
        return AffineMap(DenseOperator(tuple(w[samples] for w in _several(self.weight)), self.bias[samples]))

    def __len__(self) -> int:
        return self._operator.n

    def __repr__(self) -> str:
        operator = self._operator
        inputs = ", ".join(str(tuple(shape)) for shape in operator.inputs)
        text = f"AffineMap({operator.n} samples, {inputs} -> {tuple(operator.output)}"
        if isinstance(operator, JacobianOperator):
            text += "" if self._layer is None else f", layer {self._layer!r}"
            text += ", exact" if self._same_gates is not None else ", exact at x"
        return f"{text})"

    def _repr_html_(self) -> str:
        operator = self._operator
        facts = {
            "samples": str(operator.n),
            "inputs": ", ".join(str(tuple(shape)) for shape in operator.inputs),
            "outputs": str(tuple(operator.output)),
        }
        if isinstance(operator, JacobianOperator):
            facts["layer"] = "output" if self._layer is None else str(self._layer)
            facts["exact"] = "while no gate changes" if self._same_gates is not None else "at x"
        return html_table(list(facts), [list(facts.values())], above=["AffineMap: F(x) = W x + c"])

    def _vectors(self, v: Tensor | tuple[Tensor, ...]) -> Vectors:
        vectors, operator = _several(v), self._operator
        _check_tensors("x", vectors)
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
        size = self._chunk_size or max(1, _ENTRIES_PER_CHUNK // max(1, self._operator.n * width))
        for start in track(range(0, total, size), "weight", self._progress, "chunk"):
            yield start, min(size, total - start)


def _selector(target: Target) -> Callable[[Any], Tensor]:
    """Return the function that selects a target from a model's output."""
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
                raise ValueError(f"target: got {target}, which selects nothing; want a slice of {outputs} outputs")
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


def _relative(difference: Tensor, values: Tensor) -> Tensor:
    """Return the largest |difference| relative to the largest |value|."""
    scale = values.abs().max()
    return difference.abs().max() / torch.where(scale > 0, scale, 1)


def _signs(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return random tensors of -1 and 1, as which products with powers of two are exact."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, 2, t.shape, generator=generator) * 2 - 1).to(t) for t in like]


def _power_of_two(t: Tensor) -> float:
    """Return a power of two of the size of a tensor's entries."""
    largest = float(t.abs().max()) if t.numel() else 0.0
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0


def _check_tensors(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, want a torch.Tensor")


def _single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _several(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) and not isinstance(values, torch.Size) else (values,)
