"""Real processes for tests to kill, stop and starve, forked from one that has imported everything: a start is quick."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "stillroom.cli",
        "stillroom.experiment.workspace",
        "stillroom.studies",
        "transformers.models.llama.modeling_llama",
        "mlflow.store.tracking.sqlalchemy_store",
    ]
)


@dataclass
class Running:
    """A process and what it prints."""

    process: multiprocessing.Process
    log: Path

    @property
    def output(self):
        """Both streams, so far."""
        return self.log.read_text("utf-8") if self.log.exists() else ""

    def end(self, timeout=1500):
        """Wait; returns the exit code, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.output}"
        return self.process.exitcode

    def signal(self, number):
        """Send a signal."""
        os.kill(self.process.pid, number)


def start(log, function, *arguments, limit=None, environ=None):
    """Call a function in a process of its own; `limit`: bytes a file may have, as on a disk that is full."""
    process = _CONTEXT.Process(target=_run, args=(log, function, arguments, limit, environ or {}))
    process.start()
    return Running(process, log)


def _run(log, function, arguments, limit, environ):
    import torch

    gc.freeze()  # what was imported beforehand need not be looked through again
    with log.open("ab", 0) as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
    os.environ.update(environ)
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    function(*arguments)


def command(*arguments):
    """The command line."""
    from stillroom.cli import main

    sys.argv = ["stillroom", *map(str, arguments)]
    main()


def command_without_pictures(*arguments):
    """The command line, whose report's figures are drawn, but not rendered to files, which takes ten seconds."""
    from synthetic import quick_reports

    with quick_reports():
        command(*arguments)


def command_with_its_tracker_elsewhere(*arguments):
    """The command line where the tracker is on a disk that is not full."""
    from stillroom.experiment.tracker import Tracker

    Tracker.check = lambda _: None
    command(*arguments)


def stillroom(log, *arguments, **options):
    """Start `stillroom` with arguments in a process of its own."""
    return start(log, command, *arguments, **options)


def wait_for(condition, running, timeout=600):
    """Poll until a condition holds or the process ends; returns whether it held."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition():
            return True
        if not running.process.is_alive():
            return condition()
        time.sleep(0.002)
    raise AssertionError(f"nothing happened for {timeout} s: {running.output}")


def descendants(pid):
    """Pids of a process's children and theirs."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {pid}
