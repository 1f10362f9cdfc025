import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import interp_nn
from interp_nn.engines import eager, eager_polynomial, limits
from interp_nn.engines.cuda import compiled_library, engine, fatbin
from interp_nn.engines.devices import KNOWN
from interp_nn.engines.eager_polynomial import Polynomial
from interp_nn.engines.problem import LossOptions, Plan, Problem


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No library is loaded, and there is none."""
    monkeypatch.setattr(compiled_library, "_attempt", None)
    monkeypatch.setattr(compiled_library, "_LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.setattr(compiled_library, "_REASON", tmp_path / "_no_library.txt")
    monkeypatch.setattr(compiled_library, "launch_failures", {})
    monkeypatch.setattr(engine, "launch_failures", compiled_library.launch_failures)
    monkeypatch.delenv("INTERP_NN_JIT", raising=False)
    return monkeypatch


def test_no_library(fresh):
    how = "(to build it, in a copy of the source: INTERP_NN_BUILD_CUDA=1 pip install --no-build-isolation .)"
    assert compiled_library.load() == f"interp_nn was built without the CUDA library {how}"
    compiled_library._REASON.write_text("nvcc is too old\n")
    fresh.setattr(compiled_library, "_attempt", None)
    assert compiled_library.load() == f"interp_nn was built without the CUDA library: nvcc is too old {how}"


def test_where_no_build_would_help_nothing_is_proposed(fresh):
    fresh.setattr(torch.version, "hip", "6.4")
    assert compiled_library.load() == "the CUDA library is for CUDA, and this PyTorch is of ROCm"
    fresh.setattr(compiled_library, "_attempt", None)
    fresh.setattr(sys, "platform", "win32")
    assert compiled_library.load() == "the CUDA library is for Linux, and this is win32"


def test_a_library_that_cannot_be_loaded_gives_the_linkers_reason_once(fresh):
    compiled_library._LIBRARY.write_bytes(b"no library")
    reason = compiled_library.load()
    assert "_C.abi3.so" in reason and "Could not load this library" not in reason
    compiled_library._LIBRARY.unlink()
    assert compiled_library.load() == reason


def test_compiling_here_needs_a_gpu(fresh):
    fresh.setenv("INTERP_NN_JIT", "1")
    fresh.setattr(torch.cuda, "is_available", lambda: False)
    assert compiled_library.load() == "INTERP_NN_JIT=1 needs a PyTorch with CUDA and a CUDA device"


@pytest.mark.parametrize(
    ("built", "served", "reason"),
    [
        (12090, 12080, None),
        (12090, 13000, None),
        (13000, 0, "there is no CUDA driver"),
        (
            13000,
            12080,
            "the driver serves CUDA 12.8 and the library needs CUDA 13 "
            "(driver 580 or newer, or a library built with CUDA 12)",
        ),
        (12090, 12040, None),
        (
            12090,
            12020,
            "the driver serves CUDA 12.2 and cannot read the library's compressed kernels "
            "(driver 550.54 or newer, or INTERP_NN_JIT=1)",
        ),
    ],
)
def test_driver(fresh, built, served, reason):
    fresh.setattr(compiled_library, "versions", lambda: (built, served, True))
    assert compiled_library.driver_reason() == reason


def test_kernels_compiled_here_are_read_by_older_drivers(fresh, tmp_path):
    fresh.setattr(compiled_library, "versions", lambda: (12090, 12020, True))
    fresh.setattr(compiled_library, "_attempt", (tmp_path / "interp_nn_cuda.so", None))
    assert compiled_library.driver_reason() is None


# (machine code, PTX) of a library, and the GPUs that it serves.
SERVED = [
    ({75, 80, 90, 100, 120}, {80}, "75 80 86 87 89 90 100 103 110 120 121"),
    ({90}, set(), "90"),
    ({80, 100}, set(), "80 86 87 89 100 103"),
    ({86}, set(), "86 87 89"),
    ({75}, {75}, "75"),  # newer GPUs would run this PTX, where their kernels are empty
    (set(), {90}, "90 100 103 110 120 121"),
    (set(), set(), ""),
]


@pytest.mark.parametrize(("sass", "ptx", "gpus"), SERVED)
def test_the_gpus_that_a_library_serves(sass, ptx, gpus):
    known = ("75", "80", "86", "87", "89", "90", "100", "103", "110", "120", "121")
    assert " ".join(g for g in known if fatbin.serves(sass, ptx, (int(g) // 10, int(g) % 10))) == gpus


def test_a_gpu_that_the_library_has_no_code_for_is_a_reason(fresh, tmp_path):
    fresh.setattr(compiled_library, "_attempt", (tmp_path / "_C.abi3.so", None))
    fresh.setattr(compiled_library, "_codes", lambda path: ({90}, set()))
    fresh.setitem(limits._machine_reasons, "cuda", None)
    ampere, hopper = (spec for spec in KNOWN if spec.capability in ((8, 0), (9, 0)))
    of = {"n": 64, "d": 32, "k": 8, "device": "cuda"}
    assert limits.unsupported_reason("cuda", Problem(spec=hopper, **of)) is None
    reason = limits.unsupported_reason("cuda", Problem(spec=ampere, **of))
    assert reason == (
        "the library has code for 9.0, which a GPU of compute capability 8.0 cannot run "
        "(build it with INTERP_NN_CUDA_ARCHS=80, or INTERP_NN_JIT=1)"
    )
    assert limits.unsupported_reason("cuda", Problem(spec=ampere, **of | {"device": "sm_80"})) is None
    fresh.setattr(torch.cuda, "device_count", lambda: 2)
    for specs, expected in (((ampere, ampere), reason), ((ampere, hopper), None)):
        fresh.setattr(limits, "spec_of", lambda device, specs=specs: specs[device.index])
        assert limits.unsupported_reason("cuda") == expected


def test_a_failed_launch_is_a_reason(fresh, tmp_path):
    compiled_library.launch_failures[torch.device("cuda", 1)] = "invalid device function"
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert compiled_library.device_reason((8, 0)) == "a launch failed on cuda:1: invalid device function"


def test_compile_takes_the_reason_as_a_constant(fresh):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        return x if compiled_library.load() is None else x * 2

    assert double(torch.ones(1)) == 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("needs nvcc"), "needs nvcc"),
        (OSError("Could not load this library"), "Could not load this library"),
        (
            RuntimeError(
                "Error building extension 'x': [1/9] nvcc ...\nforward.cu\nld: cannot find -lcudart\nerror: 1\nerror: 2"
            ),
            "Error building extension 'x': ld: cannot find -lcudart: error: 1",
        ),
    ],
    ids=["own", "linker's", "compiler's"],
)
def test_the_reason_is_what_matters_of_an_error(error, reason):
    assert compiled_library._reason(error) == reason


def test_no_room_is_pytorchs_own_error():
    """The stable ABI says which function failed; PyTorch's users catch the kind of the error."""

    def fails(text, carve_out):
        raise RuntimeError(text)

    with pytest.raises(torch.OutOfMemoryError, match="no room for the results or workspaces"):
        engine.launch(fails, "aoti_torch_empty_strided(...) API call failed at binding.cpp, line 65")
    with pytest.raises(RuntimeError, match="a dtype without kernels") as caught:
        engine.launch(fails, "a dtype without kernels")
    assert type(caught.value) is RuntimeError


