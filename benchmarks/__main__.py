"""`python -m benchmarks`: the main job, the timings, and their tables and figures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import experiments
from benchmarks.experiments import datasets, papers
from benchmarks.experiments.common import at_least
from benchmarks.gpu import job
from benchmarks.records import environment, report, rows
from benchmarks.timing import ceilings, compare, operator_suite, roofline, run
from benchmarks.timing.problems import DTYPES, OPS, products


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train a small CNN with an MLP head and with a summary head, and compare")
    demo.add_argument(
        "--dataset", choices=("digits", "mnist", "cifar10", "cifar100"), help="default: what --data holds, else digits"
    )
    demo.add_argument(
        "--data",
        type=Path,
        default=datasets.usual_folder(),
        metavar="DIR",
        help="folder with MNIST or CIFAR-10 (default: $INTERP_NN_DATA)",
    )
    number = at_least(1)
    demo.add_argument("--epochs", type=number, help="default: 20 for digits, 1 for the others")
    demo.add_argument("--seeds", type=number, help="networks of each kind (default: 3 for digits, 1 for the others)")
    demo.add_argument("--train-size", type=number, help="train on the first so many images (default: all)")
    demo.add_argument("--device", default="cpu")
    demo.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="for the PNG and the JSON")

    experiment = commands.add_parser(
        "experiments", help="explanations of trained networks, and the papers' tables; lists them without a name"
    )
    experiment.add_argument("name", nargs="?", metavar="NAME")
    experiment.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="its own: `experiments NAME --help` says which"
    )

    run.add_arguments(
        commands.add_parser("run", help="time the operator, its losses and training steps against rivals")
    )
    commands.add_parser("list", help="what can be run: suites, providers, shapes")
    compare.add_arguments(
        commands.add_parser("compare", help="two git revisions side by side, or the ratios of two records")
    )

    table = commands.add_parser("table", help="print records as Markdown")
    table.add_argument("file", type=Path, nargs="+")
    table.add_argument("--page", type=Path, metavar="FILE", help="write the table into this file, between its marks")

    papers_table = commands.add_parser("papers", help="print what the papers published beside the experiments' records")
    papers_table.add_argument("--brief", action="store_true", help="only what has been published, and its rivals")
    papers_table.add_argument(
        "--page", type=Path, metavar="FILE", help="write the table into this file, between its marks"
    )

    plot = commands.add_parser("plot", help="draw records")
    plot.add_argument("file", type=Path, nargs="+")
    plot.add_argument("--output", type=Path, metavar="DIR", help="for PNG and SVG (default: beside the first record)")

    light = commands.add_parser("roofline", help="measure the device's rates, and the least time that they leave")
    light.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    light.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable (default: fp32)")
    light.add_argument("--op", choices=OPS, action="append", help="repeatable (default: all)")
    light.add_argument("--shape", type=run.shape, action="append", metavar="N,D,K[,M]", help="repeatable")

    host = commands.add_parser(
        "host",
        help="time what a layer costs on the host above its products, and a call of the triton engine without its launch",
    )
    host.add_argument("--output", type=Path, metavar="FILE", help="write the record here")

    gpu = commands.add_parser("gpu", help="everything that only a GPU can show: correctness, launches, tuning, timings")
    job.add_arguments(gpu)
    commands.add_parser("env", help="print what a record says of this machine")

    given = parser.parse_args(arguments)
    return _COMMANDS[given.command](given)


def _env(_: argparse.Namespace) -> int:
    print(json.dumps(environment.facts("cuda" if torch.cuda.is_available() else "cpu"), indent=1))
    return 0


def _list(_: argparse.Namespace) -> int:
    print(run.listing())
    return 0


def _table(given: argparse.Namespace) -> int:
    try:
        if given.page is None:
            print(report.markdown(rows.read(given.file)))
        else:
            for file in given.file:
                report.fill(given.page, file, environment.ROOT)
    except (OSError, ValueError) as error:
        print(f"benchmarks table: {error}", file=sys.stderr)
        return 2
    return 0


def _papers(given: argparse.Namespace) -> int:
    text = papers.markdown(papers.read(), given.brief)
    if given.page is None:
        print(text)
        return 0
    try:
        report.between(given.page, "papers --brief" if given.brief else "papers", text)
    except (OSError, ValueError) as error:
        print(f"benchmarks papers: {error}", file=sys.stderr)
        return 2
    return 0


def _plot(given: argparse.Namespace) -> int:
    from benchmarks.records import figures

    try:
        found = rows.read(given.file)
    except (OSError, ValueError) as error:
        print(f"benchmarks plot: {error}", file=sys.stderr)
        return 2
    for path in figures.draw(found, given.output or given.file[0].parent):
        print(path)
    return 0


def _roofline(given: argparse.Namespace) -> int:
    device = torch.device(given.device)
    problems = list(
        operator_suite.problems(operator_suite.Wanted(given.op or OPS, None, given.shape, given.dtype or ("fp32",)))
    )
    rates = {}
    for dtype in dict.fromkeys(problem.dtype for problem in problems):
        with products(dtype):
            rates[dtype] = ceilings.measure(device, dtype)
    print(f"{environment.device_name(given.device)}, torch {torch.__version__}\n\n{roofline.table(rates, problems)}")
    return 0


def _experiments(given: argparse.Namespace) -> int:
    if given.name is None:
        print(experiments.listing())
        return 0
    try:
        run_experiment = experiments.find(given.name)
    except ValueError as error:
        print(f"benchmarks experiments: {error}", file=sys.stderr)
        return 2
    return run_experiment(given.options)


def _host(given: argparse.Namespace) -> int:
    from benchmarks.timing import host

    print(host.table(host.run(given.output)))
    return 0


def _demo(given: argparse.Namespace) -> int:
    from benchmarks import demo

    return demo.run(given.dataset, given.data, given.epochs, given.seeds, given.train_size, given.device, given.output)


def _gpu(given: argparse.Namespace) -> int:
    return job.run(job.settings(given))


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "compare": compare.run,
    "demo": _demo,
    "env": _env,
    "experiments": _experiments,
    "gpu": _gpu,
    "host": _host,
    "list": _list,
    "papers": _papers,
    "plot": _plot,
    "roofline": _roofline,
    "run": run.run,
    "table": _table,
}


if __name__ == "__main__":
    sys.exit(main())
