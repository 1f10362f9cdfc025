"""Record the launches that the Triton engine would make on a GPU that is not there, for `offline` to compile.

The engine plans them for tensors on the meta device; only its device and its last step are replaced.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from offline import Launch

from interp_nn.engines.devices import spec_for
from interp_nn.engines.triton import engine, launcher
from interp_nn.engines.triton import launches as planned


@contextlib.contextmanager
def recording(capability: int, fp32_precision: str | None = None) -> Iterator[list[Launch]]:
    """Return a list that collects the engine's launches inside, planned for a known GPU of that capability.

    `fp32_precision` sets `torch.backends.cuda.matmul.fp32_precision` inside.
    """
    spec = spec_for(divmod(capability, 10))
    if spec is None:
        raise ValueError(f"no GPU is known of capability {capability}")
    launches: list[Launch] = []

    def record(plan: launcher.Launch, device: torch.device, *arguments: Any) -> None:
        named = {param.name for param in plan.kernel.params}
        constants = {name: value for name, value in plan.constants.items() if name in named}
        options = {name: value for name, value in plan.constants.items() if name not in named}
        launches.append(Launch(plan.kernel, arguments, constants, options))

    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    with mock.patch.object(planned, "spec_on", return_value=spec), mock.patch.object(engine, "launch", record):
        try:
            if fp32_precision is not None:
                switch.fp32_precision = fp32_precision
            yield launches
        finally:
            switch.fp32_precision = before
