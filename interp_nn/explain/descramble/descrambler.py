"""Descrambling: the orthogonal mixture, or the order, of a layer's features in which each feature is most like the next.

Amey, Keeley, Choudhury & Kuprov (PNAS 118(5) e2016917118, 2021) put an orthogonal P after a layer. They choose P by gradient
descent, so that P H varies slowly from each row to the next, and then look at P W. Sule, Spencer & Czaja (arXiv 2301.07820) note
that |D P H|² is Brockett's function, whose minimum is known. The principal components of H become the modes of D. The component
with the most energy becomes the mode with the lowest cost.

Such a P exists for any data and any network, and P H always looks smooth. So compare with `nulls_` before you interpret P W.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from itertools import chain
from math import nan
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from interp_nn.explain.descramble.brockett import OperatorLike, operator_on
from interp_nn.explain.descramble.derivatives import DerivativeOperator
from interp_nn.explain.descramble.diagonal import DiagonalCriterion, asymmetry, in_units_of_norm, most_diagonal
from interp_nn.explain.descramble.moments import Samples, shuffled
from interp_nn.explain.descramble.optimum import Ambiguity, Group, Optimum, Spectrum, chance, loss, smoothest
from interp_nn.explain.descramble.rewiring import (
    DescrambledWeights,
    rewire_,
    rotated_columns,
    rotated_rows,
    scaled_columns,
    weight_of,
)
from interp_nn.explain.descramble.seriation import check_data
from interp_nn.explain.estimator import Estimator, NotFittedError
from interp_nn.explain.following.layer_values import (
    Tap,
    Wiring,
    batches,
    find_layer,
    layer_values,
    reinitialised,
    wiring,
)
from interp_nn.explain.following.replay import check_model
from interp_nn.linalg import GramAccumulator

Criterion = Literal["smooth", "diag_sum", "diag_normsq"]
_PROBE = 64  # samples that show which layer comes next, and later if the model's outputs have changed


class Nulls(NamedTuple):
    """The loss on the data and on data with less structure, divided by the mean loss over random P, so that 1 is chance.

    If `fitted` is below `shuffled`, the data have structure. If `held_out` is as low as `fitted`, other samples have it too. If
    `random_net` is as low, the structure comes from the inputs or the architecture, not from training. A value is NaN where it
    does not apply. For the diagonal criteria, more is better: the values are minus the loss, divided by the largest value that a
    matrix with the same norm can reach.

    Attributes:
        fitted: Of the data.
        shuffled: Of the data with each feature shuffled by itself, with the P that is optimal for the shuffled data.
        held_out: Of every other sample, with the P that is optimal for the rest.
        random_net: Of the same layer with weights as before training, with the P that is optimal there; after `fit_layer` only.

    Example:
        >>> x = torch.arange(8.0).unsqueeze(1) * torch.linspace(1, 2, 50) + torch.eye(8, 50)
        >>> nulls = Descrambler(operator="diff1").fit(x).nulls_
        >>> nulls.fitted < nulls.shuffled < 1
        True
    """

    fitted: float
    shuffled: float
    held_out: float
    random_net: float


class Descrambler(Estimator):
    """Finds the orthogonal P (n, n) for which the rows of P x change least from each to the next, for features x (n, samples).

    Symbols, as in the papers: H the features x; D the operator; P the descrambler; W a weight; T and tau the operator's modes and
    their costs; U and lambda the data's principal components and their energies. The optimum is P = T Uᵀ.

    P depends on the operator as much as on the data. With "fourier2", the last feature is next to the first. Most operators give
    constants a cost of 0, so that the largest component, often the mean, becomes the constant mode; see `center`.

    Args:
        criterion: "smooth" minimises |D P H|². The other criteria take a square matrix W in place of the features: "diag_sum"
            maximises tr(P W), and "diag_normsq" the sum of (P W)_ii², to a local maximum. Their loss is minus that value.
        operator: D: a kind of `derivative_operator`, a matrix (m, n), a `DerivativeOperator` (as for a grid or a graph), or a
            function that is linear in the columns of its argument.
        group: The set of matrices P: "orthogonal", "special" (rotations) or "permutation" (orders of the features, which
            `seriate` finds exactly for few features).
        center: Subtract the mean of each feature first.
        canonical: Make the largest entry of each principal component positive, so that P does not depend on the solver's signs.

    Attributes:
        P_: The descrambler P, (n, n) float64.
        loss_: The loss at P, |D P H|² for "smooth".
        lower_bound_: A bound that no P of the group is below. For "smooth" and "diag_sum", an orthogonal P reaches it. The bound
            for permutations is the one for orthogonal P.
        spectrum_: `Spectrum`, the costs of the modes and the energies of the components.
        ambiguity_: `Ambiguity`, the directions in which P is arbitrary.
        nulls_: `Nulls`, the loss compared with data of less structure.
        mean_: The means of the features, (n,) float64.
        layer_: After `fit_layer`, the name of the layer.
        following_: After `fit_layer`, the name of the next layer, or None.

    Example:
        >>> x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 5.0, 0.0], [2.0, 0.0, 0.0]])
        >>> found = Descrambler(operator="diff1").fit(x)
        >>> found.spectrum_.energies.round(decimals=6), round(found.loss_, 6)  # 0 * 25 + 1 * 4 + 3 * 1
        (tensor([25.,  4.,  1.], dtype=torch.float64), 7.0)
        >>> abs(found.loss_ - found.lower_bound_) < 1e-12
        True

    Source: Amey, Keeley, Choudhury & Kuprov (2021), PNAS 118(5) e2016917118; Sule, Spencer & Czaja, arXiv 2301.07820.
    """

    layer_: str
    following_: str | None
    _derivative: DerivativeOperator
    _samples: Samples | None
    _matrix: Tensor | None
    _random_net: GramAccumulator | None
    _wires: Wiring | None
    _layers: tuple[nn.Module, nn.Module | None] | None
    _probe: Tensor | None

    def __init__(
        self,
        criterion: Criterion = "smooth",
        operator: OperatorLike = "fourier2",
        group: Group = "orthogonal",
        center: bool = False,
        canonical: bool = True,
    ) -> None:
        self.criterion, self.operator, self.group = criterion, operator, group
        self.center, self.canonical = center, canonical
        self._reset()

    def fit(self, x: Tensor, y: object = None) -> Descrambler:
        """Find P, with one pass over the features and O(n³) operations. Warns if the rank is below n, so that P is not unique.

        Args:
            x: Features of shape (n, samples), real floating-point, finite; for the diagonal criteria, a square matrix W (n, n).
            y: Ignored; scikit-learn passes it.

        Returns:
            The descrambler itself.

        Raises:
            TypeError: Complex or integer data, or an operator of another kind.
            ValueError: Another shape, values that are not finite, or a parameter of the constructor that is not known.
        """
        self._reset()
        if self._of_matrix():
            check_data(x)
            if x.shape[0] != x.shape[1]:
                raise ValueError(
                    f"x: got shape {tuple(x.shape)}, want a square matrix for criterion={self.criterion!r}"
                )
            self._matrix = x.detach().double().clone()
        else:
            self.partial_fit(x)
        return self._settled()

    def partial_fit(self, x: Tensor, y: object = None) -> Descrambler:
        """Add samples to the ones seen so far. P is computed when a fitted attribute is read, in O(n² + n samples) memory.

        Args:
            x: Features of shape (n, samples), real floating-point, finite.
            y: Ignored; scikit-learn passes it.

        Returns:
            The descrambler itself.

        Raises:
            TypeError: As in `fit`.
            ValueError: As in `fit`, another number of features than before, or a diagonal criterion.
        """
        self._want_samples("fit(W)")
        check_data(x)
        if self._samples is None:
            self._derivative = operator_on(self.operator, len(x))
            self._samples = Samples(len(x), x.device)
        if len(x) != self._samples.features:
            raise ValueError(f"x: got {len(x)} features, want {self._samples.features}, as before")
        self._samples.update(x.unsqueeze(2))
        self._random_net = None  # the random network has not seen these samples
        self._forget()
        return self

    def fit_layer(self, model: nn.Module, layer: str, data: Any, tap: Tap = "pre", joint: bool = False) -> Descrambler:
        """Find P for the values of a layer of a model, which stays as it is.

        The features of a convolution are its channels, and every position is a sample. The features of other layers are the
        last dimension. For `nulls_`, a copy of the model with weights as before training sees the same data.

        Args:
            model: Network with the layer.
            layer: Name of the layer, as in `model.named_modules()`.
            data: Inputs (n, ...), or an iterable of batches such as a DataLoader: inputs, or tuples that begin with inputs.
            tap: "pre" takes the layer's output. "post" takes the value that the next layer with a weight receives of it, after
                the activation.
            joint: Take the rows of the next layer's weight as samples too, scaled to the norm of the others, as Amey et al. do.
                Needs tap="post".

        Returns:
            The descrambler itself.

        Raises:
            TypeError: A model or data of another kind, or as in `fit`.
            ValueError: A layer that does not exist (the message lists the nearest names), a tap or joint without a next layer,
                dropout in training mode, or as in `fit`.
        """
        self._want_samples("fit(layer.weight)")
        if tap not in get_args(Tap):
            raise ValueError(f"tap: got {tap!r}, want one of {', '.join(get_args(Tap))}")
        if joint and tap != "post":
            raise ValueError(
                f"joint: got True with tap={tap!r}, want tap='post', the values that the next layer's weight multiplies"
            )
        check_model(model)
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        inputs = batches(data, model)
        first = next(inputs)
        wires = wiring(model, layer, first[:_PROBE])
        if tap == "post" and wires.following is None:
            raise ValueError(f"tap: got 'post', but no layer receives a function of {layer!r} alone; want 'pre'")
        derivative = operator_on(self.operator, wires.features)
        fresh = reinitialised(model)
        samples, null = Samples(wires.features, first.device), GramAccumulator(wires.features, first.device)
        for x in chain([first], inputs):
            values = layer_values(model, wires, tap, x)
            check_data(values.flatten(1))
            samples.update(values)
            null.update(layer_values(fresh, wires, tap, x).flatten(1))
        if joint:
            samples.update(scaled_columns(model, wires, samples.all.gram()).unsqueeze(2))
            null.update(scaled_columns(fresh, wires, null.gram()))
        self._reset()
        self._derivative, self._samples, self._random_net = derivative, samples, null
        self._wires, self._probe = wires, first[:_PROBE]
        following = None if wires.following is None else find_layer(model, wires.following)[1]
        self._layers = (find_layer(model, layer)[1], following)
        self.layer_, self.following_ = wires.layer, wires.following
        return self._settled()

    @property
    def P_(self) -> Tensor:  # noqa: N802 - the letter of the papers
        """The descrambler P, (n, n) float64."""
        return self._optimum.P

    @property
    def loss_(self) -> float:
        """The loss at P."""
        return self._optimum.loss

    @property
    def lower_bound_(self) -> float:
        """A bound that no P of the group is below."""
        return self._optimum.lower_bound

    @property
    def spectrum_(self) -> Spectrum:
        """The costs of the modes and the energies of the components."""
        return self._optimum.spectrum

    @property
    def ambiguity_(self) -> Ambiguity:
        """The directions in which P is arbitrary."""
        return self._optimum.ambiguity

    @property
    def mean_(self) -> Tensor:
        """The means of the features, (n,) float64."""
        return self._seen().all.mean

    @cached_property
    def nulls_(self) -> Nulls:
        """The loss compared with data of less structure, computed at the first access."""
        if self._matrix is not None:
            criterion, W = cast(DiagonalCriterion, self.criterion), self._matrix
            null = most_diagonal(shuffled(W), criterion, self.group).loss
            fitted, least = (in_units_of_norm(value, W, criterion) for value in (self.loss_, null))
            return Nulls(fitted, least, nan, nan)
        samples = self._seen()
        rest, held_out = (half.gram(self.center) for half in samples.halves)
        return Nulls(
            self._in_units_of_chance(samples.all.gram(self.center), self.P_),
            self._in_units_of_chance(samples.shuffled.gram(self.center)),
            self._in_units_of_chance(held_out, self._smoothest(rest).P),
            nan if self._random_net is None else self._in_units_of_chance(self._random_net.gram(self.center)),
        )

    def transform(self, x: Tensor) -> Tensor:
        """Compute P x, or P (x - mean) with `center`.

        Args:
            x: Features of shape (n, samples), real floating-point, finite.

        Returns:
            Tensor of shape (n, samples), in the dtype of x.

        Raises:
            NotFittedError: No fit came before.
            TypeError: Complex or integer data.
            ValueError: Another shape, or values that are not finite.
        """
        check_data(x)
        if len(x) != len(self.P_):
            raise ValueError(f"x: got {len(x)} features, want {len(self.P_)}, as in fit")
        return self.P_.to(x) @ (x - self.mean_.to(x).unsqueeze(1) if self.center else x)

    def weights(
        self, layer: nn.Module | Tensor | None = None, following: nn.Module | Tensor | None = None
    ) -> DescrambledWeights:
        """Compute P W of a layer's weight and W Pᵀ of the next layer's weight.

        After tap="pre", P W produces the smooth features. After tap="post", W Pᵀ receives them. Across a nonlinearity the two are
        not parts of one network.

        Args:
            layer: A layer or its weight (n, ...). Default: the layers of `fit_layer`. A summary layer counts with its effective
                weight.
            following: The next layer or its weight (m, n, ...), or None.

        Returns:
            `DescrambledWeights`, in float64.

        Raises:
            NotFittedError: No fit came before.
            TypeError: A layer without a weight (out, in, ...).
            ValueError: A weight of another shape, or no layer without `fit_layer`.
        """
        if layer is None:
            if self._layers is None:
                raise ValueError("layer: got None, but fit_layer was not called; want a layer or its weight")
            layer, following = self._layers
        return DescrambledWeights(
            rotated_rows(weight_of(layer, "layer"), self.P_),
            None if following is None else rotated_columns(weight_of(following, "following"), self.P_),
        )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Write P into the model, in place: P after the layer of `fit_layer`, Pᵀ before the next one.

        The model then computes the same function. The method checks this on the first samples of `fit_layer`. A permutation can
        be written across a nonlinearity f that treats all features alike. Any other P needs a next layer that receives the
        features directly, because f(P z) is not P f(z).

        Args:
            model: The model of `fit_layer`.

        Returns:
            The model.

        Raises:
            ValueError: `fit_layer` was not called; a nonlinearity lies between the layers and P is no permutation; or the layer
                cannot be changed alone (another layer uses its features, groups, a parametrized weight). The model is unchanged.
        """
        if self._wires is None or self._probe is None:
            raise ValueError("apply_: fit_layer was not called; want fit_layer first, which finds the next layer")
        model = getattr(model, "_orig_mod", model)
        rewire_(model, self._wires, self.P_, self.group == "permutation", self._probe)
        return model

    def check(self) -> float:
        """Return the largest error of P: of P Pᵀ = I, and of the loss relative to `lower_bound_`.

        For "diag_normsq", the second error is that of the condition for a maximum. The result is rounding error; for a
        permutation, it limits the distance from the optimum.
        """
        P, best = self.P_, self._optimum
        defect = float((P @ P.mT - torch.eye(len(P)).to(P)).abs().max())
        if self._matrix is not None and self.criterion == "diag_normsq" and self.group != "permutation":
            return max(defect, asymmetry(P, self._matrix))
        gap = abs(best.loss - best.lower_bound)
        return max(defect, gap / abs(best.lower_bound) if best.lower_bound else gap)

    def __repr__(self) -> str:
        given = f"Descrambler(criterion={self.criterion!r}, group={self.group!r}"
        if self._samples is None and self._matrix is None:
            return f"{given}, not fitted)"
        known = self.ambiguity_
        return f"{given}, loss {self.loss_:.4g} of at least {self.lower_bound_:.4g}, rank {known.rank} of {known.features})"

    def _reset(self) -> None:
        self._samples = self._matrix = self._random_net = self._wires = self._layers = self._probe = None
        for name in ("layer_", "following_"):
            vars(self).pop(name, None)
        self._forget()

    def _forget(self) -> None:
        for lazy in ("_optimum", "nulls_"):
            vars(self).pop(lazy, None)

    def _settled(self) -> Descrambler:
        """Compute the optimum now, and return this object."""
        _ = self._optimum
        return self

    @cached_property
    def _optimum(self) -> Optimum:
        if self._matrix is not None:
            found = most_diagonal(self._matrix, cast(DiagonalCriterion, self.criterion), self.group)
        else:
            found = self._smoothest(self._seen().all.gram(self.center), self._seen().precision)
        rank, n = found.ambiguity.rank, found.ambiguity.features
        if rank < n and self.group != "permutation":
            arbitrary = f"P is arbitrary in {n - rank} directions (see ambiguity_)"
            warnings.warn(f"x: rank {rank} for {n} features, so that {arbitrary}", stacklevel=4)
        return found

    def _smoothest(self, gram: Tensor, precision: float = 0.0) -> Optimum:
        return smoothest(gram, self._derivative, self.group, self.canonical, precision)

    def _in_units_of_chance(self, gram: Tensor, P: Tensor | None = None) -> float:
        """Return the loss of P (default: the smallest loss) divided by its mean over random P; NaN if the mean is zero."""
        reached = self._smoothest(gram).loss if P is None else loss(P, gram, self._derivative)
        mean = chance(gram, self._derivative, self.group)
        return reached / mean if mean else nan

    def _seen(self) -> Samples:
        if self._samples is None:
            raise NotFittedError("Descrambler: not fitted to samples yet; call fit(x) first")
        return self._samples

    def _of_matrix(self) -> bool:
        """Return True if the criterion takes one square matrix. Raises ValueError for parameters that are not known."""
        for name, value, known in (("criterion", self.criterion, Criterion), ("group", self.group, Group)):
            if value not in get_args(known):
                raise ValueError(f"{name}: got {value!r}, want one of {', '.join(get_args(known))}")
        if self.criterion != "smooth" and self.center:
            raise ValueError(
                f"center: got True with criterion={self.criterion!r}, which takes a matrix instead of samples; want False"
            )
        return self.criterion != "smooth"

    def _want_samples(self, instead: str) -> None:
        if self._of_matrix():
            raise ValueError(f"criterion: got {self.criterion!r}, which takes one square matrix; want {instead}")
