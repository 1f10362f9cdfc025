"""The order of features in which neighbours are most alike: the least |D Pi H|² over permutations Pi.

With first differences it is the shortest path through the features (seriation), with any other D a quadratic assignment. Small
ones are solved exactly; larger ones from the order of the Fiedler vector (Atkins, Boman & Hendrickson 1998), improved until no
exchange helps, with a bound that says how far from the best the result can be.
"""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from interp_nn import linalg
from interp_nn.explain.descramble.brockett import Operator, operator_on
from interp_nn.explain.descramble.derivatives import DerivativeOperator

_MOST_BY_PATHS, _MOST_BY_TRIAL = 15, 9  # features
_TRIALS_AT_ONCE = 1 << 16
_STEEPNESS = 4.0
_MIN_GAIN = 1e-12  # of the loss, for an exchange: less may be rounding, and go round in circles


class Seriation(NamedTuple):
    """order: (n,) int64, the feature at each place, so that H[order] is smooth. loss: |D H[order]|². lower_bound: what no order
    can pass (of orthogonal matrices instead of permutations). exact: whether no order has a lower loss.
    """

    order: Tensor
    loss: float
    lower_bound: float
    exact: bool


def seriate(H: Tensor, operator: Operator = "diff1") -> Seriation:
    """The order of the features H (n, N) with the least |D H[order]|², in fp64.

    operator: as in `Descrambler`. Exact for up to 15 features with "diff1" and "diff1_periodic" (Held & Karp 1962), in
    O(2ⁿ n²), and up to 9 with others (all n! orders); beyond, the result is a local minimum. Its memory is O(n²).
    Raises TypeError for complex or integer data, ValueError for another shape or values that are not finite.
    """
    samples = linalg.GramAccumulator(len(check_data(H)), H.device)
    samples.update(H)
    return seriate_gram(samples.gram(), operator_on(operator, len(H)))


def seriate_gram(gram: Tensor, operator: DerivativeOperator) -> Seriation:
    """`seriate` of features with the Gram matrix H Hᵀ (n, n)."""
    n, device = len(gram), gram.device
    gram = gram.cpu()
    bound = _lower_bound(gram, operator)
    distance = (gram.diagonal().unsqueeze(1) + gram.diagonal() - 2 * gram).clamp_min(0).fill_diagonal_(0)
    if operator.kind in ("diff1", "diff1_periodic"):
        closed, exact = operator.kind == "diff1_periodic", n <= _MOST_BY_PATHS
        order = _shortest(distance, closed) if exact else _reversed_while_shorter(distance, fiedler(distance), closed)
        order = _named(order, closed)
        loss = _length(distance, order, closed)
    else:
        penalty, exact = linalg.gram(operator.matrix()), n <= _MOST_BY_TRIAL
        order = _best_of_all(penalty, gram) if exact else _exchanged_while_cheaper(penalty, gram, fiedler(distance))
        loss = float((penalty * gram[order][:, order]).sum())
    return Seriation(order.to(device), loss, min(bound, loss), exact)


def fiedler(distance: Tensor) -> Tensor:
    """The order (n,) of features along the smoothest vector that is not constant, on the graph of their likeness.

    distance: (n, n), squared. Likeness is a Gaussian of it, whose width is such that what is as far as the mean hardly counts.
    """
    likeness = (-_STEEPNESS * distance / distance.mean().clamp_min(torch.finfo(distance.dtype).tiny)).exp()
    laplacian = torch.diag(likeness.sum(0)) - likeness  # in which the diagonal cancels
    return linalg.eigh(laplacian).vectors[:, min(1, len(distance) - 1)].argsort(stable=True)


def check_data(H: Tensor) -> Tensor:
    """H (n, N) with at least a feature and a sample, real and finite; else TypeError or ValueError."""
    linalg.check_real("H", H)
    if H.dim() != 2 or not H.numel():
        raise ValueError(f"H: got shape {tuple(H.shape)}, want (n, N), features x samples, with at least one of each")
    if not bool(H.isfinite().all()):
        raise ValueError("H: has entries that are not finite")
    return H


