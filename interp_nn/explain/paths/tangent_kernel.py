"""The tangent kernel of a network of finite width: how much a step of training on one sample moves the output at another.

With gates that are held, and weights that are independent with variance s² and a symmetric distribution, its mean over weights
is d s^(2 (d - 1)) H for d layers of weights and the neural path kernel H (Lakshminarayanan & Singh, 2020, arXiv 2006.10529).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from interp_nn.explain.following.gate_record import supported_ops
from interp_nn.explain.following.replay import check_model
from interp_nn.explain.paths.tiling import tiled
from interp_nn.nn.gated.networks import GatedNetwork

_JACOBIAN_BYTES = 1 << 28


def ntk(
    model: nn.Module, X: Tensor, Y: Tensor | None = None, *, fixed_gates: bool = False, chunk: int | None = None
) -> Tensor:
    """<dy(x) / dtheta, dy(x') / dtheta> (n, m) of samples X (n, ...) and Y (m, ...; default: X), at the model's own parameters.

    theta: the parameters that require gradients. Of several outputs it is the mean: the trace of the kernel (outputs, outputs)
    over their number, which for many units comes near each of its diagonal entries. fixed_gates: gates do not move: of a
    `GatedNetwork` theta is its value network's alone; of a ReLU network nothing changes, as its gates have no derivative.
    chunk: samples whose Jacobians (outputs x parameters each) are held at a time, twice; by default those of 256 MiB.

    Raises ValueError for a model without trained parameters, in training mode where that couples samples, or with other
    nonlinearities than gates where those are to be fixed.
    """
    check_model(model)
    dual = model if fixed_gates and isinstance(model, GatedNetwork) else None
    if fixed_gates and dual is None and not supported_ops(model, X[:1]).exact:
        raise ValueError("fixed_gates: the model has operations that are no gates; see `supported_ops`")
    network: nn.Module = model if dual is None else dual.value
    trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model: none of its parameters requires a gradient")

    def output(parameters: dict[str, Tensor], z: Tensor, gates: list[Tensor]) -> Tensor:
        row = (z.unsqueeze(0), *([[g.unsqueeze(0) for g in gates]] if dual is not None else []))
        return functional_call(network, parameters, row).flatten()

    def jacobians(x: Tensor) -> list[Tensor]:
        gates: list[Tensor] = []
        if dual is not None:
            with torch.no_grad():
                gates = dual.value_gates(dual.gating(x))
            x = torch.ones_like(x) if dual.value_input == "ones" else x
        by_parameter = vmap(jacrev(output), in_dims=(None, 0, 0))(trained, x, gates)
        return [j.flatten(2) for j in by_parameter.values()]

    def tile(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([i.flatten(1) @ j.flatten(1).T for i, j in zip(a, b, strict=True)]).sum(0) / a[0].shape[1]

    with torch.no_grad():
        y = model(X[:1])
    size = y.numel() * y.element_size() * sum(p.numel() for p in trained.values())
    return tiled(
        (len(X), len(X if Y is None else Y)),
        max(1, _JACOBIAN_BYTES // max(1, size)) if chunk is None else chunk,
        lambda rows: jacobians(X[rows]),
        None if Y is None else lambda columns: jacobians(Y[columns]),
        tile,
        y.dtype,
        X.device,
        want=("finite outputs and derivatives, or a model and X of torch.float64", "a model and X of torch.float64"),
    )
