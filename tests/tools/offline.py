"""Compile the launch of a Triton kernel for a GPU that is not there, and read its machine code.

The code shows what the interpreter cannot: registers, spills, shared memory, use of the matrix units, the width of loads, and
which loads are ordered behind a barrier. Triton needs no driver to compile, and its wheel contains a disassembler.

Triton's cache is in use: a launch compiled before takes no time, so timings need a fresh TRITON_CACHE_DIR.
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

# Bytes of shared memory that a program may have, by compute capability. The compiler has no limit: the launch would fail.
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_MEMORY = 512  # columns of a multiprocessor of compute capability 10


class Launch(NamedTuple):
    """The arguments of `kernel[grid](*args, **constants, **options)`.

    `args` are the arguments that are not constexpr, in order. Tensors may be on the meta device: only their dtype and offset
    are read. Allocations count as aligned as a GPU's.
    """

    kernel: JITFunction
    args: Sequence[Any]
    constants: Mapping[str, Any] = MappingProxyType({})
    options: Mapping[str, Any] = MappingProxyType({})


class Specialised(NamedTuple):
    """A launch as the compiler sees it: types, constants and alignments in place of arguments. It can be pickled."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, Any]
    capability: int

    @property
    def target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A compilation, successful or failed. `dtype` is that of the first tensor."""

    tag: str
    kernel: str
    capability: int
    dtype: str
    seconds: float
    error: str | None = None


class Failed(Result):
    """A failed compilation. Reading a measurement raises an AttributeError with the compiler's error."""

    def __getattr__(self, name: str) -> Any:
        # Unpickling reads attributes before `error` is set.
        raise AttributeError(f"no {name!r}: the compilation failed with {self.__dict__.get('error')}")


@dataclass(frozen=True, kw_only=True)
class Compiled(Result):
    """Counts of instructions in the code, and memory in bytes: `stack` per thread, `shared` per program.

    `spills` counts LDL and STL, which move registers to memory and back. `tensor_memory` is in columns. `loops` has the number
    of instructions of each innermost loop that multiplies matrices.
    """

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    spills: int
    spills_in_loops: tuple[int, ...]
    loops: tuple[int, ...]
    hgmma: int
    hmma: int
    tcgen05: int
    ldgsts: int
    ldgsts_16: int
    ldg_16: int
    ptx_file: Path

    @cached_property
    def ptx(self) -> str:
        return self.ptx_file.read_text()

    @property
    def vector_loads(self) -> int:
        """Loads from global memory of 16 bytes a thread, asynchronous or not."""
        return self.ldgsts_16 + self.ldg_16

    @property
    def fits_shared(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.capability]

    @property
    def has_acquire_release(self) -> bool:
        """True if one instruction releases to, and one acquires from, all programs on the GPU."""
        orders = set(re.findall(r"\b(?:atom|red|ld|st)\.global\.gpu\.(acq_rel|acquire|release)\b", self.ptx))
        return "acquire" in orders and bool(orders & {"acq_rel", "release"})

    @property
    def has_non_coherent_loads(self) -> bool:
        """True if a load may hit a cache that does not see the stores of this launch."""
        return re.search(r"\bld\.global(\.[\w:]+)*\.nc\b", self.ptx) is not None

    @property
    def matrix_instructions(self) -> int:
        """Instructions for the newest matrix unit of the capability."""
        return {9: self.hgmma, 10: self.tcgen05, 11: self.tcgen05}.get(self.capability // 10, self.hmma)


Outcome: TypeAlias = Compiled | Failed
Jobs: TypeAlias = dict[tuple[str, int], Specialised]
Outcomes: TypeAlias = dict[tuple[str, int], Outcome]


def compile(launch: Launch, capability: int, tag: str = "") -> Outcome:
    """Compile the launch in this process. Wrong arguments raise; an error of the compiler is returned as `Failed`."""
    return _build(tag, specialise(launch, capability))


def compile_all(
    named_launches: Sequence[tuple[str, Launch]], capabilities: Sequence[int], workers: int = 2
) -> Outcomes:
    """Compile every launch for every capability in other processes; return outcomes by (name, capability), in order.

    The processes find a kernel by its name, so it must be a function of a module that can be imported.
    """
    jobs = {(tag, cc): specialise(launch, cc) for tag, launch in named_launches for cc in capabilities}
    if len(jobs) < len(named_launches) * len(capabilities):
        raise ValueError("two launches, or two capabilities, are the same by name")
    return _in_workers(jobs, workers)


def specialise(launch: Launch, capability: int) -> Specialised:
    """Read the arguments with Triton's own code, as a run does."""
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
    """Return arguments and constants by the names in the kernel's signature."""
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
    """Pickle a kernel by name, as Python pickles functions."""
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
        # A compiler that aborts ends its process and breaks the pool. Jobs start in order, so one of the first that are left
        # did it: compile each of them again, alone.
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
    columns = getattr(built.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY:  # the compiler puts a trap in the place of the kernel
        why = f"{columns} columns of tensor memory, and a multiprocessor has {TENSOR_MEMORY}"
        return _failed(tag, job, time.perf_counter() - start, why)
    return _measure(tag, job, built, time.perf_counter() - start)


@contextlib.contextmanager
def _standard_error_to(file: int) -> Iterator[None]:
    """Send the output of the compiler's passes to a file: it has the reason of a failure, which their exceptions lack.

    If the process dies the file is lost, so a compiler that may die should print.
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
    loops = loops_of_products(report)
    return Compiled(
        **_identity(tag, job),
        seconds=seconds,
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=built.metadata.shared,
        tensor_memory=getattr(built.metadata, "tmem_size", None) or 0,
        spills=_count(instructions, _SPILL),
        spills_in_loops=tuple(_count(_instructions(loop), _SPILL) for loop in loops),
        loops=tuple(loop.count("\n") for loop in loops),
        hgmma=_count(instructions, "HGMMA"),
        hmma=_count(instructions, "HMMA"),
        tcgen05=_count(instructions, r"UTC\w*MMA"),
        ldgsts=_count(instructions, "LDGSTS"),
        ldgsts_16=_count(instructions, "LDGSTS", "128"),
        ldg_16=_count(instructions, "LDG", "128"),
        ptx_file=files[".ptx"],
    )


def _disassemble(cubin: Path) -> str:
    """Return resource usage and SASS, as cuobjdump prints them."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {run.returncode}: {run.stderr.strip()}")
    return run.stdout


def _instructions(sass: str) -> Counter[str]:
    """Count each instruction by its name with modifiers, such as LDGSTS.E.BYPASS.LTC128B.128."""
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))


