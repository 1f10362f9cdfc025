"""The associations of X b bᵀ b: what each keeps for its backward, and what it costs. Pure arithmetic on shapes.

With P = X b, G = bᵀb, K = bbᵀ the summary has five associations, and each may keep an intermediate for its backward:

    A  (X b) G          keeps G, and P where it is no larger than b          (form "A+")
    B  X (b G)          keeps G and W = b G
    C  ((X b) bᵀ) b     keeps P and Q = P bᵀ where they are no larger than b (form "C+")
    D  (X K) b          keeps K, and R = X K where it is no larger than b    (form "D+")
    E  X (K b)          keeps K and W = K b

so that nothing kept grows with n beyond the size of the parameter. A form with a star ("A*") is the same association left
to PyTorch's own autograd: more operations in the backward, but none of an operator's fixed cost. The cost of a form is
its floating-point operations, forward and backward together, plus a charge for each matrix product and each operator.
"""

from __future__ import annotations

from typing import NamedTuple

# A matrix product costs at least about as much as this many floating-point operations: call, allocation, cold operands.
PRODUCT_OVERHEAD = 400_000
# The same for an operator with its autograd Function around it, forward and backward (about 0.4 ms of a cold CPU core).
OPERATOR_OVERHEAD = 40_000_000

# What each form of the operator keeps for its backward, in this order.
KEEPS: dict[str, tuple[str, ...]] = {
    "A": ("G",),
    "A+": ("P", "G"),
    "B": ("G", "W"),
    "C": (),
    "C+": ("P", "Q"),
    "D": ("K",),
    "D+": ("K", "R"),
    "E": ("K", "W"),
}

EXPRESSIONS = {
    "A": "(X b)(bᵀb)",
    "B": "X (b (bᵀb))",
    "C": "((X b) bᵀ) b",
    "D": "(X (b bᵀ)) b",
    "E": "X ((b bᵀ) b)",
}


class Products(NamedTuple):
    """How many products there are of each size: n d k, d k², d² k, n k², n d² multiplications."""

    ndk: int
    dk2: int
    d2k: int
    nk2: int
    nd2: int

    def flops(self, n: int, d: int, k: int) -> int:
        """Floating-point operations: two a multiplication."""
        ndk, dk2, d2k, nk2, nd2 = self
        return 2 * (ndk * n * d * k + dk2 * d * k * k + d2k * d * d * k + nk2 * n * k * k + nd2 * n * d * d)

    def elements(self, n: int, d: int, k: int) -> int:
        """Elements read and written: two operands and a result each."""
        ndk, dk2, d2k, nk2, nd2 = self
        wide = ndk * (n * d + d * k + n * k) + nd2 * (2 * n * d + d * d)
        return wide + dk2 * (2 * d * k + k * k) + d2k * (2 * d * k + d * d) + nk2 * (2 * n * k + k * k)


def counted(form: str, pair: bool, need_x: bool, need_b: bool) -> Products:
    """The products of a form's forward and backward; sums of matrices are not counted."""
    association, composed = form[0], form[-1] == "*"
    either = need_x or need_b
    ndk = dk2 = d2k = nk2 = nd2 = 0
    if form == "A":  # P, G, P G | (dY G) bᵀ | S = Xᵀ dY, T = bᵀ S, S G, b (T + Tᵀ)
        ndk, dk2, nk2 = 1 + need_x + need_b, 1 + 3 * need_b, 1 + need_x
    elif association == "A":  # P, G, P G | D = dY G, dX = D bᵀ | T = Pᵀ dY, Xᵀ D, b (T + Tᵀ), or b T and b Tᵀ
        ndk, dk2, nk2 = 1 + need_x + need_b, 1 + need_b * (1 + composed), 1 + either + need_b
    elif association == "B":  # G, W, X W | dY Wᵀ | S = Xᵀ dY, T = bᵀ S, S G, b (T + Tᵀ)
        ndk, dk2 = 1 + need_x + need_b, 2 + need_b * (3 + composed)
    elif association == "E":  # K, W, X W | dY Wᵀ | S = Xᵀ dY, M = S bᵀ, K S, (M + Mᵀ) b
        ndk, d2k = 1 + need_x + need_b, 2 + need_b * (3 + composed)
    elif association == "C":  # P, Q, Q b | R = dY bᵀ, U = R b | U bᵀ | Xᵀ U, Qᵀ dY, Rᵀ P
        again = 2 * need_b if form == "C" else 0
        ndk = 3 + 2 * either + need_x + 3 * need_b + again
    else:  # K, R = X K, R b | dR = dY bᵀ | dR K | Rᵀ dY, M = Xᵀ dR, (M + Mᵀ) b
        ndk, d2k = 1 + either + need_b, 1 + need_b * (1 + composed)
        nd2 = 1 + need_x + need_b + (need_b if form == "D" else 0)
    if pair and association in "BDE":  # P | dP bᵀ | Xᵀ dP
        ndk += 1 + need_x + need_b
    return Products(ndk, dk2, d2k, nk2, nd2)


