"""The correctness part: every engine against the tolerances, in memory that is NaN until it is written."""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from torch import Tensor

import interp_nn
from benchmarks.gpu import kernels
from benchmarks.gpu.cases import Case
from benchmarks.gpu.log import Log
from benchmarks.timing import footprint, tolerances
from benchmarks.timing.clocks import OUT_OF_TIME
from benchmarks.timing.problems import DTYPES, products
from interp_nn import engines as engines_of
from interp_nn import functional
from interp_nn.engines import orders, verify
from interp_nn.engines.problem import EngineName, Plan

WEIGHTS = (0.7, 1.3, 0.9)
_TILE_ROWS = 128  # the most rows in a tile: a read without a mask finds NaN in guards of as many


class Setup(NamedTuple):
    """A case with its numbers: inputs by name and upstream gradients, in fp64; the functions of interp_nn and of PyTorch."""

    inputs: dict[str, Tensor]
    ours: Callable[..., Sequence[Tensor]]
    plain: Callable[..., Sequence[Tensor]]
    upstreams: list[Tensor]
    outputs: list[str]
    wanted: list[str]


class Guarded(NamedTuple):
    """A tensor in the middle of a buffer of NaN."""

    tensor: Tensor
    buffer: Tensor

    def touched(self) -> bool:
        """Return whether something was written around the tensor, or between its numbers."""
        return int(self.buffer.isnan().sum()) != self.buffer.numel() - self.tensor.numel()


def guarded(t: Tensor, layout: str = "rows") -> Guarded:
    """Copy t between guards, in one of `cases.LAYOUTS`."""
    zone = max(4096, _TILE_ROWS * t.shape[-1] if t.dim() else 1)
    size = t.numel() * (2 if layout in ("apart", "strided") else 1)
    buffer = torch.full((size + 2 * zone,), math.nan, dtype=t.dtype, device=t.device)
    inner = buffer[zone : zone + size]
    if layout == "rows":
        view = inner.view(t.shape)
    elif layout == "strided":
        view = inner.view(*t.shape, 2)[..., 0]
    else:
        rows, columns = t.shape
        view = inner.view(columns, -1)[:, :rows].mT
    view.copy_(t)
    return Guarded(view, buffer)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN: the results and workspaces of every engine.

    PyTorch fills the tensors of `empty` and `empty_strided`, for calls from Python and from the compiled library.
    """
    fill: Any = torch.utils.deterministic
    filled, mode = fill.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    fill.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        fill.fill_uninitialized_memory = filled


def check_variant(variant: verify.Variant, device: torch.device, log: Log) -> None:
    """Verify a kernel as at its first use; the second comparison, without compilation, is timed."""
    engine = engines_of.unverified(variant.engine)
    facts: dict[str, Any] = {
        "engine": variant.engine,
        "call": variant.call,
        "rows": verify.rows_of(max(variant.sizes, default=1)),
    }
    with torch.no_grad():
        start = time.perf_counter()
        reason = verify.compare(variant, device, engine)
        first = time.perf_counter()
        reason = reason or verify.compare(variant, device, engine)
        again = time.perf_counter() - first
    log.check(f"verify {variant}", reason, first_s=round(first - start, 3), again_ms=round(1e3 * again, 3), **facts)


def check_first_use(device: torch.device, log: Log) -> None:
    """Use a layer as a user does: `auto` chooses, and each kernel is verified at its first call."""
    x = torch.randn(65536, 512, device=device, dtype=torch.bfloat16)
    layer = interp_nn.nn.SummaryLinear(512, 64, device=device, dtype=torch.bfloat16)
    start = time.perf_counter()
    layer(x).sum().backward()
    seconds = time.perf_counter() - start
    found = interp_nn.verify()
    failed = {name: verdict for name, verdict in found.items() if verdict != "passed"}
    plan = interp_nn.plan(65536, 512, 64, dtype=torch.bfloat16, device=device)
    log.check("first use", str(failed) if failed else None, verdicts=found, plan=str(plan), first_s=round(seconds, 2))


def check_capture(engine: str, device: torch.device, log: Log) -> None:
    """Capture a kernel that is not verified yet: the graph has PyTorch's operations, and no verdict is made."""
    x = torch.randn(65536, 512, device=device, dtype=torch.bfloat16)
    b = torch.randn(512, 48, device=device, dtype=torch.bfloat16) / 512**0.5
    plan = Plan(cast(EngineName, engine), "(Xb)G")
    exact, same = tolerances.naive(x.double(), b.double()), tolerances.naive(x, b)  # cuBLAS is ready then
    before = interp_nn.verify()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = engines_of.get(cast(EngineName, engine)).forward(x, b, None, plan, False)[1]
    graph.replay()
    torch.cuda.synchronize()
    why = tolerances.exceeds(
        tolerances.errors(y, exact), tolerances.errors(same, exact), _floor(Case("summary", "bf16", (), 0, 0))
    )
    log.check(f"first use in a graph, {engine}", "it was verified" if interp_nn.verify() != before else why)


