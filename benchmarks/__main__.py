"""`python -m benchmarks`: the demo, the timings, the experiments, and their tables and figures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import command_line, demo, experiments
from benchmarks.command_line import users_input
from benchmarks.gpu import job
from benchmarks.records import environment, export, figures, files, report, rows
from benchmarks.timing import compare, host, kernel_profile, operator_suite, performance_model, roofline, run
from benchmarks.timing.problems import DTYPES, OPS, products
from interp_nn.engines.limits import triton_version


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = command_line.Parser(prog="python -m benchmarks", description=__doc__)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, function: Callable[[argparse.Namespace], int | None], about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about)
        added.set_defaults(function=function)
        return added

    demo.add_arguments(
        command("demo", demo.run, "train a small CNN with an MLP head and with a summary head, and compare them")
    )

    experiment = command(
        "experiments",
        _experiments,
        "explanations of trained networks, and the papers' tables; lists them without a name",
    )
    experiment.add_argument("name", nargs="?", metavar="NAME")
    experiment.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="`experiments NAME --help` lists the options of NAME"
    )

    run.add_arguments(command("run", run.run, "time the operator, its losses and training steps against baselines"))
    command("list", lambda _: print(run.listing()), "list the suites, the providers, the shapes and the experiments")
    compare.add_arguments(
        command("compare", compare.run, "time two git revisions side by side, or compare the ratios of two records")
    )

    table = command("table", _table, "print records as Markdown")
    table.add_argument("file", type=Path, nargs="+")
    table.add_argument("--csv", action="store_true", help="print every row and field as CSV instead")
    papers_table = command("papers", _papers, "print what the papers published beside the experiments' records")
    model = command("model", _model, "print predicted times of the kernels on GPUs that are not at hand")
    for page in (table, papers_table, model):
        page.add_argument("--page", type=Path, metavar="FILE", help="write the table into this file, between its marks")

    plot = command("plot", _plot, "draw records")
    plot.add_argument("file", type=Path, nargs="+")
    plot.add_argument("--output", type=Path, metavar="DIR", help="for the PNGs (default: beside the first record)")

    light = command("roofline", _roofline, "measure the device's rates, and print the least time of each problem")
    light.add_argument("--device", type=command_line.device, choices=("cpu", "cuda"), default=cuda)
    light.add_argument("--dtype", choices=DTYPES, action="append", help="repeatable (default: fp32)")
    light.add_argument("--op", choices=OPS, action="append", help="repeatable (default: all)")
    light.add_argument("--shape", type=run.shape, action="append", metavar="N,D,K[,M]", help="repeatable")

    kernel_profile.add_arguments(
        command(
            "profile", kernel_profile.run, "print the command that profiles our kernels with ncu or nsys, and run it"
        )
    )

    overhead = command(
        "host",
        _host,
        "time the Python overhead of a layer and of the triton engine",
    )
    overhead.add_argument("--output", type=Path, metavar="FILE", help="write the record here")

    job.add_arguments(
        command(
            "gpu",
            lambda given: job.run(job.settings(given)),
            "check correctness, launches, tuning and timings on a GPU, which no other command can",
        )
    )
    command(
        "env",
        lambda _: print(json.dumps(environment.facts(cuda), indent=1)),
        "print the environment of a record made on this machine",
    )

    given = parser.parse_args(arguments)
    return command_line.status(f"benchmarks {given.command}", lambda: given.function(given))


def _table(given: argparse.Namespace) -> None:
    if given.csv and given.page is not None:
        raise command_line.UserInputError("--csv: got it with --page, which takes the tables in Markdown")
    if given.csv:
        print(export.to_csv(_read(given.file)), end="")
        return
    if given.page is None:
        print(report.markdown(_read(given.file)))
    for file in given.file if given.page is not None else ():
        with users_input():
            report.fill(given.page, file, environment.ROOT)


def _papers(given: argparse.Namespace) -> None:
    from benchmarks.experiments import papers  # its modules draw figures, which the other commands do without

    with users_input():
        records = papers.read()
    _print_or_write(given, papers.markdown(records))


def _model(given: argparse.Namespace) -> None:
    if triton_version() == (0, 0):
        raise command_line.UserInputError("it reads the triton engine's tiles, and Triton is not installed")
    _print_or_write(given, performance_model.markdown())


def _print_or_write(given: argparse.Namespace, text: str) -> None:
    if given.page is None:
        print(text)
        return
    with users_input():
        report.between(given.page, given.command, text)


def _plot(given: argparse.Namespace) -> None:
    found, folder = _read(given.file), given.output or given.file[0].parent
    with users_input():
        files.check_folder(folder)
    drawn = figures.draw(found, folder)
    if not drawn:
        raise command_line.UserInputError(
            f"{', '.join(map(str, given.file))}: no timing of the summary or a loss to draw"
        )
    for path in drawn:
        print(path)


def _read(paths: list[Path]) -> list[rows.Row]:
    with users_input():
        return rows.read(paths)


def _host(given: argparse.Namespace) -> None:
    if given.output is not None:
        with users_input():
            files.check_writable(given.output)
    print(host.table(host.run(given.output)))


def _roofline(given: argparse.Namespace) -> None:
    wanted = operator_suite.Wanted(given.op or OPS, None, given.shape, given.dtype or ("fp32",))
    problems = list(operator_suite.problems(wanted))
    if not problems:
        raise command_line.UserInputError("no problem has this op and shape together")
    rates = {}
    for dtype in dict.fromkeys(problem.dtype for problem in problems):
        with products(dtype):
            rates[dtype] = roofline.measure(torch.device(given.device), dtype)
    print(f"{environment.device_name(given.device)}, torch {torch.__version__}\n\n{roofline.table(rates, problems)}")


def _experiments(given: argparse.Namespace) -> int:
    if given.name is None:
        print(experiments.listing())
        return 0
    with users_input():
        run_experiment = experiments.find(given.name)
    return run_experiment(given.options)


if __name__ == "__main__":
    sys.exit(main())
