"""Read a head: the codes of its samples, their exact contributions, and coordinates in which they say more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from interp_nn.explain.following.replay import check_inputs
from interp_nn.explain.heads.head_table import HeadTable, gini
from interp_nn.explain.heads.linear_pair import Encoder, Layer, LinearPair, PairRun
from interp_nn.explain.heads.rotations import to_classes, to_variance, to_varimax
from interp_nn.explain.linear.affine_map import AffineMap, linearize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROTATIONS = {"variance": to_variance, "classes": to_classes, "varimax": to_varimax}
_SILENT = 1e-6  # importance of a latent that rounding alone gives weights


class KeptLatents(NamedTuple):
    """Predictions with the most important latents alone; the other latents are held at their means.

    Attributes:
        latents: The latents, most important first, (k,) int64.
        agreement: Share of the samples whose predicted class is the network's, with the first 0, 1, ..., k latents, (k + 1,).
        accuracy: Share whose predicted class is y, (k + 1,); None without y.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        >>> float(read_head(model, "0", torch.randn(9, 3), output="1").kept_latents().agreement[-1])
        1.0
    """

    latents: Tensor
    agreement: Tensor
    accuracy: Tensor | None


class TopSamples(NamedTuple):
    """The samples that a latent answers to most.

    Attributes:
        largest: Indices of the samples with the largest codes, largest first.
        smallest: Indices of the samples with the smallest codes, smallest first.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2))
        >>> _ = nn.init.ones_(model[0].weight)
        >>> read_head(model, "0", torch.tensor([[2.0], [5.0], [3.0]]), output="1").top_samples(0, 2)
        TopSamples(largest=tensor([1, 2]), smallest=tensor([0, 2]))
    """

    largest: Tensor
    smallest: Tensor


def read_head(
    model: nn.Module,
    layer: Layer,
    x: Tensor | tuple[Tensor, ...],
    y: Tensor | None = None,
    *,
    output: Layer | None = None,
    class_names: Sequence[str] | None = None,
) -> HeadReading:
    """Read two linear layers with nothing between them, at samples x.

    The codes are Z = H W + e of the features H, and the outputs Z Aᵀ + c. A sample's output is then the exact sum of its
    latents' contributions and the constant c. For every orthogonal R, the layers (W R, e R, A R) compute the same function, so
    the coordinates of the codes are free: see `HeadReading.rotate`.

    Args:
        model: The network, in evaluation mode. It returns the outputs of the second layer: logits, not probabilities.
        layer: A SummaryHead, whose codes are the projection x b; or the first of two layers, an nn.Linear or a SummaryLinear. A
            layer of the model, or its path.
        x: Samples (n, ...), or a tuple of inputs.
        y: Classes of the samples, (n,) int64, for accuracies.
        output: The second layer, or its path; None for a SummaryHead.
        class_names: Names of the outputs.

    Returns:
        The reading, in the network's own coordinates.

    Raises:
        TypeError: A layer of another type, or a y that is not int64.
        ValueError: A layer that the model does not have or does not call once, something between the layers, a model that does
            not return the outputs of the second layer, or arguments of other shapes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Linear(3, 2)).double()
        >>> reading = read_head(model, "2", torch.randn(20, 4).double(), output="3")
        >>> reading.codes.shape, reading.contributions().shape, reading.rotate("varimax").check() < 1e-12
        (torch.Size([20, 3]), torch.Size([20, 3, 2]), True)
    """
    pair = LinearPair(model, layer, output)
    x = check_inputs(x)
    run = pair.run(x)
    n, m = run.outputs.shape
    if y is not None:
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            raise TypeError(f"y: got {y.dtype if isinstance(y, Tensor) else type(y).__name__}, want classes of int64")
        if y.shape != (n,) or int(y.min()) < 0 or int(y.max()) >= m:
            raise ValueError(f"y: got shape {tuple(y.shape)}, want ({n},) with classes from 0 to {m - 1}")
    names = tuple(map(str, range(m))) if class_names is None else tuple(map(str, class_names))
    if len(names) != m:
        raise ValueError(f"class_names: got {len(names)}, want {m}")
    return HeadReading(pair, x, y, names, run, None, "the network's")


class HeadReading:
    """Codes and contributions of a head in some coordinates. `read_head` and `rotate` make readings.

    Attributes:
        codes: Z R, (n, k).
        weight: A R, (m, k).
        bias: c, (m,).
        rotation: R, (k, k) float64: the identity in the network's own coordinates.
        coordinates: Name of the coordinates.
        class_names: The m names of the outputs.
        y: Classes of the samples, (n,), or None.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        >>> reading = read_head(model, "0", torch.randn(9, 3), output="1").rotate("classes")
        >>> reading.coordinates, reading.weight.shape, reading.check() < 1e-5
        ('classes', torch.Size([2, 2]), True)
    """

    def __init__(
        self,
        pair: LinearPair,
        x: tuple[Tensor, ...],
        y: Tensor | None,
        class_names: tuple[str, ...],
        run: PairRun,
        rotation: Tensor | None,
        coordinates: str,
    ) -> None:
        k = run.codes.shape[1]
        self._pair, self._x, self._run = pair, x, run
        self.rotation = torch.eye(k, dtype=torch.float64) if rotation is None else rotation
        self.coordinates, self.class_names, self.y, self.bias = coordinates, class_names, y, run.bias
        turn = self.rotation.to(run.codes)
        self.codes, self.weight = (
            (run.codes, run.decoder) if rotation is None else (run.codes @ turn, run.decoder @ turn)
        )

    def contributions(self, target: int | Tensor | None = None) -> Tensor:
        """Compute what each latent adds to each output; summed over the latents, plus `bias`, these are the outputs.

        Args:
            target: An output, or one for each sample (n,); None for all.

        Returns:
            Tensor (n, k, m), or (n, k) for a target.

        Raises:
            ValueError: A target that is out of range.
        """
        if target is None:
            return self.codes.unsqueeze(2) * self.weight.mT
        m = len(self.weight)
        chosen = torch.as_tensor(target)
        if chosen.dtype != torch.int64 or chosen.shape not in ((), (len(self.codes),)):
            raise ValueError(f"target: got {target!r}, want an int or a tensor ({len(self.codes)},) of int64")
        if not -m <= int(chosen.min()) <= int(chosen.max()) < m:
            raise ValueError(f"target: got outputs {int(chosen.min())} to {int(chosen.max())}, want them below {m}")
        return self.codes * self.weight[chosen]

    def check(self) -> float:
        """Compute the largest error of contributions + bias against the model's outputs, relative to the largest output."""
        made = self.contributions().sum(1) + self.bias
        scale = self._run.outputs.abs().max()
        return float((made - self._run.outputs).abs().max() / torch.where(scale > 0, scale, 1))

    def rotate(self, to: str | Tensor) -> HeadReading:
        """Return the reading in other coordinates, of the network's own; its outputs are the same.

        Args:
            to: "variance": principal components of the codes. "classes": the columns of A are orthogonal, the largest first, and
                latents without influence on the outputs are last. "varimax": each latent has large weights to few classes. Or an
                orthogonal matrix R (k, k).

        Returns:
            A new reading; the model does not change before `apply_`.

        Raises:
            ValueError: Another name, or a matrix that is not orthogonal.

        Source: Kaiser, Psychometrika 23 (1958), for varimax.
        """
        k = self.codes.shape[1]
        if isinstance(to, Tensor):
            rotation, name = to.double(), "given"
            if rotation.shape != (k, k) or not torch.allclose(
                rotation.mT @ rotation, torch.eye(k, dtype=torch.float64), atol=1e-5
            ):
                raise ValueError(f"to: got a matrix of shape {tuple(to.shape)}, want an orthogonal one ({k}, {k})")
        elif to in _ROTATIONS:
            rotation, name = _ROTATIONS[to](self._run.codes.cpu(), self._run.decoder.cpu()), to
        else:
            raise ValueError(f"to: got {to!r}, want one of {tuple(_ROTATIONS)}, or an orthogonal matrix")
        return HeadReading(self._pair, self._x, self.y, self.class_names, self._run, rotation, name)

    def apply_(self) -> HeadReading:
        """Write the coordinates into the model's two layers, whose function stays the same; return the reading of the result.

        Raises:
            ValueError: Parameters that are computed, sharded, or shared with another layer.
            RuntimeError: The model has changed since it was read.
        """
        if not all(map(torch.equal, self._pair.weights(), self._run[3:])):
            raise RuntimeError("apply_: the layers have changed since read_head; call it again")
        self._pair.rotate_(self.rotation)
        run = self._pair.run(self._x)
        return HeadReading(self._pair, self._x, self.y, self.class_names, run, None, self.coordinates)

    @cached_property
    def importance(self) -> Tensor:
        """Share of the outputs' change that each latent makes, (k,): its standard deviation times the norm of its weights."""
        sizes = self.codes.double().std(0, correction=0) * torch.linalg.vector_norm(self.weight.double(), dim=0)
        return sizes / sizes.sum().clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def explained_variance(self) -> float:
        """Share of the features' variance that a linear map of the codes can give back, at best, in [0, 1].

        It is that of the reconstruction codes W⁺, and the same in all coordinates; NaN for constant features.
        """
        features = self._run.features.double()
        features = features - features.mean(0)
        weight = self._run.encoder.double()
        missed = features - features @ weight @ torch.linalg.pinv(weight)
        return float(1 - missed.square().sum() / features.square().sum())

    def correlation(self) -> float:
        """Compute the mean absolute correlation between two latents, in [0, 1]; constant latents are left out."""
        codes = self.codes.double()
        codes = codes[:, codes.std(0) > 0]
        k = codes.shape[1]
        if k < 2:
            return 0.0
        found = torch.corrcoef(codes.mT).abs()
        return float((found.sum() - k) / (k * (k - 1)))

    def sparsity(self) -> float:
        """Compute the Gini coefficient of the mean absolute contributions (k, m): near 1 if few latents matter to few classes."""
        return gini(self.contributions().abs().double().mean(0))

    def kept_latents(self) -> KeptLatents:
        """Compute how well the most important latents predict alone, with the others at their means.

        Raises:
            ValueError: Fewer than two outputs.
        """
        if len(self.weight) < 2:
            raise ValueError("kept_latents: got one output, want the logits of two or more classes")
        order = self.importance.argsort(descending=True, stable=True)
        codes, weight = self.codes.double(), self.weight.double()
        mean = codes.mean(0)
        outputs = (mean @ weight.mT + self.bias.double()).expand(len(codes), -1).clone()
        predicted = [outputs.argmax(1)]
        for latent in order.tolist():
            outputs += (codes[:, latent] - mean[latent]).unsqueeze(1) * weight[:, latent]
            predicted.append(outputs.argmax(1))
        classes = torch.stack(predicted)
        agreement = (classes == self._run.outputs.argmax(1)).double().mean(1)
        return KeptLatents(order, agreement, None if self.y is None else (classes == self.y).double().mean(1))

    def input_maps(self, samples: slice | Tensor | Sequence[int] = slice(0, 8)) -> AffineMap:
        """Linearize the codes: the map from the input to each latent, at some samples.

        Args:
            samples: Which samples; by default the first eight.

        Returns:
            The maps (n, k, *input), as `linearize` returns them.

        Raises:
            UnsupportedOperation: An operation before the layer that has no affine map.
        """
        index = samples if isinstance(samples, slice | Tensor) else torch.as_tensor(samples)
        x = tuple(t[index] for t in self._x)
        return linearize(Encoder(self._pair, self.rotation.to(self.codes)), x if len(x) > 1 else x[0])

    def top_samples(self, latent: int, count: int = 9) -> TopSamples:
        """Return the samples with the largest and the smallest codes of a latent.

        Raises:
            ValueError: A latent that does not exist, or a count that is not between 1 and n.
        """
        n, k = self.codes.shape
        if not -k <= latent < k:
            raise ValueError(f"latent: got {latent}, want one of {k}")
        if not 1 <= count <= n:
            raise ValueError(f"count: got {count}, want between 1 and {n}")
        order = self.codes[:, latent].argsort(descending=True, stable=True)
        return TopSamples(order[:count], order.flip(0)[:count])

    def stability(self, other: HeadReading) -> Tensor:
        """Compute how well another reading has each latent: the largest absolute correlation with one of its latents.

        Args:
            other: A reading of a network that was trained from another seed, at the same samples; or of the same network at
                others, for coordinates that depend on the samples.

        Returns:
            (k,), in [0, 1]; 0 for a constant latent.

        Raises:
            ValueError: Readings of other networks at other samples.
        """
        same = len(self._x) == len(other._x) and all(map(torch.equal, self._x, other._x))
        if same:
            theirs = other.codes
        elif other._pair.model is self._pair.model and other._pair.name == self._pair.name:
            theirs = self._run.codes @ other.rotation.to(self.codes)
        else:
            raise ValueError(
                "other: got a reading of another network at other samples, want the same samples or network"
            )
        ours, theirs = (_standardized(codes) for codes in (self.codes, theirs))
        return (ours.mT @ theirs).abs().max(1).values.clamp_max(1)

    def summary(self) -> HeadTable:
        """Return the table of the latents, most important first."""
        kept = self.kept_latents()
        order = kept.latents
        spread = self.codes.double().var(0, correction=0)
        weights, silent = self.weight.mT[order], (self.importance[order] < _SILENT).tolist()
        supports, opposes = (
            tuple("-" if none else self.class_names[i] for i, none in zip(indices.tolist(), silent, strict=True))
            for indices in (weights.argmax(1), weights.argmin(1))
        )
        return HeadTable(
            order,
            (spread / spread.sum().clamp_min(torch.finfo(torch.float64).tiny))[order],
            self.importance[order],
            supports,
            opposes,
            kept.agreement[1:],
            None if kept.accuracy is None else kept.accuracy[1:],
            f"{self!r}; the codes explain {100 * self.explained_variance:.1f} % of the features' variance",
        )

    def to_pandas(self) -> Any:
        """Return `summary()` as a pandas.DataFrame."""
        return self.summary().to_pandas()

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the mean contribution of each latent to each class: `plots.head_contributions`."""
        from interp_nn.explain.plots import head_contributions

        return head_contributions(self, axes=axes)

    def __repr__(self) -> str:
        n, k = self.codes.shape
        return (
            f"HeadReading({n} samples, {k} latents -> {len(self.weight)} outputs, {self.coordinates} coordinates, "
            f"error {self.check():.0e})"
        )

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def _standardized(codes: Tensor) -> Tensor:
    """Return the centred codes (n, k) with columns of norm 1, or of zeros if they are constant."""
    centred = codes.double() - codes.double().mean(0)
    sizes = torch.linalg.vector_norm(centred, dim=0)
    floor = torch.finfo(codes.dtype).eps * torch.linalg.vector_norm(codes.double(), dim=0)
    return torch.where(sizes > floor, centred / torch.where(sizes > 0, sizes, 1), 0.0)
