"""Descrambling: the orthogonal mixture, or the order, of a layer's features in which each feature is most like the next.

Amey, Keeley, Choudhury & Kuprov (PNAS 118(5) e2016917118, 2021) put an orthogonal P after a layer. They choose P by gradient
descent, so that P H varies slowly from each row to the next, and then look at P W. Sule, Spencer & Czaja (arXiv 2301.07820) note
that |D P H|² is Brockett's function, whose minimum is known. The principal components of H become the modes of D. The component
with the most energy becomes the mode with the lowest cost.

Such a P exists for any data and any network, and P H always looks smooth. So read `nulls_` before you interpret P W.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import cached_property
from itertools import chain
from math import nan
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from interp_nn.display import track
from interp_nn.explain.descramble.brockett import OperatorLike, operator_on
from interp_nn.explain.descramble.derivatives import DerivativeOperator
from interp_nn.explain.descramble.diagonal import DiagonalCriterion, asymmetry, in_units_of_norm, most_diagonal
from interp_nn.explain.descramble.moments import Samples, shuffled
from interp_nn.explain.descramble.optimum import (
    Ambiguity,
    Group,
    Optimum,
    Spectrum,
    chance,
    loss,
    smallest_loss,
    smoothest,
)
from interp_nn.explain.descramble.rewiring import (
    DescrambledWeights,
    rewire_,
    rotated_columns,
    rotated_rows,
    scaled_columns,
    weight_of,
)
from interp_nn.explain.estimator import Transformer, as_given, not_fitted, to_tensor
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
from interp_nn.linalg import GramAccumulator, check_real

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Criterion = Literal["smooth", "diag_sum", "diag_normsq"]
_ROUNDING = 1e-9  # relative difference of losses that counts as none
_PROBE = 64  # samples that show which layer comes next, and later if the model's outputs have changed


class Nulls(NamedTuple):
    """The loss on the data and on data with less structure, divided by the mean loss over random P, so that 1 is chance.

    The null hypothesis: the features are independent of each other. Shuffling each feature by itself over the samples then
    changes nothing, so that the data are as likely as any shuffle of them to have the smallest loss. `p` is the share of the data
    and its shuffles whose loss is at most that of the data: p = (1 + number of shuffles with a loss <= fitted) / (shuffles + 1).
    It is uniform under the null, and small where the features are related. The samples must be independent of each other. The
    positions of an image or a text are not: there p is too small, and `held_out` is the better guide.

    If `held_out` is as low as `fitted`, other samples have the same structure. If `random_net` is as low, the structure comes
    from the inputs or the architecture, not from training. A value is NaN where it does not apply. For the diagonal criteria,
    more is better: the values are minus the loss, divided by the largest value that a matrix with the same norm can reach. `p`
    then counts the shuffles that reach as much.

    Attributes:
        fitted: Of the data.
        shuffled: Mean over the shuffles, each with the P that is optimal for it.
        held_out: Of every other sample, with the P that is optimal for the rest.
        random_net: Of the same layer with weights as before training, with the P that is optimal there; after `fit_layer` only.
        shuffled_std: Standard deviation over the shuffles.
        p: The p-value of the null hypothesis.
        shuffles: Number of shuffles.

    Example:
        >>> x = torch.arange(8.0) * torch.linspace(1, 2, 50).unsqueeze(1) + torch.eye(50, 8)
        >>> nulls = Descrambler(operator="diff1").fit(x).nulls_
        >>> nulls.fitted < nulls.shuffled < 1, nulls.p  # no one of 19 shuffles is as smooth
        (True, 0.05)
    """

    fitted: float
    shuffled: float
    held_out: float
    random_net: float
    shuffled_std: float = nan
    p: float = nan
    shuffles: int = 0


class Descrambler(Transformer):
    """Finds the orthogonal P (n, n) for which the rows of P H change least from each to the next, for n features.

    Symbols, as in the papers: H (n, samples) the features, which is xᵀ for samples x; D the operator; P the descrambler; W a
    weight; T and tau the operator's modes and their costs; U and lambda the data's principal components and their energies. The
    optimum is P = T Uᵀ.

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
        features_first: `fit`, `partial_fit` and `transform` take and return H (n, samples) instead of x (samples, n).
        progress: Show a progress bar for `nulls`. None shows one in a terminal or a notebook, where tqdm is installed.

    Attributes:
        P_: The descrambler P, (n, n) float64.
        loss_: The loss at P, |D P H|² for "smooth".
        lower_bound_: A bound that no P of the group is below. For "smooth" and "diag_sum", an orthogonal P reaches it. The bound
            for permutations is the one for orthogonal P.
        spectrum_: `Spectrum`, the costs of the modes and the energies of the components.
        ambiguity_: `Ambiguity`, the directions in which P is arbitrary.
        nulls_: `Nulls`, the loss compared with that of 19 shuffles, computed when it is read. `nulls` draws more.
        mean_: The means of the features, (n,) float64.
        layer_: After `fit_layer`, the name of the layer.
        following_: After `fit_layer`, the name of the next layer, or None.
        n_features_in_: Number of features n.
        feature_names_in_: Names of the columns, where `fit` got a data frame. Other frames must have the same ones in this order.

    Example:
        >>> x = torch.tensor([[0.0, 0.0, 2.0], [0.0, 5.0, 0.0], [1.0, 0.0, 0.0]])
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
    _samples: Samples | None = None
    _matrix: Tensor | None = None
    _random_net: GramAccumulator | None = None
    _wires: Wiring | None = None
    _layers: tuple[nn.Module, nn.Module | None] | None = None
    _probe: Tensor | None = None

    def __init__(
        self,
        criterion: Criterion = "smooth",
        operator: OperatorLike = "fourier2",
        group: Group = "orthogonal",
        center: bool = False,
        canonical: bool = True,
        *,
        features_first: bool = False,
        progress: bool | None = None,
    ) -> None:
        self.progress = progress
        self.criterion, self.operator, self.group = criterion, operator, group
        self.center, self.canonical, self.features_first = center, canonical, features_first

    def fit(self, x: object, y: object = None) -> Descrambler:
        """Find P, with one pass over the features and O(n³) operations. Warns if the rank is below n, so that P is not unique.

        Args:
            x: Samples (samples, n) of n features, real, finite: a tensor, an array or a data frame of numbers. For the diagonal
                criteria, a square matrix W (n, n), which `features_first` does not turn.
            y: Ignored; scikit-learn passes it.

        Returns:
            The descrambler itself.

        Raises:
            TypeError: Sparse data, data that are no numbers, or an operator of another kind.
            ValueError: Complex data, another shape, values that are not finite, or a parameter of the constructor that is not
                known.
        """
        self._reset()
        if self._of_matrix():
            matrix = self._validated(x, reset=True)
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(
                    f"x: got shape {tuple(matrix.shape)}, want a square matrix for criterion={self.criterion!r}"
                )
            self._matrix = matrix.double().clone()
        else:
            self.partial_fit(x)
        return self._settled()

    def partial_fit(self, x: object, y: object = None) -> Descrambler:
        """Add samples to the ones seen so far. P is computed when a fitted attribute is read, in O(n² + n samples) memory.

        Args:
            x: Samples as in `fit`.
            y: Ignored; scikit-learn passes it.

        Returns:
            The descrambler itself.

        Raises:
            TypeError: As in `fit`.
            ValueError: As in `fit`, another number of features than before, or a diagonal criterion.
        """
        self._want_samples("fit(W)")
        features = self._features(x, reset=self._samples is None)
        if self._samples is None:
            self._derivative = operator_on(self.operator, len(features))
            self._samples = Samples(len(features), features.device)
        self._samples.update(features.unsqueeze(2))
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
            check_real(f"data: the values of layer {layer!r}", values)
            if not values.numel() or not bool(values.isfinite().all()):
                raise ValueError(f"data: layer {layer!r} has no values, or some that are not finite; want finite ones")
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
        self.layer_, self.following_, self.n_features_in_ = wires.layer, wires.following, wires.features
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
        """The loss compared with data of less structure and 19 shuffles, computed at the first access."""
        return self.nulls()

    def nulls(self, shuffles: int = 19, seed: int = 0) -> Nulls:
        """Compare the loss with that of shuffled data, of held-out samples and of a random network.

        The shuffles take the samples that fit in 2^21 entries, or 4 for each feature where that is more. Where there are more
        samples, `p` compares those with their shuffles.

        Args:
            shuffles: Number of shuffles R, at least 1. The smallest p is 1 / (R + 1).
            seed: Seed of the shuffles. PyTorch's generators stay as they are.

        Returns:
            `Nulls`.

        Raises:
            NotFittedError: No fit came before.
            ValueError: Fewer than one shuffle.
        """
        if shuffles < 1:
            raise ValueError(f"shuffles: got {shuffles}, want at least 1")
        if self._matrix is not None:
            criterion, W = cast(DiagonalCriterion, self.criterion), self._matrix
            generator = torch.Generator(W.device).manual_seed(seed)
            losses = [self.loss_]
            losses += [most_diagonal(shuffled(W, generator), criterion, self.group).loss for _ in self._draws(shuffles)]
            fitted, *reached = (in_units_of_norm(value, W, criterion) for value in losses)
            return Nulls(fitted, *_mean_and_rest(losses, reached))
        samples = self._seen()
        least = [
            self._over_chance(smallest_loss(gram, self._derivative, self.group), gram)
            for gram, _ in zip(
                samples.kept_and_shuffled(shuffles, seed, self.center), self._draws(shuffles + 1), strict=True
            )
        ]
        rest, held_out = (half.gram(self.center) for half in samples.halves)
        gram = samples.all.gram(self.center)
        random_net = None if self._random_net is None else self._random_net.gram(self.center)
        return Nulls(
            self._over_chance(loss(self.P_, gram, self._derivative), gram),
            *_mean_and_rest(
                least,
                least[1:],
                self._over_chance(loss(self._smoothest(rest).P, held_out, self._derivative), held_out),
                nan if random_net is None else self._over_chance(self._smoothest(random_net).loss, random_net),
            ),
        )

    def transform(self, x: Any) -> Any:
        """Compute x Pᵀ, or (x - mean) Pᵀ with `center`; with `features_first`, P x.

        Args:
            x: Samples as in `fit`.

        Returns:
            The samples (samples, n) with mixed features, in the dtype of x; with `features_first`, (n, samples). A tensor for a
            tensor, else a numpy array.

        Raises:
            NotFittedError: No fit came before.
            TypeError: Sparse data, or data that are no numbers.
            ValueError: Complex data, another shape, or values that are not finite.
        """
        P = self.P_
        features = self._features(x, reset=False)
        mixed = P.to(features) @ (features - self.mean_.to(features).unsqueeze(1) if self.center else features)
        return as_given(mixed if self.features_first else mixed.mT, x)

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

    def plot(self, **options: Any) -> Axes:
        """Draw `nulls_` by `plots.null_bars`, and return the axes.

        Args:
            options: Of that function, such as `axes`.
        """
        from interp_nn.explain.plots.spectra import null_bars

        return null_bars({vars(self).get("layer_", "features"): self.nulls_}, **options)

    def __repr__(self) -> str:
        given = f"Descrambler(criterion={self.criterion!r}, group={self.group!r}"
        if not self.__sklearn_is_fitted__():
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

    def __sklearn_is_fitted__(self) -> bool:
        return self._samples is not None or self._matrix is not None

    def __sklearn_tags__(self) -> Any:
        """Return the tags that scikit-learn 1.6 and later reads."""
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.input_tags.three_d_array = False
        return tags

    def _features(self, x: object, *, reset: bool) -> Tensor:
        """Return samples as features (n, samples) of a floating-point dtype, checked as the base class has it."""
        values = to_tensor(x, "x")
        turn = self.features_first and values.dim() == 2
        samples = self._validated(values.mT if turn else x, reset=reset)
        if samples.dim() != 2:
            want = "(features, samples)" if self.features_first else "(samples, features)"
            raise ValueError(f"x: got shape {tuple(samples.shape)}, want {want} with at least one of each")
        return (samples if samples.is_floating_point() else samples.double()).mT

    def _draws(self, count: int) -> Iterable[int]:
        return track(range(count), "null models", self.progress, "shuffle")

    def _over_chance(self, reached: float, gram: Tensor) -> float:
        """Return a loss divided by its mean over random P; NaN if the mean is zero."""
        mean = chance(gram, self._derivative, self.group)
        return reached / mean if mean else nan

    def _seen(self) -> Samples:
        if self._samples is None:
            raise not_fitted("Descrambler: not fitted to samples yet; call fit(x) first")
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


def _mean_and_rest(
    losses: list[float], shuffled: list[float], held_out: float = nan, random_net: float = nan
) -> tuple[float, float, float, float, float, int]:
    """Return all of `Nulls` but its first entry, from losses (data first) and the shuffles' values in the units of `Nulls`."""
    fitted, *null = losses
    reached = sum(value <= fitted + _ROUNDING * abs(fitted) for value in null)
    values = torch.tensor(shuffled, dtype=torch.float64)
    spread = float(values.std()) if len(values) > 1 else nan
    p = (1 + reached) / (len(null) + 1) if fitted == fitted else nan
    return float(values.mean()), held_out, random_net, spread, p, len(null)
