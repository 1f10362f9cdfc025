"""Print versions, devices, the CUDA library, each engine with the reason where it is off, and what has been verified.

`python -m interp_nn verify` verifies the usual kernels on a GPU, in processes of their own (see `interp_nn.engines.verify`).
`python -m interp_nn tune` measures, on a GPU, a table of kernel configurations (see `interp_nn.tuning`). `python -m interp_nn
report` writes a page about a network (see `interp_nn.explain.report`).
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import sys
from collections.abc import Sequence

import torch

from interp_nn import __version__, engines
from interp_nn.engines import select, verified_files, verify
from interp_nn.engines.cuda import compiled_library, fatbin
from interp_nn.engines.workers import OUT_OF_TIME, Workers


def main() -> None:
    """Print versions, devices, engines and the library, a line each."""
    print(f"interp_nn {__version__}")
    print(f"python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch     {torch.__version__} (CUDA {torch.version.cuda or 'none'}), {torch.get_num_threads()} CPU threads")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices   cpu{''.join(f', cuda:{i} {name}' for i, name in enumerate(devices))}")
    for name, state in engines.availability().items():
        print(f"engine    {name}: {state}")
    print(f"library   {_library()}")
    for i in range(len(devices)):
        passed = verified_files.passed_before(torch.device("cuda", i))
        print(f"verified  on cuda:{i}: {len(passed)} kernels{''.join(f'{chr(10)}          {name}' for name in passed)}")
    print(f"requested {select.requested()} (INTERP_NN_ENGINE or interp_nn.use_engine)")


def _library() -> str:
    reason = compiled_library.load()
    if reason is not None:
        return f"none: {reason}"
    built, served, _ = compiled_library.versions()
    driver = f"the driver serves CUDA {compiled_library.dotted(served)}" if served else "no CUDA driver"
    file = compiled_library.path()
    return f"{file}, CUDA {compiled_library.dotted(built)}, for {fatbin.archs(file.read_bytes())}; {driver}"


def verify_all(arguments: Sequence[str]) -> int:
    """Verify the usual kernels, print a table, and return 1 if one fails or time is short, 2 if none can run."""
    parser = argparse.ArgumentParser(
        "python -m interp_nn verify", description="Compare the usual kernels with PyTorch."
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="stop after so many (default: 4)")
    parser.add_argument("--device", default="cuda", help="which GPU (default: the current one)")
    given = parser.parse_args(arguments)
    if not given.minutes >= 0:
        parser.error(f"--minutes: got {given.minutes:g}, want a number from 0 on")
    try:
        device = torch.device(given.device)
    except RuntimeError:
        parser.error(f"--device: got {given.device!r}, want cuda, or cuda:0 and the like")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("interp_nn verify: there is no CUDA device", file=sys.stderr)
        return 2
    if device.type == "cuda":
        here = torch.cuda.current_device() if device.index is None else device.index
        if here >= torch.cuda.device_count():
            parser.error(f"--device: got {given.device!r}, want an index below {torch.cuda.device_count()}")
        device = torch.device("cuda", here)
    verified_files.forget_the_dead()
    variants = verify.standard(device)
    if not variants:
        states = "; ".join(f"{name} is {state}" for name, state in engines.availability().items() if name != "eager")
        print(f"interp_nn verify: there are no kernels to compare on {device}: {states}", file=sys.stderr)
        return 2
    judge = functools.partial(verify.judge_apart, device, torch.backends.cuda.matmul.fp32_precision)
    found = Workers(min(8, os.cpu_count() or 1), judge, 120.0).run(variants, 60 * given.minutes)
    failed = 0
    for variant, outcome in zip(variants, found, strict=True):
        reason, first, again = (outcome, 0.0, 0.0) if isinstance(outcome, str) else outcome
        failed += reason != ""
        word = "passed" if not reason else "missed" if reason == OUT_OF_TIME else "FAILED"
        print(f"{word} {first:6.1f} s, again {1e3 * again:6.1f} ms  {variant}  {reason}".rstrip())
    print(f"{len(variants) - failed} of {len(variants)} kernels passed on {device}")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["tune"]:
        from interp_nn import tuning

        sys.exit(tuning.main(sys.argv[2:]))
    if sys.argv[1:2] == ["verify"]:
        sys.exit(verify_all(sys.argv[2:]))
    if sys.argv[1:2] == ["report"]:
        from interp_nn.explain.report import report_command

        sys.exit(report_command.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        "python -m interp_nn", description="With no command: versions, devices and engines."
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["tune", "verify", "report"],
        help="tune: measure a table of tiles on a GPU; verify: compare its kernels with PyTorch; report: a page about a network",
    )
    parser.parse_args()
    main()
