"""Verify kernels at their first use: a variant is compared with PyTorch's operations before it is believed.

A variant is a function of an engine with all that decides which machine code runs. At its first call on a GPU it computes
generated inputs of at most 4,093 rows, in its own tiles and with a tail, and has to be as accurate as `accuracy` asks. One that
is not, or that raises, is named in a warning, and PyTorch's operations compute it for the rest of the process. Where the engine
was asked for by name, RuntimeError is raised instead. While a CUDA graph is captured nothing can be compared: PyTorch's
operations compute a variant that is not verified yet.

What passed is remembered in a folder, a file for each variant, for this GPU, driver, PyTorch, Triton and these sources. A folder
that cannot be written costs a comparison in each process. There are no locks: two processes write the same file.
`INTERP_NN_VERIFY=0` turns all of this off.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.engines import accuracy, plain, select, verified_files
from interp_nn.engines.devices import spec_of
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.limits import MOST_COLUMNS, can_form_logits_from_x, padded, unsupported_reason
from interp_nn.engines.problem import (
    ENGINES,
    EngineName,
    LossOptions,
    Plan,
    PreparedBackward,
    PreparedForward,
    PreparedLoss,
    PreparedScale,
    Problem,
)
from interp_nn.engines.triton import configs
from interp_nn.engines.triton.configs import Bucket
from interp_nn.linalg import is_column_major

_MOST_ROWS, _FEWEST_ROWS, _ELEMENTS = 4093, 37, 2**22  # rows without a factor in common with a tile, and elements of X
_MOST_CALLS = 4096
_everywhere = False  # verify on CPUs too, where tests have engines
# The arguments and results that the flags of a function stand for.
_FLAGS = {
    "forward": ("bias", "P"),
    "backward": ("dP", "dY", "dX", "db", "dbias", "dc"),
    "loss": ("c", "upstream", "dX", "db", "dA", "dc", "dq"),
    "scale": (),
}
_OPTIONS = {reduction: LossOptions((0.7, 1.3, 0.9), -100, reduction) for reduction in ("mean", "sum", "none")}


class Variant(NamedTuple):
    """A function of an engine, and all that decides which machine code computes it.

    Attributes:
        engine: The engine.
        call: "forward", "backward", "loss" or "scale".
        dtypes: Dtype of X, or of each tensor that "scale" multiplies.
        sizes: (d, k), and (d, k, m) of a head's loss.
        transposed: b has the memory order of a layer's weight.
        plan: Order and tiles.
        flags: Which arguments are given and which results wanted, in the order of the function's arguments.
        reduction: That of a loss.
        polynomial: (degree, True with a scale), or None.
        precision: PyTorch's switch for fp32 products.
    """

    engine: EngineName
    call: str
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    plan: Plan | None = None
    flags: tuple[bool, ...] = ()
    reduction: str = ""
    polynomial: tuple[int, bool] | None = None
    precision: str = ""

    def __str__(self) -> str:
        dtypes = ", ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in self.dtypes))
        sizes = "".join(f", {name} = {size}" for name, size in zip("dkm", self.sizes, strict=False))
        order = "" if self.transposed or self.plan is None else ", b contiguous"
        tiles = "".join(f", {kernel} {config}" for kernel, config in (self.plan.tiles if self.plan else ()))
        degree = f", polynomial of degree {self.polynomial[0]}" if self.polynomial else ""
        words = [word for word, flag in zip(_FLAGS[self.call], self.flags, strict=False) if flag]
        how = ", ".join(([self.plan.order] if self.plan else []) + [self.reduction] * bool(self.reduction) + words)
        return f"{self.engine} {self.call} in {dtypes}{sizes}{degree}, {how}{order}{tiles}"


verdicts: dict[tuple[torch.device, Variant], str] = {}  # "" for what passed, else the reason


class _Calls(set[tuple[object, ...]]):
    """Calls whose variant has passed, until another table of tiles is used."""

    def cache_clear(self) -> None:
        """Forget all calls; see `configs.remembered`."""
        self.clear()


_passed = _Calls()
configs._caches.append(_passed)


class Verified:
    """An engine whose variants are verified at their first use. It has the four functions of `Engine`."""

    def __init__(self, name: EngineName, engine: Any) -> None:
        self._name, self._engine = name, engine

    def forward(
        self, x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan, pair: bool, q: Polynomial | None = None
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Compute `Engine.forward`."""
        engine = self._engine
        if x.is_cuda or _everywhere:
            flags = bias is not None, pair
            engine = self._judged("forward", flags, x, b, plan, q)
        found: tuple[Tensor | None, Tensor, list[Tensor]] = engine.forward(x, b, bias, plan, pair, q)
        return found

    def backward(
        self,
        dp: Tensor | None,
        dy: Tensor | None,
        x: Tensor,
        b: Tensor,
        saved: Sequence[Tensor],
        plan: Plan,
        need_x: bool,
        need_b: bool,
        need_bias: bool = False,
        need_c: bool = False,
        q: Polynomial | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Compute `Engine.backward`."""
        engine, needs = self._engine, (need_x, need_b, need_bias, need_c)
        if (x.is_cuda or _everywhere) and any(needs):
            engine = self._judged("backward", (dp is not None, dy is not None, *needs), x, b, plan, q)
        grads: tuple[Tensor | None, ...] = engine.backward(dp, dy, x, b, saved, plan, *needs, q)
        return grads

    def loss(
        self,
        x: Tensor,
        b: Tensor,
        a: Tensor | None,
        c: Tensor | None,
        target: Tensor,
        options: LossOptions,
        plan: Plan,
        upstream: Tensor | None = None,
        needs: Sequence[bool] | None = None,
        q: Polynomial | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute `Engine.loss`."""
        engine = self._engine
        if x.is_cuda or _everywhere:
            flags = c is not None, upstream is not None, *(*(needs or ()), *(False,) * 5)[:5]
            m = None if a is None else a.shape[0]
            engine = self._judged("loss", flags, x, b, plan, q, m, options.reduction)
        found: tuple[Tensor, list[Tensor]] = engine.loss(x, b, a, c, target, options, plan, upstream, needs, q)
        return found

    def scale(self, grads: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        """Compute `Engine.scale`."""
        engine = self._engine
        if upstream.is_cuda or _everywhere:
            engine = self._judged_scale(grads, upstream)
        found: list[Tensor] = engine.scale(grads, upstream)
        return found

    def prepared_forward(self, x: Tensor, b: Tensor, bias: Tensor | None, plan: Plan) -> PreparedForward | None:
        """Return the engine's function for these layouts, if it has one and its variant has passed."""
        engine = self._engine
        if x.is_cuda or _everywhere:
            engine = self._judged("forward", (bias is not None, plan.saves), x, b, plan, None)
        return _prepared(engine, "prepared_forward", x, b, bias, plan)

    def prepared_backward(
        self,
        dp: Tensor | None,
        dy: Tensor | None,
        x: Tensor,
        b: Tensor,
        saved: Sequence[Tensor],
        plan: Plan,
        needs: tuple[bool, bool, bool],
    ) -> PreparedBackward | None:
        """Return the engine's function for these layouts, if it has one and its variant has passed."""
        engine = self._engine
        if x.is_cuda or _everywhere:
            flags = dp is not None, dy is not None, *needs, False
            engine = self._judged("backward", flags, x, b, plan, None)
        return _prepared(engine, "prepared_backward", dp, dy, x, b, saved, plan, needs)

    def prepared_loss(
        self,
        x: Tensor,
        b: Tensor,
        a: Tensor | None,
        c: Tensor | None,
        target: Tensor,
        options: LossOptions,
        plan: Plan,
        needs: tuple[bool, bool, bool, bool],
    ) -> PreparedLoss | None:
        """Return the engine's function for these layouts, if it has one and its variant has passed."""
        engine = self._engine
        if x.is_cuda or _everywhere:
            flags = c is not None, False, *needs, False
            m = None if a is None else a.shape[0]
            engine = self._judged("loss", flags, x, b, plan, None, m, options.reduction)
        return _prepared(engine, "prepared_loss", x, b, a, c, target, options, plan, needs)

    def prepared_scale(self, grads: Sequence[Tensor], upstream: Tensor) -> PreparedScale | None:
        """Return the engine's function for these layouts, if it has one and its variant has passed."""
        engine = self._engine
        if upstream.is_cuda or _everywhere:
            engine = self._judged_scale(grads, upstream)
        return _prepared(engine, "prepared_scale", grads, upstream)

    def _judged_scale(self, grads: Sequence[Tensor], upstream: Tensor) -> Any:
        call = self._name, upstream.get_device(), upstream.dtype, *(g.dtype for g in grads)
        if call in _passed:
            return self._engine
        variant = Variant(self._name, "scale", (upstream.dtype, *(g.dtype for g in grads)))
        return self._chosen(call, variant, upstream.device)

    def _judged(
        self, name: str, flags: tuple[bool, ...], x: Tensor, b: Tensor, plan: Plan, q: Polynomial | None,
        m: int | None = None, reduction: str = "",
    ) -> Any:  # fmt: skip
        """Return what computes a call: the engine, or `plain`."""
        dtype = x.dtype
        precision = torch.backends.cuda.matmul.fp32_precision if dtype is torch.float32 else ""
        polynomial = None if q is None else (q.degree, q.scale is not None)
        call = (
            self._name, name, flags, x.get_device(), x.shape, dtype, b.shape, b.stride(), plan, m, reduction, polynomial,
            precision,
        )  # fmt: skip
        if call in _passed or x.numel() == 0 or b.numel() == 0:
            return self._engine
        (n, d), k = x.shape, b.shape[1]
        sizes = (d, k) if m is None else (d, k, m)
        variant = variant_of(
            self._name, name, dtype, n, sizes, is_column_major(b), plan, flags, x.device, reduction, polynomial,
            precision,
        )  # fmt: skip
        return self._chosen(call, variant, x.device)

    def _chosen(self, call: tuple[object, ...], variant: Variant, device: torch.device) -> Any:
        reason = verdict(variant, device, self._engine)
        if reason == "":
            if len(_passed) >= _MOST_CALLS:
                _passed.clear()
            _passed.add(call)
            return self._engine
        if select.requested() != self._name:
            return plain
        if reason is None:
            return self._engine
        raise RuntimeError(f"the {self._name} engine was asked for, but {variant} fails on this GPU: {reason}")


def _prepared(engine: Any, name: str, *given: Any) -> Any:
    prepare = getattr(engine, name, None)
    return None if prepare is None else prepare(*given)


def variant_of(
    engine: EngineName, call: str, dtype: torch.dtype, n: int, sizes: tuple[int, ...], transposed: bool, plan: Plan,
    flags: tuple[bool, ...], device: torch.device, reduction: str = "", polynomial: tuple[int, bool] | None = None,
    precision: str = "",
) -> Variant:  # fmt: skip
    """Return the variant that computes n rows on a device."""
    tiles, k = plan.tiles, sizes[1]
    spec = spec_of(device)
    if engine == "triton" and not tiles and spec is not None:
        kernel = _kernel(call, k, plan)
        classes = padded(sizes[2] if len(sizes) > 2 else 1)
        tiles = ((kernel, configs.choose(spec, Bucket(kernel, dtype.itemsize, padded(k), classes, n))),)
    own = Plan(engine, plan.order, plan.saves, tiles=tiles)
    return Variant(engine, call, (dtype,), sizes, transposed, own, flags, reduction, polynomial, precision)


def _kernel(call: str, k: int, plan: Plan) -> str:
    """Return the Triton kernel of a function."""
    if call == "loss":
        return configs.LOSS_KERNELS[plan.order]
    if k > MOST_COLUMNS:
        return f"phased_{call}"
    return "stream" if call == "forward" else "pair_backward" if plan.saves else "summary_backward"


def verdict(variant: Variant, device: torch.device, engine: Any) -> str | None:
    """Return "" for a variant that has passed, else why it fails; None where it cannot be verified now."""
    known = verdicts.get((device, variant))
    if known is None:
        if _capturing(device):
            return None
        known = judge(variant, device, engine)
        if known is not None:
            verdicts[device, variant] = known
            if known:
                _warn(variant, known)
    return known


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _warn(variant: Variant, reason: str) -> None:
    warnings.warn(
        f"{variant} fails on this GPU: {reason}. The auto engine leaves it to PyTorch's operations in this process from now on. "
        "Please report it, with the output of python -m interp_nn.",
        RuntimeWarning,
        stacklevel=2,
    )


def judge(variant: Variant, device: torch.device, engine: Any) -> str | None:
    """Return "" for a variant that passes now or has passed before, else why it fails; None where memory is short."""
    file = verified_files.file_of(repr(variant), variant.engine, device)
    if verified_files.has_passed(file):
        return ""
    died = verified_files.begin(file)
    if died is not None:
        return died
    start = time.perf_counter()
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            reason = compare(variant, device, engine)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # whatever a compiler, a driver or a kernel's assertion raises
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:300]
    finally:
        verified_files.end(file)
    if reason is None and file is not None:
        facts = {**verified_files.machine(variant.engine, device), "seconds": round(time.perf_counter() - start, 2)}
        verified_files.write(file, json.dumps({"variant": str(variant), **facts}, indent=1))
    return reason or ""


# Comparison


def compare(variant: Variant, device: torch.device, engine: Any) -> str | None:
    """Compute generated inputs by an engine, by PyTorch, and in float64; return what is not accurate, None if all is."""
    given = _inputs(variant, device)
    ours, same = (_results(by, variant, given) for by in (engine, plain))
    exact = _results(plain, variant, {name: _double(value) for name, value in given.items()})
    single = variant.dtypes[0] == torch.float32
    ulps = None if not single else accuracy.TF32_ULPS if variant.precision == "tf32" else accuracy.SPLIT_ULPS
    floor = accuracy.floor(variant.dtypes[0], ulps)
    for name, value in ours.items():
        if value.shape != exact[name].shape:
            return f"{name} has shape {tuple(value.shape)}, not {tuple(exact[name].shape)}"
        wide = exact[name].double()
        excess = accuracy.exceeds(accuracy.errors(value, wide), accuracy.errors(same[name], wide), floor)
        if excess is not None:
            return f"{name}: {excess}"
    return None


def rows_of(d: int) -> int:
    """Return the number of generated rows: at most 4,093, and fewer for many features."""
    return min(_MOST_ROWS, max(_FEWEST_ROWS, _ELEMENTS // d))


def _inputs(variant: Variant, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = variant.dtypes[0]) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    if variant.call == "scale":
        own, *others = variant.dtypes
        grads = [normal(4097 + i, dtype=dtype) for i, dtype in enumerate(others)]
        return {"grads": grads, "upstream": torch.full((), 1.75, dtype=own, device=device)}
    d, k, *head = variant.sizes
    n = rows_of(d)
    b = normal(k, d, scale=max(d, k) ** -0.5)
    given: dict[str, Any] = {"x": normal(n, d), "b": b.t() if variant.transposed else b.t().contiguous(), "q": None}
    if variant.polynomial is not None:
        degree, scaled = variant.polynomial
        coefficients = torch.tensor([1.5, -0.5, 0.25, -0.125, 0.0625][: degree + 1], device=device)
        given["q"] = Polynomial(coefficients, torch.full((), 0.75, device=device) if scaled else None)
    if variant.call == "loss":
        m = head[0] if head else None
        given["a"], given["c"] = (normal(m, k, scale=k**-0.5), normal(m)) if m else (None, None)
        given["target"] = torch.randint(m or k, (n,), generator=generator, device=device)
        given["target"][::7] = -100
        # As large as a mean's divisor, or float16 has no digits for the gradients.
        size = torch.full((), float(n) if variant.reduction == "mean" else 1.5, device=device)
        given["upstream"] = normal(n, dtype=torch.float32).abs() + 0.5 if variant.reduction == "none" else size
    else:
        given |= {"bias": normal(k), "dp": normal(n, k), "dy": normal(n, k)}
    return given


def _double(value: Any) -> Any:
    if isinstance(value, Polynomial):
        return Polynomial(*map(_double, value))
    if isinstance(value, list):
        return list(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _results(engine: Any, variant: Variant, given: dict[str, Any]) -> dict[str, Tensor]:
    """Return what an engine computes, by name."""
    flags, plan = variant.flags, variant.plan
    if variant.call == "scale":
        grads = engine.scale([g.clone() for g in given["grads"]], given["upstream"])
        return {f"gradient {i}": g for i, g in enumerate(grads)}
    assert plan is not None
    x, b, q = given["x"], given["b"], given["q"]
    if variant.call == "loss":
        has_c, has_upstream, *needs = flags
        c, upstream = given["c"] if has_c else None, given["upstream"] if has_upstream else None
        wanted = needs if q is not None else needs[:4]
        value, grads = engine.loss(
            x, b, given["a"], c, given["target"], _OPTIONS[variant.reduction], plan, upstream, wanted, q
        )
        names = [name for name, need in zip(("dX", "db", "dA", "dc", "dq"), needs, strict=True) if need]
        return {"loss": value, **dict(zip(names, grads, strict=True))}
    if variant.call == "forward":
        has_bias, pair = flags
        p, y, saved = engine.forward(x, b, given["bias"] if has_bias else None, plan, pair, q)
        named = {"Y": y, **{f"saved {i}": t for i, t in enumerate(saved)}}
        return named | {"P": p} if pair else named
    has_dp, has_dy, *needs = flags
    saved = [t.contiguous() for t in plain.forward(x, b, None, plan, True, q)[2]]
    dp, dy = given["dp"] if has_dp else None, given["dy"] if has_dy else None
    grads = engine.backward(dp, dy, x, b, saved, plan, *needs, q)
    return {
        name: g
        for name, g, need in zip(("dX", "db", "dbias", "dc"), grads, needs, strict=False)
        if need and g is not None
    }


# What users call


def standard(device: torch.device) -> list[Variant]:
    """Return the variants of the usual problems for each engine that is there: 512 features, 64 and 128 columns, 10 classes."""
    d, n, m, spec, found = 512, 65536, 10, spec_of(device), list[Variant]()
    for engine in ENGINES[1:]:
        if unsupported_reason(engine) is not None:
            continue
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            precision = torch.backends.cuda.matmul.fp32_precision if dtype == torch.float32 else ""
            reduction = "mean"
            found.append(Variant(engine, "scale", (torch.float32, dtype, dtype)))
            for k in (64, 128):
                alone, pair = Plan(engine, "(Xb)G"), Plan(engine, "(Xb)G", True)
                latent, flat = Plan(engine, "logits_from_latent"), Plan(engine, "logits_from_x")
                asked: list[tuple[str, Plan, int | None, str, str]] = [
                    ("forward", alone, None, "bias", ""),
                    ("backward", alone, None, "dY dX db dbias", ""),
                    ("forward", pair, None, "P", ""),
                    ("backward", pair, None, "dP dY dX db", ""),
                    ("loss", pair, k, "dX db", reduction),
                    ("loss", latent, m, "c dX db dA dc", reduction),
                    ("loss", flat, m, "c dX db dA dc", reduction),
                ]
                for call, plan, classes, words, reduced in asked:
                    head, is_pair = classes == m, plan is pair
                    problem = Problem(n, d, k, is_pair, True, True, classes, head, dtype, spec, device.type)
                    flat_fits = plan is not flat or can_form_logits_from_x(engine, problem)
                    if flat_fits and unsupported_reason(engine, problem) is None:
                        flags = tuple(name in words.split() for name in _FLAGS[call])
                        sizes = (d, k, m) if head else (d, k)
                        found.append(
                            variant_of(
                                engine, call, dtype, n, sizes, True, plan, flags, device, reduced, None, precision
                            )
                        )
    return found


def judge_apart(device: torch.device, precision: str, variant: Variant) -> tuple[str, float, float]:
    """Return (why a variant fails or "", seconds with its compilation, seconds without), in a process for nothing else."""
    from interp_nn.engines import unverified

    torch.backends.cuda.matmul.fp32_precision = precision
    engine, start = unverified(variant.engine), time.perf_counter()
    reason = judge(variant, device, engine)
    first = time.perf_counter() - start
    if reason != "":
        return reason or "memory is short", first, 0.0
    start = time.perf_counter()
    with torch.no_grad():
        reason = compare(variant, device, engine) or ""
    return reason, first, time.perf_counter() - start


def verify(group: Any = None) -> dict[str, str]:
    """Return the verdict on each kernel that this process has used on a GPU; with a group, one verdict for all its ranks.

    Kernels are verified at their first use, by each process alone. A process whose kernel fails warns, and computes it by
    PyTorch's operations from then on, so its last bits differ from those of the other ranks. Call this on all ranks after the
    first training step where that matters: a kernel that fails on one rank is then left by all.

    Args:
        group: A process group of torch.distributed, whose ranks all call this; None for this process alone.

    Returns:
        "passed", or why it fails, by the name of the kernel with its sizes and tiles.

    Example:
        >>> import interp_nn
        >>> interp_nn.verify()  # nothing has run on a GPU
        {}
    """
    if group is not None:
        import torch.distributed as dist

        failed = {variant: reason for (_, variant), reason in verdicts.items() if reason}
        everywhere: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everywhere, failed, group)
        devices = {device for device, _ in verdicts} or {torch.device("cuda", torch.cuda.current_device())}
        for rank, found in enumerate(everywhere):
            for variant, reason in found.items():
                new = [device for device in devices if not verdicts.get((device, variant))]
                verdicts.update({(device, variant): f"on rank {rank}: {reason}" for device in new})
                if new:
                    _warn(variant, f"on rank {rank}: {reason}")
        _passed.clear()
    return {str(variant): reason or "passed" for (_, variant), reason in verdicts.items()}
