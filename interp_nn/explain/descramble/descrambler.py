"""Descrambling: the orthogonal mixture, or the order, of a layer's features in which each is most like the next.

Amey, Keeley, Choudhury & Kuprov (PNAS 118(5) e2016917118, 2021) put an orthogonal P after a layer so that P H varies slowly from
one row to the next, and read P W. They descend; Sule, Spencer & Czaja (arXiv 2301.07820) note that |D P H|² is Brockett's
function, whose minimum is known: the principal components of H go to the modes of D, the largest to the cheapest.

Such a P exists for any data and any network, and P H always looks smooth: see `nulls_` before believing what P W shows.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from itertools import chain
from math import nan
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from interp_nn.explain.descramble.brockett import Operator, operator_on
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
_PROBE = 64  # samples that show how a layer is wired, and whether the outputs are as they were


class Nulls(NamedTuple):
    """The loss on the data and where there is less to be found, in units of its mean over random P: 1 is chance.

    fitted: of the data. shuffled: of the data with each feature's samples shuffled by themselves, with the P that is optimal for
    these. held_out: of every other sample, with the P that is optimal for the rest. random_net: of the same layer with weights
    as before training, with its own optimal P. NaN for what there is not. So fitted below shuffled is structure; held_out as
    low, structure that other samples have too; random_net as low, structure of the inputs and the architecture alone.

    For the diagonal criteria the units are the largest that a matrix of W's norm can reach, and more is better.
    """

    fitted: float
    shuffled: float
    held_out: float
    random_net: float


class Descrambler(Estimator):
    """The orthogonal P (n, n) that makes the features of a layer smooth from each to the next: P H for H (n, N).

    criterion: "smooth", the least |D P H|²; or for a square W in the place of H "diag_sum", the largest tr(P W), and
    "diag_normsq", the largest sum of (P W)_ii² (a local maximum: there is no closed form). Their loss is minus that.
    operator: D, by a name of `derivative_operator`, as a matrix (m, n), as a DerivativeOperator (of a grid, of a graph), or as a
    function that is linear in the columns it is given. P shows it as much as the data: with "fourier2" the last feature
    neighbours the first, and with most, constants cost nothing, so that the largest component, often the mean, goes to them.
    group: "orthogonal", "special" (rotations), or "permutation", an order: exact for few features, else a local minimum (see
    `seriate`). center: take each feature's mean off first. canonical: whether each component has the sign that makes its
    largest entry positive, or the solver's.

    After `fit`, `partial_fit` or `fit_layer`, all fp64:
    P_: (n, n). loss_: |D P H|². lower_bound_: what no P of the group is below; an orthogonal P reaches it with "smooth" and
    "diag_sum"; an order's is that of the orthogonal P's. spectrum_, ambiguity_, nulls_: `Spectrum`, `Ambiguity`, `Nulls`.
    mean_: (n,), the features' means. layer_, following_: the names of the layer, and of the next or None, after `fit_layer`.
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
        operator: Operator = "fourier2",
        group: Group = "orthogonal",
        center: bool = False,
        canonical: bool = True,
    ) -> None:
        self.criterion, self.operator, self.group = criterion, operator, group
        self.center, self.canonical = center, canonical
        self._reset()

    def fit(self, H: Tensor, y: object = None) -> Descrambler:
        """Find P for H (n, N), features x samples, or for a square W; returns self. One pass over H, and O(n³).

        Warns where the rank of H is below n, since P is then arbitrary in part. Raises TypeError for complex or integer data,
        ValueError for another shape, for values that are not finite, and for parameters that are not known.
        """
        self._reset()
        if self._of_matrix():
            check_data(H)
            if H.shape[0] != H.shape[1]:
                raise ValueError(
                    f"H: got shape {tuple(H.shape)}, want a square matrix for criterion={self.criterion!r}"
                )
            self._matrix = H.detach().double().clone()
        else:
            self.partial_fit(H)
        return self._settled()

    def partial_fit(self, H: Tensor, y: object = None) -> Descrambler:
        """Add samples, the columns of H (n, m), to those seen; returns self. In O(n² + n m) memory; P is found when asked for.

        Raises what `fit` does, and ValueError for another number of features than before.
        """
        self._want_samples("fit(W)")
        check_data(H)
        if self._samples is None:
            self._derivative = operator_on(self.operator, len(H))
            self._samples = Samples(len(H), H.device)
        if len(H) != self._samples.features:
            raise ValueError(f"H: got {len(H)} features, want {self._samples.features}, as before")
        self._samples.update(H.unsqueeze(2))
        self._random_net = None  # which has not seen these
        self._forget()
        return self

    def fit_layer(self, model: nn.Module, name: str, data: Any, tap: Tap = "pre", joint: bool = False) -> Descrambler:
        """Find P for the layer `name` of a model on data: inputs (n, ...), or batches (a DataLoader), each of them inputs or a
        tuple that begins with them; returns self. The model is left as it is.

        tap: "pre", what the layer gives; "post", what the next layer with a weight receives of that, after the activation. The
        features of a convolution are its channels, with every position a sample, and those of other layers the last dimension.
        joint: the rows of the next layer's weight are samples too, scaled to the norm of the others (needs "post"; Amey et al.).
        The layer with its network's weights as before training sees the same data, for nulls_.

        Raises ValueError for a layer that does not exist (with the nearest names), for one that no next layer receives where
        that is asked for, for dropout in training mode; TypeError for data or a model of another kind.
        """
        self._want_samples("fit(layer.weight)")
        if tap not in get_args(Tap):
            raise ValueError(f"tap: got {tap!r}, want one of {', '.join(get_args(Tap))}")
        if joint and tap != "post":
            raise ValueError(
                f"joint: got True with tap={tap!r}, want tap='post', which is what the next layer's weight meets"
            )
        check_model(model)
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        inputs = batches(data, model)
        first = next(inputs)
        wires = wiring(model, name, first[:_PROBE])
        if tap == "post" and wires.following is None:
            raise ValueError(f"tap: got 'post', but no layer receives a function of {name!r} alone; want 'pre'")
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
        self._layers = (find_layer(model, name)[1], following)
        self.layer_, self.following_ = wires.layer, wires.following
        return self._settled()

    @property
    def P_(self) -> Tensor:  # noqa: N802 - the letter of the papers
        return self._optimum.P

    @property
    def loss_(self) -> float:
        return self._optimum.loss

    @property
    def lower_bound_(self) -> float:
        return self._optimum.lower_bound

    @property
    def spectrum_(self) -> Spectrum:
        return self._optimum.spectrum

    @property
    def ambiguity_(self) -> Ambiguity:
        return self._optimum.ambiguity

    @property
    def mean_(self) -> Tensor:
        return self._seen().all.mean

    @cached_property
    def nulls_(self) -> Nulls:
        """See `Nulls`; computed when first asked for."""
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

    def transform(self, H: Tensor) -> Tensor:
        """P H (n, N) of H (n, N), in the dtype of H; of the deviations from `mean_` where `center`."""
        check_data(H)
        if len(H) != len(self.P_):
            raise ValueError(f"H: got {len(H)} features, want {len(self.P_)}, as in fit")
        return self.P_.to(H) @ (H - self.mean_.to(H).unsqueeze(1) if self.center else H)

    def weights(
        self, layer: nn.Module | Tensor | None = None, following: nn.Module | Tensor | None = None
    ) -> DescrambledWeights:
        """P W of a layer's weight (n, ...) and W Pᵀ of the next one's (m, n, ...); by default those of `fit_layer`.

        Of a summary layer the weight is its effective weight. After tap="pre" it is P W that shows the features as they were
        made smooth, after "post" W Pᵀ, which meets them; across a nonlinearity the two are not parts of one network.
        """
        if layer is None:
            if self._layers is None:
                raise ValueError("layer: got None, which means the layer of fit_layer; want a layer or its weight")
            layer, following = self._layers
        return DescrambledWeights(
            rotated_rows(weight_of(layer, "layer"), self.P_),
            None if following is None else rotated_columns(weight_of(following, "following"), self.P_),
        )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Put the layer's features in the order found, in place, and the next layer's inputs with them: the model computes what
        it did, which is seen on the first samples of `fit_layer`. Returns the model.

        An orthogonal P that is no permutation is put in where the next layer receives the features as they are; across a
        nonlinearity f it is refused with ValueError, as f(P z) is not P f(z). So is a layer that cannot be exchanged alone
        (another layer uses its features, groups, a parametrized weight); the model is then as it was.
        """
        if self._wires is None or self._probe is None:
            raise ValueError("apply_: want fit_layer first, which sees what the features of a layer go into")
        model = getattr(model, "_orig_mod", model)
        rewire_(model, self._wires, self.P_, self.group == "permutation", self._probe)
        return model

    def check(self) -> float:
        """How far P is from what it should be: the largest error of P Pᵀ = I, and of the loss against `lower_bound_`, relative to
        it; for "diag_normsq" of the condition for a maximum. Rounding, but for an order: then how far from the best it may be.
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
        """This object, with what `fit` finds found."""
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
            warnings.warn(f"H: rank {rank} for {n} features, so that {arbitrary}", stacklevel=4)
        return found

    def _smoothest(self, gram: Tensor, precision: float = 0.0) -> Optimum:
        return smoothest(gram, self._derivative, self.group, self.canonical, precision)

    def _in_units_of_chance(self, gram: Tensor, P: Tensor | None = None) -> float:
        """The loss of P, or the least that there is, over its mean over random P; NaN where that is zero."""
        reached = self._smoothest(gram).loss if P is None else loss(P, gram, self._derivative)
        mean = chance(gram, self._derivative, self.group)
        return reached / mean if mean else nan

    def _seen(self) -> Samples:
        if self._samples is None:
            raise NotFittedError("Descrambler: this is known after fit(H), of samples, which was not called")
        return self._samples

    def _of_matrix(self) -> bool:
        """Whether the criterion is of one square matrix. Raises ValueError for parameters that are not known."""
        for name, value, known in (("criterion", self.criterion, Criterion), ("group", self.group, Group)):
            if value not in get_args(known):
                raise ValueError(f"{name}: got {value!r}, want one of {', '.join(get_args(known))}")
        if self.criterion != "smooth" and self.center:
            raise ValueError(
                f"center: got True with criterion={self.criterion!r}, whose matrix has no samples; want False"
            )
        return self.criterion != "smooth"

    def _want_samples(self, instead: str) -> None:
        if self._of_matrix():
            raise ValueError(f"criterion: got {self.criterion!r}, which is of one square matrix; want {instead}")
