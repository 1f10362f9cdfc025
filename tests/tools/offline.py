"""Compile a kernel's launch for a GPU that is not there, and read in its machine code what a CPU cannot show.

The interpreter computes what a kernel means. What it costs, and much of what makes it wrong on a device only, is in the
compiled code: registers, spills, shared memory, whether the matrix units are used, how wide the loads are, which loads are
ordered behind a barrier. Triton compiles without a driver and brings its own disassembler; both are used as they come.

Triton's cache is used too: a launch compiled before takes no seconds, so a record of times needs a fresh TRITON_CACHE_DIR.
"""

import contextlib
import copyreg
import importlib
import multiprocessing
import os
import pickle
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

# Bytes of shared memory one program may have, by compute capability. The compiler knows no limit: the launch would fail.
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


class Launch(NamedTuple):
    """What `kernel[grid](*args, **constants, **options)` would be given; the grid is not compiled.

    `args` are the arguments that are not constexpr, in order. Tensors may be on the meta device: their dtype and offset
    count, and an allocation is taken to be as aligned as a GPU's.
    """

    kernel: JITFunction
    args: Sequence[Any]
    constants: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})


class Specialised(NamedTuple):
    """A launch as the compiler sees it: types, known values and alignments in the place of arguments. It can be pickled."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    capability: int

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def is_constant(self, name: str) -> bool:
        return self.signature[name] == "constexpr"

    def is_divisible(self, name: str) -> bool:
        """Whether the compiler knows the integer, or the address, as a multiple of 16."""
        attributes = self.attributes.get((self.kernel.arg_names.index(name),), [])
        return ["tt.divisibility", 16] in attributes


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is known of a compilation whether or not it came to anything. `dtype` is that of the first tensor."""

    tag: str
    kernel: str
    capability: int
    dtype: str
    seconds: float
    error: str | None = None


class Failed(Result):
    """A compilation that gave up. It has no measurements, and says why to whoever asks for one."""

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks before there is an error to tell.
        raise AttributeError(f"no {name!r}: the compilation failed with {self.__dict__.get('error')}")


@dataclass(frozen=True, kw_only=True)
class Compiled(Result):
    """Counts are of instructions in the code, each once however often a loop runs it; memory is in bytes.

    `stack` is per thread and `shared` per program. `spill_loads` and `spill_stores` are LDL and STL.
    """

    registers: int
    stack: int
    shared: int
    spill_loads: int
    spill_stores: int
    hgmma: int
    hmma: int
    tcgen05: int
    ffma: int
    ldgsts: int
    ldgsts_16: int
    ldg_16: int
    ptx_file: Path

    @cached_property
    def ptx(self) -> str:
        return self.ptx_file.read_text()

    @property
    def spills(self) -> int:
        return self.spill_loads + self.spill_stores

    @property
    def vector_loads(self) -> int:
        """Loads from global memory of 16 bytes a thread, asynchronous or not."""
        return self.ldgsts_16 + self.ldg_16

    @property
    def fits_shared(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.capability]

    @property
    def assertions(self) -> int:
        """Calls that stop the kernel: `tl.device_assert`, and the overflow checks that a debug build adds."""
        return len(re.findall(r"\bcall\.uni\s+__assertfail\b", self.ptx))

    @property
    def has_acquire_release(self) -> bool:
        """Whether something releases to, and something acquires from, every program on the GPU."""
        orders = set(re.findall(r"\b(?:atom|red|ld|st)\.global\.gpu\.(acq_rel|acquire|release)\b", self.ptx))
        return "acquire" in orders and bool(orders & {"acq_rel", "release"})

    @property
    def has_non_coherent_loads(self) -> bool:
        """Whether a load may be served from a cache that does not see the stores of this launch."""
        return re.search(r"\bld\.global(\.[\w:]+)*\.nc\b", self.ptx) is not None

    def matrix_instructions(self, capability: int | None = None) -> int:
        """Instructions for the matrix unit that `capability` is meant to use; by default the one compiled for."""
        generation = (capability or self.capability) // 10
        return {9: self.hgmma, 10: self.tcgen05, 11: self.tcgen05}.get(generation, self.hmma)


Outcome: TypeAlias = Compiled | Failed
Jobs: TypeAlias = dict[tuple[str, int], Specialised]
Outcomes: TypeAlias = dict[tuple[str, int], Outcome]


def compile(launch: Launch, capability: int, tag: str = "") -> Outcome:
    """The launch compiled in this process. An argument that is missing or too many raises; a compiler that fails does not."""
    return _build(tag, specialise(launch, capability))


