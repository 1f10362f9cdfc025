"""Problem -> Plan: which engine computes, and which product is formed first. Pure arithmetic on shapes.

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

import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

import torch

ENGINES = ("reference",)

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

_requested = os.environ.get("INTERP_NN_ENGINE") or "auto"  # checked at use: an import never fails


@dataclass(frozen=True)
class Plan:
    """How a problem is computed: by which engine, in which form (see `interp_nn.dispatch`), and why."""

    engine: str
    form: str
    flops: int
    reason: str

    @property
    def association(self) -> str:
        return self.form[0]

    def __str__(self) -> str:
        return f"{self.engine}, {self.form}: {EXPRESSIONS[self.association]}; {self.reason}"


class use_engine:  # noqa: N801 - used like a function, as torch.no_grad is
    """Force an engine for every later call, or inside a `with` block: `use_engine("reference")`; "auto" lets dispatch choose.

    Overrides the environment variable INTERP_NN_ENGINE. Global to the process, like torch.backends' flags. A backward
    always runs on the engine of its forward. Raises ValueError for a name that is not an engine.
    """

    def __init__(self, name: str) -> None:
        global _requested
        _check_engine(name, "use_engine")
        self._previous, _requested = _requested, name

    def __enter__(self) -> use_engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _requested
        _requested = self._previous


def _check_engine(name: str, source: str) -> None:
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"{source}: unknown engine {name!r}; this build has {', '.join(ENGINES)}, or 'auto' to choose")


def requested() -> str:
    """The engine asked for by `use_engine` or INTERP_NN_ENGINE, unchecked; "auto" where none was."""
    return _requested


def engine() -> str:
    """The engine that computes: the one asked for by `use_engine` or INTERP_NN_ENGINE, else dispatch's choice."""
    _check_engine(_requested, "INTERP_NN_ENGINE")
    return "reference" if _requested == "auto" else _requested


def products(form: str, n: int, d: int, k: int, pair: bool, need_x: bool, need_b: bool) -> tuple[int, int]:
    """(floating-point operations, matrix products) of a form's forward and backward; sums of matrices are not counted."""
    association, composed = form[0], form[-1] == "*"
    either = need_x or need_b
    ndk = dk2 = d2k = nk2 = nd2 = 0  # how many products of each size
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
    flops = 2 * (ndk * n * d * k + dk2 * d * k * k + d2k * d * d * k + nk2 * n * k * k + nd2 * n * d * d)
    return flops, ndk + dk2 + d2k + nk2 + nd2


def cost(form: str, n: int, d: int, k: int, pair: bool, need_x: bool, need_b: bool) -> int:
    """Floating-point operations, and what calls cost in the same unit."""
    flops, count = products(form, n, d, k, pair, need_x, need_b)
    return flops + count * PRODUCT_OVERHEAD + (0 if form[-1] == "*" else OPERATOR_OVERHEAD)


def candidates(n: int, d: int, k: int, pair: bool, composed: bool) -> list[str]:
    """The forms worth considering: each association with all it may keep; D and E only pay for k > d.

    `composed` admits the ones left to PyTorch's autograd, which keeps every intermediate: only where each may be kept.
    """
    small_p, small_q = pair or n <= d, n <= k
    forms = ["A+" if small_p else "A", "B", "C+" if small_p and small_q else "C"]
    if k > d:
        forms += ["D+" if small_q else "D", "E"]
    if composed:
        forms += [form[0] + "*" for form in forms if form in ("A+", "B", "C+", "D+", "E")]
    return forms


def cheapest(
    n: int, d: int, k: int, pair: bool = False, need_x: bool = True, need_b: bool = True, composed: bool = True
) -> str:
    """The candidate form with the least cost; the earlier one on a tie."""
    best, least = "", -1
    for form in candidates(n, d, k, pair, composed):
        charge = cost(form, n, d, k, pair, need_x, need_b)
        if least < 0 or charge < least:
            best, least = form, charge
    return best


