import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import python
from setuptools import Distribution
from setuptools.command.egg_info import FileList

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
GLOBALS = SETUP["cuda_library"].__globals__
CODES = "75 80 86 87 88 89 90 100 110 103 120 121"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """What setup.py passes to setup() on a machine with such an nvcc and PyTorch, of which None is not there."""

    def build(
        mode="1", archs=None, nvcc="13.0", codes=CODES, torch="2.10.0+cpu", cuda=None, hip=None, platform="linux",
        folders=("include", "lib64"), **environment,
    ):  # fmt: skip
        toolkit = tmp_path / "cuda"
        if nvcc is not None:
            for folder, file in zip(("bin", *folders), ("nvcc", "cuda_runtime.h", "libcudart_static.a"), strict=False):
                (toolkit / folder).mkdir(parents=True, exist_ok=True)
                (toolkit / folder / file).touch()
            listing = "\\n".join(f"sm_{code}" for code in codes.split())
            (toolkit / "bin/nvcc").write_text(
                '#!/bin/sh\ncase "$1" in\n'
                f"--version) echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.88';;\n"
                f"--list-gpu-code) printf '{listing}\\n';;\nesac\n"
            )
            (toolkit / "bin/nvcc").chmod(0o755)
        environment |= {"INTERP_NN_BUILD_CUDA": mode, "INTERP_NN_CUDA_ARCHS": archs}
        for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", *environment):
            monkeypatch.delenv(name, raising=False)
            if environment.get(name) is not None:
                monkeypatch.setenv(name, environment[name])
        monkeypatch.setattr(sys, "platform", platform)
        fake = SimpleNamespace(__version__=torch, version=SimpleNamespace(cuda=cuda, hip=hip))
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "torch", fake if torch is not None else None)
            patched.setitem(GLOBALS, "find_toolkit", lambda: toolkit if nvcc is not None else None)
            patched.setitem(GLOBALS, "extension", lambda toolkit, archs: {"archs": archs})
            return SETUP["cuda_library"]()

    return build


# The machine, and what the one sentence on it says.
OBSTACLES = [
    ({"platform": "darwin"}, "it is for Linux, and this is darwin"),
    ({"nvcc": None}, r"bin/nvcc and include/cuda_runtime.h are not in PATH or /usr/local/cuda; set CUDA_HOME to"),
    (
        {"folders": ("include",)},
        r"cuda has no libcudart_static.a in lib64, lib, targets/\*/lib \(install CUDA's runtime",
    ),
    ({"hip": "6.4", "torch": "2.13.0+rocm6.4"}, r"it is for CUDA, and PyTorch 2\.13\.0\+rocm6\.4 is of ROCm"),
    ({"torch": None}, r"PyTorch cannot be imported by the build .* --no-build-isolation"),
    ({"torch": "2.9.1"}, r"PyTorch 2\.9\.1 is older than 2\.10"),
    ({"nvcc": "12.6"}, r"nvcc .* is of CUDA 12\.6, older than 12\.8"),
    ({"cuda": "12.8"}, r"nvcc .* CUDA 13\.0 and PyTorch of CUDA 12\.8, .* CUDA_HOME to a toolkit of CUDA 12"),
    (
        {"codes": "75 80 86 89 90"},
        r"nvcc 13\.0 cannot compile for 100 120; it knows sm_75 .* \(set INTERP_NN_CUDA_ARCHS\)",
    ),
]


def reason_stored(arguments, folder):
    """Run the build of the Python files that setup() would run, and return the reason that it leaves in the package."""
    (folder / "interp_nn").mkdir(parents=True)
    command = arguments["cmdclass"]["build_py"](Distribution({"script_name": "setup.py"}))
    command.build_lib, command.editable_mode = str(folder), False
    command.ensure_finalized()
    command.run()
    return (folder / "interp_nn/_no_library.txt").read_text()


@pytest.mark.parametrize(("machine", "sentence"), OBSTACLES)
def test_a_build_that_must_have_the_library_stops_and_any_other_goes_on_without(
    build, capsys, tmp_path, machine, sentence
):
    with pytest.raises(SystemExit) as stop:
        build(**machine)
    assert re.search(f"^interp_nn: the CUDA library cannot be built: .*{sentence}", stop.value.code)
    assert "\n" not in stop.value.code
    assert reason_stored(build(mode="auto", **machine), tmp_path / "build").endswith("\n")
    printed = capsys.readouterr().err
    assert re.search(f"^interp_nn: building without the CUDA library: .*{sentence}", printed)
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"), [("CUDA_HOME", "/opt/cuda"), ("archs", "90"), ("TORCH_CUDA_ARCH_LIST", "9.0")]
)
def test_who_names_a_toolkit_or_gpus_gets_the_library_or_an_error(build, name, value):
    sentence = (
        rf"^interp_nn: {'INTERP_NN_CUDA_ARCHS' if name == 'archs' else name} asks for the CUDA library, which cannot "
    )
    with pytest.raises(
        SystemExit, match=sentence + r"be built: PyTorch 2\.9.*\. INTERP_NN_BUILD_CUDA=0 builds without it$"
    ):
        build(mode="auto", torch="2.9.1", **{name: value})
    assert set(build(mode="0", torch="2.9.1", **{name: value})) == {"cmdclass"}
    assert build(mode="auto", **{name: value})["archs"] == (
        SETUP["parse_archs"](SETUP["ARCHS"]) if name == "CUDA_HOME" else [(90, False)]
    )


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("8.0;9.0+PTX", "80;90+PTX"),
        ("5.2 6.0+PTX 7.5 8.6 9.0a 9.0 12.0f+PTX", "75;86;90;120+PTX"),  # a list made for PyTorch itself
        ("10.0 ;", "100"),
    ],
)
def test_the_list_of_torch(text, archs):
    assert SETUP["archs_of_torch"](text) == archs


