import os
import subprocess
import sys
from pathlib import Path

import emulator_build
import pytest


@pytest.mark.skipif(os.environ.get("INTERP_NN_EMULATOR_SANITIZE") == "1", reason="this is the sanitized run")
@pytest.mark.parametrize(("test", "clean"), [("unpatched", True), ("row_too_many_loaded", False)])
def test_address_sanitizer(tmp_path, test, clean):
    runtime = emulator_build.sanitizer_runtime()
    if runtime is None:
        pytest.skip("no AddressSanitizer here")
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "INTERP_NN_EMULATOR_SANITIZE": "1",
        "INTERP_NN_EMULATOR_NO_GUARDS": "1",
    }
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-s", f"--basetemp={tmp_path / 'inner'}"]
    command += [str(here / "test_emulated_mutants.py"), "-k", test]
    done = subprocess.run(command, env=environment, cwd=here.parents[3], capture_output=True, text=True, check=False)
    text = done.stdout[-4000:] + done.stderr[-4000:]
    assert (done.returncode == 0) == clean, text
    assert clean or "heap-buffer-overflow" in text, text
