"""Tests of compiled code, each in a process without the interpreter: a kernel is interpreted or compiled from its import on."""

import atexit
import os
import shutil
import tempfile

if os.environ.get("TRITON_INTERPRET", "") in ("", "0") and os.environ.get("INTERP_NN_COMPILE_TESTS") == "1":
    # Times and failures are the compiler's own, not those of an earlier run.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="interp_nn-triton-")
    atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
    if os.environ.get("INTERP_NN_EVERY_TILE") != "1":
        collect_ignore = ["test_every_tile.py"]
else:
    collect_ignore_glob = ["*"]
