"""The tangent kernel of a network of finite width.

It says how much a training step on one sample moves the output at another. Take fixed gates, d layers, and independent weights
with variance s² and a symmetric distribution. Then its mean over the weights is d s^(2 (d - 1)) H, with the neural path kernel H
(Lakshminarayanan & Singh, 2020, arXiv 2006.10529).
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
    model: nn.Module,
    x: Tensor,
    other_x: Tensor | None = None,
    *,
    fixed_gates: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute the neural tangent kernel <dy(x) / dtheta, dy(x') / dtheta> at the model's own parameters theta.

    theta are the parameters that require gradients. For several outputs, the kernel is the mean over them: the trace of the
    (outputs, outputs) kernel divided by the number of outputs. In wide networks all its diagonal entries come near that mean.

    Args:
        model: Any network whose samples do not depend on each other.
        x: Samples of shape (n, ...), in the model's dtype.
        other_x: Samples of shape (m, ...). Default: x.
        fixed_gates: Keep the gates fixed. For a `GatedNetwork`, theta is then the value network's parameters. For a ReLU network
            nothing changes, because its gates have no derivative.
        chunk_size: Number of samples in a tile. Two tiles' Jacobians (outputs x parameters for each sample) are in memory at a
            time. Default: the number that takes 256 MiB.

    Returns:
        Tensor of shape (n, m), in the dtype of the model's output.

    Raises:
        TypeError: The model is no `nn.Module`.
        ValueError: No parameter requires a gradient, a layer is in training mode where that couples samples, chunk_size is below
            1, or fixed_gates is given for a model with nonlinearities that are no gates.

    Example:
        >>> ntk(nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[5., 2.],
                [2., 1.]])

    Source: Jacot, Gabriel & Hongler (2018), arXiv 1806.07572.
    """
    check_model(model)
    dual = model if fixed_gates and isinstance(model, GatedNetwork) else None
    if fixed_gates and dual is None and not supported_ops(model, x[:1]).exact:
        raise ValueError(
            "fixed_gates: got True, but the model has operations that are no gates; `supported_ops` lists them; want False"
        )
    network: nn.Module = model if dual is None else dual.value
    trained = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model: none of its parameters requires a gradient, want at least one")

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
        y = model(x[:1])
    size = y.numel() * y.element_size() * sum(p.numel() for p in trained.values())
    return tiled(
        (len(x), len(x if other_x is None else other_x)),
        max(1, _JACOBIAN_BYTES // max(1, size)) if chunk_size is None else chunk_size,
        lambda rows: jacobians(x[rows]),
        None if other_x is None else lambda columns: jacobians(other_x[columns]),
        tile,
        y.dtype,
        x.device,
        want=("finite outputs and derivatives, or a model and x of torch.float64", "a model and x of torch.float64"),
    )
