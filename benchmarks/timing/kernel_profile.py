"""`profile`: the command that profiles our kernels, by Nsight Compute or Nsight Systems; runs it where both are.

The profiled process, `python -m benchmarks.timing.kernel_profile`, makes the calls between the marks of CUDA's profiler, after
what happens once.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.command_line import UserInputError, at_least, users_input
from benchmarks.records import files
from benchmarks.records.environment import ROOT
from benchmarks.timing import providers
from benchmarks.timing.measure import calling
from benchmarks.timing.problems import CLASSES, DTYPES, MODES, OPS, Problem, datasets, products
from benchmarks.timing.run import ALL_MODES, shape
from interp_nn.engines import limits, select
from interp_nn.engines.devices import spec_for
from interp_nn.engines.problem import Problem as PlannedProblem

# ncu sets the GPU's clocks unless it is told not to: a machine may not allow it, and times would not be those of other commands.
NCU = ("--set=full", "--clock-control=none")
# The kernels of csrc, forward first.
_CUDA = {
    "summary": ["forward_kernel", "summary_backward_kernel"],
    "cross_entropy": ["pair_loss_kernel"],
    "head": ["head_loss_kernel"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks profile`."""
    add = parser.add_argument
    add("--tool", choices=("ncu", "nsys"), default="ncu", help="ncu: counters of each kernel; nsys: a time line")
    add("--op", choices=OPS, default="summary")
    add("--mode", choices=ALL_MODES, help="default: fwdbwd, or loss")
    add("--shape", type=shape, metavar="N,D,K[,M]", help="default: 65536,512,64, and 10 classes for head")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--engine", choices=("triton", "cuda"), default="triton")
    add("--calls", type=at_least(1), default=3, help="default: 3")
    add("--output", type=Path, default=Path("profile"), metavar="FILE", help="of the tool, without its suffix")


def run(given: argparse.Namespace) -> int:
    """Print the command; run it where the tool and a GPU are, else print what is missing."""
    mode = given.mode or ("loss" if given.op != "summary" else "fwdbwd")
    sizes = given.shape or (65536, 512, 64, CLASSES)[: 4 if given.op == "head" else 3]
    if mode not in MODES[given.op] or len(sizes) != (4 if given.op == "head" else 3):
        raise UserInputError(
            f"{given.op}: want a mode of {', '.join(MODES[given.op])}, and a shape N,D,K, or N,D,K,M for head"
        )
    problem = Problem.of(given.op, sizes, given.dtype)
    made = command(problem, mode, given.engine, given.tool, given.calls, given.output)
    print(shlex.join(made))
    if shutil.which(given.tool) is None or not torch.cuda.is_available():
        missing = "there is no GPU" if shutil.which(given.tool) else f"{given.tool} is not on the PATH"
        print(f"not run: {missing}", file=sys.stderr)
        return 0
    with users_input():
        files.check_folder(given.output.resolve().parent)
    return subprocess.run(made, cwd=ROOT, check=False).returncode


def command(problem: Problem, mode: str, engine: str, tool: str, calls: int, output: Path) -> list[str]:
    """Return the command that profiles the kernels of a problem in a mode."""
    target = [sys.executable, "-m", "benchmarks.timing.kernel_profile", mode, engine, str(calls), *map(str, problem)]
    if tool == "nsys":
        options = ["--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--force-overwrite=true"]
        return ["nsys", "profile", *options, f"--output={output.resolve()}", *target]
    pattern = f"regex:^({'|'.join(kernels(problem, mode, engine))})$"
    options = ["--profile-from-start=off", *NCU, "--force-overwrite", f"--export={output.resolve()}"]
    return ["ncu", *options, f"--kernel-name={pattern}", *target]


def kernels(problem: Problem, mode: str, engine: str) -> list[str]:
    """Return the names of an engine's kernels for a problem, as a GPU of compute capability 9.0 runs them."""
    if engine == "cuda":
        return _CUDA[problem.op][: 1 if mode in ("infer", "fwd") else None]
    grad = mode not in ("infer", "fwd")
    classes = (problem.m or problem.k) if problem.loss else None
    planned = PlannedProblem(
        problem.n, problem.d, problem.k, problem.op == "cross_entropy", grad, grad, classes, problem.op == "head",
        DTYPES[problem.dtype], spec_for((9, 0)), "sm_90",
    )  # fmt: skip
    if (why := limits.unsupported_reason("triton", planned)) is not None:
        raise UserInputError(f"the triton engine does not compute {problem.name}: {why}")
    return list(select._kernels(planned, select._kernel_plan(planned, "triton")))


def main(arguments: list[str]) -> None:
    """Make the calls that are profiled."""
    mode, engine, calls, op, n, d, k, m, dtype = arguments
    problem = Problem(op, int(n), int(d), int(k), None if m == "None" else int(m), dtype)
    sets = datasets(problem, torch.device("cuda"), 1)
    with products(dtype):
        provider = providers.build(f"ours-{engine}", problem, mode, sets, engine, None)
        call = calling(provider, mode, sets)
        with provider.using():
            call(0)
            call(0)
            with torch.cuda.profiler.profile():
                for _ in range(int(calls)):
                    call(0)
                torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
