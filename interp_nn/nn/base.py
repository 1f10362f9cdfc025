"""Base classes of the layers with a parameter b: Gram matrix, spectrum, orthogonality, and a cache of the effective weight."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from interp_nn import linalg
from interp_nn.nn import diagnosis
from interp_nn.nn.effective_weight import READ_ONLY, EffectiveWeight
from interp_nn.nn.symbolic import weight_in_graph
from interp_nn.ops.library import is_dtensor, is_wrapped, transforming

_EXACT = (torch.float32, torch.float64)
_OLD_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


class _Cached(NamedTuple):
    """A value computed from `sources`, and their identity (address, version, ...) at that time.

    The sources are kept alive, so that no other tensor gets their addresses.
    """

    value: Tensor
    identity: tuple[Any, ...]
    sources: list[Tensor]


class LinearForm(nn.Module):
    """Base class of layers with a parameter b.

    `b` is (in, out), or has the layout of a convolution's kernels, (out, in / groups, kh, kw): flattened to rows and
    transposed, those are b, one for each group of output channels. `weight` is the effective weight, computed from b.
    """

    b: nn.Parameter
    groups: int = 1
    constraint: str | None = None  # set by `orthogonality.constrain`
    __jit_unused_properties__ = ("weight", "_parameters")

    # Under the constraint "penalty": a list of none or one Gram matrix that a forward formed, and the hook on `b` that
    # empties the list.
    _gram_cache: tuple[list[_Cached], RemovableHandle] | None = None

    @property
    def _parameters(self) -> dict[str, nn.Parameter | None]:
        """The parameters. A read by PyTorch's old hooks, which replace `weight` in this dictionary, raises ValueError.

        Forwards read `self.__dict__["_parameters"]`, as nn.Module does, and pass this by.
        """
        if not torch.compiler.is_compiling():
            caller = sys._getframe(1)
            if caller.f_globals.get("__name__") in _OLD_HOOKS and caller.f_locals.get("name") == "weight":
                raise ValueError(f"{READ_ONLY}; torch.nn.utils.weight_norm and spectral_norm take name='b', too")
        return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, value: dict[str, nn.Parameter | None]) -> None:
        self.__dict__["_parameters"] = value

    @property
    def weight(self) -> Tensor:
        """The effective weight W, in the layout of the plain layer's weight: (out, in), or (out, in / groups, kh, kw).

        It is differentiable with respect to b, and cannot be written: in-place operations and assignments raise ValueError. Use
        `set_weight_`, `reset_parameters` or `fold`. Each read computes it, with two products of 2 in out min(in, out)
        operations; a frozen layer returns its cached weight. Where b is sharded, a read is collective: every rank must read,
        and gets a DTensor. Compiled code, torch.func and sharded layers get a plain tensor, whose in-place writes are lost.
        """
        if (proxy := weight_in_graph(self)) is not None:
            return proxy
        try:
            return EffectiveWeight.of(self._weight_now())
        except AttributeError as error:  # nn.Module would report a missing attribute `weight`
            raise RuntimeError(f"weight: cannot be computed from b: {error}") from error

    @weight.setter
    def weight(self, value: object) -> None:
        raise ValueError(READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as nn.Module does. Raises ValueError for `weight`, which is computed from b.

        Pruning registers the weight that it has read under another name.
        """
        if name == "weight" or isinstance(param, EffectiveWeight):
            raise ValueError(READ_ONLY)
        super().register_parameter(name, param)

    @torch.no_grad()
    def set_weight_(self, weight: Tensor) -> None:
        """Set b so that the effective weight is `weight`. b gets the cube roots of its singular values, computed in float64.

        Args:
            weight: Tensor of `weight`'s shape, on any device and of any real dtype; where b is sharded, the same on all ranks.

        Raises:
            ValueError: The shape differs, or a value is not finite.
        """
        self._write(b_of_weight(self._checked_weight(weight), self.groups))

    def _checked_weight(self, weight: Tensor) -> Tensor:
        shape = weight_shape(self.b)
        if weight.shape != shape:
            raise ValueError(f"weight: got shape {tuple(weight.shape)}, want {tuple(shape)}")
        found = whole(weight).detach().to(self.b.device, self.b.dtype)
        if not bool(found.isfinite().all()):
            raise ValueError(f"weight: got a value that is not finite in {self.b.dtype}")
        return found

    def matrix(self) -> Tensor:
        """Return b (in, out), a view of the parameter; (groups, in, out per group) for grouped layers."""
        return as_matrix(self.b, self.groups)

    def whole_matrix(self) -> Tensor:
        """Return `matrix()`, gathered from all devices if `b` is a DTensor."""
        return as_matrix(whole(self.b), self.groups)

    def gram(self) -> Tensor:
        """Compute the Gram matrix bᵀb (out, out), differentiable; (groups, ...) for grouped layers."""
        return linalg.gram(self.matrix())

    def effective_weight(self) -> Tensor:
        """Compute `weight` as a plain tensor, differentiable: the weight of the plain layer with the same outputs."""
        weight = self._weight_of(self.matrix()).mT
        return weight if self.b.dim() == 2 else weight.reshape(self.b.shape)

    @torch.no_grad()
    def exact_weight(self) -> Tensor:
        """Compute `weight` in float64, without gradient."""
        exact = as_matrix(self.b.detach().double(), self.groups)
        return (self._weight_of(exact) if exact.numel() else exact).mT.reshape(weight_shape(self.b))

    def _weight_of(self, matrix: Tensor) -> Tensor:
        return linalg.effective_weight(matrix)

    def _weight_now(self) -> Tensor:
        return self.effective_weight().contiguous().to(memory_format=memory_format(self.b))

    def _is_summary(self) -> bool:
        return True

    def spectrum(self, weight: bool = False) -> Tensor:
        """Compute the singular values of b, or those of the effective weight, (min(in, out),) float64, descending.

        Raises ValueError if b is not finite. A summary warns once for a layer if its orthogonality defect exceeds 1.
        """
        s = linalg.singular_values(linalg.check_finite(self.whole_matrix()))
        if s.numel() and not s.is_meta and self._is_summary():
            diagnosis.look_at_norm(self, float(s.max()))
        return s.pow(3) if weight else s

    def orthogonality_defect(self) -> float:
        """Compute max |s - 1| over the singular values s of b. It is 0 if b has orthonormal columns or rows.

        Raises ValueError if b is not finite.
        """
        return linalg.orthogonality_defect(self.whole_matrix())

    @torch.no_grad()
    def orthogonalize_(self) -> float:
        """Replace b by its polar factor, the nearest orthonormal matrix; return the orthogonality defect left."""
        b = self.whole_matrix()
        results = [linalg.orthogonalize(m) for m in (b if self.groups > 1 else b.unsqueeze(0))]
        self._write(as_parameter(torch.stack([r.factor for r in results]), self.b.shape))
        return max(r.defect for r in results)

    @torch.no_grad()
    def reset_orthogonal_(self) -> None:
        """Draw b as a random orthonormal matrix, in float32 or float64."""
        if self.b.is_meta or self.b.numel() == 0:
            return
        rows = as_matrix(self.b, self.groups).mT
        draw = torch.empty_like(
            rows, dtype=linalg.accumulation_dtype(rows.dtype), memory_format=torch.contiguous_format
        )
        for part in draw if self.groups > 1 else draw.unsqueeze(0):
            nn.init.orthogonal_(part)
        self._write(as_parameter(draw.mT, self.b.shape))

    def cached_gram(self) -> Tensor | None:
        """Return the smaller Gram matrix of b, detached, that a penalised layer's last forward formed; None if b may differ.

        A fused optimizer changes b without a trace in PyTorch, but only a b with a gradient. The cache is valid
        from a forward without a gradient until b gets one.
        """
        b = self._parameters.get("b")
        if self._gram_cache is None or type(b) is not nn.Parameter or b.grad is not None:
            return None
        if torch.compiler.is_compiling() or transforming(b):
            return None
        cached = self._gram_cache[0]
        return cached[0].value if cached and cached[0].identity == self._identity() else None

    def _cache_gram(self, g: Tensor | None) -> None:
        """Cache a Gram matrix; not of a 16-bit b, where bᵀb - I cancels, nor under a torch.func transform."""
        b = self._parameters.get("b")
        if torch.compiler.is_compiling() or transforming(b, g) or not torch.is_grad_enabled():
            return
        self._drop_gram()
        if g is None or type(b) is not nn.Parameter or not b.requires_grad or b.grad is not None:
            return
        if g.dtype == b.dtype in _EXACT:
            cached = [self._cached(g.detach())]
            self._gram_cache = cached, b.register_hook(lambda _: cached.clear())

    def _drop_gram(self) -> None:
        if self._gram_cache is not None:
            self._gram_cache[1].remove()
            self._gram_cache = None

    def _cached(self, value: Tensor) -> _Cached:
        return _Cached(value, self._identity(), [t.detach() for t in self._sources()])

    def _identity(self) -> tuple[Any, ...]:
        return tuple(map(_version_of, self._sources()))

    def _sources(self) -> list[Tensor]:
        """Return the tensors that determine b: itself, or all tensors of its parametrization."""
        if "b" not in self._parameters and parametrize.is_parametrized(self, "b"):
            made = self.get_submodule("parametrizations.b")
            return [*made.parameters(), *made.buffers()]
        return [self.b]

    @torch.no_grad()
    def _write(self, value: Tensor) -> None:
        """Write a whole tensor of b's shape into b."""
        if parametrize.is_parametrized(self, "b"):
            self.b = value  # type: ignore[assignment] # by the parametrization's right inverse
        else:
            write_whole(self.b, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict and prefix + "b" not in state_dict:
            args[-1].append(
                f"{prefix}weight: is a plain layer's weight, or b of interp_nn 0.1, and is not the {prefix}b of a "
                f"{type(self).__name__}; load the state with interp_nn.convert.load_state_dict(model, state, source='linear') "
                "or source='summary-0.1'."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._drop_gram()  # before b's memory is freed
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        """Set training or evaluation mode; return the module.

        Evaluation mode warns, once, if b is not finite, or has an orthogonality defect above 1 in spite of a constraint.
        """
        if not mode:
            diagnosis.look(self)
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        diagnosis.look(self, prefix[:-1])
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_gram_cache"}

    def __prepare_scriptable__(self) -> Any:
        """Refuse torch.jit.script, which calls this for each module of a model."""
        raise TypeError(
            f"torch.jit.script: cannot compile {type(self).__name__}; call interp_nn.convert.fold(model) first, which makes "
            "plain layers of the same function, or use torch.jit.trace or torch.export.export"
        )

    def _refuse_quantized(self, name: str, value: Tensor) -> None:
        """Raise TypeError for an input of torch.ao's quantization in eager mode, which leaves these layers as they are."""
        if getattr(value, "is_quantized", False):
            raise TypeError(
                f"{name}: got a quantized tensor, {value.dtype}, for {type(self).__name__}({self.extra_repr()}), which torch.ao "
                "leaves in floating point; call interp_nn.convert.fold(model) before `prepare`, or put a DeQuantStub before it"
            )

    def _note(self) -> str:
        return f", constraint={self.constraint!r}" if self.constraint else ""


class Freezable(LinearForm):
    """Base class of layers whose forward is a plain layer with the effective weight, which `freeze` caches."""

    _frozen: _Cached | None = None

    def freeze(self) -> Any:
        """Cache the effective weight: a forward then costs as much as the plain layer's, and b gets no gradient.

        The cache is recomputed when b, or a tensor of its parametrization, changes in a way that PyTorch records:
        another tensor, an in-place write, another dtype or device. It is not recomputed after a write through `.data`, a step
        of a fused optimizer, or a write under torch.compile. `unfreeze()`, `train()` and `load_state_dict()` drop it;
        `eval()` does not create it.

        Returns:
            The module.
        """
        diagnosis.look(self)
        self._frozen = self._freeze()
        return self

    def unfreeze(self) -> Any:
        """Drop the weight cached by `freeze`; return the module."""
        self._frozen = None
        return self

    def frozen_weight(self) -> Tensor | None:
        """Return the effective weight cached by `freeze`, recomputed if b has changed; None if not frozen."""
        if self._frozen is None:
            return None
        if torch.compiler.is_compiling() or self._frozen.identity == self._identity():
            return self._frozen.value
        now = self._freeze()
        if not transforming(self.b):  # a transform may have replaced the layer's b for as long as it lasts
            self._frozen = now
        return now.value

    def _weight_now(self) -> Tensor:
        frozen = self.frozen_weight()
        return super()._weight_now() if frozen is None else frozen

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
        with torch.inference_mode(False), torch.no_grad(), linalg.autocast_off(self.b.device):
            return self._cached(super()._weight_now().detach())


def memory_format(t: Tensor) -> torch.memory_format:
    """Return channels_last for a four-dimensional t with such strides, else contiguous_format."""
    last = t.dim() == 4 and t.stride(1) == 1 and t.stride(3) == t.shape[1] > 1
    return torch.channels_last if last else torch.contiguous_format


def whole(t: Any) -> Tensor:
    """Return a tensor, gathered from all devices if it is a DTensor."""
    gathered: Tensor = t.full_tensor() if is_dtensor(t) else t
    return gathered


def as_placed(value: Tensor, like: Any) -> Tensor:
    """Return a whole tensor as a DTensor, replicated on the mesh of `like`, if that is one."""
    if not is_dtensor(like) or is_dtensor(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    placed: Tensor = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return placed


def write_whole(target: Any, value: Tensor) -> None:
    """Write a whole tensor into another one of its shape, or into the parts of a DTensor."""
    placed: Any = as_placed(value, target)
    target.copy_(placed.redistribute(placements=target.placements) if is_dtensor(target) else placed)


def as_matrix(b: Tensor, groups: int) -> Tensor:
    """Return the matrix b (in, out), or (groups, in, out per group), of a parameter: itself, or kernels (out, ...)."""
    if b.dim() == 2:
        return b
    rows = b.flatten(1)
    return rows.t() if groups == 1 else rows.unflatten(0, (groups, -1)).mT


def as_parameter(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Return a matrix b in the layout of a parameter of this shape, the inverse of `as_matrix`."""
    return matrix.reshape(shape) if len(shape) == 2 else matrix.mT.reshape(shape)


def b_of_weight(weight: Tensor, groups: int = 1, root: bool = True) -> Tensor:
    """Return the b whose effective weight is a plain layer's `weight`, in the layout of the parameter.

    `root=False` returns the weight itself in that layout, as b.
    """
    matrix = weight.detach().t() if weight.dim() == 2 else as_matrix(weight.detach(), groups)
    if root and weight.numel():
        matrix = linalg.cube_root(matrix)
    return as_parameter(matrix, weight_shape(weight)).contiguous()


def weight_shape(b: Tensor) -> torch.Size:
    """Return the shape of the effective weight of a parameter b; also the reverse."""
    return b.shape[::-1] if b.dim() == 2 else b.shape


def _version_of(t: Tensor) -> tuple[Any, ...]:
    """Return a value that changes when t becomes another tensor, or is written to in a way that PyTorch records."""
    if is_wrapped(t):
        return (id(t),)
    local: Tensor = t.to_local() if is_dtensor(t) else t  # type: ignore[attr-defined]
    return local.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device
