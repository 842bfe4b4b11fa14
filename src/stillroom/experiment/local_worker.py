"""Processes that run one trial each, on this machine: how they are started, what they do, how they end.

A process that has trained keeps much of its memory, so each trial has one of its own. What takes seconds is the
import of everything, and that is done before the trial is there: on a CPU by one process that is forked for every
trial, elsewhere by a new process that is made ready while the trial before it runs. The process that is forked has
run no operation of PyTorch and never touched a GPU; only allocators that know of forks have threads in it.

Every process ends when the one that asked for it is gone, however that ended: it reads a connection that dies with it.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
import transformers

from stillroom.credentials import redact
from stillroom.errors import UserError
from stillroom.experiment.jobs import TrialPlan, run_trial
from stillroom.experiment.launching import ORPHAN_SECONDS
from stillroom.experiment.sharded_trial import train_sharded

OUTPUT = "output.log"
"""What a trial's process, and the libraries in it, printed: a file in the trial's folder, kept where it failed."""

FORKS = "STILLROOM_FORKS"
"""Set in the environment of a process that forks for each trial."""


@dataclass(frozen=True)
class Job:
    """A trial, the threads it may use, and how many processes train it, each with as many threads."""

    plan: TrialPlan
    threads: int
    processes: int = 1


class TrialProcess(Protocol):
    """A running trial. Its connection gives each epoch's metrics (dict), or an error (str), and ends with it."""

    @property
    def connection(self) -> Connection:
        """What it says."""

    def exit_code(self) -> int | None:
        """How it ended, negative for a signal, None where nobody knows; waits until it has."""


class TrialProcesses(Protocol):
    """Starts a process for a trial, where it is free to start one; closing ends them all."""

    def start(self, job: Job, slot: int) -> TrialProcess:
        """A process for this trial with the devices of this slot."""

    def close(self) -> None:
        """End every process that was started and is still there."""


class Ready:
    """A new process that imports everything and then waits for what it is sent; it may be a trial's."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Returns at once; `environment` is added to this process's own."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.connection, theirs = Pipe()
        path = f"import gc, sys; gc.disable(); sys.path[:] = {sys.path!r}"
        code = f"{path}; from {__name__} import serve; serve({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
        )
        theirs.close()

    def exit_code(self) -> int | None:
        """How it ended; waits until it has."""
        return self.process.wait()

    def close(self, patience: float = 0.0) -> str:
        """Wait `patience` seconds for it to exit, then kill it; returns what it printed before any trial."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.process.kill()
        self.process.wait()
        with self._said:
            self._said.seek(0)
            return self._said.read().decode("utf-8", "replace").strip()


@dataclass
class Fork:
    """A trial's process that is the child of another process than this one."""

    connection: Connection
    pid: int
    parent: Ready

    def exit_code(self) -> int | None:
        """How it ended, by its parent's word; None where that one is gone."""
        try:
            self.parent.connection.send(self.pid)
            code: int = self.parent.connection.recv()
        except (EOFError, OSError):
            return None
        return code


class Forks:
    """Trials as forks of one process that has imported everything."""

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        """All slots have the same environment: none has a device of its own."""
        self._environment = {**environments[0], FORKS: "1"}
        self._parent = Ready(self._environment)
        self._patience = 0.0

    def start(self, job: Job, slot: int) -> Fork:
        """Fork it; a parent that was killed is replaced. `UserError` if the new one does not live either."""
        try:
            return self._fork(job)
        except (EOFError, OSError):
            self._parent.close()
            self._parent = Ready(self._environment)
        try:
            return self._fork(job)
        except (EOFError, OSError):
            said = self._parent.close().rpartition("\n")[2] or "it was killed"
            raise UserError(
                f"could not start a process for trials on this machine: {said}; finished work is on disk, "
                "run the command again"
            ) from None

    def _fork(self, job: Job) -> Fork:
        ours, theirs = Pipe()
        with theirs:
            self._parent.connection.send(job)
            send_handle(self._parent.connection, theirs.fileno(), self._parent.process.pid)
            fork = Fork(ours, self._parent.connection.recv(), self._parent)
        self._patience = 10.0
        return fork

    def close(self) -> None:
        """End the parent, which kills its forks; while it still imports it has none, and is killed itself."""
        self._parent.close(self._patience)


