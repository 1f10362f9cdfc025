"""The memory of verified kernels: a file for each variant that has passed, in a folder of the user's.

A file holds for one GPU, driver, PyTorch, Triton and state of the kernels' sources. While a process verifies a variant, a file
beside names the process: one that never came to an end of it has hung or crashed, and no later process tries again by itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import secrets
from pathlib import Path

import torch

from interp_nn.engines.cuda import compiled_library
from interp_nn.engines.devices import spec_of
from interp_nn.engines.limits import triton_version
from interp_nn.engines.problem import EngineName
from interp_nn.version import __version__


def folder() -> Path | None:
    """Return the folder of what has passed: `interp_nn/verified` in XDG_CACHE_HOME or ~/.cache; None without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interp_nn" / "verified"
    except RuntimeError:
        return None


def has_passed(file: Path | None) -> bool:
    """Return True if the file is there, and False where the folder may not be read."""
    try:
        return file is not None and file.exists()
    except OSError:
        return False


def passed_before(device: torch.device) -> list[str]:
    """Return the variants that have passed on this machine, with these versions."""
    where = folder()
    found: list[str] = []
    try:
        files = sorted(where.glob("*.json")) if where is not None and where.is_dir() else []
    except OSError:
        return found
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            name, _ = content.pop("variant"), content.pop("seconds")
            if content == machine(content["engine"], device):
                found.append(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


@functools.cache
def machine(engine: EngineName, device: torch.device) -> dict[str, str]:
    """Return what a verdict depends on besides the variant."""
    cuda = device.type == "cuda"
    spec = spec_of(device)
    if engine == "triton":
        files = sorted(Path(__file__).with_name("triton").glob("*.py"))
    else:
        files = [file for file in (compiled_library.path(),) if file.exists()]
    sources = hashlib.sha256()
    for file in files:
        sources.update(file.read_bytes())
    return {
        "engine": engine,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "capability": "" if spec is None else spec.name,
        "driver": _driver() if cuda else "",
        "torch": torch.__version__,
        "triton": ".".join(map(str, triton_version())),
        "interp_nn": __version__,
        "sources": sources.hexdigest()[:16],
    }


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return str(getattr(torch._C, "_cuda_getDriverVersion", int)())


def file_of(variant: str, engine: EngineName, device: torch.device) -> Path | None:
    """Return the file that says that a variant has passed; None without a folder."""
    where = folder()
    if where is None:
        return None
    key = repr((variant, sorted(machine(engine, device).items())))
    return where / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def begin(file: Path | None) -> str | None:
    """Note that this process verifies a variant; return a reason where an earlier process never came to an end of it."""
    if file is None:
        return None
    mark = file.with_suffix(".running")
    try:
        host, process = mark.read_text(encoding="utf-8").split()
        if host == platform.node() and not _alive(int(process)):
            return (
                f"process {process} ended while it verified this, or was ended because it hung; "
                "python -m interp_nn verify tries again"
            )
    except (OSError, ValueError):
        pass
    write(mark, f"{platform.node()} {os.getpid()}")
    return None


def end(file: Path | None) -> None:
    """Note that this process has come to an end of it."""
    if file is not None:
        with contextlib.suppress(OSError):
            file.with_suffix(".running").unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def forget_the_dead() -> None:
    """Forget processes that ended while they verified: their variants are tried again."""
    where = folder()
    for mark in where.glob("*.running") if where is not None else ():
        end(mark)


def write(path: Path, text: str) -> None:
    """Write a file in one step, if the folder can be written."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
