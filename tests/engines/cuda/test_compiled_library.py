import pytest
import torch

from interp_nn.engines.cuda import compiled_library, engine


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """No library is loaded, and there is none."""
    monkeypatch.setattr(compiled_library, "_attempt", None)
    monkeypatch.setattr(compiled_library, "_LIBRARY", tmp_path / "_C.abi3.so")
    monkeypatch.delenv("INTERP_NN_JIT", raising=False)
    return monkeypatch


def test_no_library(fresh):
    assert (
        "built without the CUDA library (where nvcc is: INTERP_NN_BUILD_CUDA=1 pip install" in compiled_library.load()
    )


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
    ],
)
def test_driver(fresh, built, served, reason):
    fresh.setattr(compiled_library, "versions", lambda: (built, served, True))
    assert compiled_library.driver_reason() == reason


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

    def fails(text):
        raise RuntimeError(text)

    with pytest.raises(torch.OutOfMemoryError, match="no room for the results or workspaces"):
        engine.launch(fails, "aoti_torch_empty_strided(...) API call failed at binding.cpp, line 65")
    with pytest.raises(RuntimeError, match="a dtype without kernels") as caught:
        engine.launch(fails, "a dtype without kernels")
    assert type(caught.value) is RuntimeError