_SPILL = "LDL|STL"


def _count(instructions: Counter[str], name: str, modifier: str | None = None) -> int:
    """Count the instructions whose name matches and that have the modifier, if given."""
    return sum(
        count
        for instruction, count in instructions.items()
        if re.fullmatch(name, instruction.split(".")[0]) and (modifier is None or modifier in instruction.split("."))
    )


def loops_of_products(sass: str) -> list[str]:
    """Return the instructions, a line each, of each innermost loop that multiplies matrices, in the order of the code.

    A loop reaches from the target of a jump backwards to the last such jump. Loops that only wait are left out.
    """
    lines = re.findall(r"^(\s+/\*([0-9a-f]{4,})\*/\s+(.*?);)", sass, re.MULTILINE)
    code = [(int(address, 16), text, line) for line, address, text in lines]
    products = [address for address, text, _ in code if re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", text)]
    ends: dict[int, int] = {}
    for address, text, _ in code:
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if jump is not None and int(jump[1], 16) < address:
            ends[int(jump[1], 16)] = address
    loops = [loop for loop in sorted(ends.items()) if any(loop[0] <= at <= loop[1] for at in products)]
    inner = [
        (first, last) for first, last in loops if not any(first < other and end <= last for other, end in loops)
    ]  # fmt: skip
    return ["".join(f"{line}\n" for address, _, line in code if first <= address <= last) for first, last in inner]


_IDENTITY = ("kernel", "tag", "capability", "dtype")
_MEASURED = ("registers", "stack", "spills", "shared", "tensor_memory", "matrix_instructions", "ldgsts_16")


def write_table(path: str | Path, outcomes: Iterable[Outcome]) -> None:
    """Write a tab-separated row for each outcome, or the last line of its error, under the compiler's version."""
    lines = [f"Triton {triton.__version__}", "\t".join([*_IDENTITY, *_MEASURED, "seconds"])]
    for outcome in outcomes:
        row = [str(getattr(outcome, name)) for name in _IDENTITY]
        if isinstance(outcome, Compiled):
            row += [*(str(getattr(outcome, name)) for name in _MEASURED), f"{outcome.seconds:.1f}"]
        else:
            row.append(f"failed: {str(outcome.error).strip().splitlines()[-1]}")
        lines.append("\t".join(row))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
