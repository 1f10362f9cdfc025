"""Base class of SummaryLinear and SummaryConv2d: a polynomial q, a spectral norm that divides b, and a learned gain."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from interp_nn import functional, linalg
from interp_nn.functional import constant
from interp_nn.nn.base import _EXACT, Freezable, as_matrix, as_parameter, as_placed, weight_shape, whole, write_whole
from interp_nn.nn.polynomials import SUMMARY, coefficients_of, inverse_map, map_of
from interp_nn.ops.library import is_dtensor, is_tracing, is_wrapped, ordinary
from interp_nn.ops.polynomial import FormedWeight

POWER_ITERATIONS = 10  # after a step of the optimizer, as published for PC layers
_MOST_ITERATIONS, _CHANGE = 100, 1e-3  # until the norm converges
_SAME = 0.05  # a loaded norm that is so near was the one of training, and stays
_UNIT = 4e-3  # bfloat16 rounds the length of a loaded `v` by less
Normalize = bool | Literal["restore"]


class Options(NamedTuple):
    """The options of a layer, checked, with the defaults of its polynomial.

    Attributes:
        polynomial: As given.
        coefficients: Those of q.
        normalize: False, True or "restore".
        gain: If True, a gain is learned.
    """

    polynomial: str | tuple[float, ...]
    coefficients: tuple[float, ...]
    normalize: Normalize
    gain: bool

    @property
    def plain(self) -> bool:
        """True for the summary itself."""
        return self.coefficients == SUMMARY and not (self.normalize or self.gain)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a layer with these options."""
        return {"polynomial": self.polynomial, "normalize": self.normalize, "gain": self.gain}


def options_of(polynomial: str | Sequence[float], normalize: Normalize | None, gain: bool | None) -> Options:
    """Check the arguments of a layer.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An unknown polynomial, or `normalize` is another string.
    """
    coefficients = coefficients_of(polynomial)
    named = polynomial if isinstance(polynomial, str) else ""
    if normalize is None:
        normalize = True if named == "newton-schulz" else "restore" if named.startswith("pc-") else False
    if normalize not in (True, False, "restore") or not isinstance(normalize, bool | str):
        raise ValueError(f"normalize: got {normalize!r}, want True, False, 'restore', or None (the polynomial's own)")
    if gain is None:
        gain = named not in ("", "summary")
    if not isinstance(gain, bool):
        raise TypeError(f"gain: got {gain!r}, want True, False, or None (the polynomial's own)")
    return Options(named or coefficients, coefficients, normalize, gain)


class Solved(NamedTuple):
    """The values of a layer with a given effective weight.

    Attributes:
        b: b in the layout of the parameter.
        gain: The gain, (groups,) float64.
        norm: The spectral norm of b, (groups,) float64; None if it is not known.
    """

    b: Tensor
    gain: Tensor
    norm: Tensor | None