NO_IMAGE = "not launched: no kernel image is available for execution on the device\nException raised from check"
X, B, DY = torch.randn(9, 6), torch.randn(6, 4), torch.randn(9, 4)
A, C, TARGET = torch.randn(3, 4), torch.randn(3), torch.arange(9) % 3
Q = Polynomial(torch.tensor([1.5, -0.5, 0.25]), torch.tensor(0.7))
SUMMARY, HEAD = Plan("cuda", "(Xb)G"), Plan("cuda", "logits_from_latent")
POLYNOMIAL = Plan("cuda", "(Xb)q", saves=True)
OPTIONS, NEEDS = LossOptions((1.0, 1.0, 1.0), -100, "mean"), (True,) * 4


def eager_forward_of_polynomial():
    p, y, (_, g, terms) = eager_polynomial.forward(X, B, None, Q, POLYNOMIAL, True)
    return p, y, [p, g, terms + Q.coefficients[0] * torch.eye(4)]  # what a kernel saves


def eager_backward_of_polynomial():
    kept = eager_polynomial.forward(X, B, None, Q, eager_polynomial.SAVING, True)[2]
    return eager_polynomial.backward(DY, DY, X, B, Q, kept, eager_polynomial.SAVING, (True, True, False, True, False))[
        :4
    ]


CALLS = {
    "forward": (lambda: engine.forward(X, B, None, SUMMARY, False), lambda: eager.forward(X, B, None, SUMMARY, False)),
    "forward of a polynomial": (
        lambda: engine.forward(X, B, None, POLYNOMIAL, True, Q),
        eager_forward_of_polynomial,
    ),
    "backward": (
        lambda: engine.backward(None, DY, X, B, [B.T @ B], SUMMARY, True, True, True),
        lambda: eager.backward(None, DY, X, B, [B.T @ B], SUMMARY, True, True, True),
    ),
    "backward of a polynomial": (  # of what a kernel has saved
        lambda: engine.backward(DY, DY, X, B, [X @ B, DY, DY], POLYNOMIAL, True, True, False, True, Q),
        eager_backward_of_polynomial,
    ),
    "loss": (
        lambda: engine.loss(X, B, A, C, TARGET, OPTIONS, HEAD, None, NEEDS),
        lambda: eager.loss(X, B, A, C, TARGET, OPTIONS, HEAD, None, NEEDS),
    ),
    "scale": (lambda: engine.scale([X.clone()], DY[0, 0]), lambda: [X * DY[0, 0]]),
}


@pytest.fixture
def refused(fresh):
    """CUDA refuses every launch. The list has the attempts."""
    attempts = []

    def refuse(*arguments):
        attempts.append(arguments)
        raise RuntimeError(NO_IMAGE)

    for name in ("_forward", "_backward", "_loss", "_scale"):
        fresh.setattr(engine, name, refuse)
    return attempts


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_that_is_refused_is_one_warning_and_the_eager_engine(refused, name):
    kernel, by_eager = CALLS[name]
    with pytest.warns(
        RuntimeWarning, match=r"could not launch a kernel on cpu: no kernel image is .* the device\. The"
    ):
        first = kernel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = kernel()
    assert len(refused) == 1
    torch.testing.assert_close(first, by_eager())
    torch.testing.assert_close(again, by_eager())


def test_an_engine_that_was_asked_for_raises_the_error_of_its_launch(refused, fresh):
    fresh.setitem(limits._machine_reasons, "cuda", None)
    with interp_nn.use_engine("cuda"):
        for _ in range(2):
            with pytest.raises(engine.LaunchError, match=r"^no kernel image is available for execution on the device$"):
                CALLS["forward"][0]()
        with ThreadPoolExecutor(1) as autograd, pytest.raises(engine.LaunchError):
            autograd.submit(CALLS["backward"][0]).result()
    assert not compiled_library.launch_failures
