"""Launch a kernel: by Triton's own call, or by a compiled kernel that an earlier launch has found."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp_nn.engines.devices import sm_carveout
from interp_nn.engines.limits import triton_version
from interp_nn.engines.triton import configs


class Launch(NamedTuple):
    """One launch of a kernel: its grid, its constants and options by name, and its compiled kernels."""

    kernel: Any
    programs: int
    splits: int
    constants: Constants
    scratch: bool = False


class Constants(dict[str, Any]):
    """The constants and options of a launch by name, and its compiled kernels by what else Triton specialises on.

    Attributes:
        handles: Compiled kernels by device, integers, and the dtype of each pointer or None.
        pointers: Number of arguments that are tensors or None, which come first; 0 before the first launch.
        integers: Number of arguments up to the last integer, which come next.
    """

    __slots__ = ("handles", "integers", "pointers")

    def __init__(self, *parts: dict[str, Any]) -> None:
        super().__init__()
        for part in parts:
            self.update(part)
        self.handles: dict[tuple[Any, ...], _Handle] = {}
        self.pointers = self.integers = 0


class _Handle(NamedTuple):
    """A compiled kernel, its launcher, the first arguments of that, and its last ones, which are the constants."""

    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    stream: Any
    compiled: Any  # Triton 3.8 and newer unload the function of a kernel that nothing holds


def launch(made: Launch, device: torch.device, *arguments: Any) -> None:
    """Launch a kernel on a device, and return at once. All launches of this engine go through this function.

    Triton's own call finds the compiled kernel by parsing all arguments and constants. A launch on the current device whose
    tensors are aligned to 16 bytes finds it in the constants' handles, in less time. It is left to Triton while a hook or switch
    is set that Triton's own call heeds for a compiled kernel. Hooks of the compilation itself, such as `jit_cache_hook`, Triton
    calls only where it compiles.
    """
    on_gpu = device.type == "cuda"
    if on_gpu and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            made.kernel[(made.programs,)](*arguments, **made.constants)
        return
    kept, key = made.constants, None
    if type(kept) is Constants and kept.pointers:
        tensors = arguments[: kept.pointers]
        given = [0 if t is None else t.data_ptr() for t in tensors]
        if not reduce(or_, given) & 15:
            kinds = [t if t is None else t.dtype if t.is_cuda is on_gpu else _ELSEWHERE for t in tensors]
            key = (device, *arguments[kept.pointers : kept.integers], *kinds)
            handle = kept.handles.get(key)
            if handle is not None:
                run, function, metadata, constants, stream, _ = handle
                if not _observed(made.kernel):
                    rest = arguments[kept.pointers :]
                    at = stream(device.index or 0)
                    run(made.programs, 1, 1, at, function, metadata, None, None, None, *given, *rest, *constants)
                    return
    compiled = made.kernel[(made.programs,)](*arguments, **kept)
    if TESTED and type(kept) is Constants and compiled is not None:
        _keep(made, key, compiled, arguments)


def _observed(kernel: Any) -> bool:
    """Return True if Triton's own launch would call a hook, or look for a kernel that is compiled in another way."""
    runtime, compilation = _knobs
    return bool(
        runtime.launch_enter_hook.calls
        or runtime.launch_exit_hook.calls
        or kernel.pre_run_hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or compilation.instrumentation_mode
    )


_knobs: tuple[Any, Any]  # of Triton's runtime and compilation, once a launch is remembered
_ELSEWHERE = "on another device"  # where Triton's own launch raises
TESTED = (3, 6) <= triton_version() <= (3, 9)  # whose launchers take what `launch` gives them


def _keep(made: Launch, key: tuple[Any, ...] | None, compiled: Any, arguments: tuple[Any, ...]) -> None:
    """Remember a compiled kernel for later launches; at the first one, find which arguments are pointers and integers."""
    kept = made.constants
    if not kept.pointers:
        pointers = next(i for i, a in enumerate(arguments) if not (a is None or isinstance(a, Tensor)))
        kept.integers = next(
            (i for i in range(pointers, len(arguments)) if type(arguments[i]) is not int), len(arguments)
        )
        kept.pointers = pointers
    elif key is not None and _ELSEWHERE not in key and hasattr(compiled, "packed_metadata"):
        from triton import knobs
        from triton.runtime import driver

        global _knobs
        _knobs = knobs.runtime, knobs.compilation
        names = made.kernel.arg_names[len(arguments) :]
        if all(name in kept for name in names) and not _observed(made.kernel):
            constants = tuple(kept[name] for name in names)
            stream = driver.active.get_current_stream
            run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
            kept.handles[key] = _Handle(run, function, metadata, constants, stream, compiled)


def ready(made: Launch, device: torch.device, kinds: Sequence[torch.dtype | None], *rest: Any) -> Any:
    """Return `launch` as a function of the bitwise or of all addresses, and of each (0 for None); None before it is compiled.

    That returns False, and launches nothing, where `launch` has to look: an address that is not aligned to 16 bytes, hooks,
    another current device, table of tiles or carve-out of multiprocessors.

    Args:
        made: The launch.
        device: Device of the tensors.
        kinds: Dtype of each tensor among the kernel's arguments, or None.
        rest: The kernel's other arguments.
    """
    kept, on_gpu = made.constants, device.type == "cuda"
    handle = kept.handles.get((device, *rest[: kept.integers - kept.pointers], *kinds)) if kept.pointers else None
    if handle is None:
        return None
    run, _, metadata, constants, stream, _ = handle
    kernel, programs, index, last = made.kernel, made.programs, device.index or 0, (*rest, *constants)
    table, kept_back = configs.generation, sm_carveout()

    def launched(bits: int, *addresses: int) -> bool:
        if (
            bits & 15
            or _observed(kernel)
            or (on_gpu and torch.cuda.current_device() != index)
            or table != configs.generation
            or kept_back != sm_carveout()
        ):
            return False
        run(programs, 1, 1, stream(index), handle.function, metadata, None, None, None, *addresses, *last)
        return True

    return launched
