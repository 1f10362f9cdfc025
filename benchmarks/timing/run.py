"""`run`: time suites on a device, and write a record."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import experiments
from benchmarks.command_line import UserInputError, at_least, not_negative, positive, users_input
from benchmarks.command_line import device as present
from benchmarks.records import environment, report
from benchmarks.records.intervals import ENOUGH
from benchmarks.records.report import BEST_PLAN, REPEAT
from benchmarks.records.rows import Writer, common
from benchmarks.timing import custom, explain_suite, layer_providers, operator_suite, peers, training_suite
from benchmarks.timing.clocks import Limit
from benchmarks.timing.measure import TIMERS, Asked
from benchmarks.timing.problems import (
    CLASSES,
    DTYPES,
    HEADS,
    LAYER_SHAPES,
    LAYERS,
    MODES,
    OPS,
    QUICK,
    SELECTION,
    SHAPES,
)
from benchmarks.timing.providers import ABOUT, NAMES, PLAN_NAMES, chosen
from interp_nn.engines import ENGINES

SUITES = {
    "ops": "the operator and its losses: forward, backward, both, inference, loss with gradients",
    "polynomials": "layers with a polynomial and a spectral norm: forward, backward, both, microbatches, updates of the norm",
    "train": "training steps of the reference networks with each head",
    "explain": "the affine maps of networks, the grouping of activation patterns",
    "selection": "the choice of a plan over n and k, beside every plan, nn.Linear, unfused and the inverse; only by --suite",
}
# The paths that a suite measures: a record is stale when these have changed since its commit.
_OPERATOR = ("benchmarks/timing", "interp_nn/engines", "interp_nn/functional.py", "interp_nn/ops")
PATHS = {
    "ops": _OPERATOR,
    "polynomials": (*_OPERATOR, "interp_nn/nn"),
    "train": (*_OPERATOR, "interp_nn/nn"),
    "explain": (
        "benchmarks/timing",
        "interp_nn/explain/clusters",
        "interp_nn/explain/following",
        "interp_nn/explain/linear",
    ),
    "selection": _OPERATOR,
}
_CHOICE = ("ours", *PLAN_NAMES, BEST_PLAN, "linear", "unfused", "inverse-inv", REPEAT)
PROVIDERS = tuple(dict.fromkeys((*NAMES, *layer_providers.NAMES, *training_suite.PROVIDERS)))
_BESIDE = ("ours", "linear", "unfused")  # of a user's provider
_BY_NAME = frozenset((*PROVIDERS, *ABOUT, *peers.NAMES))
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
    add("--provider", type=named, metavar="NAME", action="append", help=_PROVIDER_HELP)
    add("--engine", choices=("auto", *ENGINES), default="auto", help="the engine of `ours`")
    add("--device", type=present, choices=TIMERS, help="default: cuda where there is one")
    add("--timer", choices=names, help=_TIMER_HELP)
    add(
        "--l2",
        choices=("cold", "hot"),
        help="cold: sets of inputs in turn that the last cache does not hold (default on a GPU)",
    )
    add("--samples", type=at_least(ENOUGH), help="of each provider, at least (default: 7)")
    add("--seconds", type=positive, help="of each problem and mode (default: 1.5)")
    largest = (
        f"leave out larger forwards and backwards (default: {operator_suite.CPU_BUDGET:.0f} on a CPU, none on a GPU)"
    )
    add("--budget", type=positive, metavar="GFLOP", help=largest)
    late = "skip the problems and modes that are left after this time, with rows that say so (default: no limit)"
    add("--minutes", type=not_negative, default=math.inf, help=late)
    quick = "less than a minute: two shapes, few samples, the main providers, the suite ops alone"
    add("--quick", action="store_true", help=quick)
    file = "JSON lines, appended to (default: benchmarks/results/DEVICE/TIME.jsonl)"
    add("--out", type=Path, metavar="FILE", help=file)
    add("--revision", metavar="SHA", help="the commit to record where there is no git")


_TIMER_HELP = (
    "wall on a CPU; on a GPU events (calls as a program makes them; default), graph (replayed, without the host) "
    "or host (its share alone); there explain always uses events, and train has no other timer"
)


_PROVIDER_HELP = (
    "one of `python -m benchmarks list`, or FILE.py:NAME for a function that the file makes a provider, beside ours, linear and "
    "unfused unless ours is named; explain has its own; repeatable (default: all, but the main ones for large problems on a CPU)"
)


def named(text: str) -> str:
    """Read the name of a provider; that of a user's file, FILE.py:NAME, becomes known."""
    if ":" in text:
        try:
            return custom.load(text, _BY_NAME)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    if text in peers.NAMES:
        try:
            peers.find(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    elif text not in _BY_NAME:
        near = difflib.get_close_matches(text, _BY_NAME)
        hint = f"did you mean {' or '.join(near)}?" if near else "`python -m benchmarks list` has them"
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {hint}")
    return text


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
    """Run the suites and print their table; the exit status is 1 if ours or a user's is wrong, 2 for options that do not fit."""
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timer = given.timer or TIMERS[device.type][0]
    if timer not in TIMERS[device.type]:
        raise UserInputError(f"--timer: got {timer}, want {' or '.join(TIMERS[device.type])} on {device.type}")
    cold = (given.l2 or ("cold" if device.type == "cuda" else "hot")) == "cold"
    asked = Asked(
        device, timer, cold, given.engine,
        given.seconds or (0.3 if given.quick else 1.5), given.samples or (ENOUGH if given.quick else 7),
        limit=Limit(given.minutes),
    )  # fmt: skip
    results = environment.ROOT / "benchmarks" / "results" / environment.device_slug(device.type)
    out = given.out or results / f"{environment.now(given.revision)}.jsonl"
    names = given.provider or PROVIDERS
    if "ours" not in names:  # every ratio has it
        names = [*_BESIDE, *names]
    names = list(dict.fromkeys((*names, REPEAT)))
    suites = given.suite or (["ops"] if given.quick else [suite for suite in SUITES if suite != "selection"])
    dtypes = given.dtype or (("fp32",) if device.type == "cpu" else ("bf16", "fp32"))
    if given.provider:
        timed = {suite: _timed(suite, given, names, dtypes, device.type == "cpu") for suite in suites}
        for name in given.provider:
            if not any(name in of for of in timed.values()):
                what = f" computes the op {op}" if (op := custom.op_of(name)) else ""
                raise UserInputError(
                    f"--provider: {name}{what}: no suite has a problem with it and this op, mode and shape together"
                )
        suites = given.suite or [suite for suite in suites if timed[suite] & set(given.provider)]
    with users_input():
        writer = Writer(out, common(device.type, given.revision))
    for suite in [suite for suite in SUITES if suite in suites]:
        writer.share(paths=PATHS[suite])
        if suite == "train":
            training_suite.run(names, asked, writer)
        elif suite == "explain":
            explain_suite.run(asked, writer, given.quick)
        else:
            wanted = _wanted(suite, given, names, dtypes, device.type == "cpu")
            operator_suite.run(wanted, asked, writer)
    if all(row["op"] == "ceiling" for row in writer.rows):
        raise UserInputError("no suite has a problem with this op, mode, shape and provider together")
    print("\n" + report.markdown(writer.rows))
    print(f"\nrecord: {out}")
    return int(
        any(
            row["status"] in ("wrong", "failed") and (row["about"] or row["provider"].startswith("ours"))
            for row in writer.rows
        )
    )


def _timed(suite: str, given: argparse.Namespace, names: Sequence[str], dtypes: Sequence[str], cpu: bool) -> set[str]:
    """Return the providers that have a row in a suite."""
    if suite == "train":
        return set(training_suite.PROVIDERS)
    if suite == "explain":
        return set(explain_suite.PROVIDERS)
    wanted = _wanted(suite, given, names, dtypes, cpu)
    ops = {
        problem.op
        for problem in operator_suite.problems(wanted)
        if wanted.modes is None or set(wanted.modes) & set(MODES[problem.op])
    }
    return {name for name in wanted.providers if ops and custom.op_of(name) in (None, *ops)}


def _wanted(
    suite: str, given: argparse.Namespace, names: Sequence[str], dtypes: Sequence[str], cpu: bool
) -> operator_suite.Wanted:
    """Return the problems, modes and providers of a suite of the operator."""
    ops: Sequence[str]
    ops, known = (tuple(LAYERS), layer_providers.NAMES) if suite == "polynomials" else (OPS, (*ABOUT, *custom.FOUND))
    modes, shapes = given.mode, given.shape
    if suite == "selection":
        ops, modes, shapes = OPS[:1], modes or ("infer", "fwdbwd"), shapes or SELECTION
        names = [*_CHOICE, *(name for name in names if name in custom.FOUND)]
    ops = [op for op in given.op or ops if op in ops]
    ordinary = suite == "ops" and not given.provider
    if ordinary and given.quick:
        names = operator_suite.QUICK_NAMES
    budget = given.budget or (operator_suite.CPU_BUDGET if cpu else None)
    large = operator_suite.LARGE if ordinary and cpu else None
    return operator_suite.Wanted(ops, modes, shapes, dtypes, chosen(names, known), budget, given.quick, large)


def listing() -> str:
    """Return suites, ops, modes, providers and shapes as text."""
    lines = ["suites"]
    lines += [f"  {name:18}{about}" for name, about in SUITES.items()]
    lines += ["", "ops and their modes", *(f"  {op:23}{', '.join(modes)}" for op, modes in MODES.items())]
    abouts = {**ABOUT, **layer_providers.ABOUT, **training_suite.ABOUT}
    lines += ["", "providers", *(f"  {name:18}{about}" for name, about in abouts.items())]
    lines += ["", "providers of other packages, only by --provider", *(f"  {line}" for line in peers.listing())]
    lines += ["", "experiments (`python -m benchmarks experiments NAME`)"]
    lines += [f"  {line}" for line in experiments.listing().splitlines()]
    lines += ["", f"dtypes: {', '.join(DTYPES)}", "shapes (n, d, k), and heads with m classes"]
    lines += [f"  {given}" for given in [*SHAPES, *((*head, CLASSES) for head in HEADS)]]
    lines += [f"  selection: n, 512, k for {len(SELECTION)} pairs of n and k"]
    lines += [f"  layers: {', '.join(map(str, LAYER_SHAPES))}"]
    lines += [f"  --quick: {', '.join(map(str, QUICK))}"]
    return "\n".join(lines)
