"""Parametric t-SNE: a network that places points on a plane so that neighbours stay neighbours, and its linear form.

van der Maaten, "Learning a parametric embedding by preserving local structure" (AISTATS 2009). Unlike an embedding of fixed
points, the encoder places new ones; and where it is piecewise affine, it is one exact affine map around each of them.
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

_HALVINGS = 44  # of a bracket of e^80 in the bandwidth: to 5e-12 of it
_VIEWS = ("View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Transpose", "Permute", "Alias")


def conditional_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """How likely point i would pick point j as its neighbour, p(j | i), with the perplexity given in every row.

    x: (n, ...), each point taken as one long row. The result is (n, n) fp64 with zeros on the diagonal: a Gaussian around each
    point, whose width is found by bisection so that exp of the row's entropy is the perplexity. Where more points than that
    are equally near, a row is uniform over them. Raises ValueError unless 1 < perplexity < n - 1.
    """
    n = len(x)
    if not 1 < perplexity < n - 1:
        raise ValueError(f"perplexity: got {perplexity:g} for {n} points, want more than 1 and less than {n - 1}")
    squared = _squared_distances(x.flatten(1).double())
    nearest = squared.fill_diagonal_(torch.inf).amin(1, keepdim=True)
    excess = (squared - nearest).fill_diagonal_(0)  # a shift of a row changes nothing, and gives the nearest weight 1
    excess /= (excess.sum(1, keepdim=True) / (n - 1)).clamp_min(torch.finfo(excess.dtype).tiny)
    low, high = excess.new_full((n, 1), -40), excess.new_full((n, 1), 40)
    weights = total = excess
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        precision = middle.exp()
        weights = (-precision * excess).exp().fill_diagonal_(0)
        total = weights.sum(1, keepdim=True)
        entropy = total.log() + precision * (weights * excess).sum(1, keepdim=True) / total
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return weights / total


def joint_probabilities(x: Tensor, perplexity: float) -> Tensor:
    """P (n, n) fp64: (p(j | i) + p(i | j)) / 2n, symmetric, zero on the diagonal, summing to 1."""
    conditional = conditional_probabilities(x, perplexity)
    return (conditional + conditional.mT) / (2 * len(conditional))


def tsne_loss(embedding: Tensor, joint: Tensor, exaggeration: float = 1.0) -> Tensor:
    """KL(P || Q), a scalar, for points (n, d) whose similarities Q are a Student t's, and P (n, n) `joint`: in the
    embedding's dtype, or in fp32 where that has 16 bits.

    Q has max(d - 1, 1) degrees of freedom (section 3 of the paper: the volume of the space grows with d). `exaggeration`
    multiplies the attraction between points and leaves their repulsion, as P scaled in the gradient alone does; the value is
    the divergence only at 1.
    """
    embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
    joint = joint.to(embedding.dtype)
    freedom = max(embedding.shape[1] - 1, 1)
    log_similarity = -(freedom + 1) / 2 * torch.log1p(_squared_distances(embedding) / freedom)
    itself = torch.eye(len(embedding), dtype=torch.bool, device=embedding.device)
    log_total = log_similarity.masked_fill(itself, -torch.inf).flatten().logsumexp(0)
    return torch.xlogy(joint, joint).sum() - exaggeration * (joint * log_similarity).sum() + log_total


class ParametricTSNE:
    """A network that embeds points of any shape into the plane, trained on the t-SNE divergence by mini-batches of Adam.

    encoder: a network from (n, ...) to (n, d) whose last layer is linear. It is a template: `fit` trains a copy of it. None is
    the paper's: the points as rows, 500, 500 and 2000 ReLU units, and a linear layer to the plane; trained from a random start
    where the paper stacks restricted Boltzmann machines, with the data's dtype and device.
    perplexity: how many neighbours a point has, as in `conditional_probabilities`, within a mini-batch.
    batch_size: the points whose P is formed together. Each epoch deals all points into batches anew, of sizes that differ by
    at most one and do not exceed it: fewer points would starve the last batch of neighbours.
    early_exaggeration: how many times attraction counts in the first `exaggeration_epochs`, so that clusters can pass.
    seed: of everything random in `fit`; PyTorch's own generators are left as they were, and equal seeds give equal networks.
    progress: show a progress bar (needs tqdm).

    After `fit`: `encoder`, the trained copy in evaluation mode; `kl_`, the mean divergence of the batches of each epoch.
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
        """Raises TypeError for an encoder that is no module, ValueError for a number out of its range."""
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
        """The trained network. Raises RuntimeError before `fit`."""
        if self._encoder is None:
            raise RuntimeError("ParametricTSNE: not fitted yet; call fit(X) first")
        return self._encoder

    def fit(self, X: Tensor) -> ParametricTSNE:
        """Train on points X (n, ...), of a floating dtype.

        The encoder's own dtype and device are those of the training. Raises TypeError for X of another kind; ValueError for X
        that is not finite, for fewer points than the perplexity needs in a batch, and for an encoder without parameters, whose
        output is not (n, d), or whose last operation is a ReLU, which would fold the embedding into one quadrant.
        """
        _check_points(X)
        X = X.detach()
        batches = -(-len(X) // self.batch_size)
        smallest = len(X) // batches
        if not 1 < self.perplexity < smallest - 1:
            raise ValueError(
                f"perplexity: got {self.perplexity:g} for batches of {smallest} points (X has {len(X)}, batch_size is "
                f"{self.batch_size}), want more than 1 and less than {smallest - 1}"
            )
        device = X.device if self._template is None else _parameter(self._template).device
        with _own_random_numbers(self.seed, device):
            encoder = _default_encoder(X) if self._template is None else copy.deepcopy(self._template)
            _check_encoder(encoder, X)
            self.kl_ = self._train(encoder, X, batches)
        self._encoder = encoder.eval()
        return self

    @torch.no_grad()
    def transform(self, X: Tensor) -> Tensor:
        """Where the encoder places points X (n, ...), new or not: (n, d), in the encoder's dtype and on its device.

        Raises RuntimeError before `fit`; TypeError and ValueError as there.
        """
        encoder = self.encoder
        _check_points(X)
        return torch.cat([encoder(_to(part, encoder)) for part in X.split(self.batch_size)])

    def fit_transform(self, X: Tensor) -> Tensor:
        """`fit`, then `transform` of the same points."""
        return self.fit(X).transform(X)

    def linearize(self, X: Tensor) -> AffineMap:
        """The encoder around each point of X (n, ...): W (n, d, ...) and b (n, d) with transform(X) = W X + b.

        W holds d images a point, which say how each entry of X moves the point along each axis; two points in one region of a
        piecewise affine encoder differ by exactly W (x - x'). Raises RuntimeError before `fit`.
        """
        encoder = self.encoder
        _check_points(X)
        return linearize(encoder, _to(X, encoder))

    def _train(self, encoder: nn.Module, X: Tensor, batches: int) -> list[float]:
        optimizer = torch.optim.Adam(encoder.parameters(), lr=self.learning_rate)
        encoder.train()
        divergences = []
        for epoch in self._epochs():
            exaggeration = self.early_exaggeration if epoch < self.exaggeration_epochs else 1.0
            total = 0.0
            for index in torch.randperm(len(X)).tensor_split(batches):
                points = _to(X[index.to(X.device)], encoder)
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
    """(n, n) from differences: the expansion into products would lose the distances of near neighbours."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def _default_encoder(X: Tensor) -> nn.Module:
    sizes = (X[0].numel(), 500, 500, 2000, 2)
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, device=X.device, dtype=X.dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _parameter(encoder: nn.Module) -> nn.Parameter:
    """One that says the encoder's dtype and device."""
    parameter = next(encoder.parameters(), None)
    if parameter is None:
        raise ValueError("encoder: has no parameters to train")
    return parameter


def _to(points: Tensor, encoder: nn.Module) -> Tensor:
    parameter = _parameter(encoder)
    return points.to(parameter.device, parameter.dtype)


def _check_points(X: Any) -> None:
    if not isinstance(X, Tensor):
        raise TypeError(f"X: got {type(X).__name__}, want a torch.Tensor (arrays: torch.from_numpy)")
    if not X.is_floating_point():
        raise TypeError(f"X: got {X.dtype}, want a floating dtype")
    if X.dim() < 2:
        raise ValueError(f"X: got shape {tuple(X.shape)}, want (n, ...) with at least two dimensions")
    if not len(X):
        raise ValueError("X: got no points")
    if not bool(X.isfinite().all()):
        raise ValueError("X: has entries that are not finite")


def _check_encoder(encoder: nn.Module, X: Tensor) -> None:
    points = _to(X[:2], encoder)
    out = encoder.eval()(points)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(points):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"encoder: gave {got} for {len(points)} points, want ({len(points)}, d)")
    last = out.grad_fn
    while last is not None and last.name().startswith(_VIEWS):
        last = last.next_functions[0][0]
    if last is not None and last.name().startswith("Relu"):
        raise ValueError(
            "encoder: ends in a ReLU, which folds the embedding into one quadrant; end it in a linear layer"
        )


@contextmanager
def _own_random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """Seeded generators, for initial weights, shuffles and dropout alike; the global ones come back as they were."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach accelerators too
            yield
    else:
        module = torch.get_device_module(device)
        with torch.random.fork_rng([device], device_type=device.type), module.device(device):
            torch.default_generator.manual_seed(seed)
            module.manual_seed(seed)
            yield