class Spawned:
    """Trials as new processes, each made ready while the one before it in its slot still runs."""

    def __init__(self, environments: Sequence[Mapping[str, str]], trials: int) -> None:
        """One environment a slot; `trials`: how many starts to be ready for."""
        self._environments = environments
        self._ahead = max(0, trials - len(environments))
        self._ready = {slot: Ready(environment) for slot, environment in enumerate(environments)}
        self._started: list[Ready] = []

    def start(self, job: Job, slot: int) -> Ready:
        """Give the trial to the process that is ready in its slot; one that died there is the trial's failure."""
        process = self._ready.pop(slot, None) or Ready(self._environments[slot])
        self._started.append(process)
        with suppress(OSError):
            process.connection.send(job)
        if self._ahead:
            self._ahead -= 1
            self._ready[slot] = Ready(self._environments[slot])
        return process

    def close(self) -> None:
        """Kill every process."""
        for process in (*self._ready.values(), *self._started):
            process.close()


def serve(descriptor: int) -> None:
    """What a new process does, with the connection it was given: run the trial it is sent, or fork for each.

    A `Job` alone is run here; one that a connection follows is run in a fork, whose pid is answered; a pid is waited
    for, and its exit code answered. When the other side is gone, so are the forks and this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that shows the sweep; it ends this one
    control, children = Connection(descriptor), set[int]()
    _import_modelling_code()
    gc.collect()
    gc.freeze()  # the pages of what is imported stay shared, since no collection in a fork writes to them
    gc.enable()  # the imports went faster without
    with suppress(EOFError, OSError):
        while True:
            asked = control.recv()
            if isinstance(asked, Job) and os.environ.get(FORKS):
                children.add(_fork(asked, control))
            elif isinstance(asked, Job):
                run(asked, control)
            else:
                children.discard(asked)
                control.send(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]))
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def _import_modelling_code() -> None:
    """What a trial imports when it loads its model: seconds that its fork need not spend."""
    from stillroom.models import attention_capture  # noqa: F401

    transformers.AutoModelForCausalLM  # noqa: B018 - a lazy attribute, whose module is imported by this


def _fork(job: Job, control: Connection) -> int:
    descriptor = recv_handle(control)
    child = os.fork()
    if not child:
        control.close()
        run(job, Connection(descriptor))
    os.close(descriptor)
    control.send(child)
    return child


def run(job: Job, connection: Connection) -> NoReturn:
    """Run the trial in this process and end it, with code 0 if the trial has its result."""
    code = 1
    try:
        _be_killed_first()
        _print_to(job.plan.folder / OUTPUT)
        faulthandler.enable()
        threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
        torch.set_num_threads(job.threads)
        several = partial(train_sharded, count=job.processes, threads=job.threads) if job.processes > 1 else None
        run_trial(job.plan, lambda metrics: _tell(connection, metrics), wait=ORPHAN_SECONDS, by=several)
        code = 0
    except Exception as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        _tell(connection, redact(f"{type(error).__name__}: {error}"))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing is left to clean up, and a large process takes seconds to do it


def _tell(connection: Connection, said: Any) -> None:
    try:
        connection.send(said)
    except OSError:
        os._exit(1)  # the sweep is gone: no failure of the trial's


def _end_with(connection: Connection) -> None:
    """End this process when the other side of its connection is gone."""
    with suppress(EOFError, OSError):
        connection.recv_bytes()
    os._exit(1)


def _be_killed_first() -> None:
    """Where memory runs out, Linux is to kill a trial, which is tried again, and not what the sweep hangs on."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "ascii")


def _print_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
