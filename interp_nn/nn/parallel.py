"""Shard summary layers over several devices with PyTorch's DTensor.

Data-parallel training does not need this: DistributedDataParallel and fully_shard work with the layers unchanged. Importing
this file imports torch.distributed.tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor

from interp_nn.functional import SummaryPair
from interp_nn.nn.heads import SummaryLayer
from interp_nn.nn.linear import SummaryLinear
from interp_nn.nn.weights import tied_parameters

# Placements of b (in, out), bias (out,) and a local input, by the dimension that is sharded.
_PLACES: dict[str, tuple[Placement, Placement, Placement]] = {
    "rows": (Replicate(), Replicate(), Shard(0)),
    "inputs": (Shard(0), Replicate(), Replicate()),
    "outputs": (Shard(1), Shard(0), Replicate()),
}


def parallelize(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> nn.Module:
    """Shard layers of a model over a one-dimensional mesh of devices, in place.

    Inputs and results of the layers are local tensors. The parameters become DTensors, so create the optimizer afterwards.

    Args:
        model: The model, changed in place.
        mesh: A mesh of one dimension.
        plan: Maps the path of a SummaryLinear or SummaryLayer to the dimension to shard:

            - "rows": each device has all of b and passes its own rows of x. Gradients are those of the sum of the devices'
              losses.
            - "inputs": each device has a part of the d rows of b. Projection and Gram matrix are summed over the devices.
              Every device passes the same x and gets the whole result.
            - "outputs": each device has a part of the k columns of b, which is gathered for the Gram matrix. Every device
              passes the same x and gets the whole result.

    Returns:
        The model.

    Raises:
        TypeError: A path is that of another kind of module.
        ValueError: The mesh has more dimensions; a path is not in the model; a layer is sharded already, is named twice, or
            has a parameter that is tied to another module's. The message names the path. So do errors in a layer's forward.

    Example:
        >>> from torch import distributed
        >>> distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
        >>> model = parallelize(nn.Sequential(SummaryLinear(4, 3)), DeviceMesh("cpu", [0]), {"0": "rows"})
        >>> model[0].b.placements
        (Replicate(),)
        >>> distributed.destroy_process_group()
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: got {mesh.ndim} dimensions, want one (take mesh['name'] of a larger one)")
    modules = dict(model.named_modules(remove_duplicate=False))
    taken: dict[nn.Module, str] = {}
    for path, over in plan.items():
        if path not in modules:
            near = get_close_matches(path, modules) or [name for name in modules if name]
            raise ValueError(f"plan: no module {path!r} in the model; near it: {', '.join(near[:5])}")
        if over not in _PLACES:
            raise ValueError(f"{path}: got {over!r}, want one of {', '.join(map(repr, _PLACES))}")
        if type(modules[path]) not in (SummaryLinear, SummaryLayer):
            raise TypeError(f"{path}: got {type(modules[path]).__name__}, want SummaryLinear or SummaryLayer")
        if isinstance(modules[path].b, DTensor):
            raise ValueError(f"{path}: its parameters are DTensors already")
        first = taken.setdefault(modules[path], path)
        if first != path:
            raise ValueError(f"{path}: is the same module as {first!r}; name it once")
        for name in ("b", "bias"):
            if others := tied_parameters(model, modules[path], name):
                raise ValueError(f"{path}: its {name} is tied to {', '.join(others)}, and would not be afterwards")
    for path, over in plan.items():
        layer = modules[path]
        assert isinstance(layer, (SummaryLinear, SummaryLayer))
        _share(layer, path, mesh, over)
    return model


def _share(layer: SummaryLinear | SummaryLayer, path: str, mesh: DeviceMesh, over: str) -> None:
    b_place, bias_place, input_place = _PLACES[over]

    def partition(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, place in (("b", b_place), ("bias", bias_place)):
            parameter = getattr(module, name, None)
            if parameter is not None:
                shared = distribute_tensor(parameter.detach(), mesh, [place])
                setattr(module, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))

    features = layer.in_features

    def enter(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[DTensor]:
        if not inputs:
            raise TypeError(
                f"{path}: input: got it by keyword, want it by position: hooks shard it, and see no keywords"
            )
        (x,) = inputs
        if not isinstance(x, Tensor) or isinstance(x, DTensor):
            raise TypeError(f"{path}: x: got {type(x).__name__}, want a local torch.Tensor")
        if x.dim() < 2 or x.shape[-1] != features:
            raise ValueError(f"{path}: x: got shape {tuple(x.shape)}, want (..., n, {features})")
        return (DTensor.from_local(x, mesh, [input_place], run_check=False),)

    def leave(_: nn.Module, out: Any, mesh: DeviceMesh) -> Any:
        if isinstance(out, DTensor):
            return out.redistribute(placements=[input_place]).to_local()
        return SummaryPair(*(leave(_, part, mesh) for part in out))

    distribute_module(layer, mesh, partition, enter, leave)  # type: ignore[arg-type] # whose hooks do return something
