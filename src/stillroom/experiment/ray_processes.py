"""The processes of the Ray that this process has started: watched while they work, ended without a rest."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil

from stillroom.errors import UserError

_SECONDS = 0.5
"""How often is looked whether they are still there. Ray itself takes 15 to 60 seconds, and then ends this process."""


@contextmanager
def guarded() -> Iterator[None]:
    """Raise `UserError` in the main thread when a process of our own Ray is gone: Ray would end this process unasked.

    A process killed for memory, say: the kernel takes the largest. Nothing of that Ray is left when it is raised.
    """
    vital = _own_processes()
    if not vital or threading.current_thread() is not threading.main_thread():
        yield
        return
    family, lost, done = _family(vital), threading.Event(), threading.Event()

    def guard() -> None:
        while not done.wait(_SECONDS):
            if not all(_alive(process) for process in vital):
                lost.set()
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # it may wait for Ray for ever
                return
            family.update(_family(vital))  # while parents tell of their children: orphans are found by nobody

    watching = threading.Thread(target=guard, name="guard of Ray's processes", daemon=True)
    watching.start()
    try:
        yield
    except BaseException as error:
        if lost.is_set() or not all(_alive(process) for process in vital):
            end_ray(family)
            raise UserError(
                "Ray has stopped: one of its processes was killed, perhaps because memory ran out; finished work is "
                "saved, run the same command to resume"
            ) from error
        raise
    finally:
        done.set()
        watching.join()


def end_with_parent() -> None:
    """End this process soon after its parent, the scheduler of its node, has ended.

    A trial whose sweep was killed waits for ever to have its numbers taken, and keeps its folder.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="ends with the node's scheduler", daemon=True).start()


def end_ray(family: set[psutil.Process] | None = None) -> None:
    """End the Ray that this process started, if it did, and wait until none of its processes is left.

    `family`: processes of it whose parents may be gone.
    """
    import ray

    family = _family(_own_processes()) | (family or set())
    if not family:
        return
    ray.shutdown()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=10)


def _own_processes() -> list[psutil.Process]:
    """The processes that make up the Ray this process started: its control store, its scheduler."""
    import ray

    node = ray._private.worker._global_node
    started = itertools.chain(*node.all_processes.values()) if node is not None else ()
    found = []
    for info in started:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(info.process.pid))
    return found


def _family(processes: Sequence[psutil.Process]) -> set[psutil.Process]:
    """Processes and what they have started: workers, agents."""
    family = set(processes)
    for process in processes:
        with suppress(psutil.Error):
            family |= set(process.children(recursive=True))
    return family


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
