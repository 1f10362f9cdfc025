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

from interp_nn.explain.linear.affine_map import AffineMap, linearize

_BISECTIONS = 44  # of a bracket of e^80 for the precision: to a relative 5e-12
_VIEWS = ("View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Alias")


def conditional_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """Compute p(j | i), the probability that point i picks point j as its neighbour, with a given perplexity.

    Each point has a Gaussian, whose width is found by bisection such that exp of the row's entropy is the perplexity. If more
    points than that are equally near, the row is uniform over them.

    Args:
        x: Points (n, ...), which are flattened.
        perplexity: Effective number of neighbours of each point.

    Returns:
        Tensor (n, n) fp64, with zeros on the diagonal.

    Raises:
        ValueError: A perplexity outside (1, n - 1).
    """
    n = len(x)
    if not 1 < perplexity < n - 1:
        raise ValueError(f"perplexity: got {perplexity:g} for {n} points, want more than 1 and less than {n - 1}")
    squared = _squared_distances(x.flatten(1).double())
    nearest = squared.fill_diagonal_(torch.inf).amin(1, keepdim=True)
    excess = (squared - nearest).fill_diagonal_(
        0
    )  # this shift cancels in the ratio, and gives the nearest point weight 1
    excess /= (excess.sum(1, keepdim=True) / (n - 1)).clamp_min(torch.finfo(excess.dtype).tiny)
    low, high = excess.new_full((n, 1), -40), excess.new_full((n, 1), 40)
    weights = total = excess
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        precision = middle.exp()
        weights = (-precision * excess).exp().fill_diagonal_(0)
        total = weights.sum(1, keepdim=True)
        entropy = total.log() + precision * (weights * excess).sum(1, keepdim=True) / total
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return weights / total


def joint_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """Compute P = (p(j | i) + p(i | j)) / 2n, (n, n) fp64, for points x (n, ...); P sums to 1."""
    conditional = conditional_probabilities(x, perplexity)
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
    embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    joint = joint.to(embedding.dtype)
    freedom = max(embedding.shape[1] - 1, 1)
    log_similarity = -(freedom + 1) / 2 * torch.log1p(_squared_distances(embedding) / freedom)
    itself = torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)
    log_total = log_similarity.masked_fill(itself, -torch.inf).flatten().logsumexp(0)
    return torch.xlogy(joint, joint).sum() - exaggeration * (joint * log_similarity).sum() + log_total