def compile_all(
    named_launches: Sequence[tuple[str, Launch]], capabilities: Sequence[int], workers: int = 2
) -> Outcomes:
    """Every launch for every capability, by (name, capability) in the order given; in this process if `workers` < 2.

    Kernels are found again by name in the other processes, so they are to be functions of a module that can be imported.
    """
    jobs = {(tag, cc): specialise(launch, cc) for tag, launch in named_launches for cc in capabilities}
    if len(jobs) < len(named_launches) * len(capabilities):
        raise ValueError("two launches, or two capabilities, are the same by name")
    if workers < 2:
        return {key: _build(key[0], job) for key, job in jobs.items()}
    return _in_workers(jobs, workers)


def specialise(launch: Launch, capability: int) -> Specialised:
    """The launch with its arguments read as a run would read them, by the same code of Triton's."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel} is not a kernel for a GPU: is TRITON_INTERPRET set?")
    backend = make_backend(GPUTarget("cuda", capability, 32))
    debug = launch.options.get("debug", kernel.debug) or triton.knobs.runtime.debug
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    values, types, options = bind(**_by_parameter(launch), **{**launch.options, "debug": bool(debug)})
    options, signature, constants, attributes = kernel._pack_args(backend, options, values, types, options)
    return Specialised(kernel, signature, constants, attributes, options.__dict__, capability)


def _by_parameter(launch: Launch) -> dict[str, Any]:
    """Arguments and constants by name, each where the kernel's own signature says that it belongs."""
    kernel, params = launch.kernel.__name__, launch.kernel.params
    runtime = [p.name for p in params if not p.is_constexpr]
    unknown = launch.constants.keys() - {p.name for p in params if p.is_constexpr}
    if unknown:
        raise TypeError(f"{kernel} has no constexpr {', '.join(sorted(unknown))}")
    if len(launch.args) > len(runtime):
        raise TypeError(f"{kernel} takes {len(runtime)} arguments ({', '.join(runtime)}), got {len(launch.args)}")
    given = dict(zip(runtime, launch.args, strict=False)) | dict(launch.constants)
    missing = [p.name for p in params if p.name not in given and not p.has_default]
    if missing:
        raise TypeError(f"{kernel} also needs {', '.join(missing)}")
    return given


def _kernel(module: str, qualname: str) -> JITFunction:
    return attrgetter(qualname)(importlib.import_module(module))


def _reduce(kernel: JITFunction) -> tuple[Callable[[str, str], JITFunction], tuple[str, str]]:
    """Pickle a kernel, or one that is another's constant, as Python pickles functions: by name."""
    name = kernel.module, kernel.fn.__qualname__
    try:
        found = _kernel(*name)
    except (AttributeError, ImportError):
        found = None
    if found is not kernel:
        raise pickle.PicklingError(f"{'.'.join(name)} does not lead to the kernel: define it at the top of a module")
    return _kernel, name


copyreg.pickle(JITFunction, _reduce)


def _in_workers(jobs: Jobs, workers: int) -> Outcomes:
    done: Outcomes = {}
    while left := {key: job for key, job in jobs.items() if key not in done}:
        done |= _pool(left, workers)
        # A compiler that aborts takes its process and all that waits down with it. Jobs start in order, so it was one of the
        # first that are left: each of them again, on its own.
        for key in [key for key in left if key not in done][:workers]:
            died = _failed(key[0], jobs[key], 0.0, "the compiler's process died")
            done |= _pool({key: jobs[key]}, 1, keep_messages=False) or {key: died}
    return {key: done[key] for key in jobs}


def _pool(jobs: Jobs, workers: int, keep_messages: bool = True) -> Outcomes:
    """What new processes make of the jobs, less those that were lost when one of the processes died."""
    futures = {}
    # Not forked: PyTorch's threads would be left behind, with the locks they hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context) as pool, contextlib.suppress(BrokenProcessPool):
        for key, job in jobs.items():
            futures[key] = pool.submit(_build, key[0], job, keep_messages)
    return {key: f.result() for key, f in futures.items() if not isinstance(f.exception(), BrokenProcessPool)}


def _build(tag: str, job: Specialised, keep_messages: bool = True) -> Outcome:
    source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as messages:
        try:
            with _standard_error_to(messages.fileno()) if keep_messages else contextlib.nullcontext():
                built = triton.compile(source, target=job.target, options=job.options)
        except Exception as error:  # each stage of the compiler has its own, and its passes raise bare RuntimeErrors
            seconds = time.perf_counter() - start
            messages.seek(0)
            first = re.search(r".*\berror: .*", messages.read().decode(errors="replace"), re.IGNORECASE)
            return _failed(tag, job, seconds, f"{type(error).__name__}: {error}" + (f"\n{first[0]}" if first else ""))
    return _measure(tag, job, built, time.perf_counter() - start)


