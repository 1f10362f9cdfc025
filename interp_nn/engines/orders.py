"""The orders in which X b bᵀ b and X b q(bᵀb) can be multiplied: the tensors that each saves for its backward, and its cost.

Pure arithmetic on shapes. With P = X b, G = bᵀb, K = bbᵀ:

    (Xb)G        saves G, and P where it is no larger than b
    X(bG)        saves G and W = b G
    ((Xb)bᵀ)b    saves P and Q = P bᵀ; a candidate only where both are no larger than b
    (X(bbᵀ))b    saves K and R = X K; a candidate only for k > d, and where R is no larger than b
    X((bbᵀ)b)    saves K and W = K b; a candidate only for k > d

For a polynomial q of degree 1 to 4, with q' = q without its constant term:

    (Xb)q          saves P, G and q'(G); a candidate only where P is no larger than b. Kernels of one launch save G, q(G), and
                   P for a pair
    X(bq)          saves G, q'(G) and W = b q(G)
    X(q(K)b)       saves K, q'(K) and W = q(K) b; a candidate only for k > d
    ((Xb)bᵀ)b...   Horner's rule by products with bᵀ and b; a candidate only where n <= d and n <= k, and only by autograd

Degree 0 has no Gram matrix: W = c0 b, or Y = c0 P of a pair, by autograd.

So nothing that is saved grows with n beyond the size of the parameter. Any order may instead leave its backward to PyTorch's
autograd, which has more operations but none of the operator's fixed cost. The cost of an order is its floating-point operations,
forward and backward together, plus a charge for each matrix product, for what it reads and writes, and for the operator.
"""

from __future__ import annotations

from typing import NamedTuple

from interp_nn.engines.problem import Order, Plan, Problem

# A matrix product costs at least about as much as this many floating-point operations: call, allocation, cold operands.
PRODUCT_OVERHEAD = 400_000
# An element that a product reads or writes takes the time of about as many: without it, few rows and k look too cheap beside G.
ELEMENT_COST = 20
# The same for an operator with its autograd Function around it, forward and backward: what a CPU core takes 50 us for.
OPERATOR_OVERHEAD = 3_000_000
# A polynomial's, whose backward has some twenty small operations on k x k matrices, is so many times larger.
POLYNOMIAL_OVERHEAD = 13

_SAVED: dict[tuple[Order, bool], tuple[str, ...]] = {
    ("(Xb)G", False): ("G",),
    ("(Xb)G", True): ("P", "G"),
    ("X(bG)", False): ("G", "W"),
    ("((Xb)bᵀ)b", True): ("P", "Q"),
    ("(X(bbᵀ))b", True): ("K", "R"),
    ("X((bbᵀ)b)", False): ("K", "W"),
}
OPERATOR_PLANS = tuple(Plan("eager", order, saves) for order, saves in _SAVED)
_SAVED_OF_POLYNOMIALS: dict[tuple[Order, bool], tuple[str, ...]] = {
    ("(Xb)q", True): ("P", "G", "q(G)"),
    ("X(bq)", False): ("G", "q(G)", "W"),
    ("X(q(K)b)", False): ("K", "q(K)", "W"),
}
_SAVED_BY_KERNELS: dict[tuple[Order, bool], tuple[str, ...]] = {  # of a polynomial, by the engines of one launch
    ("(Xb)q", False): ("G", "q(G)"),
    ("(Xb)q", True): ("P", "G", "q(G)"),
}
POLYNOMIAL_PLANS = tuple(Plan("eager", order, saves) for order, saves in _SAVED_OF_POLYNOMIALS)
# Products of k x k matrices by degree: q(G), and what its backward does with G.
_POWERS, _POWERS_BACKWARD, _POWERS_BY_AUTOGRAD = (0, 0, 1, 2, 2), (0, 0, 1, 4, 4), (0, 0, 2, 4, 4)


def saved_names(plan: Plan, polynomial: bool = False) -> tuple[str, ...]:
    """Return the names of the tensors that an operator saves for its backward, in their order.

    Raises:
        ValueError: The operator of a summary, or that of a polynomial, has no such plan.
    """
    plans = _SAVED
    if polynomial:
        plans = _SAVED_OF_POLYNOMIALS if plan.engine == "eager" else _SAVED_BY_KERNELS
    if (plan.order, plan.saves) not in plans:
        known = ", ".join(f"{order}{' saves' * saves}" for order, saves in plans)
        raise ValueError(f"plan: got order {plan.order}{' saves' * plan.saves}, want one of {known}")
    return plans[plan.order, plan.saves]