def check_poison(engines: Sequence[str], device: torch.device, log: Log) -> None:
    """Check that missing writes would be seen: new memory is NaN, and an engine's memory is filled before its launch."""
    with poisoned():
        empty = [torch.empty_strided((64, 3), (1, 64), dtype=dtype, device=device) for dtype in set(DTYPES.values())]
    log.check("poison", None if all(bool(t.isnan().all()) for t in empty) else "new memory is not NaN")
    x, b = torch.ones(64, 32, device=device), torch.ones(32, 8, device=device)
    for engine in engines:
        with log.guarded(f"poison, {engine}"), interp_nn.use_engine(engine):
            functional.summary(x, b)  # a first call may launch more
            with poisoned():
                _, ran = footprint.profiled(lambda: functional.summary(x, b), device)
            if ran is not None:
                why = None if len(ran) > 1 else "nothing fills the memory that it allocates"
                log.check(f"poison, {engine}", why, engine=engine, profiled=ran)


def setup(case: Case, n: int, device: torch.device) -> Setup:
    """Draw a case with n rows, at the scale of a trained network; the same numbers on every run."""
    draw = torch.Generator(device).manual_seed(zlib.crc32(f"{case.name} {n}".encode()))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=device, generator=draw)

    d, k = case.d, case.k
    inputs = {"x": randn(n, d), "b": randn(d, k) / max(d, k) ** 0.5}
    wanted = case.wanted.split()
    if case.what.endswith("summary"):
        if "bias" in wanted:
            inputs["bias"] = randn(k)
        return Setup(
            inputs, lambda *t: [functional.summary(*t)], lambda *t: [tolerances.naive(*t)], [randn(n, k)], ["y"], wanted
        )
    if case.what.endswith("pair"):
        places = [("projection", "summary").index(name) for name in wanted]
        return Setup(
            inputs, lambda x, b: [functional.summary_pair(x, b)[i] for i in places],
            lambda x, b: [tolerances.naive_pair(x, b)[i] for i in places], [randn(n, k) for _ in places], wanted,
            ["x", "b"],
        )  # fmt: skip
    return _loss_setup(case, inputs, wanted, randn, draw)