def head_products(form: str, n: int, d: int, k: int, m: int) -> tuple[int, int]:
    """(floating-point operations, matrix products) of the head's loss with all gradients, in its flat or latent form."""
    flops, count = 2 * (2 * d * k * k + 3 * m * k * k), 5  # G, b (T + Tᵀ); H = A G, T = U2 A, U2ᵀ G
    if form == "flat":  # W = b Zᵀ, X W, Xᵀ E, bᵀ V, V Z, E Wᵀ with 2 m columns
        return flops + 4 * m * (3 * n * d + 3 * d * k), count + 6
    return flops + 2 * 3 * n * d * k + 4 * m * 3 * n * k, count + 6  # P, D bᵀ, Xᵀ D; P Zᵀ, E Z, Pᵀ E


def head_form(n: int, d: int, k: int, m: int) -> str:
    """ "flat" (no n x k intermediate) where it takes no more operations than "latent": about 2 m < k for large n."""
    return "flat" if head_products("flat", n, d, k, m)[0] <= head_products("latent", n, d, k, m)[0] else "latent"


def choose(n: int, d: int, k: int, pair: bool, need_x: bool, need_b: bool) -> str:
    """The token of the plan for a summary or pair. While compiling, operators: there they cost nothing extra."""
    name = engine()
    if torch.compiler.is_exporting():
        return f"{name}:{_for_any_rows(d, k, pair)}"
    composed = name == "reference" and not torch.compiler.is_compiling()
    return f"{name}:{cheapest(n, d, k, pair, need_x, need_b, composed)}"


def choose_loss(n: int, d: int, k: int, m: int | None, need_x: bool, need_b: bool) -> str:
    """The token of the plan for a loss: of the pair (m None: classes are the k columns), or of a head with m classes."""
    if torch.compiler.is_exporting():
        form = _for_any_rows(d, k, True) if m is None else "flat" if 2 * m < k else "latent"
    else:
        form = cheapest(n, d, k, True, need_x, need_b, False) if m is None else head_form(n, d, k, m)
    return f"{engine()}:{form}"


def _for_any_rows(d: int, k: int, pair: bool) -> str:
    """The form of a large n. An exported program serves every n, and a choice by n would guard on it."""
    return "E" if k > d else "A+" if pair else "B"


def resolve(token: str) -> tuple[str, str]:
    """(engine, form) of a token that an operator was given; ValueError if it is not one."""
    name, _, form = token.partition(":")
    if name not in ENGINES or form not in _FORMS:
        raise ValueError(f"plan: got {token!r}, want 'engine:form' with engine in {ENGINES} and form in {_FORMS}")
    return name, form


_FORMS = (*KEEPS, "flat", "latent")


def plan(n: int, d: int, k: int, *, pair: bool = False, grad: Iterable[str] = ("x", "b")) -> Plan:
    """How `functional.summary` (or `summary_pair`) computes X (n x d) with b (d x k) in eager mode, and why.

    grad: which of "x" and "b" need a gradient; () for inference. Raises ValueError for a negative size or another name.
    """
    for name, size in (("n", n), ("d", d), ("k", k)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"plan: {name} must be an integer >= 0, got {size!r}")
    wanted = set(grad)
    if not wanted <= {"x", "b"}:
        raise ValueError(f"plan: grad may hold 'x' and 'b', got {sorted(wanted)}")
    needs = ("x" in wanted, "b" in wanted)
    form = cheapest(n, d, k, pair, *needs)
    flops, count = products(form, n, d, k, pair, *needs)
    charges = {f: cost(f, n, d, k, pair, *needs) for f in candidates(n, d, k, pair, True)}
    rivals = ", ".join(f"{f} {c / charges[form]:.3g}" for f, c in charges.items() if f != form)
    how = "left to autograd" if form[-1] == "*" else "one operator each way"
    return Plan(
        engine(), form, flops, f"{flops / 1e6:.4g} MFLOP in {count} products, {how}; cost of the others: {rivals}"
    )
