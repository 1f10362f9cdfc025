import struct

import audit
import pytest
import resources

from interp_nn.engines.cuda import fatbin

ARCHS = audit.SETUP["ARCHS"]
SINCE = {"torch_call_dispatcher": 10, "torch_from_blob": 11}


def blob(*entries):
    """A fat binary of (kind, arch) entries: 1 is PTX, 2 machine code."""
    code = b""
    for kind, arch in entries:
        header = bytearray(64)
        struct.pack_into("<HHIQ", header, 0, kind, 0x0101, len(header), 24)
        struct.pack_into("<I", header, 28, arch)
        code += bytes(header) + bytes(24)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(code)) + code


def test_archs_of_several_fat_binaries_in_one_library():
    library = b"\x7fELF" + bytes(37) + blob((2, 80), (2, 120), (1, 120)) + b"between" + blob((2, 90), (1, 90), (2, 80))
    assert fatbin.archs(library) == "80;90+PTX;120+PTX"


def test_archs_are_those_of_a_release():
    assert not list(audit.wrong_archs(ARCHS))
    assert list(audit.wrong_archs("90")) == [f"it is compiled for 90, a release for {ARCHS}"]


@pytest.mark.parametrize("name", ["libcudart.so.13", "libcuda.so.1", "libtorch_cuda.so", "libpython3.11.so.1.0"])
def test_only_libraries_of_every_machine_are_needed(name):
    listing = " (NEEDED)  Shared library: [{}]\n (NEEDED)  Shared library: [libstdc++.so.6]\n"
    assert not list(audit.wrong_needed(listing.format("libtorch_cpu.so")))
    (sentence,) = audit.wrong_needed(listing.format(name))
    assert sentence.startswith(f"it needs {name},")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("                 U malloc@GLIBC_2.2.5", None),
        ("                 U _ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv", None),
        ("                 U torch_from_blob", "torch_from_blob came with PyTorch 2.11; the wheel is for 2.10"),
        ("                 U _ZN3c106detail14torchCheckFailEPKcS2_jS2_", "is C++ of PyTorch"),
        ("                 U cudaLaunchKernel", "cudaLaunchKernel is of no library"),
    ],
)
def test_symbols(line, sentence):
    sentences = list(audit.wrong_symbols(f"{line}\n", SINCE))
    assert not sentences if sentence is None else sentence in sentences[0]


def test_headers_tell_since_when_a_function_is_there(tmp_path):
    for header, text in {
        "csrc/inductor/aoti_torch/c/shim.h": "#ifdef __cplusplus\n#endif\nint32_t aoti_torch_old();\n",
        "csrc/stable/c/shim.h": (
            "#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_11_0\n// torch_in_a_comment()\nint\ntorch_new(int a);\n"
            "#ifdef USE_CUDA\nint torch_new_too();\n#endif\n#endif // TORCH\nint torch_not_so_new(void);\n"
        ),
    }.items():
        (tmp_path / header).parent.mkdir(parents=True)
        (tmp_path / header).write_text(text)
    since = audit.stable_since(tmp_path)
    assert since == {"aoti_torch_old": 10, "torch_new": 11, "torch_new_too": 11, "torch_not_so_new": 10}


LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN9interp_nn4plusILNS_4KindE3ELi64EEEvPfi' for 'sm_90'
ptxas info    : Function properties for _ZN9interp_nn4plusILNS_4KindE3ELi64EEEvPfi
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function 'minus' for 'sm_80'
ptxas info    : Function properties for minus
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""


def test_spills_where_there_may_be_none(tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text(LOG)
    resources.main(str(log), "minus")
    assert " 90        255      16    1024" in capsys.readouterr().out
    for unspilled, sentence in (("plus", "must not spill: .*plus.* on sm_90"), ("times", "no kernel is called times")):
        with pytest.raises(SystemExit, match=sentence):
            resources.main(str(log), unspilled)