def _loss_setup(
    case: Case, inputs: dict[str, Tensor], wanted: list[str], randn: Callable[..., Tensor], draw: torch.Generator
) -> Setup:
    n, k, device = len(inputs["x"]), case.k, draw.device
    target = torch.randint(case.m or k, (n,), device=device, generator=draw)
    if case.ignored == "all":
        target.fill_(-100)
    elif case.ignored == "some":
        target[1::5] = -100
    given: dict[str, Any] = {"weights": WEIGHTS, "reduction": case.reduction}
    upstream = (randn(n) if case.reduction == "none" else randn()).abs() + 0.5
    if case.what == "pair_loss":
        return Setup(
            inputs, lambda x, b: [functional.summary_cross_entropy(x, b, target, **given)],
            lambda x, b: [tolerances.naive_cross_entropy(x, b, target, **given)], [upstream], ["loss"],
            [name for name in wanted if name in inputs],
        )  # fmt: skip
    assert case.m is not None
    inputs["a"] = randn(case.m, k) / k**0.5
    if case.bias:
        inputs["c"] = randn(case.m)
    return Setup(
        inputs, lambda x, b, a, c=None: [functional.summary_head_cross_entropy(x, b, a, c, target, **given)],
        lambda x, b, a, c=None: [tolerances.naive_head_cross_entropy(x, b, a, c, target, **given)], [upstream],
        ["loss"], [name for name in wanted if name in inputs],
    )  # fmt: skip


