"""What every layer with a weight b has: Gram matrix, spectrum, orthogonality, and a cache of its effective weight."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interp_nn import linalg
from interp_nn.ops.library import transforming

_EXACT = (torch.float32, torch.float64)


class LinearForm(nn.Module):
    """A module whose `weight` (out, ...) holds bᵀ: flattened to (out, in), its transpose is the b (in, out) of the maths.

    With `groups` > 1 (grouped convolutions) each group of output channels has a b of its own; matrices are then batched.
    """

    weight: nn.Parameter
    groups: int = 1
    constraint: str | None = None  # set by `constraints.constrain`

    # The smaller square product of b that a forward formed, kept under the constraint "penalty", and what it was computed
    # from: that tensor itself too, so that no other comes to lie at its address.
    _square: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def matrix(self) -> Tensor:
        """b (in, out), a view of `weight`; (groups, in, out per group) for grouped layers."""
        rows = self.weight.flatten(1)
        return rows.t() if self.groups == 1 else rows.unflatten(0, (self.groups, -1)).mT

    def gram(self) -> Tensor:
        """Gram matrix bᵀb (out, out), differentiable."""
        return linalg.gram(self.matrix())

    def effective_weight(self) -> Tensor:
        """b (bᵀb) in the shape of `weight`, differentiable: the weight of the linear layer that this one is."""
        return linalg.effective_weight(self.matrix()).mT.reshape(self.weight.shape)

    def spectrum(self) -> Tensor:
        """The min(in, out) singular values of b in descending order, fp64. Those of the effective weight are their cubes."""
        return linalg.singular_values(self.matrix())

    def orthogonality_defect(self) -> float:
        """max |s - 1| over the singular values s of b: 0 where b has orthonormal columns (or rows)."""
        return linalg.orthogonality_defect(self.matrix())

    @torch.no_grad()
    def orthogonalize_(self) -> float:
        """Replace b by its polar factor, the nearest orthonormal matrix; return the orthogonality defect reached."""
        b = self.matrix()
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
        """The smaller square product of b, detached, that the last forward of a penalised layer formed; None if b has changed."""
        if self._square is None or torch.compiler.is_compiling() or self._square[1] != self._identity():
            return None
        return self._square[0]

    def _keep_square(self, square: Tensor | None) -> None:
        """Keep what `known_square` gives; not of 16-bit weights, as bᵀb - I cancels, nor what only lives in a transform."""
        weight = self._parameters.get("weight")
        if torch.compiler.is_compiling() or transforming() or not torch.is_grad_enabled():
            return
        self._square = None
        if square is not None and type(weight) is nn.Parameter and square.dtype == weight.dtype in _EXACT:
            self._square = square.detach(), self._identity(), weight.detach()

    def _identity(self) -> tuple[Any, ...]:
        w = self.weight
        return w.data_ptr(), None if w.is_inference() else w._version, w.dtype, w.device

    @torch.no_grad()
    def _set_weight(self, value: Tensor) -> None:
        if parametrize.is_parametrized(self, "weight"):
            self.weight = value  # type: ignore[assignment] # through the parametrization's right inverse
        else:
            self.weight.copy_(value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._square = None  # before its weight's memory goes
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_square"}

    def _note(self) -> str:
        return f", constraint={self.constraint!r}" if self.constraint else ""


class Freezable(LinearForm):
    """A linear form whose forward is a plain linear layer with its effective weight, which can be kept."""

    # The kept weight, what it was computed from, and that tensor itself, so that no other comes to lie at its address.
    _frozen: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def freeze(self) -> Any:
        """Keep the effective weight: from now on a forward costs exactly a plain linear layer's, and `weight` gets no gradient.

        The kept weight is recomputed when `weight` changes in a way PyTorch records (another tensor, an in-place write,
        another dtype or device); a write through `.data`, or any write under torch.compile, goes unseen. `unfreeze()`,
        `train()` and `load_state_dict()` drop it; `eval()` alone keeps nothing. Returns the module.
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
        if not torch.compiler.is_compiling() and self._frozen[1] != self._identity():
            self._frozen = self._freeze()
        return self._frozen[0]

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

    def _freeze(self) -> tuple[Tensor, tuple[Any, ...], Tensor]:
        # Whatever mode this is called in, the kept weight must serve in every other.
        with torch.inference_mode(False), torch.no_grad(), autocast_off(self.weight.device):
            return self.effective_weight().contiguous(), self._identity(), self.weight.detach()


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which nothing is cast, on devices with and without autocast."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def copy_parameters(source: nn.Module, to: nn.Module, weight: Tensor) -> None:
    """Give `to` the weight, and the bias and the flags of `source`."""
    for name, value in (("weight", weight), ("bias", source.bias)):
        if value is not None:
            trains = getattr(source, name).requires_grad  # of a parametrized weight, only told where gradients are on
            with torch.no_grad():
                getattr(to, name).copy_(value).requires_grad_(trains)
    to.train(source.training)


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
