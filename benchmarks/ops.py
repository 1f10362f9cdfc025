"""The operator's forward + backward (or inference) on this machine, every provider checked against fp64 before timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import interp_nn
from benchmarks import providers, record
from benchmarks.timing import interleave

Shape = tuple[int, int, int]

# As large as nn.Linear's own problems, a grid of rows x features x columns, and layers that widen (k > d).
SHAPES: list[Shape] = [
    (4096, 512, 64),
    (65536, 512, 64),
    (8192, 1024, 128),
    *((n, d, k) for n in (32, 256, 4096, 65536) for d in (512, 1024) for k in (10, 100, 128, 512)),
    (4096, 512, 2048),
    (1024, 1024, 4096),
]


def run(shapes: Sequence[Shape], mode: str, seconds: float, output: Path | None) -> dict[str, Any]:
    """Time all shapes in fp32 on the CPU, write the record, and return it. mode: "fwdbwd" or "infer"."""
    rows: list[dict[str, Any]] = []
    for shape in tqdm(shapes, desc=f"ops {mode}", unit="shape"):
        rows += _shape_rows(shape, mode, seconds)
        if output is not None:
            write_record(output, mode, rows)
    return write_record(output, mode, rows)


def write_record(output: Path | None, mode: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the rows so far, written where `output` says."""
    head = {"experiment": "ops", "mode": mode, "dtype": "float32", **record.environment()}
    whole = {**head, "results": rows}
    if output is not None:
        record.write(output, whole)
    return whole


def _shape_rows(shape: Shape, mode: str, seconds: float) -> list[dict[str, Any]]:
    n, d, k = shape
    draw = torch.Generator().manual_seed(0)
    training = mode == "fwdbwd"
    x = torch.randn(n, d, generator=draw).requires_grad_(training)
    b = (torch.randn(d, k, generator=draw) / d**0.5).requires_grad_(training)
    w = (torch.randn(k, d, generator=draw) / d**0.5).requires_grad_(training)
    dy = torch.randn(n, k, generator=draw)
    names = providers.applicable(d, k)
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    errors: dict[str, float] = {}
    for name in names:
        parameter = w if name == "nn.Linear" else b
        calls[name] = _call(providers.PROVIDERS[name], x, parameter, dy, training)
        errors[name] = _error(calls[name](), providers.truth(name), x, parameter, dy, training)
    timings = interleave(calls, seconds)
    plan = str(interp_nn.plan(n, d, k, grad=("x", "b") if training else ()))
    return [
        {
            "n": n,
            "d": d,
            "k": k,
            "provider": name,
            "plan": plan if name == "interp_nn" else None,
            "ms_p50": round(t.p50, 4),
            "ms_p20": round(t.p20, 4),
            "ms_p80": round(t.p80, 4),
            "samples": t.samples,
            "error_fro": errors[name],
            # A limit far above fp32 rounding: a wrong provider is a row, and says so.
            "status": "ok" if errors[name] < 1e-2 else "wrong",
        }
        for name, t in timings.items()
    ]


def _call(
    f: providers.Provider, x: Tensor, parameter: Tensor, dy: Tensor, training: bool
) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        if not training:
            with torch.no_grad():
                return [f(x, parameter)]
        y = f(x, parameter)
        return [y.detach(), *torch.autograd.grad(y, (x, parameter), dy)]

    return call


def _error(
    got: Sequence[Tensor], f: providers.Provider, x: Tensor, parameter: Tensor, dy: Tensor, training: bool
) -> float:
    """The largest relative Frobenius error of a call's results."""
    exact_x, exact_parameter = (t.detach().double().requires_grad_(training) for t in (x, parameter))
    exact = _call(f, exact_x, exact_parameter, dy.double(), training)()
    return max(float((g - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True))


def table(whole: dict[str, Any]) -> str:
    """The record as a Markdown table: milliseconds of ours, and the ratio to it of every other provider's time."""
    rows = whole["results"]
    shapes = list(dict.fromkeys((r["n"], r["d"], r["k"]) for r in rows))
    lines = [
        "| n, d, k | plan | interp_nn ms | / nn.Linear | / naive | / best eager | / inverse |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for shape in shapes:
        of = {r["provider"]: r for r in rows if (r["n"], r["d"], r["k"]) == shape}
        ours = of["interp_nn"]["ms_p50"]
        eager = min(r["ms_p50"] for name, r in of.items() if name.startswith("eager"))
        inverse = f"{ours / of['inverse']['ms_p50']:.2f}" if "inverse" in of else "-"
        form = of["interp_nn"]["plan"].split(",")[1].split(":")[0].strip()
        lines.append(
            f"| {', '.join(map(str, shape))} | {form} | {ours:.3g} | {ours / of['nn.Linear']['ms_p50']:.2f} "
            f"| {ours / of[providers.NAIVE]['ms_p50']:.2f} | {ours / eager:.2f} | {inverse} |"
        )
    wrong = [f"{r['provider']} at {r['n'], r['d'], r['k']}" for r in rows if r["status"] != "ok"]
    return "\n".join(lines + ([f"\nWrong: {', '.join(wrong)}"] if wrong else []))
