"""`python -m benchmarks`: the main job, the timings, and their tables."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks import ops, record
from benchmarks.gpu import job


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="train a small CNN with an MLP head and with a summary head, and compare")
    demo.add_argument(
        "--dataset", choices=("digits", "mnist", "cifar10"), help="default: what --data holds, else digits"
    )
    demo.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("INTERP_NN_DATA"),
        metavar="DIR",
        help="folder with MNIST or CIFAR-10 (default: $INTERP_NN_DATA)",
    )
    demo.add_argument("--epochs", type=int, help="default: 20 for digits, 1 for the others")
    demo.add_argument("--seeds", type=int, help="networks of each kind (default: 3 for digits, 1 for the others)")
    demo.add_argument("--train-size", type=int, help="train on the first so many images (default: all)")
    demo.add_argument("--device", default="cpu")
    demo.add_argument("--output", type=Path, default=Path("results"), metavar="DIR", help="for the PNG and the JSON")

    run = commands.add_parser("run", help="time the operator against its rivals on this CPU")
    run.add_argument("--mode", choices=("fwdbwd", "infer"), default="fwdbwd")
    run.add_argument(
        "--shape", type=_shape, action="append", metavar="N,D,K", help="repeatable (default: the whole grid)"
    )
    run.add_argument("--seconds", type=float, default=1.5, help="for each shape, at least 7 rounds (default: 1.5)")
    run.add_argument("--output", type=Path, metavar="FILE", help="write the record here")

    host = commands.add_parser(
        "host", help="time what a call of the triton engine costs on the host, without its launch"
    )
    host.add_argument("--output", type=Path, metavar="FILE", help="write the record here")

    gpu = commands.add_parser("gpu", help="everything that only a GPU can show: correctness, launches, tuning, timings")
    job.add_arguments(gpu)

    table = commands.add_parser("table", help="print a record of `run` as Markdown")
    table.add_argument("file", type=Path)
    commands.add_parser("env", help="print what a record says of this machine")

    given = parser.parse_args(arguments)
    if given.command == "env":
        print(json.dumps(record.environment(), indent=1))
    elif given.command == "table":
        print(ops.table(json.loads(given.file.read_text(encoding="utf-8"))))
    elif given.command == "run":
        print(ops.table(ops.run(given.shape or ops.SHAPES, given.mode, given.seconds, given.output)))
    elif given.command == "gpu":
        return job.run(job.settings(given))
    elif given.command == "host":
        from benchmarks import host as host_cost

        print(host_cost.table(host_cost.run(given.output)))
    else:
        from benchmarks import demo as main_job

        return main_job.run(
            given.dataset, given.data, given.epochs, given.seeds, given.train_size, given.device, given.output
        )
    return 0


def _shape(text: str) -> ops.Shape:
    n, d, k = (int(part) for part in text.split(","))
    return n, d, k


if __name__ == "__main__":
    sys.exit(main())
