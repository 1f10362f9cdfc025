"""What all tests share: `reproducible`, in each process that runs tests, and how many processes there are."""

import gc
import os

import pytest

# Problems as small as the tests' lose more to waking threads than they gain; the variable is for the processes they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("INTERP_NN_DATA", None)  # tests make the data that they need; a user's own takes minutes
# What is imported and collected stays to the end: looking for garbage in it takes a third of the time.
gc.disable()


def pytest_sessionstart(session):
    """Import PyTorch, in two seconds, only where tests run: not in the process that hands them out to others."""
    plugins = session.config.pluginmanager
    if plugins.has_plugin("dsession"):
        gc.enable()
    else:
        plugins.import_plugin("reproducible")


def pytest_collection_finish():
    """Leave out of each search for garbage what is there before the first test, and search less often: compilers leave much."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Processes for `-n auto`: one a core, at most 8; on a single core none beside this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8) if cores > 1 else 0