@pytest.mark.parametrize("text", ["Hopper", "90", "9.0,10.0", "6.0 7.0"])
def test_a_list_of_torch_that_is_not_understood_is_an_error(build, text):
    with pytest.raises(SystemExit, match=r"^interp_nn: TORCH_CUDA_ARCH_LIST: got '"):
        build(mode="auto", TORCH_CUDA_ARCH_LIST=text)
    assert build(archs="90", TORCH_CUDA_ARCH_LIST=text)["archs"] == [(90, False)]


@pytest.mark.parametrize("archs", ["75+PTX", "70+PTX", "90;75+PTX"])
def test_ptx_that_newer_gpus_would_run_without_kernels_is_an_error(build, archs):
    with pytest.raises(
        SystemExit, match=r"INTERP_NN_CUDA_ARCHS: got '7\d\+PTX', want PTX of 80 or newer: newer GPUs would"
    ):
        build(archs=archs)


@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize("archs", ["", ";", "ninety", "9.0", "90a", "90+ptx", "80,90", "80 90", "sm_90"])
def test_ill_formed_archs_are_an_error_in_every_build(build, mode, archs):
    with pytest.raises(SystemExit, match=r"^interp_nn: INTERP_NN_CUDA_ARCHS: got ('.+', want a list|an empty list)"):
        build(mode=mode, archs=archs, nvcc=None)


@pytest.mark.parametrize("mode", ["", "yes", "2"])
def test_the_mode_is_one_of_three(build, mode):
    with pytest.raises(SystemExit, match=f"INTERP_NN_BUILD_CUDA: got '{mode}', want auto, 1 or 0"):
        build(mode=mode)


def test_no_library_where_none_is_wanted(build, capsys, tmp_path):
    arguments = build(mode="0", archs="ninety", nvcc=None, torch=None)
    assert reason_stored(arguments, tmp_path) == "INTERP_NN_BUILD_CUDA=0 left it out\n"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize("machine", [{}, {"nvcc": "12.9", "cuda": "12.8"}, {"archs": "80; 90+PTX;"}])
def test_a_good_machine_builds(build, mode, machine):
    archs = build(mode=mode, **machine)["archs"]
    assert archs == ([(80, False), (90, True)] if "archs" in machine else SETUP["parse_archs"](SETUP["ARCHS"]))


def test_flags_of_nvcc():
    assert SETUP["gencode"]([(80, False), (120, True)]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_a_wrapper_of_nvcc_on_the_path_is_not_taken_for_the_toolkit(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert SETUP["find_toolkit"]() != tmp_path


@pytest.mark.parametrize(
    ("include", "lib"),
    [
        ("include", "lib64"),  # NVIDIA's
        ("include", "lib"),  # pip's
        ("targets/x86_64-linux/include", "targets/x86_64-linux/lib"),  # conda's
    ],
)
def test_toolkits_of_nvidia_pip_and_conda(tmp_path, monkeypatch, include, lib):
    for file in ("bin/nvcc", f"{include}/cuda_runtime.h", f"{lib}/libcudart_static.a"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert SETUP["find_toolkit"]() == tmp_path
    (tmp_path / "csrc").mkdir()
    monkeypatch.chdir(tmp_path)
    module = SETUP["extension"](tmp_path, [(90, False)])["ext_modules"][0]
    assert str(tmp_path / include) in module.include_dirs and str(tmp_path / lib) in module.library_dirs


def test_setuptools_that_is_too_old_is_one_sentence(monkeypatch):
    monkeypatch.setattr("setuptools.__version__", "65.5.0")
    with pytest.raises(
        SystemExit, match=r'^interp_nn: it needs setuptools 77 .*65\.5\.0 is installed: pip install "setup'
    ):
        runpy.run_path(str(ROOT / "setup.py"))


def test_a_bad_build_exits_with_its_sentence_alone(tmp_path):
    done = python("setup.py", "build_ext", INTERP_NN_BUILD_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode == 1
    assert (
        done.stderr.startswith("interp_nn: the CUDA library cannot be built: bin/nvcc and")
        and done.stderr.count("\n") == 1
    )


def test_the_source_archive_has_what_its_tests_and_its_makefile_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = FileList()
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        files.process_template_line(line)
    guide = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert not [file for file in files.files if file.startswith("benchmarks/results") or file.endswith(".png")]
    assert len(guide) > 9 and {*guide, "mkdocs.yml", ".ci/run", "CHANGELOG.md", "Makefile"} <= set(files.files)
