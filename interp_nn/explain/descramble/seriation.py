"""The order of features that minimises |D Pi H|² over permutations Pi, so that neighbours are alike.

For first differences it is the shortest path through the features (seriation). For any other D it is a quadratic assignment.
Small problems are solved exactly. Larger ones start from the order of the Fiedler vector (Atkins, Boman & Hendrickson 1998) and
are improved until no exchange lowers the loss. A lower bound limits the distance of the result from the optimum.
"""

from __future__ import annotations

from itertools import count, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.display import track
from interp_nn.explain.descramble.brockett import OperatorLike, operator_on
from interp_nn.explain.descramble.derivatives import DerivativeOperator
from interp_nn.explain.estimator import all_finite, to_tensor

_MAX_BY_PATHS, _MAX_BY_TRIAL = 15, 9  # the largest numbers of features that are solved exactly
_CHUNK_ORDERS = 1 << 16  # orders that are tried at a time
_STEEPNESS = 4.0
_MIN_GAIN = (
    1e-12  # the gain an exchange must have, relative to the loss: a smaller one may be rounding and repeat forever
)


class Seriation(NamedTuple):
    """An order of features, the result of `seriate`.

    Attributes:
        order: The feature at each place, (n,) int64, so that x[:, order] is smooth.
        loss: |D x[:, order]ᵀ|².
        lower_bound: A bound that no order is below, from orthogonal matrices in place of permutations.
        exact: True if no order has a lower loss.

    Example:
        >>> found = seriate(torch.tensor([[0.0, 5.0, 1.0]]))
        >>> found.order.tolist(), found.loss, found.exact
        ([0, 2, 1], 17.0, True)
    """

    order: Tensor
    loss: float
    lower_bound: float
    exact: bool


def seriate(
    x: object, operator: OperatorLike = "diff1", *, features_first: bool = False, progress: bool | None = None
) -> Seriation:
    """Find the order of features that minimises |D x[:, order]ᵀ|², in float64.

    With "diff1" and "diff1_periodic" the result is exact for up to 15 features, in O(2ⁿ n²) (Held & Karp 1962). With other
    operators it is exact for up to 9 features, by trying all n! orders. Beyond, it is a local minimum, in O(n²) memory.

    Args:
        x: Samples (samples, n) of n features, real, finite: a tensor, an array or a data frame of numbers.
        operator: D, as in `Descrambler`.
        features_first: x is (n, samples).
        progress: Show a progress bar. None shows one in a terminal or a notebook, where tqdm is installed.

    Returns:
        `Seriation` with the order on x's device.

    Raises:
        TypeError: Sparse data, data that are no numbers, or an operator of another kind.
        ValueError: Complex data, another shape, values that are not finite, or an operator that is not known.

    Example:
        >>> seriate(torch.tensor([[3.0, 1.0, 4.0, 2.0]])).order
        tensor([1, 3, 0, 2])

    Source: Held & Karp (1962); Atkins, Boman & Hendrickson (1998); Croes (1958); Taillard (1991).
    """
    features = as_features(x, features_first)
    samples = linalg.GramAccumulator(len(features), features.device)
    samples.update(features)
    return seriate_gram(samples.gram(), operator_on(operator, len(features)), progress)


def seriate_gram(gram: Tensor, operator: DerivativeOperator, progress: bool | None = False) -> Seriation:
    """Find the order as `seriate` does, from the Gram matrix H Hᵀ (n, n) of the features."""
    n, device = len(gram), gram.device
    gram = gram.cpu()
    bound = _lower_bound(gram, operator)
    distance = (gram.diagonal().unsqueeze(1) + gram.diagonal() - 2 * gram).clamp_min(0).fill_diagonal_(0)
    if operator.kind in ("diff1", "diff1_periodic"):
        closed, exact = operator.kind == "diff1_periodic", n <= _MAX_BY_PATHS
        order = (
            _shortest(distance, closed)
            if exact
            else _reversed_while_shorter(distance, fiedler(distance), closed, progress)
        )
        order = _named(order, closed)
        loss = _length(distance, order, closed)
    else:
        penalty, exact = linalg.gram(operator.matrix()), n <= _MAX_BY_TRIAL
        order = (
            _best_of_all(penalty, gram)
            if exact
            else _exchanged_while_cheaper(penalty, gram, fiedler(distance), progress)
        )
        loss = float((penalty * gram[order][:, order]).sum())
    return Seriation(order.to(device), loss, min(bound, loss), exact)


def fiedler(distance: Tensor) -> Tensor:
    """Sort the features by the Fiedler vector: the smoothest vector, apart from constants, on the graph of their similarity.

    distance: squared distances, (n, n). The similarity is a Gaussian of the distance, exp(-4) at the mean squared distance.
    """
    similarity = (-_STEEPNESS * distance / distance.mean().clamp_min(torch.finfo(distance.dtype).tiny)).exp()
    laplacian = torch.diag(similarity.sum(0)) - similarity  # the diagonal of the similarity cancels
    return linalg.eigh(laplacian).vectors[:, min(1, len(distance) - 1)].argsort(stable=True)


def as_features(x: object, features_first: bool) -> Tensor:
    """Return samples (samples, features) as features (features, samples), floating-point; raise TypeError or ValueError."""
    values = to_tensor(x, "x")
    if values.dim() != 2 or not values.numel():
        want = "(features, samples)" if features_first else "(samples, features)"
        raise ValueError(f"x: got shape {tuple(values.shape)}, want {want} with at least one of each")
    if not all_finite(values):
        raise ValueError("x: has entries that are not finite, want finite ones")
    values = values if values.is_floating_point() else values.double()
    return values if features_first else values.mT