class Products(NamedTuple):
    """Number of matrix products of each size: n d k, d k², d² k, n k², n d², k³, d³ multiplications."""

    ndk: int
    dk2: int
    d2k: int
    nk2: int
    nd2: int
    k3: int = 0
    d3: int = 0

    def flops(self, n: int, d: int, k: int) -> int:
        """Return the floating-point operations, two a multiplication."""
        ndk, dk2, d2k, nk2, nd2, k3, d3 = self
        wide = ndk * n * d * k + nk2 * n * k * k + nd2 * n * d * d
        return 2 * (wide + dk2 * d * k * k + d2k * d * d * k + k3 * k**3 + d3 * d**3)

    def elements(self, n: int, d: int, k: int) -> int:
        """Return the elements read and written: two operands and a result each."""
        ndk, dk2, d2k, nk2, nd2, k3, d3 = self
        wide = ndk * (n * d + d * k + n * k) + nd2 * (2 * n * d + d * d) + 3 * (k3 * k * k + d3 * d * d)
        return wide + dk2 * (2 * d * k + k * k) + d2k * (2 * d * k + d * d) + nk2 * (2 * n * k + k * k)


def count_products(plan: Plan, problem: Problem) -> Products:
    """Count the products of forward and backward; sums of matrices are not counted."""
    if problem.degree is not None:
        return _count_of_polynomial(plan, problem, problem.degree)
    order, autograd = plan.order, plan.autograd
    need_x, need_b = problem.need_x, problem.need_b
    either = need_x or need_b
    ndk = dk2 = d2k = nk2 = nd2 = 0
    if order == "(Xb)G" and not (
        plan.saves or autograd
    ):  # P, G, P G | (dY G) bᵀ | S = Xᵀ dY, T = bᵀ S, S G, b (T + Tᵀ)
        ndk, dk2, nk2 = 1 + need_x + need_b, 1 + 3 * need_b, 1 + need_x
    elif order == "(Xb)G":  # P, G, P G | D = dY G, dX = D bᵀ | T = Pᵀ dY, Xᵀ D, b (T + Tᵀ), or b T and b Tᵀ
        ndk, dk2, nk2 = 1 + need_x + need_b, 1 + need_b * (1 + autograd), 1 + either + need_b
    elif order == "X(bG)":  # G, W, X W | dY Wᵀ | S = Xᵀ dY, T = bᵀ S, S G, b (T + Tᵀ)
        ndk, dk2 = 1 + need_x + need_b, 2 + need_b * (3 + autograd)
    elif order == "X((bbᵀ)b)":  # K, W, X W | dY Wᵀ | S = Xᵀ dY, M = S bᵀ, K S, (M + Mᵀ) b
        ndk, d2k = 1 + need_x + need_b, 2 + need_b * (3 + autograd)
    elif order == "((Xb)bᵀ)b":  # P, Q, Q b | R = dY bᵀ, U = R b | U bᵀ | Xᵀ U, Qᵀ dY, Rᵀ P
        ndk = 3 + 2 * either + need_x + 3 * need_b
    else:  # K, R = X K, R b | dR = dY bᵀ | dR K | Rᵀ dY, M = Xᵀ dR, (M + Mᵀ) b
        ndk, d2k = 1 + either + need_b, 1 + need_b * (1 + autograd)
        nd2 = 1 + need_x + need_b
    if problem.pair and order in ("X(bG)", "(X(bbᵀ))b", "X((bbᵀ)b)"):  # P | dP bᵀ | Xᵀ dP
        ndk += 1 + need_x + need_b
    return Products(ndk, dk2, d2k, nk2, nd2)


def _count_of_polynomial(plan: Plan, problem: Problem, degree: int) -> Products:
    need_x, need_b = problem.need_x, problem.need_b
    either = need_x or need_b
    each = 1 + need_x + need_b
    # A weight has a backward of its own, whatever computes that of the product with X.
    by_autograd = plan.autograd and (problem.pair or plan.order == "(Xb)q")
    backward = _POWERS_BY_AUTOGRAD if by_autograd else _POWERS_BACKWARD
    powers = _POWERS[degree] + need_b * backward[degree]
    if degree == 0:  # X (c0 b), or P alone
        return Products(each, 0, 0, 0, 0)
    if plan.order == "((Xb)bᵀ)b...":  # P, two products a degree | the same for dY | each product's share of db
        return Products(each + 2 * degree * (1 + either + need_b), 0, 0, 0, 0)
    if plan.order == "(Xb)q":  # P, G, P q | D = dP + dY q, dX = D bᵀ | T = Pᵀ dY, Xᵀ D, b (M + Mᵀ)
        return Products(each, 1 + need_b * (1 + plan.autograd), 0, 1 + either + need_b, 0, powers)
    ndk = each * (1 + problem.pair)  # also P | dP bᵀ | Xᵀ dP of a pair
    narrow = 2 + need_b * (3 + by_autograd)
    if plan.order == "X(bq)":  # G, W, X W | dY Wᵀ | S = Xᵀ dY, T = bᵀ S, S q, b (M + Mᵀ)
        return Products(ndk, narrow, 0, 0, 0, powers)
    return Products(ndk, 0, narrow, 0, 0, 0, powers)  # K, W, X W | dY Wᵀ | S = Xᵀ dY, N = S bᵀ, q S, (M + Mᵀ) b


