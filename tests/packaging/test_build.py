import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools.command.egg_info import FileList

ROOT = Path(__file__).resolve().parents[2]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
CODES = "75 80 86 87 88 89 90 100 110 103 120 121"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """What setup.py passes to setup() on a machine with such an nvcc and PyTorch, of which None is not there."""

    def build(mode="1", archs=None, nvcc="13.0", codes=CODES, torch="2.10.0+cpu", torch_cuda=None, platform="linux"):
        toolkit = tmp_path / "cuda"
        if nvcc is not None:
            for name in ("bin", "include"):
                (toolkit / name).mkdir(parents=True, exist_ok=True)
            (toolkit / "include/cuda_runtime.h").touch()
            listing = "\\n".join(f"sm_{code}" for code in codes.split())
            (toolkit / "bin/nvcc").write_text(
                '#!/bin/sh\ncase "$1" in\n'
                f"--version) echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.88';;\n"
                f"--list-gpu-code) printf '{listing}\\n';;\nesac\n"
            )
            (toolkit / "bin/nvcc").chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        monkeypatch.setenv("INTERP_NN_BUILD_CUDA", mode)
        monkeypatch.delenv("INTERP_NN_CUDA_ARCHS", raising=False)
        if archs is not None:
            monkeypatch.setenv("INTERP_NN_CUDA_ARCHS", archs)
        monkeypatch.setattr(sys, "platform", platform)
        fake = SimpleNamespace(__version__=torch, version=SimpleNamespace(cuda=torch_cuda))
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "torch", fake if torch is not None else None)
            patched.setitem(SETUP["cuda_library"].__globals__, "extension", lambda toolkit, archs: {"archs": archs})
            return SETUP["cuda_library"]()

    return build


# The machine, and what the one sentence on it says.
OBSTACLES = [
    ({"platform": "darwin"}, "it is for Linux, and this is darwin"),
    ({"nvcc": None}, r"nvcc and its headers are not in \S+cuda; set CUDA_HOME"),
    ({"torch": None}, r"PyTorch cannot be imported by the build .* --no-build-isolation"),
    ({"torch": "2.9.1"}, r"PyTorch 2\.9\.1 is older than 2\.10"),
    ({"nvcc": "12.6"}, r"nvcc .* is of CUDA 12\.6, older than 12\.8"),
    ({"torch_cuda": "12.8"}, r"nvcc .* CUDA 13\.0 and PyTorch of CUDA 12\.8, .* CUDA_HOME to a toolkit of CUDA 12"),
    ({"archs": "70"}, r"nvcc 13\.0 cannot compile for 70 of INTERP_NN_CUDA_ARCHS; it knows sm_75 sm_80"),
    ({"codes": "75 80 86 89 90"}, r"cannot compile for 100 120"),
]


@pytest.mark.parametrize(("machine", "sentence"), OBSTACLES)
def test_a_build_that_must_have_the_library_stops_with_one_sentence(build, machine, sentence):
    with pytest.raises(SystemExit) as stop:
        build(**machine)
    assert re.search(f"^interp_nn: the CUDA library cannot be built: .*{sentence}", stop.value.code)
    assert "\n" not in stop.value.code


@pytest.mark.parametrize(("machine", "sentence"), OBSTACLES)
def test_else_the_library_is_left_out_and_the_sentence_printed(build, capsys, machine, sentence):
    assert build(mode="auto", **machine) == {}
    printed = capsys.readouterr().err
    assert re.search(f"^interp_nn: building without the CUDA library: .*{sentence}", printed)
    assert printed.count("\n") == 1


@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize("archs", ["", ";", "ninety", "9.0", "90a", "90+ptx", "80,90", "80 90", "sm_90"])
def test_ill_formed_archs_are_an_error_in_every_build(build, mode, archs):
    with pytest.raises(SystemExit, match=r"^interp_nn: INTERP_NN_CUDA_ARCHS: got ('.+', want a list|an empty list)"):
        build(mode=mode, archs=archs, nvcc=None)


@pytest.mark.parametrize("mode", ["", "yes", "2"])
def test_the_mode_is_one_of_three(build, mode):
    with pytest.raises(SystemExit, match=f"INTERP_NN_BUILD_CUDA: got '{mode}', want auto, 1 or 0"):
        build(mode=mode)


def test_no_library_where_none_is_wanted(build, capsys):
    assert build(mode="0", archs="ninety", nvcc=None, torch=None) == {}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize("machine", [{}, {"nvcc": "12.9", "torch_cuda": "12.8"}, {"archs": "80; 90+PTX;"}])
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


def test_a_bad_build_exits_with_its_sentence_alone(tmp_path):
    environment = {**os.environ, "INTERP_NN_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("interp_nn: the CUDA library cannot be built: nvcc") and done.stderr.count("\n") == 1


def test_the_source_archive_has_what_its_tests_and_its_makefile_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = FileList()
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        files.process_template_line(line)
    guide = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    assert len(guide) > 9 and {*guide, "mkdocs.yml", ".ci/run", "CHANGELOG.md", "Makefile"} <= set(files.files)
