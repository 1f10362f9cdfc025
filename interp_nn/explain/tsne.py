"""Parametric t-SNE: a network that places points on a plane so that neighbours stay neighbours.

The network also places new points. If it is piecewise affine, it is an exact affine map around each point.

Source: van der Maaten, "Learning a parametric embedding by preserving local structure" (AISTATS 2009).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp_nn.display import track
from interp_nn.explain.estimator import (
    Transformer,
    as_given,
    check_count,
    check_network,
    check_number,
    in_parameters_dtype,
)
from interp_nn.explain.linear.affine_map import AffineMap, linearize

_BRACKET = 40.0  # of the logarithm of the precision
_TABLE_POINTS = 4096  # so many points have their distances computed once for all epochs: 64 MiB in fp32
_STEPS, _SETTLED = 80, 1e-10
_SETTLED_IN_TRAINING = 1e-5  # of the logarithm of the perplexity, as in scikit-learn's TSNE; fp32 reaches it
_VIEWS = ("View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Alias")


def conditional_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """Compute p(j | i), the probability that point i picks point j as its neighbour, with a given perplexity.

    Each point has a Gaussian, whose width is found by Newton's method such that exp of the row's entropy is the perplexity. If
    more points than that are equally near, the row is uniform over them.

    Args:
        x: Points (n, ...), which are flattened.
        perplexity: Effective number of neighbours of each point.

    Returns:
        Tensor (n, n) fp64, with zeros on the diagonal.

    Raises:
        ValueError: A perplexity outside (1, n - 1).
    """
    if not 1 < perplexity < len(x) - 1:
        raise ValueError(
            f"perplexity: got {perplexity:g} for {len(x)} points, want more than 1 and less than {len(x) - 1}"
        )
    return _conditional(_squared_distances(x.flatten(1).double()), perplexity, None)[0]


def _conditional(
    squared: Tensor, perplexity: float, start: Tensor | None, tolerance: float = _SETTLED
) -> tuple[Tensor, Tensor]:
    """Return p(j | i), and the logarithms of the precisions (n, 1) in units of each row's mean, where another search may start.

    squared: the squared distances (n, n), which are overwritten. tolerance: of the logarithm of the perplexity.
    """
    n, excess = len(squared), squared
    excess -= excess.fill_diagonal_(torch.inf).amin(1, keepdim=True)
    excess.fill_diagonal_(0)  # the shift cancels in the ratio, and gives the nearest point weight 1
    excess /= (excess.sum(1, keepdim=True) / (n - 1)).clamp_min(torch.finfo(excess.dtype).tiny)
    others = 1 - torch.eye(n, dtype=excess.dtype, device=excess.device)
    goal, position = math.log(perplexity), start
    if position is None:  # the distance of the last of the neighbours that are asked for is about the width
        width = excess.kthvalue(min(n, 2 + int(perplexity)), 1, keepdim=True).values
        position = (1 / width.clamp_min(math.exp(-_BRACKET))).log()
    low, high = excess.new_full((n, 1), -_BRACKET), excess.new_full((n, 1), _BRACKET)
    nearest = ((excess == 0) & (others > 0)).sum(1, keepdim=True)
    position = torch.where(
        nearest > perplexity, high, position
    )  # no precision is too large for a row of equal distances
    for _ in range(_STEPS):
        # Newton's method for the entropy as a function of the logarithm of the precision. It bisects where it leaves the bracket.
        precision = position.exp()
        weights = torch.exp(-precision * excess).mul_(others)
        total = weights.sum(1, keepdim=True)
        weighted = weights * excess
        mean = weighted.sum(1, keepdim=True) / total
        error = total.log() + precision * mean - goal
        low, high = torch.where(error > 0, position, low), torch.where(error > 0, high, position)
        settled = (error.abs() < tolerance) | (high - low < tolerance) | (nearest > perplexity)
        if bool(settled.all()):
            break
        slope = precision.square() * ((weighted * excess).sum(1, keepdim=True) / total - mean.square())
        step = position + (error / slope.clamp_min(torch.finfo(slope.dtype).tiny)).clamp(-2, 2)
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        position = torch.where(settled, position, step)
    return weights / total, position


def joint_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """Compute P = (p(j | i) + p(i | j)) / 2n, (n, n) fp64, for points x (n, ...); P sums to 1."""
    return _symmetric(conditional_probabilities(x, perplexity))


def _symmetric(conditional: Tensor) -> Tensor:
    return (conditional + conditional.mT) / (2 * len(conditional))


def tsne_loss(embedding: Tensor, joint: Tensor, exaggeration: float = 1.0) -> Tensor:
    """Compute the divergence KL(P || Q), with similarities Q of a Student t with max(d - 1, 1) degrees of freedom.

    Args:
        embedding: Points (n, d).
        joint: P (n, n).
        exaggeration: Factor of the attraction between points; their repulsion does not change. The value is the divergence
            only at 1.

    Returns:
        Scalar in the embedding's dtype, or in fp32 for 16-bit dtypes.
    """
    embedding = embedding.to(_at_least_fp32(embedding.dtype))
    joint = joint.to(embedding.dtype)
    _, log_similarity = _log_similarity(embedding)
    itself = torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)
    log_total = log_similarity.masked_fill(itself, -torch.inf).flatten().logsumexp(0)
    return torch.xlogy(joint, joint).sum() - exaggeration * (joint * log_similarity).sum() + log_total


def _log_similarity(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n, n) squared distances over the degrees of freedom, and the logarithms of the unnormalised similarities."""
    freedom = max(embedding.shape[1] - 1, 1)
    distances = torch.cdist(embedding, embedding, compute_mode="donot_use_mm_for_euclid_dist")  # few columns: no pdist
    scaled = distances.square() / freedom
    return scaled, -(freedom + 1) / 2 * torch.log1p(scaled)