class PolynomialLayer(Freezable):
    """Base class of layers whose weight is m a b q(a² bᵀb).

    a is 1, or the buffer `scale`, one over the spectral norm σ of b, with `normalize`. m is 1, times the parameter `gain`, times
    σ with `normalize="restore"`. The buffers `u` and `v` are the singular vectors of σ. `update_spectral_norms` updates the
    three; a forward only reads `scale`.
    """

    polynomial: str | tuple[float, ...]
    normalize: Normalize
    gain: nn.Parameter | None
    u: Tensor
    v: Tensor
    scale: Tensor
    _coefficients: tuple[float, ...]
    _plain: bool  # the summary itself
    _cache: Any = None  # of `cached_weights`, inside of its block
    # Address and version of the b whose norm `scale` has; None if that is to be checked, False if it is not.
    _norm_of: tuple[int, int] | Literal[False] | None = None

    def _set_options(self, options: Options) -> None:
        """Set the options of a layer with a b, in a constructor or a conversion; `reset_norm` makes the values right."""
        self.polynomial, self._coefficients, self.normalize = (
            options.polynomial,
            options.coefficients,
            options.normalize,
        )
        self._plain = options.plain
        b, groups = self.b, self.groups
        if options.gain:
            vars(self).pop("gain", None)
            self.gain = nn.Parameter(b.new_ones(groups), requires_grad=b.requires_grad)
        else:
            vars(self)["gain"] = None  # no entry of the parameters: the layer has those of nn.Linear
        if options.normalize:
            d, k = as_matrix(b, groups).shape[-2:]
            lead = (groups,) if groups > 1 else ()
            self.register_buffer("u", b.new_zeros(*lead, d).detach())
            self.register_buffer("v", b.new_zeros(*lead, k).detach())
            self.register_buffer("scale", b.new_ones((groups, 1, 1) if groups > 1 else ()).detach())

    def _clear_options(self) -> None:
        """Remove what `_set_options` has set."""
        for name in ("polynomial", "_coefficients", "_plain", "normalize", "gain", "_norm_of"):
            vars(self).pop(name, None)
        self._parameters.pop("gain", None)
        for name in ("u", "v", "scale"):
            self._buffers.pop(name, None)

    def _share_options(self, other: PolynomialLayer) -> None:
        """Take the gain and the buffers of a layer with the same b."""
        for name in ("gain", "u", "v", "scale"):
            for held, theirs in ((self._parameters, other._parameters), (self._buffers, other._buffers)):
                if name in theirs:
                    held[name] = theirs[name]  # type: ignore[assignment]

    def _weight_key(self) -> tuple[Any, ...]:
        """Return a value that is equal for layers whose weights are equal where their b is the same."""
        values = [t for t in (self.gain, self.scale if self.normalize else None) if t is not None]
        return (
            self._coefficients,
            self.normalize,
            *(id(t) if t.is_meta else tuple(t.detach().flatten().tolist()) for t in values),
        )

    def _is_summary(self) -> bool:
        return self._plain

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return a and m in a dtype, () or (groups, 1, 1); None is 1."""
        scale = self.scale.to(dtype) if self.normalize else None
        multiplier = None
        if self.gain is not None:
            gain: Tensor = self.gain
            if self.groups > 1:
                multiplier = gain.view(-1, 1, 1).to(dtype)
            elif is_dtensor(gain):  # a sharded entry cannot be squeezed
                multiplier = gain.sum().to(dtype)
            else:
                multiplier = gain.squeeze(0).to(dtype)
        if self.normalize == "restore":
            multiplier = (1.0 if multiplier is None else multiplier) / self.scale.to(dtype)
        return scale, multiplier

    def _functional_options(self) -> dict[str, Any]:
        """Return `polynomial` and `scale` for the functions of `functional`."""
        c = self._coefficients
        scale, multiplier = self._factors(linalg.accumulation_dtype(self.b.dtype))
        options: dict[str, Any] = {} if scale is None else {"scale": scale}
        if multiplier is None:
            return options | {"polynomial": c}
        if is_dtensor(multiplier):
            return options | {"polynomial": torch.stack([multiplier * value for value in c])}
        return options | {"polynomial": multiplier * constant(c, self.b)}

    def _scale_and_multiplier(self) -> tuple[float | Tensor, Tensor] | None:
        """Return a and m where m can stay apart from the coefficients: numbers round less, and so does m's gradient.

        It is one inner product then, and not a sum over the coefficients m c_i, which cancels. None if m is 1, for sharded
        parameters, and in a trace, which PyTorch compares with one without gradients.
        """
        if self.gain is None and self.normalize != "restore":
            return None
        if is_dtensor(self.b) or (self.gain is not None and is_dtensor(self.gain)):
            return None
        if not torch.compiler.is_compiling() and is_tracing():
            return None
        scale, multiplier = self._factors(linalg.accumulation_dtype(self.b.dtype))
        assert multiplier is not None
        return 1.0 if scale is None else scale, multiplier

    def _weight_of(self, matrix: Tensor) -> Tensor:
        if matrix.dim() == 2 and matrix.dtype == self.b.dtype and not (self._is_summary() or is_dtensor(matrix)):
            if self.b.dtype in _EXACT and (found := self._scale_and_multiplier()) is not None:
                scale, multiplier = found
                return multiplier * functional.effective_weight(matrix, polynomial=self._coefficients, scale=scale)
            return functional.effective_weight(matrix, **self._functional_options())
        factors = self._factors(linalg.accumulation_dtype(matrix.dtype))
        return _weight(matrix, self._coefficients, *(None if t is None else as_placed(t, matrix) for t in factors))

    def formed_weight(self) -> Tensor | None:
        """Return the effective weight that `freeze` or `cached_weights` holds; None if there is none."""
        return self.frozen_weight() if self._cache is None else self._cache.weight()

    def _numbers(self, x: Tensor | None = None) -> tuple[Tensor, Tensor | None, list[float], float] | None:
        """Return b, the gain, and c and s with which the weight is Σ_i c_i b (bᵀb - s I)ⁱ; None where autograd has to form it.

        So it has where a parameter is no plain one, or has not the dtype of an input x.

        It reads scale and gain, for which a GPU would have to wait. The scale multiplies the coefficients and not b: one that is
        far from 1 is left to autograd, because powers of bᵀb could overflow.
        """
        b, gain, c = self._parameters.get("b"), self.gain, self._coefficients
        if type(b) is not nn.Parameter or b.dim() != 2 or not b.is_cpu or b.dtype not in _EXACT:
            return None
        if x is not None and not x.dtype == b.dtype == (b if self.bias is None else self.bias).dtype:
            return None
        scale = float(self.scale) if self.normalize else 1.0
        multiplier = 1.0 if gain is None else gain.item()
        if type(gain) not in (nn.Parameter, NoneType) or len(c) == 1 or multiplier == 0 or not 0.01 < scale < 100:
            return None
        if self.normalize == "restore":
            multiplier /= scale
        c, shift = linalg.centred(c)
        return b, gain, [multiplier * value * scale ** (2 * i + 1) for i, value in enumerate(c)], shift / scale**2

    def _graphless_weight(self) -> FormedWeight | None:
        """Return the effective weight with a pull-back of its own; None where autograd has to form it."""
        found = self._numbers() if ordinary() else None
        if found is None:
            return None
        self._warn_if_stale()
        return FormedWeight(*found)

    def effective_weight(self) -> Tensor:
        """Compute `weight` as a plain tensor, differentiable: the weight of the plain layer with the same outputs."""
        self._warn_if_stale()
        return super().effective_weight()

    @torch.no_grad()
    def exact_weight(self) -> Tensor:
        """Compute `weight` in float64, without gradient."""
        self._warn_if_stale()
        return super().exact_weight()

    @torch.no_grad()
    def set_weight_(self, weight: Tensor) -> None:
        """Set b so that the effective weight is `weight`, computed in float64, and with it the gain and the spectral norm.

        With a gain, or with `normalize`, the largest singular value of a b is 1, and gain or norm carry that of the weight. The
        other singular values are solved for on the first branch from 0 on which f(s) = s q(s²) is monotone.

        Args:
            weight: Tensor of `weight`'s shape, on any device and of any real dtype; where b is sharded, the same on all ranks.

        Raises:
            ValueError: The shape differs, a value is not finite, or no b gives the weight: a singular value that f does not
                reach, or with normalize=True and no gain a norm other than f(1).
        """
        if self._is_summary():
            super().set_weight_(weight)
            return
        self._write_solved(solve(self._checked_weight(weight), self.groups, self.options(), "weight"))

    def options(self) -> Options:
        """Return the options of the layer."""
        return Options(self.polynomial, self._coefficients, self.normalize, self.gain is not None)

    @torch.no_grad()
    def _write_solved(self, solved: Solved) -> None:
        self._write(solved.b)
        if self.gain is not None:
            write_whole(self.gain, solved.gain.to(self.gain.device, self.gain.dtype))
        self.reset_norm(solved.norm)

    def _reset_b(self) -> None:
        """Draw an orthonormal b; the gain becomes 1."""
        self.reset_orthogonal_()
        if self.gain is not None:
            nn.init.ones_(self.gain)
        self.reset_norm()

    def orthogonalize_(self) -> float:
        """Replace b by its polar factor, the nearest orthonormal matrix; return the orthogonality defect left."""
        defect = super().orthogonalize_()
        self.reset_norm()
        return defect

    @torch.no_grad()
    def reset_norm(self, known: Tensor | None = None, keep: bool = False) -> None:
        """Compute the spectral norm of b by power iterations until it converges, from `u` if that is a direction already.

        Args:
            known: The norm (groups,), if it is known: only its singular vectors are computed then.
            keep: If True, and `scale` is about that of the norm, it stays as it is; not in an average of states, whose `v` is
                shorter than 1.
        """
        if not self.normalize or self.b.is_meta or self.b.numel() == 0:
            return
        b = self._norm_matrix()
        u = whole(self.u).to(b.dtype)
        known_direction = bool(_is_direction(u).all())
        if not known_direction:  # start from the largest column
            largest = torch.linalg.vector_norm(b, dim=-2).argmax(-1)
            u = b.gather(-1, largest[..., None, None].expand(*b.shape[:-1], 1)).squeeze(-1)
        held = (1 / whole(self.scale)).to(b.dtype).flatten().view(b.shape[:-2])
        if keep:
            length = torch.linalg.vector_norm(whole(self.v).to(b.dtype), dim=-1)
            keep = bool((((length - 1).abs() <= _UNIT) | (length == 0)).all())
        before = held if keep else b.new_zeros(())
        for i in range(_MOST_ITERATIONS):
            u, v, norm = _power_iteration(b, u)
            if not bool(((norm - before).abs() > _CHANGE * norm).any()):
                if keep and known_direction and i == 0:
                    self._norm_of = _version(self.b) or False
                    return
                break
            before = norm
        if keep and bool(((held - norm).abs() <= _SAME * norm).all()):
            norm = held
        self._write_norm(u, v, norm if known is None else known.to(norm).view(norm.shape))

    @torch.no_grad()
    def _update_norm(self) -> None:
        """Take the power iterations that follow a step of the optimizer. Nothing waits for the device."""
        if not self.normalize or self.b.is_meta or self.b.numel() == 0:
            return
        b = self._norm_matrix()
        scale = whole(self.scale).to(b.dtype)
        w = b * scale  # b / σ of the last step: nothing over- or underflows
        u = _direction(whole(self.u).to(b.dtype)).unsqueeze(-1)
        for _ in range(POWER_ITERATIONS - 1):
            v = w.mT @ u
            u = w @ v
        u, v, norm = _power_iteration(b, u.squeeze(-1))
        self._write_norm(u, v, norm)

    def _norm_matrix(self) -> Tensor:
        b = self.whole_matrix().detach()
        return b.to(linalg.accumulation_dtype(b.dtype))

    def _write_norm(self, u: Tensor, v: Tensor, norm: Tensor) -> None:
        positive = norm > 0  # a zero b stays zero
        scale = torch.where(positive, 1 / torch.where(positive, norm, 1.0), 1.0)
        for name, value in (("u", u), ("v", v), ("scale", scale)):
            write_whole(getattr(self, name), value.view(getattr(self, name).shape))
        self._norm_of = _version(self.b) or False

    def _warn_if_stale(self) -> None:
        """Warn once if b has changed, in a way that PyTorch records, and `scale` is not one over its norm.

        A b that is pruned or parametrized since is one that has changed.
        """
        known = self._norm_of
        if not self.normalize or known is False or torch.compiler.is_compiling():
            return
        b = self._parameters.get("b")
        now = _version(b)
        if b is None and is_wrapped(self.b):
            return
        if b is not None and (now is None or (known is not None and (now[0] != known[0] or now[1] == known[1]))):
            return
        with torch.no_grad():
            _, _, norm = _power_iteration(self._norm_matrix(), self.u.to(linalg.accumulation_dtype(self.u.dtype)))
            error = (norm * self.scale.view(norm.shape) - 1).abs()
            same = error <= (_SAME if known is None else _CHANGE + torch.finfo(self.scale.dtype).eps)
            stale = not bool((same | (norm == 0)).all())
        self._norm_of = False if stale or now is None else now
        if stale:
            warnings.warn(
                f"{type(self).__name__}({self.extra_repr()}): b has changed since its spectral norm was computed; call "
                "interp_nn.nn.follow(optimizer, model) once, or interp_nn.nn.update_spectral_norms(model) after each change",
                stacklevel=3,
            )

    def spectrum(self, weight: bool = False) -> Tensor:
        """Compute the singular values of b, or those of the effective weight, (min(in, out),) float64, descending.

        Raises ValueError if b is not finite, and with `weight` also if the gain or the scale is not.
        """
        s = super().spectrum()
        if not weight:
            return s
        for name in ("gain", "scale"):
            if (t := getattr(self, name, None)) is not None:  # no scale without `normalize`
                linalg.check_finite(whole(t.detach()), name)
        each = (-1, 1) if self.groups > 1 else ()
        scale, multiplier = (1.0 if t is None else whole(t.detach()).view(each) for t in self._factors(torch.float64))
        return (multiplier * map_of(self._coefficients, scale * s)).abs().sort(-1, descending=True).values

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # A loaded norm that is that of the loaded b stays as it is, to the last bit.
        self.reset_norm(keep=args[1] + "scale" in args[0])

    def _save_to_state_dict(self, *args: Any) -> None:
        self._warn_if_stale()
        super()._save_to_state_dict(*args)

    def _sources(self) -> list[Tensor]:
        others = (self.gain, self.scale if self.normalize else None)
        return super()._sources() + [t for t in others if t is not None]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        if self._norm_of:
            self._norm_of = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        then, now = self._norm_of, _version(self._parameters.get("b"))
        known = (0, now[1] - then[1]) if then and now and then[0] == now[0] else None  # changes of b since
        return super().__getstate__() | {"_norm_of": known, "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._norm_of:  # the copy's b has an address and a version of its own
            now = _version(self._parameters.get("b"))
            self._norm_of = now and (now[0], now[1] - self._norm_of[1])

    def _note(self) -> str:
        shown = {"polynomial": self.polynomial, "normalize": self.normalize, "gain": self.gain is not None}
        different = {n: v for n, v in shown.items() if v != ("summary" if n == "polynomial" else False)}
        return "".join(f", {n}={v!r}" for n, v in different.items()) + super()._note()


def solve(weight: Tensor, groups: int, options: Options, name: str) -> Solved:
    """Return b, gain and spectral norm of a layer whose effective weight is `weight`, in the plain layer's layout.

    Raises:
        ValueError: No b gives the weight. The message begins with `name`.
    """
    _, c, normalize, with_gain = options
    shape = weight_shape(weight)
    matrix = (weight.t() if weight.dim() == 2 else as_matrix(weight, groups)).detach()
    ones = torch.ones(groups, dtype=torch.float64, device=weight.device)
    sign = -1.0 if next(value for value in c if value) < 0 else 1.0  # of f near 0

    def result(b: Tensor, gain: Tensor = ones, norm: Tensor = ones) -> Solved:
        return Solved(as_parameter(b, shape).contiguous(), gain, norm)

    if not weight.numel():
        return result(matrix)
    if options.plain:
        return result(linalg.cube_root(matrix))
    if not (normalize or with_gain):
        return result(sign * linalg.map_singular_values(matrix, lambda s: inverse_map(c, s, name)))
    at_one = float(map_of(c, torch.ones((), dtype=torch.float64)))
    if at_one == 0:
        raise ValueError(f"{name}: no b of norm 1 has a weight with polynomial={options.polynomial!r}, whose f(1) is 0")
    size = linalg.singular_values(matrix)[..., 0].view(groups) / abs(at_one)
    if normalize is True and not with_gain:
        if bool(((size - 1).abs() > 1e-5).any()):
            found = ", ".join(f"{float(v) * abs(at_one):.6g}" for v in size[:5])
            raise ValueError(
                f"{name}: got spectral norm {found}, want {abs(at_one):.6g}, the only one of normalize=True without a gain; "
                "pass gain=True"
            )
        size = ones

    def unit(s: Tensor) -> Tensor:
        top = s.amax(-1, keepdim=True)
        found = sign * inverse_map(c, s * (abs(at_one) / torch.where(top > 0, top, 1.0)), name)
        return torch.where(s < top, found, math.copysign(1.0, at_one)) * (top > 0)

    each = size.view(-1, 1, 1)
    b = linalg.map_singular_values(matrix if groups > 1 else matrix.unsqueeze(0), unit)
    if normalize == "restore":  # the norm of b is that of the weight
        return result((each * b).to(b.dtype).view(matrix.shape), norm=size)
    # A zero weight has a zero gain, and a b from which the gain has a gradient.
    b = torch.where(each > 0, b, torch.eye(*b.shape[-2:], dtype=b.dtype, device=b.device))
    return result(b.view(matrix.shape), gain=size)


def solved_weight(solved: Solved, groups: int, options: Options) -> Tensor:
    """Return the effective weight of a layer with these values, in the plain layer's layout and in float64."""
    shape = (groups, 1, 1) if groups > 1 else ()
    scale = multiplier = None
    if options.normalize:
        assert solved.norm is not None
        norm = solved.norm.view(shape)
        scale = 1 / torch.where(norm > 0, norm, 1.0)
    if options.gain:
        multiplier = solved.gain.view(shape)
    if options.normalize == "restore" and scale is not None:
        multiplier = (1.0 if multiplier is None else multiplier) / scale
    exact = as_matrix(solved.b.detach().double(), groups)
    exact = _weight(exact, options.coefficients, scale, multiplier) if exact.numel() else exact
    return exact.mT.reshape(weight_shape(solved.b))