def evaluate(
    function: Callable[..., Sequence[Tensor]], given: dict[str, Tensor], upstreams: Sequence[Tensor], wanted: Sequence[str]
) -> list[Tensor]:  # fmt: skip
    """Return the outputs, and the gradients of the wanted inputs."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in given.items()}
    out = function(*leaves.values())
    cotangents = [u.to(o.dtype) for u, o in zip(upstreams, out, strict=True)]
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], cotangents)
    return [*(o.detach() for o in out), *grads]


def check_case(case: Case, engines: Sequence[str], device: torch.device, log: Log) -> None:
    """Check these engines and the eager one for each number of rows of the case; a line for each."""
    dtype = DTYPES[case.mode]
    for n in case.rows:
        if log.left() < 0:
            log.write(f"{case.name}, n {n}", "skipped", why=OUT_OF_TIME)
            continue
        with log.guarded(f"{case.name}, n {n}", n=n, **_facts(case)), products(case.mode):
            asked = setup(case, n, device)
            rounded = {name: t.to(dtype) for name, t in asked.inputs.items()}
            upstreams = [u.to(dtype) for u in asked.upstreams]
            rounded["b"] = guarded(rounded["b"], case.layout).tensor
            wide = {name: t.double() for name, t in rounded.items()}
            exact = evaluate(asked.plain, wide, [u.double() for u in upstreams], asked.wanted)
            same = evaluate(asked.plain, rounded, upstreams, asked.wanted)
            classes, head = (case.m or case.k) if case.loss else None, case.m is not None
            for engine in (*engines, kernels.EAGER):
                label = f"{case.name}, n {n}, {engine}"
                why = kernels.unsupported_reason(engine, device, dtype, n, case.d, case.k, classes, head)
                if why is not None:
                    log.write(label, "skipped", why=why, engine=engine, n=n, **_facts(case))
                    continue
                with log.guarded(label, engine=engine, n=n, **_facts(case)):
                    _check_engine(case, n, engine, asked, rounded, upstreams, same, exact, log)


def _check_engine(
    case: Case, n: int, engine: str, asked: Setup, rounded: dict[str, Tensor], upstreams: list[Tensor],
    same: list[Tensor], exact: list[Tensor], log: Log,
) -> None:  # fmt: skip
    held = {name: guarded(t, case.layout if name == "b" else "rows") for name, t in rounded.items()}
    given = {name: h.tensor for name, h in held.items()}
    order = {"flat": "logits_from_x", "latent": "logits_from_latent"}.get(case.what)
    with contextlib.ExitStack() as stack:
        stack.enter_context(interp_nn.use_engine(engine))
        stack.enter_context(poisoned())
        launched = stack.enter_context(kernels.launches(engine))
        if order is not None:
            stack.enter_context(mock.patch.object(orders, "head_order", return_value=order))
        plan = interp_nn.plan(
            n, case.d, case.k,
            pair=case.what.endswith("pair") or case.what == "pair_loss",
            grad=[name for name in asked.wanted if name in ("x", "b")],
            classes=(case.m or case.k) if case.loss else None,
            dtype=rounded["x"].dtype, device=rounded["x"].device,
        )  # fmt: skip
        got = evaluate(asked.ours, given, upstreams, asked.wanted)
    names = [*asked.outputs, *(f"d{name}" for name in asked.wanted)]
    found: dict[str, list[float]] = {}
    whys = []
    floor = _floor(case)
    for name, g, s, e in zip(names, got, same, exact, strict=True):
        ours, theirs = tolerances.errors(g, e), tolerances.errors(s, e)
        found[name] = [*ours, *theirs]
        why = _nothing_kept(name, g) if case.empty_mean else tolerances.exceeds(ours, theirs, floor)
        if why is None and g.dtype != s.dtype:
            why = f"dtype {g.dtype}, PyTorch's {s.dtype}"
        whys += [] if why is None else [f"{name}: {why}"]
    if "b" in asked.wanted:
        db = got[names.index("db")]
        lies = _dense(db) if case.layout in ("apart", "strided") else db.stride() == rounded["b"].stride()
        whys += [] if lies or min(db.shape) == 1 else [f"db: strides {db.stride()}"]
    whys += [f"{name}: written outside" for name, h in held.items() if h.touched()]
    if engine in kernels.WITH_KERNELS and not launched:
        whys.append("no kernel was launched")
    log.check(
        f"{case.name}, n {n}, {engine}",
        "; ".join(whys) or None,
        engine=engine, order=plan.order, config={kernel: str(config) for kernel, config in plan.tiles},
        kernels=launched, n=n, floor=floor, errors=found, errors_of="ours, PyTorch's: Frobenius, maximum", **_facts(case),
    )  # fmt: skip


def _dense(t: Tensor) -> bool:
    """Return whether a matrix or its transpose is contiguous, as the gradient of a strided b has to be."""
    return t.is_contiguous() or t.mT.is_contiguous()


def _floor(case: Case) -> float:
    """Return the floor of the tests; tf32 operands have the digits of fp16."""
    if case.mode == "tf32":
        return tolerances.FLOOR_ULPS[torch.float16] * tolerances.TF32_EPS
    return tolerances.floor(DTYPES[case.mode], tolerances.SPLIT_ULPS if case.mode == "fp32" else None)


def _nothing_kept(name: str, got: Tensor) -> str | None:
    """Check the mean over no rows: NaN, with zero gradients."""
    if name == "loss":
        return None if bool(got.isnan()) else f"{float(got)}, want NaN without any row"
    return None if bool((got == 0).all()) else "not zero without any row"


def _facts(case: Case) -> dict[str, Any]:
    facts = case._asdict()
    del facts["rows"]
    return facts | {"dtype": str(DTYPES[case.mode]).removeprefix("torch.")}


def check_far_rows(
    engines: Sequence[str], device: torch.device, log: Log,
    elements: int = 2**31, d: int = 1024, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """Check rows beyond `elements` elements of x: their values and gradients, and the sums over all rows."""
    k, n = 64, elements // d + 1000
    name = f"rows beyond {elements} elements: n {n}, d {d}, k {k}, {str(dtype).removeprefix('torch.')}"
    needed = 8 * n * d * dtype.itemsize
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < needed:
        free = torch.cuda.mem_get_info(device)[0]
        log.write(name, "skipped", why=f"{free / 1e9:.1f} GB of memory are free, {needed / 1e9:.1f} needed")
        return
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, dtype=dtype, device=device, generator=draw)
    b = torch.randn(d, k, dtype=torch.float64, device=device, generator=draw).div(d**0.5).to(dtype)
    dy = torch.randn(n, k, dtype=dtype, device=device, generator=draw)
    target = torch.randint(k, (n,), device=device, generator=draw)

    def value(x: Tensor, b: Tensor, rows: slice) -> Tensor:
        return tolerances.naive_cross_entropy(x, b, target[rows], reduction="sum") / n

    with log.guarded(f"{name}, summary"):
        _check_far(
            f"{name}, summary", engines, functional.summary, lambda x, b, rows: tolerances.naive(x, b), x, b, dy, None,
            log,
        )  # fmt: skip
    with log.guarded(f"{name}, pair loss"):
        loss = functional.summary_cross_entropy
        _check_far(f"{name}, pair loss", engines, lambda x, b: loss(x, b, target), value, x, b, None, k, log)


class _Expected(NamedTuple):
    """A result or some of its rows, as PyTorch computes it in the inputs' dtype and in fp64."""

    of: str
    rows: slice
    same: Tensor
    exact: Tensor

    @property
    def name(self) -> str:
        return self.of if self.rows.start is None else f"{self.of}[{self.rows.start}:]"