def _lower_bound(gram: Tensor, operator: DerivativeOperator) -> float:
    """Return the smallest loss of orthogonal matrices.

    If D maps constants to zero, only orthogonal matrices that keep constants count, as permutations do. This bound is tighter
    (Hadley, Rendl & Wolkowicz 1992).
    """
    costs, ones = operator.eigenvalues, gram.new_ones(len(gram), 1)
    if float(operator.apply(ones).abs().sum()) <= 1e-9 * float(costs[-1].sqrt()):
        centre = torch.eye(len(gram), dtype=gram.dtype) - 1 / len(gram)
        gram, costs = centre @ gram @ centre, costs[1:]
    values = linalg.eigh(gram).values.flip(0)[: len(costs)].clamp_min(0)
    return float(costs @ values)


def _length(distance: Tensor, order: Tensor, closed: bool) -> float:
    after = order.roll(-1) if closed else order[1:]
    return float(distance[order[: len(after)], after].sum())


def _named(order: Tensor, closed: bool) -> Tensor:
    """Choose one of the equal orders: a path from its smaller end, a cycle from 0 towards its smaller neighbour."""
    if closed:
        order = order.roll(-int(order.argmin()))
    backwards = order[1 % len(order)] > order[-1] if closed else order[0] > order[-1]
    return order if not backwards else order.flip(0).roll(1) if closed else order.flip(0)


def _shortest(distance: Tensor, closed: bool) -> Tensor:
    """Find the shortest path (or cycle) through all points, by dynamic programming over sets of points."""
    n = len(distance)
    sets = torch.arange(1 << n)
    members = (sets.unsqueeze(1) >> torch.arange(n)) & 1
    # cost[s, j] is the length of the shortest path through the points of s that ends in j. A cycle begins at point 0.
    cost = torch.full((1 << n, n), torch.inf, dtype=distance.dtype)
    start = torch.arange(1 if closed else n)
    cost[1 << start, start] = 0
    sizes = members.sum(1)
    for size in range(2, n + 1):
        chosen = sets[sizes == size]
        before = chosen.unsqueeze(1) ^ (1 << torch.arange(n))  # the set without j; with j, where it was not in the set
        inside = members[chosen].bool()
        reached = (cost[before.where(inside, 0)] + distance.mT).amin(2)
        cost[chosen] = reached.where(inside, torch.inf).minimum(cost[chosen])
    whole = (1 << n) - 1
    order = [int((cost[whole] + (distance[:, 0] if closed else 0)).argmin())]
    while len(order) < n:
        whole ^= 1 << order[-1]
        order.append(int((cost[whole] + distance[:, order[-1]]).argmin()))
    return torch.tensor(order)


def _reversed_while_shorter(distance: Tensor, order: Tensor, closed: bool, progress: bool | None = False) -> Tensor:
    """Reverse parts of the path while that shortens it: 2-opt (Croes 1958)."""
    n = len(distance)
    if not closed:  # a path is a cycle through one more point, at distance 0 from all others
        padded = distance.new_zeros(n + 1, n + 1)
        padded[:n, :n] = distance
        distance, order = padded, torch.cat((order, torch.tensor([n])))
    least = _MIN_GAIN * float(distance.max())
    for _ in track(count(), "seriation", progress, "pass"):
        improved = False
        for i in range(len(order) - 1):
            # A reversal replaces the steps at places i and j > i by a step between their starts and one between their ends.
            starts, ends = order[i:], order.roll(-1)[i:]
            change = distance[starts[0], starts] + distance[ends[0], ends]
            change -= distance[starts[0], ends[0]] + distance[starts, ends]
            j = int(change[1:].argmin()) + 1
            if float(change[j]) < -least:
                order[i + 1 : i + j + 1] = order[i + 1 : i + j + 1].flip(0)
                improved = True
        if not improved:
            break
    return order if closed else order.roll(-1 - int((order == n).nonzero()))[:-1]


def _best_of_all(penalty: Tensor, gram: Tensor) -> Tensor:
    best, least = torch.arange(len(gram)), torch.inf
    for part in torch.tensor(list(permutations(range(len(gram))))).split(_CHUNK_ORDERS):
        losses = (penalty * gram[part.unsqueeze(2), part.unsqueeze(1)]).sum((1, 2))
        if float(losses.min()) < least:
            best, least = part[losses.argmin()], float(losses.min())
    return best


def _exchanged_while_cheaper(penalty: Tensor, gram: Tensor, order: Tensor, progress: bool | None = False) -> Tensor:
    """Exchange pairs of features while that lowers the loss.

    One matrix product gives the change of the loss for all partners of a feature, in O(n²) (Taillard 1991).
    """
    g, cost = gram[order][:, order], penalty.diagonal()
    least = _MIN_GAIN * float((penalty.abs() * g.abs()).sum())
    for _ in track(count(), "seriation", progress, "pass"):
        improved = False
        for i in range(len(order)):
            own, size = (penalty * g).sum(1), g.diagonal()
            # 2 sum over all k of (penalty_ki - penalty_kj)(g_kj - g_ki), then minus the terms of k = i and k = j.
            change = 2 * (penalty[i] @ g + penalty @ g[i] - own[i] - own)
            change -= 2 * ((cost[i] - penalty[i]) * (g[i] - size[i]) + (penalty[i] - cost) * (size - g[i]))
            change += (cost[i] - cost) * (size - size[i])
            j = int(change.argmin())
            if float(change[j]) < -least:
                pair, swapped = [i, j], [j, i]
                order[pair], g[pair] = order[swapped], g[swapped]
                g[:, pair] = g[:, swapped]
                improved = True
        if not improved:
            break
    return order
