"""Formulas by which torch.utils.flop_counter counts the operators: the matrix products of their plan, two operations a product.

Every engine is counted by the order of its plan, without padding and without what a kernel computes again. Sums, softmax and the
like are not counted, as PyTorch counts none. Plans with `autograd` are PyTorch's own products and need no formula.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from interp_nn.engines.orders import count_products, head_by_gram
from interp_nn.engines.problem import Order, Problem, plan_from_text
from interp_nn.ops import losses, summary  # noqa: F401 - they define the operators

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]
_formulas: dict[Any, Callable[..., int]] = {}


def count_by(operator: Any, formula: Callable[..., int]) -> None:
    """Register a formula for an operator, at once or as soon as the program imports PyTorch's counter."""
    _formulas[operator] = formula
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(operator)(formula)


class _Finder(MetaPathFinder):
    """Registers the formulas when PyTorch's counter is imported. This package does not import it, because it imports Triton."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                for operator, formula in _formulas.items():
                    module.register_flop_formula(operator)(formula)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _rows(shape: _Shape) -> int:
    n = 1
    for size in shape[:-1]:
        n *= size
    return n


def _count(plan: str, n: int, b: _Shape, pair: bool, need_x: bool, need_b: bool, coefficients: _Shape | None) -> int:
    """Return the operations of forward and backward."""
    degree = None if coefficients is None else coefficients[0] - 1
    d, k = b
    problem = Problem(n, d, k, pair, need_x, need_b, degree=degree)
    return count_products(plan_from_text(plan), problem).flops(n, d, k)


def _forward(x: _Shape, b: _Shape, plan: str, pair: bool, coefficients: _Shape | None) -> int:
    return _count(plan, _rows(x), b, pair, False, False, coefficients)


def _backward(
    dp: _Shape | None,
    dy: _Shape | None,
    x: _Shape,
    b: _Shape,
    plan: str,
    need_x: bool,
    need_b: bool,
    coefficients: _Shape | None = None,
    need_coefficients: bool = False,
) -> int:
    n, (d, k) = _rows(x), b
    if dy is None:  # dP bᵀ, Xᵀ dP
        return 2 * n * d * k * (need_x + need_b)
    pair = dp is not None
    both = _count(plan, n, b, pair, need_x, need_b, coefficients) - _count(plan, n, b, pair, False, False, coefficients)
    order = plan_from_text(plan).order
    if coefficients is None:
        always = {"((Xb)bᵀ)b": 4 * n * d * k, "(X(bbᵀ))b": 2 * n * d * k}  # formed though b and x need no gradient
        if plan_from_text(plan).saves:
            always["(Xb)G"] = 2 * n * k * k
        return both if need_x or need_b else always.get(order, 0)
    degree = coefficients[0] - 1
    inner = d if order == "X(q(K)b)" else k
    if not need_b and need_coefficients:  # as for b, without the products that form db
        both = _backward(dp, dy, x, b, plan, need_x, True, coefficients)
        if order == "(Xb)q":
            both -= 2 * n * d * k + 2 * d * k * k
        else:
            both -= 2 * 2 * d * k * inner + pair * 2 * n * d * k
    elif order == "(Xb)q" and not (need_x or need_b):
        both = 2 * n * k * k
    return both + 2 * inner**3 * (need_coefficients and degree in (2, 4))  # G², or G S G


def summary_flops(
    x: _Shape,
    b: _Shape,
    bias: _Shape | None,
    plan: str,
    coefficients: _Shape | None = None,
    scale: _Shape | None = None,
    shift: float = 0.0,
    **_: Any,
) -> int:
    """Return the operations of `interp_nn::summary`, or of its twin for the rows of DTensors."""
    return _forward(x, b, plan, False, coefficients)


def _pair_flops(
    x: _Shape,
    b: _Shape,
    plan: str,
    coefficients: _Shape | None = None,
    scale: _Shape | None = None,
    shift: float = 0.0,
    **_: Any,
) -> int:
    return _forward(x, b, plan, True, coefficients)


def _backward_flops(
    dp: _Shape | None,
    dy: _Shape | None,
    x: _Shape,
    b: _Shape,
    saved: Sequence[_Shape],
    plan: str,
    needs: Sequence[bool],
    transposed: bool,
    coefficients: _Shape | None = None,
    scale: _Shape | None = None,
    shift: float = 0.0,
    **_: Any,
) -> int:
    need_x, need_b, _bias, need_c, need_a = (*needs, False, False)[:5]
    return _backward(dp, dy, x, b, plan, need_x, need_b or need_a, coefficients, need_c)


def rows_backward_flops(
    dy: _Shape, x: _Shape, b: _Shape, first: Any, second: Any, plan: str, *rest: Any, **_: Any
) -> int:
    """Return the operations of `interp_nn::summary_of_rows_backward`."""
    return _backward(None, dy, x, b, plan, rest[0][0], rest[0][1])


def _loss_flops(x: _Shape, b: _Shape, a: _Shape | None, c: Any, target: Any, *rest: Any, **_: Any) -> int:
    plan, needs, _transposed = rest[-3:]
    if a is not None:
        return _head(plan_from_text(plan).order, _rows(x), b[0], b[1], a[0], needs)
    forward = _forward(x, b, plan, True, None)
    return forward + _backward(b, b, x, b, plan, needs[0], needs[1]) if any(needs) else forward


def _loss_backward_flops(upstream: Any, *arguments: Any, **_: Any) -> int:
    return _loss_flops(*arguments)


def _head(order: Order, n: int, d: int, k: int, m: int, needs: Sequence[bool]) -> int:
    """Return the operations of a head's loss with its needed gradients, of x, b, output weight A and bias."""
    need_x, need_b, need_a = needs[:3]
    through = need_b or need_a
    by_gram = head_by_gram(d, k, m)
    if by_gram:  # G, H = A G | T = U2 A, b (T + Tᵀ) | U2ᵀ G
        narrow = d * k * k + m * k * k + need_b * (m * k * k + d * k * k) + need_a * m * k * k
    else:  # F = A bᵀ, H = F b | R = U2ᵀ bᵀ | Rᵀ A, Fᵀ U2ᵀ | R b
        narrow = m * d * k * (2 + through + 2 * need_b + need_a)
    if order == "logits_from_x":  # W = b Zᵀ, X W | E Wᵀ | V = Xᵀ E, bᵀ V | V Z
        of_rows = 2 * m * n * d * (1 + need_x + through)
        narrow += m * d * k * (1 + by_gram) + 2 * m * d * k * (through + need_b)
    else:  # P, P Zᵀ | D = E Z | D bᵀ | Pᵀ E | Xᵀ D
        of_rows = n * d * k * (1 + need_x + need_b) + 2 * m * n * k * (1 + (need_x or need_b) + through)
    return 2 * (of_rows + narrow)


count_by(torch.ops.interp_nn.summary, summary_flops)
count_by(torch.ops.interp_nn.summary_pair, _pair_flops)
count_by(torch.ops.interp_nn.summary_backward, _backward_flops)
count_by(torch.ops.interp_nn.summary_cross_entropy, _loss_flops)
count_by(torch.ops.interp_nn.summary_cross_entropy_backward, _loss_backward_flops)
if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Finder())