@torch.no_grad()
def _divergence_and_gradient(embedding: Tensor, joint: Tensor, exaggeration: float) -> tuple[Tensor, Tensor]:
    """Return KL(P || Q) and the gradient of `tsne_loss` by its closed form.

    embedding: (n, d), at least fp32. joint: (n, n), in the same dtype.
    """
    freedom = max(embedding.shape[1] - 1, 1)
    scaled, log_similarity = _log_similarity(embedding)
    divergence = torch.xlogy(joint, joint).sum() - (joint * log_similarity).sum()
    log_similarity.fill_diagonal_(-torch.inf)
    largest = log_similarity.max()
    q = torch.exp(log_similarity - largest)
    total = q.sum()
    forces = (exaggeration * joint - q / total) / (1 + scaled)
    # From differences, because products lose precision for near neighbours.
    pulls = [(forces * (axis.unsqueeze(1) - axis)).sum(1) for axis in embedding.unbind(1)]
    return divergence + largest + total.log(), (2 + 2 / freedom) * torch.stack(pulls, 1)


class ParametricTSNE(Transformer):
    """Train a network that embeds points of any shape, on the t-SNE divergence, by Adam on mini-batches.

    Each epoch splits the points at random into batches of nearly equal size, so that no batch is too small for the
    perplexity. `fit` does not change PyTorch's own random state, and equal seeds give equal networks.

    Args:
        encoder: Network from (n, ...) to (n, d) with a linear last layer. `fit` trains a copy of it; parameters that require no
            gradient stay. None is a network from random weights: flattened points, layers of 256, 256 and 1024 ReLU units and a
            linear layer to the plane, in the points' dtype. The paper's network has layers of 500, 500 and 2000 units, which
            restricted Boltzmann machines pre-train.
        perplexity: Effective number of neighbours of each point within a mini-batch.
        batch_size: Largest number of points in a mini-batch.
        epochs: Number of passes over the points.
        learning_rate: Adam's learning rate.
        early_exaggeration: Factor of the attraction in the first epochs, so that clusters can pass each other.
        exaggeration_epochs: Number of these epochs.
        seed: Seed of the initial weights, the batches and dropout.
        progress: Show a progress bar. None shows one in a terminal or a notebook, where tqdm is installed.

    Attributes:
        encoder_: The trained copy of the encoder, in evaluation mode.
        kl_: Mean divergence of the batches in each epoch.
        n_features_in_: Number of entries of a point.
        feature_names_in_: Names of the columns, where `fit` got a data frame. Other frames must have the same ones in this order.

    Example:
        >>> x = torch.cat([torch.zeros(8, 3), torch.ones(8, 3)]) + 0.01 * torch.arange(16).unsqueeze(1)
        >>> tsne = ParametricTSNE(nn.Linear(3, 2), perplexity=4, epochs=2).fit(x)
        >>> tsne.transform(x).shape, len(tsne.kl_)
        (torch.Size([16, 2]), 2)

    Source: van der Maaten, "Learning a parametric embedding by preserving local structure" (AISTATS 2009).
    """

    encoder_: nn.Module
    kl_: list[float]
    _fitted = "encoder_"

    def __init__(
        self,
        encoder: nn.Module | None = None,
        *,
        perplexity: float = 30.0,
        batch_size: int = 500,
        epochs: int = 100,
        learning_rate: float = 3e-3,
        early_exaggeration: float = 4.0,
        exaggeration_epochs: int = 20,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        self.encoder, self.perplexity, self.batch_size, self.epochs = encoder, perplexity, batch_size, epochs
        self.learning_rate, self.seed, self.progress = learning_rate, seed, progress
        self.early_exaggeration, self.exaggeration_epochs = early_exaggeration, exaggeration_epochs

    def fit(self, x: object, y: object = None) -> ParametricTSNE:
        """Train a copy of the encoder on points, in its own dtype and on its own device, also under `torch.no_grad`.

        Args:
            x: Points (n, ...): a tensor, an array or a data frame of numbers.
            y: Ignored; scikit-learn passes it.

        Returns:
            self.

        Raises:
            TypeError: An encoder that is not an nn.Module, another parameter of another type, sparse points, or points that are
                no numbers.
            ValueError: A number of the constructor out of range. Points that are not finite or too few for the perplexity. An
                encoder without parameters to train, with an output other than (n, d), or with a final ReLU (which limits the
                embedding to one quadrant).
            FloatingPointError: The divergence is no longer finite.
        """
        self._check_parameters()
        with torch.inference_mode(False), torch.enable_grad():
            points = self._validated(x, reset=True)
            points = points.clone() if points.is_inference() else points
            template = self.encoder
            if template is None:
                points = points if points.is_floating_point() else points.to(torch.get_default_dtype())
            batches = -(-len(points) // self.batch_size)
            smallest = len(points) // batches
            if not 1 < self.perplexity < smallest - 1:
                raise ValueError(
                    f"perplexity: got {self.perplexity:g} for batches of {smallest} points (x has n_samples={len(points)}, "
                    f"batch_size is {self.batch_size}), want more than 1 and less than {smallest - 1}"
                )
            device = points.device if template is None else _trained(template)[0].device
            with _own_random_numbers(self.seed, device):
                encoder = _default_encoder(points) if template is None else copy.deepcopy(template)
                _check_encoder(encoder, points)
                self.kl_ = self._train(encoder, points, batches)
        self.encoder_ = encoder.eval()
        return self

    @torch.no_grad()
    def transform(self, x: Any) -> Any:
        """Embed points, new or not.

        Args:
            x: Points (n, ...): a tensor, an array or a data frame of numbers.

        Returns:
            Embedding (n, d) in the encoder's dtype: a tensor on its device for a tensor, else a numpy array.

        Raises:
            NotFittedError: Before `fit`.
            TypeError: Sparse points, or points that are no numbers.
            ValueError: Points that are not finite, or of another number of features.
        """
        self._want_fitted()
        parts = self._validated(x, reset=False).split(self.batch_size)
        return as_given(torch.cat([self.encoder_(in_parameters_dtype(part, self.encoder_)) for part in parts]), x)

    def linearize(self, x: object) -> AffineMap:
        """Compute the encoder's affine map around each point: transform(x) = W x + c.

        For each point, W holds d images: they say how each entry of x moves the point along each axis. Two points in one
        region of a piecewise affine encoder differ by exactly W (x - x').

        Args:
            x: Points (n, ...): a tensor, an array or a data frame of numbers.

        Returns:
            W (n, d, ...) and b (n, d).

        Raises:
            NotFittedError: Before `fit`.
            TypeError: Sparse points, or points that are no numbers.
            ValueError: Points that are not finite, or of another number of features.
        """
        self._want_fitted()
        return linearize(self.encoder_, in_parameters_dtype(self._validated(x, reset=False), self.encoder_))

    def _check_parameters(self) -> None:
        if self.encoder is not None:
            check_network(self.encoder, "encoder")
        for name, least in (("batch_size", 4), ("epochs", 1), ("exaggeration_epochs", 0)):
            check_count(name, getattr(self, name), least)
        check_count("seed", self.seed)
        check_number("early_exaggeration", self.early_exaggeration, least=1)
        check_number("learning_rate", self.learning_rate)
        check_number("perplexity", self.perplexity, above=1)

    def _train(self, encoder: nn.Module, x: Tensor, batches: int) -> list[float]:
        trained = _trained(encoder)
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate, fused=trained[0].device.type == "cpu")
        encoder.train()
        device, dtype = trained[0].device, _at_least_fp32(trained[0].dtype)
        table = None  # of all squared distances
        if len(x) <= _TABLE_POINTS:
            table = _squared_distances(in_parameters_dtype(x, encoder).flatten(1).double()).to(dtype)
        divergences: list[float] = []
        precisions: Tensor | None = None  # the last epoch's precision of each point, from which the search starts
        for epoch in track(range(self.epochs), "t-SNE", self.progress, "epoch"):
            exaggeration = self.early_exaggeration if epoch < self.exaggeration_epochs else 1.0
            total, fresh = (
                torch.zeros((), dtype=dtype, device=device),
                torch.zeros(len(x), 1, dtype=dtype, device=device),
            )
            for index in torch.randperm(len(x)).tensor_split(batches):
                points = in_parameters_dtype(x[index.to(x.device)], encoder)
                embedding = encoder(points)
                index = index.to(device)
                with torch.no_grad():
                    if table is None:
                        squared = _squared_distances(points.flatten(1).to(dtype))
                    else:
                        squared = table.index_select(0, index).index_select(1, index)
                    start = None if precisions is None else precisions[index]
                    conditional, fresh[index] = _conditional(squared, self.perplexity, start, _SETTLED_IN_TRAINING)
                    divergence, gradient = _divergence_and_gradient(
                        embedding.to(dtype), _symmetric(conditional), exaggeration
                    )
                optimizer.zero_grad()
                embedding.backward(gradient.to(embedding.dtype))
                optimizer.step()
                total += divergence
            divergences.append(float(total) / batches)
            if not math.isfinite(divergences[-1]):
                raise FloatingPointError(
                    f"epoch {epoch}: the divergence is {divergences[-1]}; try a smaller learning_rate"
                )
            precisions = fresh
        return divergences


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _squared_distances(x: Tensor) -> Tensor:
    """Compute squared distances (n, n) from differences, because products lose precision for near neighbours.

    On a CPU a twentieth of the time of `torch.cdist` for 784 columns.
    """
    above = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu_(1)
    squared = x.new_zeros(len(x), len(x)).masked_scatter(above, torch.pdist(x).square())
    return squared + squared.mT


def _default_encoder(x: Tensor) -> nn.Module:
    sizes = (x[0].numel(), 256, 256, 1024, 2)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, device=x.device, dtype=x.dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _trained(encoder: nn.Module) -> list[nn.Parameter]:
    """Return the parameters to train. Raises ValueError if there are none."""
    parameters = list(encoder.parameters())
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        problem = "requires no gradient in any of its parameters" if parameters else "has no parameters"
        raise ValueError(f"encoder: {problem}, want a network to train")
    return trained


def _check_encoder(encoder: nn.Module, x: Tensor) -> None:
    points = in_parameters_dtype(x[:2], encoder)
    out = encoder.eval()(points)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(points):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"encoder: returned {got} for {len(points)} points, want ({len(points)}, d)")
    last = out.grad_fn
    while last is not None and last.name().startswith(_VIEWS):
        last = last.next_functions[0][0]
    if last is not None and last.name().startswith("Relu"):
        raise ValueError(
            "encoder: ends in a ReLU, which limits the embedding to one quadrant; want a linear last layer"
        )


@contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators for initial weights, shuffles and dropout, and restore their state at the end."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed accelerators
            yield
    else:
        module = torch.get_device_module(device)
        with torch.random.fork_rng([device], device_type=device.type), module.device(device):
            torch.default_generator.manual_seed(seed)
            module.manual_seed(seed)
            yield
