"""What every layer with a weight b has: Gram matrix, spectrum, orthogonality, and a cache of its effective weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from interp_nn import linalg
from interp_nn.ops.library import is_dtensor, is_wrapped, transforming

_EXACT = (torch.float32, torch.float64)


class _Kept(NamedTuple):
    """value: what was computed from `sources`; identity: theirs at that time, and they, so that no others come to lie there."""

    value: Tensor
    identity: tuple[Any, ...]
    sources: list[Tensor]


class LinearForm(nn.Module):
    """A module whose `weight` (out, ...) holds bᵀ: flattened to (out, in), its transpose is the b (in, out) of the maths.

    With `groups` > 1 (grouped convolutions) each group of output channels has a b of its own; matrices are then batched.
    """

    weight: nn.Parameter
    groups: int = 1
    constraint: str | None = None  # set by `constraints.constrain`

    # The smaller square product of b that a forward formed, under the constraint "penalty": none or one, and the hook on
    # `weight` that takes it away.
    _square: tuple[list[_Kept], RemovableHandle] | None = None

    def matrix(self) -> Tensor:
        """b (in, out), a view of `weight`; (groups, in, out per group) for grouped layers."""
        return self._matrix_of(self.weight)

    def whole_matrix(self) -> Tensor:
        """`matrix()`, gathered from all devices where `weight` is a DTensor."""
        weight: Any = self.weight
        return self._matrix_of(weight.full_tensor() if is_dtensor(weight) else weight)

    def _matrix_of(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return rows.t() if self.groups == 1 else rows.unflatten(0, (self.groups, -1)).mT

    def gram(self) -> Tensor:
        """Gram matrix bᵀb (out, out), differentiable."""
        return linalg.gram(self.matrix())

    def effective_weight(self) -> Tensor:
        """b (bᵀb) in the shape of `weight`, differentiable: the weight of the linear layer that this one is."""
        return linalg.effective_weight(self.matrix()).mT.reshape(self.weight.shape)

    def spectrum(self) -> Tensor:
        """The min(in, out) singular values of b in descending order, fp64. Those of the effective weight are their cubes."""
        return linalg.singular_values(self.whole_matrix())

    def orthogonality_defect(self) -> float:
        """max |s - 1| over the singular values s of b: 0 where b has orthonormal columns (or rows)."""
        return linalg.orthogonality_defect(self.whole_matrix())

    @torch.no_grad()
    def orthogonalize_(self) -> float:
        """Replace b by its polar factor, the nearest orthonormal matrix; return the orthogonality defect reached."""
        b = self.whole_matrix()
        results = [linalg.orthogonalize(m) for m in (b if self.groups > 1 else b.unsqueeze(0))]
        factor = torch.cat([r.factor.mT for r in results])
        self._set_weight(factor.view(self.weight.shape))
        return max(r.defect for r in results)

    @torch.no_grad()
    def reset_orthogonal_(self) -> None:
        """Draw b as a random orthonormal matrix, in fp32 at least."""
        if self.weight.is_meta or self.weight.numel() == 0:
            return
        rows = self.weight.flatten(1).unflatten(0, (self.groups, -1))
        draw = torch.empty_like(
            rows, dtype=linalg.accumulation_dtype(rows.dtype), memory_format=torch.contiguous_format
        )
        for part in draw:
            nn.init.orthogonal_(part)
        self._set_weight(draw.view(self.weight.shape))

    def known_square(self) -> Tensor | None:
        """The smaller square product of b, detached, that the last forward of a penalised layer formed; None if b may differ.

        Fused optimizers change a weight and PyTorch records nothing, but none changes a weight without a gradient: so it is
        known from a forward that found none until the weight gets one.
        """
        weight = self._parameters.get("weight")
        if self._square is None or type(weight) is not nn.Parameter or weight.grad is not None:
            return None
        if torch.compiler.is_compiling() or transforming():
            return None
        kept = self._square[0]
        return kept[0].value if kept and kept[0].identity == self._identity() else None

    def _keep_square(self, square: Tensor | None) -> None:
        """Keep what `known_square` gives; not of 16-bit weights, as bᵀb - I cancels, nor what only lives in a transform."""
        weight = self._parameters.get("weight")
        if torch.compiler.is_compiling() or transforming() or not torch.is_grad_enabled():
            return
        self._drop_square()
        if square is None or type(weight) is not nn.Parameter or not weight.requires_grad or weight.grad is not None:
            return
        if square.dtype == weight.dtype in _EXACT:
            kept = [self._kept(square.detach())]
            self._square = kept, weight.register_hook(lambda _: kept.clear())

    def _drop_square(self) -> None:
        if self._square is not None:
            self._square[1].remove()
            self._square = None

    def _kept(self, value: Tensor) -> _Kept:
        return _Kept(value, self._identity(), [t.detach() for t in self._sources()])

    def _identity(self) -> tuple[Any, ...]:
        return tuple(map(_mark, self._sources()))

    def _sources(self) -> list[Tensor]:
        """What the weight is made of: itself, or all that its parametrization computes it from."""
        if "weight" not in self._parameters and parametrize.is_parametrized(self, "weight"):
            made = self.get_submodule("parametrizations.weight")
            return [*made.parameters(), *made.buffers()]
        return [self.weight]

    @torch.no_grad()
    def _set_weight(self, value: Tensor) -> None:
        if parametrize.is_parametrized(self, "weight"):
            self.weight = value  # type: ignore[assignment] # through the parametrization's right inverse
        elif is_dtensor(self.weight):
            from torch.distributed.tensor import DTensor, Replicate

            mesh = self.weight.device_mesh  # type: ignore[attr-defined]
            self.weight.copy_(DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False))
        else:
            self.weight.copy_(value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._drop_square()  # before its weight's memory goes
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_square"}

    def _note(self) -> str:
        return f", constraint={self.constraint!r}" if self.constraint else ""


class Freezable(LinearForm):
    """A linear form whose forward is a plain linear layer with its effective weight, which can be kept."""

    _frozen: _Kept | None = None

    def freeze(self) -> Any:
        """Keep the effective weight: from now on a forward costs exactly a plain linear layer's, and `weight` gets no gradient.

        The kept weight is recomputed when `weight`, or what a parametrization computes it from, changes in a way PyTorch
        records (another tensor, an in-place write, another dtype or device). What PyTorch does not record goes unseen: a
        write through `.data`, a step of a fused optimizer, any write under torch.compile. `unfreeze()`, `train()` and
        `load_state_dict()` drop it; `eval()` alone keeps nothing. Returns the module.
        """
        self._frozen = self._freeze()
        return self

    def unfreeze(self) -> Any:
        """Drop the weight kept by `freeze`. Returns the module."""
        self._frozen = None
        return self

    def frozen_weight(self) -> Tensor | None:
        """The effective weight kept by `freeze`, brought up to date; None when not frozen."""
        if self._frozen is None:
            return None
        if torch.compiler.is_compiling() or self._frozen.identity == self._identity():
            return self._frozen.value
        now = self._freeze()
        if not transforming():  # where another weight may stand in for this layer's, for as long as the transform lasts
            self._frozen = now
        return now.value

    def train(self, mode: bool = True) -> Any:
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args)

    def _note(self) -> str:
        return super()._note() + (", frozen" if self._frozen is not None else "")

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        if self._frozen is not None:
            self._frozen = self._freeze()
        return self

    def _freeze(self) -> _Kept:
        # Whatever mode this is called in, the kept weight must serve in every other.
        with torch.inference_mode(False), torch.no_grad(), linalg.autocast_off(self.weight.device):
            return self._kept(self.effective_weight().contiguous().detach())


def _mark(t: Tensor) -> tuple[Any, ...]:
    """What changes where t becomes another tensor, or is written to in a way that PyTorch records."""
    if is_wrapped(t):
        return (id(t),)
    local: Tensor = t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]
    return local.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device


def copy_parameters(source: nn.Module, to: nn.Module, weight: Tensor) -> None:
    """Give `to` the weight, and the bias and the flags of `source`."""
    for name, value in (("weight", weight), ("bias", source.bias)):
        if value is not None:
            trains = getattr(source, name).requires_grad  # of a parametrized weight, only told where gradients are on
            with torch.no_grad():
                getattr(to, name).copy_(value).requires_grad_(trains)
    to.train(source.training)


def ties(model: nn.Module, layer: nn.Module, name: str) -> list[str]:
    """The parameters of a model's other modules that are this layer's parameter of that name."""
    parameter = layer._parameters.get(name)
    others = ((path, m) for path, m in model.named_modules() if m is not layer and parameter is not None)
    return [f"{path}.{of}".lstrip(".") for path, m in others for of, p in m._parameters.items() if p is parameter]


def check_preserve(preserve: str) -> None:
    """Raise ValueError for what a conversion cannot keep."""
    if preserve not in ("function", "weight"):
        raise ValueError(f"preserve: got {preserve!r}, want 'function' or 'weight'")


def root(name: str, weight: Tensor, preserve: str, groups: int = 1) -> Tensor:
    """The `weight` to give a summary layer made from the layer `name`: its cube root ("function") or itself ("weight")."""
    check_preserve(preserve)
    if isinstance(weight, nn.UninitializedParameter):
        raise TypeError(f"{name}: its weight is uninitialized (a lazy module); run it once first")
    if preserve == "weight" or weight.numel() == 0:
        return weight.detach()
    rows = weight.detach().flatten(1).unflatten(0, (groups, -1))
    return linalg.cube_root(rows).view(weight.shape)


def exact_effective(weight: Tensor, groups: int = 1) -> Tensor:
    """The effective weight of a summary layer's `weight`, in its shape and in fp64."""
    if weight.numel() == 0:
        return weight.detach().double()
    b = weight.detach().double().flatten(1).unflatten(0, (groups, -1)).mT
    return linalg.effective_weight(b).mT.reshape(weight.shape)


def folded(layer: LinearForm) -> Tensor:
    """The effective weight, computed in fp64 and rounded once."""
    return exact_effective(layer.weight, layer.groups).to(layer.weight.dtype)


def meta_arguments(layer: Any, *names: str) -> dict[str, Any]:
    """What makes a layer like `layer` on the meta device: nothing is drawn for parameters that are about to be copied."""
    given = {name: getattr(layer, name) for name in names}
    return given | {"bias": layer.bias is not None, "device": "meta", "dtype": layer.weight.dtype}
