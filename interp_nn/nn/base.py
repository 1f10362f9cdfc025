"""Base classes of the layers with a weight b: Gram matrix, spectrum, orthogonality, and a cache of the effective weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from interp_nn import linalg
from interp_nn.ops.library import is_dtensor, is_wrapped, transforming

_EXACT = (torch.float32, torch.float64)


class _Cached(NamedTuple):
    """A value computed from `sources`, and their identity (address, version, ...) at that time.

    The sources are kept alive, so that no other tensor gets their addresses.
    """

    value: Tensor
    identity: tuple[Any, ...]
    sources: list[Tensor]


class LinearForm(nn.Module):
    """Base class of layers with a weight b.

    `weight` (out, ...) holds bᵀ: flattened to (out, in), its transpose is b (in, out). With `groups` > 1 (grouped
    convolutions) each group of output channels has its own b, and matrices are batched.
    """

    weight: nn.Parameter
    groups: int = 1
    constraint: str | None = None  # set by `orthogonality.constrain`

    # Under the constraint "penalty": a list of none or one Gram matrix that a forward formed, and the hook on `weight` that
    # empties the list.
    _gram_cache: tuple[list[_Cached], RemovableHandle] | None = None

    def matrix(self) -> Tensor:
        """Return b (in, out), a view of `weight`; (groups, in, out per group) for grouped layers."""
        return self._matrix_of(self.weight)

    def whole_matrix(self) -> Tensor:
        """Return `matrix()`, gathered from all devices if `weight` is a DTensor."""
        weight: Any = self.weight
        return self._matrix_of(weight.full_tensor() if is_dtensor(weight) else weight)

    def _matrix_of(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return rows.t() if self.groups == 1 else rows.unflatten(0, (self.groups, -1)).mT

    def gram(self) -> Tensor:
        """Compute the Gram matrix bᵀb (out, out), differentiable; (groups, ...) for grouped layers."""
        return linalg.gram(self.matrix())

    def effective_weight(self) -> Tensor:
        """Compute b (bᵀb) in the shape of `weight`, differentiable: the weight of the plain layer with the same outputs."""
        return linalg.effective_weight(self.matrix()).mT.reshape(self.weight.shape)

    def spectrum(self) -> Tensor:
        """Compute the singular values of b, (min(in, out),) float64, descending; the effective weight has their cubes."""
        return linalg.singular_values(self.whole_matrix())

    def orthogonality_defect(self) -> float:
        """Compute max |s - 1| over the singular values s of b. It is 0 if b has orthonormal columns or rows."""
        return linalg.orthogonality_defect(self.whole_matrix())

    @torch.no_grad()
    def orthogonalize_(self) -> float:
        """Replace b by its polar factor, the nearest orthonormal matrix; return the orthogonality defect left."""
        b = self.whole_matrix()
        results = [linalg.orthogonalize(m) for m in (b if self.groups > 1 else b.unsqueeze(0))]
        factor = torch.cat([r.factor.mT for r in results])
        self._set_weight(factor.view(self.weight.shape))
        return max(r.defect for r in results)

    @torch.no_grad()
    def reset_orthogonal_(self) -> None:
        """Draw b as a random orthonormal matrix, in float32 or float64."""
        if self.weight.is_meta or self.weight.numel() == 0:
            return
        rows = self.weight.flatten(1).unflatten(0, (self.groups, -1))
        draw = torch.empty_like(
            rows, dtype=linalg.accumulation_dtype(rows.dtype), memory_format=torch.contiguous_format
        )
        for part in draw:
            nn.init.orthogonal_(part)
        self._set_weight(draw.view(self.weight.shape))

    def cached_gram(self) -> Tensor | None:
        """Return the smaller Gram matrix of b, detached, that a penalised layer's last forward formed; None if b may differ.

        A fused optimizer changes a weight without a trace in PyTorch, but only a weight with a gradient. The cache is valid
        from a forward without a gradient until the weight gets one.
        """
        weight = self._parameters.get("weight")
        if self._gram_cache is None or type(weight) is not nn.Parameter or weight.grad is not None:
            return None
        if torch.compiler.is_compiling() or transforming(weight):
            return None
        cached = self._gram_cache[0]
        return cached[0].value if cached and cached[0].identity == self._identity() else None

    def _cache_gram(self, g: Tensor | None) -> None:
        """Cache a Gram matrix; not of 16-bit weights, where bᵀb - I cancels, nor under a torch.func transform."""
        weight = self._parameters.get("weight")
        if torch.compiler.is_compiling() or transforming(weight, g) or not torch.is_grad_enabled():
            return
        self._drop_gram()
        if g is None or type(weight) is not nn.Parameter or not weight.requires_grad or weight.grad is not None:
            return
        if g.dtype == weight.dtype in _EXACT:
            cached = [self._cached(g.detach())]
            self._gram_cache = cached, weight.register_hook(lambda _: cached.clear())

    def _drop_gram(self) -> None:
        if self._gram_cache is not None:
            self._gram_cache[1].remove()
            self._gram_cache = None

    def _cached(self, value: Tensor) -> _Cached:
        return _Cached(value, self._identity(), [t.detach() for t in self._sources()])

    def _identity(self) -> tuple[Any, ...]:
        return tuple(map(_version_of, self._sources()))

    def _sources(self) -> list[Tensor]:
        """Return the tensors that determine the weight: itself, or all tensors of its parametrization."""
        if "weight" not in self._parameters and parametrize.is_parametrized(self, "weight"):
            made = self.get_submodule("parametrizations.weight")
            return [*made.parameters(), *made.buffers()]
        return [self.weight]

    @torch.no_grad()
    def _set_weight(self, value: Tensor) -> None:
        if parametrize.is_parametrized(self, "weight"):
            self.weight = value  # type: ignore[assignment] # by the parametrization's right inverse
        elif is_dtensor(self.weight):
            from torch.distributed.tensor import DTensor, Replicate

            mesh = self.weight.device_mesh  # type: ignore[attr-defined]
            self.weight.copy_(DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False))
        else:
            self.weight.copy_(value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._drop_gram()  # before the weight's memory is freed
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_gram_cache"}

    def _note(self) -> str:
        return f", constraint={self.constraint!r}" if self.constraint else ""


class Freezable(LinearForm):
    """Base class of layers whose forward is a plain layer with the effective weight, which `freeze` caches."""

    _frozen: _Cached | None = None

    def freeze(self) -> Any:
        """Cache the effective weight: a forward then costs as much as the plain layer's, and `weight` gets no gradient.

        The cache is recomputed when `weight`, or a tensor of its parametrization, changes in a way that PyTorch records:
        another tensor, an in-place write, another dtype or device. It is not recomputed after a write through `.data`, a step
        of a fused optimizer, or a write under torch.compile. `unfreeze()`, `train()` and `load_state_dict()` drop it;
        `eval()` does not create it.

        Returns:
            The module.
        """
        self._frozen = self._freeze()
        return self

    def unfreeze(self) -> Any:
        """Drop the weight cached by `freeze`; return the module."""
        self._frozen = None
        return self

    def frozen_weight(self) -> Tensor | None:
        """Return the effective weight cached by `freeze`, recomputed if `weight` has changed; None if not frozen."""
        if self._frozen is None:
            return None
        if torch.compiler.is_compiling() or self._frozen.identity == self._identity():
            return self._frozen.value
        now = self._freeze()
        if not transforming(self.weight):  # a transform may have replaced the layer's weight for as long as it lasts
            self._frozen = now
        return now.value

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode; return the module. Training mode drops the weight cached by `freeze`."""
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

    def _freeze(self) -> _Cached:
        # The cached weight must serve in every mode, whichever this is called in.
        with torch.inference_mode(False), torch.no_grad(), linalg.autocast_off(self.weight.device):
            return self._cached(self.effective_weight().contiguous().detach())


def _version_of(t: Tensor) -> tuple[Any, ...]:
    """Return a value that changes when t becomes another tensor, or is written to in a way that PyTorch records."""
    if is_wrapped(t):
        return (id(t),)
    local: Tensor = t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]
    return local.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device