def _check_far(
    name: str, engines: Sequence[str], ours: Callable[..., Tensor], plain: Callable[..., Tensor],
    x: Tensor, b: Tensor, dy: Tensor | None, classes: int | None, log: Log,
) -> None:  # fmt: skip
    (n, d), k = x.shape, b.shape[1]
    expected = _expected_far(plain, x, b, dy)
    floor = tolerances.floor(x.dtype, tolerances.SPLIT_ULPS if x.dtype == torch.float32 else None)
    for engine in engines:
        facts = {"engine": engine, "n": n, "d": d, "k": k, "dtype": str(x.dtype)}
        why = kernels.unsupported_reason(engine, x.device, x.dtype, n, d, k, classes)
        if why is not None:
            log.write(f"{name}, {engine}", "skipped", why=why, **facts)
            continue
        with log.guarded(f"{name}, {engine}", **facts):
            with interp_nn.use_engine(engine), poisoned():
                leaves = x.detach().requires_grad_(), b.detach().requires_grad_()
                out = ours(*leaves)
                dx, db = torch.autograd.grad(out, leaves, dy)
            got, whys, found = {"y": out.detach(), "dx": dx, "db": db}, [], {}
            for want in expected:
                result = got[want.of][want.rows]
                errors = tolerances.errors(result, want.exact), tolerances.errors(want.same, want.exact)
                found[want.name] = [*errors[0], *errors[1]]
                excess = tolerances.exceeds(*errors, floor)
                whys += [] if excess is None else [f"{want.name}: {excess}"]
            log.check(f"{name}, {engine}", "; ".join(whys) or None, errors=found, **facts)


def _expected_far(plain: Callable[..., Tensor], x: Tensor, b: Tensor, dy: Tensor | None) -> list[_Expected]:
    """Compute db, and y and dx at the first rows, around the boundary, and at the last rows."""
    n = len(x)
    sums = {dtype: torch.zeros_like(b, dtype=torch.float64) for dtype in (x.dtype, torch.float64)}
    step = 2**16
    for first in range(0, n, step):
        rows = slice(first, min(n, first + step))
        for dtype, total in sums.items():
            total += _chunk(plain, x, b, dy, rows, dtype)[2].double()
    expected = [_Expected("db", slice(None), sums[x.dtype], sums[torch.float64])]
    for at in (0, n - 1500, n - 500):
        rows = slice(at, min(n, at + 500))
        same, exact = (_chunk(plain, x, b, dy, rows, dtype) for dtype in (x.dtype, torch.float64))
        expected.append(_Expected("dx", rows, same[1], exact[1]))
        if dy is not None:
            expected.append(_Expected("y", rows, same[0], exact[0]))
    return expected


def _chunk(
    plain: Callable[..., Tensor], x: Tensor, b: Tensor, dy: Tensor | None, rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (output, dX, the share of db) of some rows."""
    part, parameter = x[rows].to(dtype).requires_grad_(), b.to(dtype, copy=True).requires_grad_()
    out = plain(part, parameter, rows)
    dx, db = torch.autograd.grad(out, (part, parameter), None if dy is None else dy[rows].to(dtype))
    return out.detach(), dx, db