def flops_and_products(plan: Plan, problem: Problem) -> tuple[int, int]:
    """Return (floating-point operations, number of matrix products) of forward and backward."""
    if problem.head and problem.classes is not None:
        degree = 1 if problem.degree is None else problem.degree
        return _head_products(plan.order, problem.n, problem.d, problem.k, problem.classes, degree)
    found = count_products(plan, problem)
    return found.flops(problem.n, problem.d, problem.k), sum(found)


def cost(plan: Plan, problem: Problem) -> int:
    """Return the floating-point operations, plus the charges for products, elements and the operator in the same unit."""
    products = count_products(plan, problem)
    sizes = problem.n, problem.d, problem.k
    charges = sum(products) * PRODUCT_OVERHEAD + products.elements(*sizes) * ELEMENT_COST
    operator = OPERATOR_OVERHEAD * (1 if problem.degree is None else POLYNOMIAL_OVERHEAD)
    return products.flops(*sizes) + charges + (0 if plan.autograd else operator)


def candidates(problem: Problem, operators: bool = True, autograd: bool = True) -> list[Plan]:
    """Return the eager plans worth considering.

    Args:
        problem: The problem.
        operators: Admit the operator's own backward.
        autograd: Admit plans whose backward is left to PyTorch's autograd, which saves every intermediate.
    """
    n, d, k = problem.n, problem.d, problem.k
    small_p, small_q = problem.pair or n <= d, n <= k
    if problem.degree is not None:
        return _candidates_of_polynomial(problem, operators, autograd, small_p, small_q)
    orders: list[tuple[Order, bool]] = []
    if small_p:
        orders.append(("(Xb)G", True))
    orders.append(("X(bG)", False))
    if small_p and small_q:
        orders.append(("((Xb)bᵀ)b", True))
    if k > d:
        if small_q:
            orders.append(("(X(bbᵀ))b", True))
        orders.append(("X((bbᵀ)b)", False))
    found = [Plan("eager", order, saves) for order, saves in orders] if operators else []
    return found + ([Plan("eager", order, autograd=True) for order, _ in orders] if autograd else [])


def _candidates_of_polynomial(
    problem: Problem, operators: bool, autograd: bool, small_p: bool, small_q: bool
) -> list[Plan]:
    if problem.degree == 0:
        return [Plan("eager", "(Xb)q" if problem.pair else "X(bq)", autograd=True)]
    orders: list[tuple[Order, bool]] = [("(Xb)q", True)] if small_p else []
    orders.append(("X(bq)", False))
    if problem.k > problem.d:
        orders.append(("X(q(K)b)", False))
    found = [Plan("eager", order, saves) for order, saves in orders] if operators else []
    if autograd:
        found += [Plan("eager", order, autograd=True) for order, _ in orders]
        if small_p and small_q:
            found.append(Plan("eager", "((Xb)bᵀ)b...", autograd=True))
    return found


def cheapest(problem: Problem, operators: bool = True, autograd: bool = True) -> Plan:
    """Return the candidate with the least cost; the earlier one on a tie."""
    best, least = None, -1
    for plan in candidates(problem, operators, autograd):
        charge = cost(plan, problem)
        if least < 0 or charge < least:
            best, least = plan, charge
    assert best is not None
    return best


def head_by_gram(d: int, k: int, m: int, degree: int = 1) -> bool:
    """Return True if a head with m classes forms H = A q(G) in fewer operations, gradients included, than by A bᵀ b without G.

    Horner's rule takes `degree` products with G, or twice as many with bᵀ and b.
    """
    return 2 * d * k + 3 * degree * m * k <= 6 * degree * d * m


def _head_products(order: Order, n: int, d: int, k: int, m: int, degree: int = 1) -> tuple[int, int]:
    """Return (floating-point operations, matrix products) of a head's loss with all gradients."""
    by_gram = head_by_gram(d, k, m, degree)
    if by_gram:  # G, b (T + Tᵀ); H = A G, T = U2 A, U2ᵀ G
        flops, count = 2 * (2 * d * k * k + 3 * degree * m * k * k), 2 + 3 * degree
    else:  # F = A bᵀ, H = F b; R = U2ᵀ bᵀ, Rᵀ A, Fᵀ U2ᵀ, R b
        flops, count = 2 * 6 * degree * d * k * m, 6 * degree
    if order == "logits_from_x":  # W = b Zᵀ, X W, Xᵀ E, bᵀ V, V Z, E Wᵀ with 2 m columns
        known = 0 if by_gram or degree != 1 else 2 * d * k * m  # half of W is Fᵀ
        return flops + 4 * m * (3 * n * d + 3 * d * k) - known, count + 6
    return flops + 2 * 3 * n * d * k + 4 * m * 3 * n * k, count + 6  # P, D bᵀ, Xᵀ D; P Zᵀ, E Z, Pᵀ E


def head_order(n: int, d: int, k: int, m: int) -> Order:
    """Return the order of a head's loss with fewer operations: "logits_from_x" from about 2 m < k on, for large n."""
    from_x, from_latent = (_head_products(order, n, d, k, m)[0] for order in ("logits_from_x", "logits_from_latent"))
    return "logits_from_x" if from_x <= from_latent else "logits_from_latent"