@contextlib.contextmanager
def _standard_error_to(file: int) -> Iterator[None]:
    """Send there what the compiler's passes print, which is why they failed and which their exceptions do not repeat.

    If the process dies the file goes with it: a compiler that may do so should be left to print.
    """
    saved = os.dup(2)
    try:
        os.dup2(file, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _failed(tag: str, job: Specialised, seconds: float, error: str) -> Failed:
    return Failed(**_identity(tag, job), seconds=seconds, error=error)


def _identity(tag: str, job: Specialised) -> dict[str, Any]:
    tensors = (kind[1:] for kind in job.signature.values() if kind.startswith("*"))
    return {
        "tag": tag,
        "kernel": job.kernel.__name__,
        "capability": job.capability,
        "dtype": next(tensors, "-").removeprefix("k"),  # k marks a pointer to const
    }


def _measure(tag: str, job: Specialised, built: triton.compiler.CompiledKernel, seconds: float) -> Compiled:
    files = {Path(path).suffix: Path(path) for path in built.metadata_group.values()}
    report = _disassemble(files[".cubin"])
    usage = re.search(rf"Function {re.escape(built.metadata.name)}:\s+REG:(\d+) STACK:(\d+)", report)
    if usage is None:
        raise RuntimeError(f"no resource usage of {built.metadata.name} for capability {job.capability}")
    instructions = _instructions(report)
    if not _count(instructions, "EXIT"):
        raise RuntimeError(f"no code of {built.metadata.name} for capability {job.capability} in the disassembly")
    return Compiled(
        **_identity(tag, job),
        seconds=seconds,
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=built.metadata.shared,
        spill_loads=_count(instructions, "LDL"),
        spill_stores=_count(instructions, "STL"),
        hgmma=_count(instructions, "HGMMA"),
        hmma=_count(instructions, "HMMA"),
        tcgen05=_count(instructions, r"UTC\w*MMA"),
        ffma=_count(instructions, "FFMA"),
        ldgsts=_count(instructions, "LDGSTS"),
        ldgsts_16=_count(instructions, "LDGSTS", "128"),
        ldg_16=_count(instructions, "LDG", "128"),
        ptx_file=files[".ptx"],
    )


def _disassemble(cubin: Path) -> str:
    """Resource usage and SASS, in the words of cuobjdump."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {run.returncode}: {run.stderr.strip()}")
    return run.stdout


def _instructions(sass: str) -> Counter[str]:
    """How often each instruction occurs, by its name with modifiers, such as LDGSTS.E.BYPASS.LTC128B.128."""
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))


def _count(instructions: Counter[str], name: str, modifier: str | None = None) -> int:
    """Instructions whose name matches, and that have the modifier, if one is asked for, as a word of its own."""
    return sum(
        count
        for instruction, count in instructions.items()
        if re.fullmatch(name, instruction.split(".")[0]) and (modifier is None or modifier in instruction.split("."))
    )


_IDENTITY: dict[str, Callable[[Result], str]] = {
    "kernel": lambda r: r.kernel,
    "tag": lambda r: r.tag,
    "cc": lambda r: str(r.capability),
    "dtype": lambda r: r.dtype,
}
_MEASUREMENTS: dict[str, Callable[[Compiled], str]] = {
    "registers": lambda c: str(c.registers),
    "stack": lambda c: str(c.stack),
    "spills": lambda c: str(c.spills),
    "shared": lambda c: str(c.shared),
    "matrix": lambda c: str(c.matrix_instructions()),
    "LDGSTS128": lambda c: str(c.ldgsts_16),
    "seconds": lambda c: f"{c.seconds:.1f}",
}


def table(compiled: Iterable[Outcome]) -> str:
    """A line for each outcome under a line of headings, in columns; a failure ends in the last line of its error."""
    compiled = list(compiled)
    rows = [[*_IDENTITY, *_MEASUREMENTS], *map(_row, compiled)]
    complete = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in (rows if i < len(_IDENTITY) else complete)) for i in range(len(rows[0]))]
    return "\n".join(_line(row, widths) for row in rows)


def _row(outcome: Outcome) -> list[str]:
    identity = [column(outcome) for column in _IDENTITY.values()]
    if isinstance(outcome, Compiled):
        return identity + [column(outcome) for column in _MEASUREMENTS.values()]
    return [*identity, f"failed: {str(outcome.error).strip().splitlines()[-1]}"]


def _line(row: list[str], widths: list[int]) -> str:
    named, measured = len(_IDENTITY), len(row) == len(widths)
    cells = [text.ljust(width) for text, width in zip(row[:named], widths, strict=False)]
    cells += (
        [text.rjust(width) for text, width in zip(row[named:], widths[named:], strict=True)]
        if measured
        else row[named:]
    )
    return "  ".join(cells).rstrip()


def write_table(path: str | Path, compiled: Iterable[Outcome]) -> None:
    """The table as a file, with the compiler's version on top; the folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"Triton {triton.__version__}\n{table(compiled)}\n")