def products(form: str, n: int, d: int, k: int, pair: bool, need_x: bool, need_b: bool) -> tuple[int, int]:
    """(floating-point operations, matrix products) of a form's forward and backward."""
    found = counted(form, pair, need_x, need_b)
    return found.flops(n, d, k), sum(found)


def cost(form: str, n: int, d: int, k: int, pair: bool, need_x: bool, need_b: bool) -> int:
    """Floating-point operations, and what calls cost in the same unit."""
    flops, count = products(form, n, d, k, pair, need_x, need_b)
    return flops + count * PRODUCT_OVERHEAD + (0 if form[-1] == "*" else OPERATOR_OVERHEAD)


def candidates(n: int, d: int, k: int, pair: bool, operators: bool = True, composed: bool = True) -> list[str]:
    """The forms worth considering: each association with all it may keep; D and E only pay for k > d.

    `operators` admits the operator's own, `composed` the ones left to PyTorch's autograd, which keeps every intermediate:
    only where each may be kept.
    """
    small_p, small_q = pair or n <= d, n <= k
    forms = ["A+" if small_p else "A", "B", "C+" if small_p and small_q else "C"]
    if k > d:
        forms += ["D+" if small_q else "D", "E"]
    left = [form[0] + "*" for form in forms if form in ("A+", "B", "C+", "D+", "E")]
    return forms * operators + left * composed


def cheapest(
    n: int, d: int, k: int, pair: bool = False, need_x: bool = True, need_b: bool = True, operators: bool = True,
    composed: bool = True,
) -> str:  # fmt: skip
    """The candidate form with the least cost; the earlier one on a tie."""
    best, least = "", -1
    for form in candidates(n, d, k, pair, operators, composed):
        charge = cost(form, n, d, k, pair, need_x, need_b)
        if least < 0 or charge < least:
            best, least = form, charge
    return best


def head_by_gram(d: int, k: int, m: int) -> bool:
    """Whether H = A G of a head with m classes takes fewer operations, all gradients included, than H = (A bᵀ) b without G."""
    return 2 * d * k + 3 * m * k <= 6 * d * m


def head_products(form: str, n: int, d: int, k: int, m: int) -> tuple[int, int]:
    """(floating-point operations, matrix products) of the head's loss with all gradients, in its flat or latent form."""
    if head_by_gram(d, k, m):
        flops, count = 2 * (2 * d * k * k + 3 * m * k * k), 5  # G, b (T + Tᵀ); H = A G, T = U2 A, U2ᵀ G
    else:
        flops, count = 2 * 6 * d * k * m, 6  # F = A bᵀ, H = F b; R = U2ᵀ bᵀ, Rᵀ A, Fᵀ U2ᵀ, R b
    if form == "flat":  # W = b Zᵀ, X W, Xᵀ E, bᵀ V, V Z, E Wᵀ with 2 m columns
        known = 0 if head_by_gram(d, k, m) else 2 * d * k * m  # half of W is Fᵀ
        return flops + 4 * m * (3 * n * d + 3 * d * k) - known, count + 6
    return flops + 2 * 3 * n * d * k + 4 * m * 3 * n * k, count + 6  # P, D bᵀ, Xᵀ D; P Zᵀ, E Z, Pᵀ E


def head_form(n: int, d: int, k: int, m: int) -> str:
    """ "flat" (no n x k intermediate) where it takes no more operations than "latent": about 2 m < k for large n."""
    return "flat" if head_products("flat", n, d, k, m)[0] <= head_products("latent", n, d, k, m)[0] else "latent"