def _lower_bound(gram: Tensor, operator: DerivativeOperator) -> float:
    """Of orthogonal matrices; and where D sends constants to zero, of those that keep constants, as permutations do
    (Hadley, Rendl & Wolkowicz 1992), which is tighter.
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
    """Of the orders that are one path, that from the smaller end; of those that are one round, from 0 to its smaller side."""
    if closed:
        order = order.roll(-int(order.argmin()))
    backwards = order[1 % len(order)] > order[-1] if closed else order[0] > order[-1]
    return order if not backwards else order.flip(0).roll(1) if closed else order.flip(0)


def _shortest(distance: Tensor, closed: bool) -> Tensor:
    """The shortest path (or round) through all points, by dynamic programming over sets of points."""
    n = len(distance)
    sets = torch.arange(1 << n)
    members = (sets.unsqueeze(1) >> torch.arange(n)) & 1
    # cost[s, j]: of the shortest path through the points of s that ends in j; a round begins at point 0.
    cost = torch.full((1 << n, n), torch.inf, dtype=distance.dtype)
    start = torch.arange(1 if closed else n)
    cost[1 << start, start] = 0
    sizes = members.sum(1)
    for size in range(2, n + 1):
        chosen = sets[sizes == size]
        before = chosen.unsqueeze(1) ^ (1 << torch.arange(n))  # without j; with it, where it was not in
        inside = members[chosen].bool()
        reached = (cost[before.where(inside, 0)] + distance.mT).amin(2)
        cost[chosen] = reached.where(inside, torch.inf).minimum(cost[chosen])
    whole = (1 << n) - 1
    order = [int((cost[whole] + (distance[:, 0] if closed else 0)).argmin())]
    while len(order) < n:
        whole ^= 1 << order[-1]
        order.append(int((cost[whole] + distance[:, order[-1]]).argmin()))
    return torch.tensor(order)


def _reversed_while_shorter(distance: Tensor, order: Tensor, closed: bool) -> Tensor:
    """2-opt (Croes 1958): parts of the path whose reversal shortens it are reversed, until there are none."""
    n = len(distance)
    if not closed:  # a path is a round through a point that is as far from all others
        padded = distance.new_zeros(n + 1, n + 1)
        padded[:n, :n] = distance
        distance, order = padded, torch.cat((order, torch.tensor([n])))
    least = _MIN_GAIN * float(distance.max())
    improved = True
    while improved:
        improved = False
        for i in range(len(order) - 1):
            # The steps from places i and j > i are replaced by one that joins their starts, and one that joins their ends.
            starts, ends = order[i:], order.roll(-1)[i:]
            change = distance[starts[0], starts] + distance[ends[0], ends]
            change -= distance[starts[0], ends[0]] + distance[starts, ends]
            j = int(change[1:].argmin()) + 1
            if float(change[j]) < -least:
                order[i + 1 : i + j + 1] = order[i + 1 : i + j + 1].flip(0)
                improved = True
    return order if closed else order.roll(-1 - int((order == n).nonzero()))[:-1]


def _best_of_all(penalty: Tensor, gram: Tensor) -> Tensor:
    best, least = torch.arange(len(gram)), torch.inf
    for part in torch.tensor(list(permutations(range(len(gram))))).split(_TRIALS_AT_ONCE):
        losses = (penalty * gram[part.unsqueeze(2), part.unsqueeze(1)]).sum((1, 2))
        if float(losses.min()) < least:
            best, least = part[losses.argmin()], float(losses.min())
    return best


def _exchanged_while_cheaper(penalty: Tensor, gram: Tensor, order: Tensor) -> Tensor:
    """Two features whose exchange lowers the loss change places (the change in O(n²) for all partners: Taillard 1991), until no
    two are left.
    """
    g, cost = gram[order][:, order], penalty.diagonal()
    least = _MIN_GAIN * float((penalty.abs() * g.abs()).sum())
    improved = True
    while improved:
        improved = False
        for i in range(len(order)):
            own, size = (penalty * g).sum(1), g.diagonal()
            # 2 sum over all k of (penalty_ki - penalty_kj)(g_kj - g_ki), less what k = i and k = j should count in that.
            change = 2 * (penalty[i] @ g + penalty @ g[i] - own[i] - own)
            change -= 2 * ((cost[i] - penalty[i]) * (g[i] - size[i]) + (penalty[i] - cost) * (size - g[i]))
            change += (cost[i] - cost) * (size - size[i])
            j = int(change.argmin())
            if float(change[j]) < -least:
                pair, swapped = [i, j], [j, i]
                order[pair], g[pair] = order[swapped], g[swapped]
                g[:, pair] = g[:, swapped]
                improved = True
    return order
