"""Print versions, devices, the CUDA library, and each engine with the reason where it is off: `python -m interp_nn`.

`python -m interp_nn tune` measures, on a GPU, a table of kernel configurations (see `interp_nn.tuning`). `python -m interp_nn
report` writes a page about a network (see `interp_nn.explain.report`).
"""

from __future__ import annotations

import argparse
import platform
import sys

import torch

from interp_nn import __version__, engines
from interp_nn.engines import select
from interp_nn.engines.cuda import compiled_library, fatbin


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
    print(f"requested {select.requested()} (INTERP_NN_ENGINE or interp_nn.use_engine)")


def _library() -> str:
    reason = compiled_library.load()
    if reason is not None:
        return f"none: {reason}"
    built, served, _ = compiled_library.versions()
    driver = f"the driver serves CUDA {compiled_library.dotted(served)}" if served else "no CUDA driver"
    file = compiled_library.path()
    return f"{file}, CUDA {compiled_library.dotted(built)}, for {fatbin.archs(file.read_bytes())}; {driver}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["tune"]:
        from interp_nn import tuning

        sys.exit(tuning.main(sys.argv[2:]))
    if sys.argv[1:2] == ["report"]:
        from interp_nn.explain.report import report_command

        sys.exit(report_command.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(
        "python -m interp_nn", description="With no command: versions, devices and engines."
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["tune", "report"],
        help="tune: measure a table of kernel configurations on a GPU; report: a page about a network and a table",
    )
    parser.parse_args()
    main()
