"""Every reason why an engine cannot compute a problem, and every model of the shared memory that a kernel needs.

The compiled CUDA kernels check only what would be unsafe (csrc/dispatch.h): this file decides before they are called, and also
for a GPU that is not at hand.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping

import torch

from interp_nn.engines.cuda import compiled_library
from interp_nn.engines.devices import DeviceSpec, interpreting, spec_of
from interp_nn.engines.problem import EngineName, Problem

OLDEST_TRITON = (3, 6)
_LARGEST_TILE = 1024  # rows; kernels count tiles of n rows in 32 bits
MOST_COLUMNS = 128  # of b, and classes, that a kernel holds in one tile
_OLDEST_CAPABILITY = {"triton": (8, 0), "cuda": (7, 5)}
interpreter_has_bfloat16 = (
    False  # Triton's own does not: its products of bfloat16 are wrong by many orders of magnitude
)
_TWO_SQUARES = 160 << 10  # bytes: two 128 x 128 matrices in fp32, and the tiles that are multiplied with them
_THREE_SQUARES = 200 << 10


def unsupported_reason(engine: EngineName, problem: Problem | None = None) -> str | None:
    """Return why an engine cannot compute a problem; None if it can.

    Args:
        engine: The engine.
        problem: The problem. None asks only if the engine can compute anything on this machine. For a device "sm_90" and the
            like, which is not at hand, this machine does not matter.
    """
    if engine == "eager":
        return None
    if problem is not None and problem.degree is not None:
        reason = _polynomial_reason(problem)
        if reason is not None:
            return reason
    if problem is None or not problem.device.startswith("sm_"):
        reason = _machine_reason(engine)
        if reason is None and engine == "cuda":
            reason = _library_reason(problem)
        if reason is not None or problem is None:
            return reason
    spec = problem.spec
    if spec is None:
        return f"it needs a CUDA device, and x is on {problem.device}"
    oldest = _OLDEST_CAPABILITY[engine]
    if spec.capability < oldest:
        return f"it needs compute capability {_dotted(oldest)}, and {problem.device} has {_dotted(spec.capability)}"
    if problem.dtype == torch.float64:
        return "it has no float64 kernels"
    fp32 = problem.dtype == torch.float32
    if fp32 and 64 < problem.k <= MOST_COLUMNS and not problem.head and spec.shared < _TWO_SQUARES:
        return f"fp32 kernels for more than 64 columns need {_TWO_SQUARES >> 10} KiB of shared memory in a block"
    if problem.classes is not None and max(problem.k, problem.classes) > MOST_COLUMNS:
        return f"its losses have at most {MOST_COLUMNS} columns and classes, not {problem.k} and {problem.classes}"
    return _triton_reason(problem, spec) if engine == "triton" else _cuda_reason(problem, spec)


def _polynomial_reason(problem: Problem) -> str | None:
    if problem.degree == 0:
        return "its kernels compute polynomials of degree 1 to 4: degree 0 has no Gram matrix"
    if problem.k > MOST_COLUMNS:
        return f"its polynomials have at most {MOST_COLUMNS} columns, not {problem.k}: beyond, cuBLAS forms W = b q(G) faster"
    if problem.need_scale:
        return "its kernels have no gradient of a polynomial's scale"
    return None


def _triton_reason(problem: Problem, spec: DeviceSpec) -> str | None:
    n, d, k, classes = problem.n, problem.d, problem.k, problem.classes
    if interpreting() and problem.dtype == torch.bfloat16 and problem.device == "cpu" and not interpreter_has_bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly (float32 and float16 are right)"
    if problem.head and problem.dtype == torch.float32 and k > 64:
        if spec.shared < _TWO_SQUARES:
            return f"fp32 kernels for more than 64 columns need {_TWO_SQUARES >> 10} KiB of shared memory in a block"
        if classes is not None and classes > 64 and spec.shared < _THREE_SQUARES:
            needed = _THREE_SQUARES >> 10
            return f"fp32 heads of more than 64 columns and 64 classes need {needed} KiB of shared memory in a block"
    if problem.dtype == torch.float32 and 32 < k <= MOST_COLUMNS and spec.capability[0] in (10, 11):
        if problem.pair and classes is None and k > 64 and (problem.need_x or problem.need_b):
            return "its fp32 backward of a pair of more than 64 columns needs 560 columns of tensor memory, of 512"
        if problem.head and classes is not None and classes > 16:
            return "its fp32 heads of more than 32 columns and 16 classes need 272 KiB of shared memory in a block"
    if max(n + _LARGEST_TILE, d * max(k, MOST_COLUMNS)) > 2**31:
        return "n or d k is beyond 32-bit offsets"
    return None


def _cuda_reason(problem: Problem, spec: DeviceSpec) -> str | None:
    k, classes = problem.k, problem.classes
    if k > MOST_COLUMNS:
        return f"its kernels have at most {MOST_COLUMNS} columns, not {k}"
    if problem.d >= 2**30:
        return "d is beyond 32-bit offsets"
    few = classes is None or classes <= 16
    fp32 = problem.dtype == torch.float32
    if spec.capability < (8, 0):
        if not fp32 or problem.head or k > 64 or not few:
            return "below compute capability 8.0 it has only fp32 kernels of at most 64 columns, and losses of 16"
    elif fp32 and not few:
        needed = _THREE_SQUARES if problem.head else _TWO_SQUARES
        if spec.shared < needed:
            return f"its fp32 losses of more than 16 classes need {needed >> 10} KiB of shared memory in a block"
    return None


# Reasons of this machine, found once: for the engines that are asked for.
_machine_reasons: dict[str, str | None] = {}


def _machine_reason(engine: EngineName) -> str | None:
    if engine not in _machine_reasons:
        _machine_reasons[engine] = _triton_machine_reason() if engine == "triton" else _cuda_machine_reason()
    return _machine_reasons[engine]


_machine_reason._dynamo_marked_constant = True  # type: ignore[attr-defined] # see devices.spec_of


def _triton_machine_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Linux)"
    version = triton_version()
    if version < OLDEST_TRITON:
        return f"Triton {_dotted(version)} is older than {_dotted(OLDEST_TRITON)}"
    if interpreting():
        numpy = tuple(map(int, importlib.metadata.version("numpy").split(".")[:2]))
        if version < (3, 7) and numpy >= (2, 4):
            return "the interpreter of Triton 3.6 needs numpy < 2.4"
        return None
    reason = _no_device_reason("triton")
    without = torch.version.cuda is None or not torch.cuda.is_available()
    return f"{reason} (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)" if without else reason


def _cuda_machine_reason() -> str | None:
    return _no_device_reason("cuda") or compiled_library.load() or compiled_library.driver_reason()


def _library_reason(problem: Problem | None) -> str | None:
    """Return why the library cannot compute on a problem's GPU or, without a problem, on any of this machine."""
    if problem is not None:
        on_gpu = problem.device == "cuda" and problem.spec is not None
        return compiled_library.device_reason(problem.spec.capability) if on_gpu and problem.spec else None
    specs = [spec_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    able = [spec.capability for spec in specs if spec is not None and spec.capability >= _OLDEST_CAPABILITY["cuda"]]
    reasons = [compiled_library.device_reason(capability) for capability in able]
    return reasons[0] if reasons and None not in reasons else None


def _no_device_reason(engine: EngineName) -> str | None:
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    oldest = _OLDEST_CAPABILITY[engine]
    specs = [spec_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    if not any(spec is not None and spec.capability >= oldest for spec in specs):
        return f"no CUDA device of compute capability {_dotted(oldest)} or newer"
    return None


def triton_version() -> tuple[int, int]:
    """Return the installed Triton's (major, minor), (0, 0) without one. Triton itself is not imported."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            major, minor = importlib.metadata.version(name).split(".")[:2]
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return 0, 0


triton_version._dynamo_marked_constant = True  # type: ignore[attr-defined] # see devices.spec_of


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def padded(size: int) -> int:
    """Return the power of two, at least 16, that holds `size` columns or classes in a kernel's tile."""
    return max(16, 1 << (size - 1).bit_length())


# Shared memory of a block. The figures of the last three are those of the matrices that Triton's compiler lays there, found by
# compiling; operands of exact fp32 products lie there in two parts.


def tiles_fit(spec: DeviceSpec, tiles: Mapping[str, int], stages: tuple[int, int], columns: int, itemsize: int) -> bool:
    """Return True if a kernel's tiles should fit, by an upper estimate.

    Counted are the staged tiles, and a square to change layouts through.

    Args:
        spec: The GPU.
        tiles: Tile sizes by name, as in `configs.TILES`.
        stages: Stages of the software pipeline, and those of a loss's first loop over features.
        columns: Padded columns of b, for kernels that hold all of them in a tile.
        itemsize: Bytes of an element of X.
    """
    columns = tiles.get("BK", columns)
    rows, depth = tiles["BN"], tiles["BD"]
    alone = len(tiles) == 2  # the forward: b's tile has as many rows as X's has columns
    staged = stages[0] * (rows * depth + (depth if alone else max(rows, depth)) * columns)
    if "BD_A" in tiles:
        staged = max(staged, stages[1] * (tiles["BN_A"] + columns) * tiles["BD_A"])
    return (staged + 2 * columns * columns) * itemsize <= spec.shared


def can_form_logits_from_x(engine: EngineName, problem: Problem) -> bool:
    """Return True if an engine can compute the loss of a head in the order "logits_from_x"."""
    if engine == "eager":
        return True
    if engine == "cuda" or problem.spec is None:
        return False
    k, m = padded(problem.k), padded(problem.classes or 1)
    needed = 8 * k * k + 24 * k * m if problem.dtype == torch.float32 else 4 * k * k + 8 * k * m
    return needed <= problem.spec.shared


def single_tf32_fits(spec: DeviceSpec, k: int, m: int) -> bool:
    """Return True if an fp32 loss fits with single tf32 products: 18 bytes an entry of k x m, against 12 of split ones."""
    return 18 * k * m <= spec.shared


def output_layer_fits(spec: DeviceSpec, k: int, m: int, itemsize: int, split: bool) -> bool:
    """Return True if A, H = A G and their transposes fit at once, each in two parts where products are split."""
    return 4 * k * m * itemsize * (2 if split else 1) <= spec.shared
