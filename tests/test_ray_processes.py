"""The processes of a Ray: none outlives what it works for."""

import subprocess
import sys

import psutil
import pytest

_CHILD = "from stillroom.experiment.ray_processes import end_with_parent as e; e(); print(1, flush=True); input()"
_PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {_CHILD!r}], stdin=sys.stdin).wait()"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a process there keeps the number of a parent that is gone")
def test_a_worker_ends_when_its_scheduler_is_killed():
    """Else a trial of a killed sweep keeps its folder, and the next sweep waits for it for minutes."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"1\n"
    (worker,) = psutil.Process(parent.pid).children()
    assert worker.is_running()
    parent.kill()
    parent.wait()
    assert psutil.wait_procs([worker], timeout=20) == ([worker], [])
    parent.stdin.close()
    parent.stdout.close()