class ParametricTSNE:
    """Train a network that embeds points of any shape, on the t-SNE divergence, by Adam on mini-batches.

    Each epoch splits the points at random into batches of nearly equal size, so that no batch is too small for the
    perplexity. `fit` does not change PyTorch's own random state, and equal seeds give equal networks.

    Args:
        encoder: Network from (n, ...) to (n, d) with a linear last layer. `fit` trains a copy of it. None is the paper's
            network: flattened points, layers of 500, 500 and 2000 ReLU units and a linear layer to the plane. It starts from
            random weights; the paper pre-trains it with restricted Boltzmann machines.
        perplexity: Effective number of neighbours of each point within a mini-batch.
        batch_size: Largest number of points in a mini-batch.
        epochs: Number of passes over the points.
        learning_rate: Adam's learning rate.
        early_exaggeration: Factor of the attraction in the first epochs, so that clusters can pass each other.
        exaggeration_epochs: Number of these epochs.
        seed: Seed of the initial weights, the batches and dropout.
        progress: Show a progress bar (needs tqdm).

    Attributes:
        kl_: Mean divergence of the batches in each epoch.

    Raises:
        TypeError: An encoder that is not an nn.Module.
        ValueError: A number out of range.

    Example:
        >>> x = torch.cat([torch.zeros(8, 3), torch.ones(8, 3)]) + 0.01 * torch.arange(16).unsqueeze(1)
        >>> tsne = ParametricTSNE(nn.Linear(3, 2), perplexity=4, epochs=2).fit(x)
        >>> tsne.transform(x).shape, len(tsne.kl_)
        (torch.Size([16, 2]), 2)

    Source: van der Maaten, "Learning a parametric embedding by preserving local structure" (AISTATS 2009).
    """

    def __init__(
        self,
        encoder: nn.Module | None = None,
        *,
        perplexity: float = 30.0,
        batch_size: int = 500,
        epochs: int = 100,
        learning_rate: float = 1e-3,
        early_exaggeration: float = 4.0,
        exaggeration_epochs: int = 20,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: got {type(encoder).__name__}, want an nn.Module or None")
        for name, value, least in (
            ("batch_size", batch_size, 4),
            ("epochs", epochs, 1),
            ("early_exaggeration", early_exaggeration, 1),
            ("exaggeration_epochs", exaggeration_epochs, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name}: got {value}, want at least {least}")
        if not learning_rate > 0:
            raise ValueError(f"learning_rate: got {learning_rate}, want more than 0")
        self._template = encoder
        self._encoder: nn.Module | None = None
        self.perplexity, self.batch_size, self.epochs = perplexity, batch_size, epochs
        self.learning_rate, self.seed, self.progress = learning_rate, seed, progress
        self.early_exaggeration, self.exaggeration_epochs = early_exaggeration, exaggeration_epochs
        self.kl_: list[float] = []

    @property
    def encoder(self) -> nn.Module:
        """The trained copy in evaluation mode. Raises RuntimeError before `fit`."""
        if self._encoder is None:
            raise RuntimeError("ParametricTSNE: not fitted yet; call fit(x) first")
        return self._encoder

    def fit(self, x: Tensor) -> ParametricTSNE:
        """Train a copy of the encoder on points, in its own dtype and on its own device.

        Args:
            x: Points (n, ...) of a floating-point dtype.

        Returns:
            self.

        Raises:
            TypeError: Points of another type.
            ValueError: Points that are not finite or too few for the perplexity, or an encoder without parameters, with an
                output other than (n, d), or with a final ReLU (which limits the embedding to one quadrant).
            FloatingPointError: The divergence is no longer finite.
        """
        _check_points(x)
        x = x.detach()
        batches = -(-len(x) // self.batch_size)
        smallest = len(x) // batches
        if not 1 < self.perplexity < smallest - 1:
            raise ValueError(
                f"perplexity: got {self.perplexity:g} for batches of {smallest} points (x has {len(x)}, batch_size is "
                f"{self.batch_size}), want more than 1 and less than {smallest - 1}"
            )
        device = x.device if self._template is None else _parameter(self._template).device
        with _own_random_numbers(self.seed, device):
            encoder = _default_encoder(x) if self._template is None else copy.deepcopy(self._template)
            _check_encoder(encoder, x)
            self.kl_ = self._train(encoder, x, batches)
        self._encoder = encoder.eval()
        return self

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """Embed points, new or not.

        Args:
            x: Points (n, ...) of a floating-point dtype.

        Returns:
            Tensor (n, d), in the encoder's dtype and on its device.

        Raises:
            RuntimeError: Before `fit`.
            TypeError: Points of another type.
            ValueError: Points that are not finite.
        """
        encoder = self.encoder
        _check_points(x)
        return torch.cat([encoder(_to(part, encoder)) for part in x.split(self.batch_size)])

    def fit_transform(self, x: Tensor) -> Tensor:
        """Fit, and return the embedding (n, d) of the same points x (n, ...)."""
        return self.fit(x).transform(x)

    def linearize(self, x: Tensor) -> AffineMap:
        """Compute the encoder's affine map around each point: transform(x) = W x + b.

        For each point, W holds d images: they say how each entry of x moves the point along each axis. Two points in one
        region of a piecewise affine encoder differ by exactly W (x - x').

        Args:
            x: Points (n, ...) of a floating-point dtype.

        Returns:
            W (n, d, ...) and b (n, d).

        Raises:
            RuntimeError: Before `fit`.
            TypeError: Points of another type.
            ValueError: Points that are not finite.
        """
        encoder = self.encoder
        _check_points(x)
        return linearize(encoder, _to(x, encoder))

    def _train(self, encoder: nn.Module, x: Tensor, batches: int) -> list[float]:
        optimizer = torch.optim.Adam(encoder.parameters(), lr=self.learning_rate)
        encoder.train()
        divergences = []
        for epoch in self._epochs():
            exaggeration = self.early_exaggeration if epoch < self.exaggeration_epochs else 1.0
            total = 0.0
            for index in torch.randperm(len(x)).tensor_split(batches):
                points = _to(x[index.to(x.device)], encoder)
                embedding = encoder(points)
                joint = joint_probabilities(points, self.perplexity)
                optimizer.zero_grad()
                loss = tsne_loss(embedding, joint, exaggeration)
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    divergence = loss if exaggeration == 1 else tsne_loss(embedding, joint)
                total += divergence.item()
            if not math.isfinite(total):
                raise FloatingPointError(f"epoch {epoch}: the divergence is {total}; try a smaller learning_rate")
            divergences.append(total / batches)
        return divergences

    def _epochs(self) -> Iterator[int]:
        if not self.progress:
            return iter(range(self.epochs))
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install interp_nn[explain]") from error
        return iter(tqdm(range(self.epochs), desc="t-SNE", unit="epoch"))


def _squared_distances(x: Tensor) -> Tensor:
    """Compute squared distances (n, n) from differences, because products lose precision for near neighbours."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def _default_encoder(x: Tensor) -> nn.Module:
    sizes = (x[0].numel(), 500, 500, 2000, 2)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, device=x.device, dtype=x.dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _parameter(encoder: nn.Module) -> nn.Parameter:
    """Return the encoder's first parameter, which has its dtype and device."""
    parameter = next(encoder.parameters(), None)
    if parameter is None:
        raise ValueError("encoder: has no parameters, want a network to train")
    return parameter


def _to(points: Tensor, encoder: nn.Module) -> Tensor:
    parameter = _parameter(encoder)
    return points.to(parameter.device, parameter.dtype)


def _check_points(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, want a torch.Tensor (arrays: torch.from_numpy)")
    if not x.is_floating_point():
        raise TypeError(f"x: got {x.dtype}, want a floating-point dtype")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want (n, ...) with at least two dimensions")
    if not len(x):
        raise ValueError("x: got no points, want at least one")
    if not bool(x.isfinite().all()):
        raise ValueError("x: has entries that are not finite, want finite points")


def _check_encoder(encoder: nn.Module, x: Tensor) -> None:
    points = _to(x[:2], encoder)
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
