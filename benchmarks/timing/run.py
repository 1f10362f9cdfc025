"""`run`: time suites on a device, and write a record."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from benchmarks.command_line import UserInputError, at_least, not_negative, positive, users_input
from benchmarks.command_line import device as present
from benchmarks.records import environment, report
from benchmarks.records.rows import Writer, common
from benchmarks.timing import explain_suite, layer_providers, operator_suite, training_suite
from benchmarks.timing.clocks import Limit
from benchmarks.timing.measure import TIMERS, Asked
from benchmarks.timing.problems import CLASSES, DTYPES, HEADS, LAYER_SHAPES, LAYERS, MODES, OPS, QUICK, SHAPES
from benchmarks.timing.providers import ABOUT, NAMES
from interp_nn.engines import ENGINES

SUITES = {
    "ops": "the operator and its losses: forward, backward, both, inference, loss with gradients",
    "polynomials": "layers with a polynomial and a spectral norm: forward, backward, both, microbatches, updates of the norm",
    "train": "training steps of the reference networks with each head",
    "explain": "the affine maps of networks, the grouping of activation patterns",
}
PROVIDERS = tuple(dict.fromkeys((*NAMES, *layer_providers.NAMES)))
ALL_MODES = tuple(dict.fromkeys(mode for modes in MODES.values() for mode in modes))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks run`."""
    names = [timer for timers in TIMERS.values() for timer in timers]
    add = parser.add_argument
    add("--suite", choices=SUITES, action="append", help="repeatable (default: all)")
    add("--op", choices=(*OPS, *LAYERS), action="append", help="repeatable (default: all)")
    add("--mode", choices=ALL_MODES, action="append", help="repeatable (default: all of an op)")
    add(
        "--shape", type=shape, action="append", metavar="N,D,K[,M]", help="repeatable; with M classes for the op 'head'"
    )
    add("--dtype", choices=DTYPES, action="append", help="repeatable (default: fp32; on a GPU bf16 too)")
    add("--provider", choices=PROVIDERS, action="append", help="not of explain; repeatable (default: all)")
    add("--engine", choices=("auto", *ENGINES), default="auto", help="the engine of `ours`")
    add("--device", type=present, choices=TIMERS, help="default: cuda where there is one")
    add("--timer", choices=names, help=_TIMER_HELP)
    add(
        "--l2",
        choices=("cold", "hot"),
        help="cold: sets of inputs in turn that the last cache does not hold (default on a GPU)",
    )
    add("--samples", type=at_least(1), help="of each provider, fewer for slow calls (default: 7)")
    add("--seconds", type=positive, help="of each problem and mode (default: 1.5)")
    largest = (
        f"leave out larger forwards and backwards (default: {operator_suite.CPU_BUDGET:.0f} on a CPU, none on a GPU)"
    )
    add("--budget", type=positive, metavar="GFLOP", help=largest)
    late = "skip the problems and modes that are left after this time, with rows that say so (default: no limit)"
    add("--minutes", type=not_negative, default=math.inf, help=late)
    add("--quick", action="store_true", help="one minute: two shapes, few samples, the suite ops alone")
    file = "JSON lines, appended to (default: benchmarks/results/DEVICE/TIME.jsonl)"
    add("--out", type=Path, metavar="FILE", help=file)
    add("--revision", metavar="SHA", help="the commit to record where there is no git")


_TIMER_HELP = (
    "wall on a CPU; on a GPU events (calls as a program makes them; default), graph (replayed, without the host) "
    "or host (its share alone); there explain always uses events, and train has no other timer"
)


def shape(text: str) -> tuple[int, ...]:
    """Read N,D,K or N,D,K,M of positive numbers."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) not in (3, 4) or min(found) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want N,D,K or N,D,K,M of positive whole numbers")
    return found


def run(given: argparse.Namespace) -> int:
    """Run the suites and print their table; the exit status is 1 if ours is wrong, 2 for options that do not fit."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timer = given.timer or TIMERS[device.type][0]
    if timer not in TIMERS[device.type]:
        raise UserInputError(f"--timer: got {timer}, want {' or '.join(TIMERS[device.type])} on {device.type}")
    cold = (given.l2 or ("cold" if device.type == "cuda" else "hot")) == "cold"
    asked = Asked(
        device, timer, cold, given.engine,
        given.seconds or (0.3 if given.quick else 1.5), given.samples or (3 if given.quick else 7),
        limit=Limit(given.minutes),
    )  # fmt: skip
    results = environment.ROOT / "benchmarks" / "results" / environment.device_slug(device.type)
    out = given.out or results / f"{environment.now(given.revision)}.jsonl"
    with users_input():
        writer = Writer(out, common(device.type, given.revision))
    names = given.provider or PROVIDERS
    suites = given.suite or (["ops"] if given.quick else list(SUITES))
    budget = given.budget or (operator_suite.CPU_BUDGET if device.type == "cpu" else None)
    dtypes = given.dtype or (("fp32",) if device.type == "cpu" else ("bf16", "fp32"))
    for suite, ops, known in (("ops", OPS, NAMES), ("polynomials", tuple(LAYERS), layer_providers.NAMES)):
        if suite in suites:
            asked_ops, chosen = [op for op in given.op or ops if op in ops], [name for name in names if name in known]
            wanted = operator_suite.Wanted(asked_ops, given.mode, given.shape, dtypes, chosen, budget, given.quick)
            operator_suite.run(wanted, asked, writer)
    if "train" in suites:
        training_suite.run(names, asked, writer)
    if "explain" in suites:
        explain_suite.run(asked, writer, given.quick)
    if all(row["op"] == "ceiling" for row in writer.rows):
        raise UserInputError("no suite has a problem with this op, mode, shape and provider together")
    print("\n" + report.markdown(writer.rows))
    print(f"\nrecord: {out}")
    return int(any(row["status"] in ("wrong", "failed") and row["provider"].startswith("ours") for row in writer.rows))


def listing() -> str:
    """Return suites, ops, modes, providers and shapes as text."""
    lines = ["suites"]
    lines += [f"  {name:18}{about}" for name, about in SUITES.items()]
    lines += ["", "ops and their modes", *(f"  {op:23}{', '.join(modes)}" for op, modes in MODES.items())]
    lines += ["", "providers", *(f"  {name:18}{about}" for name, about in {**ABOUT, **layer_providers.ABOUT}.items())]
    lines += ["", f"dtypes: {', '.join(DTYPES)}", "shapes (n, d, k), and heads with m classes"]
    lines += [f"  {given}" for given in [*SHAPES, *((*head, CLASSES) for head in HEADS)]]
    lines += [f"  layers: {', '.join(map(str, LAYER_SHAPES))}"]
    lines += [f"  --quick: {', '.join(map(str, QUICK))}"]
    return "\n".join(lines)
