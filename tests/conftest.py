"""What all tests share: two cores, so one thread per process, and examples that are the same every time."""

import os
import signal
import sys
import tempfile

# Before torch is imported anywhere: its thread pool is sized once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests of the launcher start from a shell that is no rank, whatever started pytest.
for name in (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
):
    os.environ.pop(name, None)

# What a run may remember between starts must not come from, or go to, the home of whoever runs the tests.
_cache = tempfile.TemporaryDirectory(prefix="longctx-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

import pytest  # noqa: E402 - after the environment
from hypothesis import settings  # noqa: E402 - after the environment

settings.register_profile("longctx", deadline=None, derandomize=True, database=None)
settings.load_profile("longctx")


def pytest_configure(config):
    # A shell's script starts what runs in its background with SIGINT ignored, and some tests send it to themselves.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "matrix: the full product of axes; only runs when asked for by -m matrix")


def pytest_pycollect_makeitem(collector, obj):
    """The ten thousand cases of the matrix are not even made unless they are asked for."""
    if "matrix" in collector.config.option.markexpr:
        return None
    marks = getattr(obj, "pytestmark", None)
    return [] if isinstance(marks, list) and any(mark.name == "matrix" for mark in marks) else None


def pytest_collection_modifyitems(config, items):
    """Also leaves out single cases that are marked among the parameters of a test."""
    # Processes take longest to start: first, so that no worker is left with one of them at the end.
    items.sort(key=lambda item: item.get_closest_marker("gloo") is None)
    if "matrix" in config.option.markexpr:
        return
    chosen = [item for item in items if not item.get_closest_marker("matrix")]
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("matrix")])
    items[:] = chosen


@pytest.fixture(autouse=True)
def requests_to_stop_are_of_one_test():
    """A command that takes signals until its process ends must not take those of later tests in this process."""
    yield
    stopping = sys.modules.get("longctx.launcher.stopping")
    if stopping is not None and stopping._current is not None:
        stopping._current = None
        signal.set_wakeup_fd(-1)
        for number in stopping.STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