def _weight(matrix: Tensor, c: Sequence[float], scale: Tensor | None, multiplier: Tensor | None) -> Tensor:
    """Return m a b q(a² bᵀb) of a matrix b (..., d, k)."""
    if c == SUMMARY and scale is None and multiplier is None:
        return linalg.effective_weight(matrix)
    shift = 0.0
    if not is_dtensor(matrix):
        c, shift = linalg.centred(tuple(c))
    weight = linalg.centred_weight(matrix if scale is None else matrix * scale, c, shift)
    return (weight if multiplier is None else multiplier * weight).to(matrix.dtype)


def _power_iteration(b: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next (u, v) of norm 1 (or zeros), and the norm of bᵀu, for b (..., d, k) and u (..., d) of any norm."""
    tiny = torch.finfo(b.dtype).tiny
    u = _direction(u)
    v = nn.functional.normalize((b.mT @ u.unsqueeze(-1)).squeeze(-1), dim=-1, eps=tiny)
    u = (b @ v.unsqueeze(-1)).squeeze(-1)
    norm = torch.linalg.vector_norm(u, dim=-1)
    return nn.functional.normalize(u, dim=-1, eps=tiny), v, norm


def _direction(u: Tensor) -> Tensor:
    """Return vectors (..., d) with a norm of 1, also of the mean of several; equal entries for one that is zero or not finite."""
    u = nn.functional.normalize(u, dim=-1, eps=torch.finfo(u.dtype).tiny)
    return torch.where(_is_direction(u), u, u.shape[-1] ** -0.5)


def _is_direction(u: Tensor) -> Tensor:
    """Return whether each vector (..., d) has a norm of about 1, (..., 1); False for memory that was never written."""
    return (torch.linalg.vector_norm(u, dim=-1, keepdim=True) - 1).abs() < 0.1


def _version(b: Any) -> tuple[int, int] | None:
    """Return the address and version of a plain parameter with values; None for others, and where a transform replaces it."""
    if type(b) is not nn.Parameter or is_wrapped(b) or b.is_inference() or b.is_meta or not b.numel():
        return None
    return b.data_ptr(), b._version
