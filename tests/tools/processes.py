"""Python in a process of its own, which imports this checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(*arguments, **variables):
    """Run Python with these arguments and further environment variables; return the finished process and its text."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


_FORKS = """
import json, os, sys, torch, traceback
found = []
for code in sys.argv[1:]:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1), os.dup2(writing, 2), os.close(writing)
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        found.append(file.read())
    os.waitpid(child, 0)
print(json.dumps(found))
"""


def python_after_torch(*codes):
    """Run each code in a process that has imported PyTorch and nothing else; return what each wrote, its traceback too.

    They are forks of one process, as the import of PyTorch takes two seconds.
    """
    done = python("-c", _FORKS, *codes)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
