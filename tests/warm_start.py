"""Processes forked from one that has imported torch and the like, so that a start does not take eight seconds.

They are `stillroom` for a shell, and what a sweep on this machine forks its trials from. Each imports the package's own
modules again: a page may change them on the way.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace

_SLOW = (
    "transformers.models.llama.modeling_llama",
    "peft",
    "mlflow.store.tracking.sqlalchemy_store",
    "pandas",
    "pyarrow",
    "scipy.stats",
    "matplotlib.figure",
)
_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), None]).encode()
socket.send_fds(server, [len(call).to_bytes(4, "big")], [0, 1, 2])
server.sendall(call)
sys.exit(int(server.makefile().read()))
"""


@cache
def address():
    """Where the warm process listens, for as long as this one lives."""
    path = str(Path(tempfile.mkdtemp(prefix="warm", dir="/tmp")) / "socket")  # a socket's path must be short
    server = subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"
    return path


def client():
    """The text of a program that runs `stillroom`."""
    return _CLIENT.format(python=sys.executable, address=address())


def subprocesses(address):
    """For `local_worker`, in place of `subprocess`: the process that forks for each trial is itself a fork."""

    class Popen:
        def __init__(self, command, env, pass_fds, stdin, stdout, stderr):
            (control,) = pass_fds
            self.returncode, self._server = None, socket.socket(socket.AF_UNIX)
            self._server.connect(address)
            call = json.dumps([[], str(Path.cwd()), env, sys.path]).encode()
            with Path(os.devnull).open() as nothing:
                streams = [nothing.fileno(), stdout.fileno(), stderr.fileno(), control]
                socket.send_fds(self._server, [len(call).to_bytes(4, "big")], streams)
            self._server.sendall(call)
            self.pid = int.from_bytes(self._server.recv(4), "big")

        def wait(self, timeout=None):
            if self.returncode is None:
                if not select.select([self._server], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("a fork", timeout)
                self.returncode = int(self._server.recv(16) or -signal.SIGKILL)
            return self.returncode

        def kill(self):
            if self.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)

    return SimpleNamespace(Popen=Popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired)


def _serve(address):
    for slow in _SLOW:
        importlib.import_module(slow)
    gc.collect()
    gc.freeze()  # a fork need not look through it again
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    parent = os.getppid()
    listener.settimeout(1)
    while os.getppid() == parent:
        try:
            connection = listener.accept()[0]
        except TimeoutError:
            continue
        if not os.fork():
            listener.close()
            _answer(connection, address)
        connection.close()


def _answer(connection, address):
    connection.settimeout(None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(connection, 4, 4)
    arguments, folder, environment, path = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path or [environment["PYTHONPATH"], *sys.path[1:]]
    sys.argv = ["stillroom", *arguments]
    code = 1
    try:
        if path:
            connection.sendall(os.getpid().to_bytes(4, "big"))
            os.register_at_fork(after_in_child=connection.close)  # it ends with this process, not with its forks
            from stillroom.experiment.local_worker import serve

            serve(streams[3])
        else:
            _command(arguments, address)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(str(code).encode())
        os._exit(code)


def _command(arguments, address):
    from stillroom.cli import main

    if arguments[0] in ("run", "sweep"):
        from stillroom.experiment import local_worker

        local_worker.subprocess = subprocesses(address)
    with _pictures_once():
        main()


def _pictures_once():
    """A page's first report has its pictures; they take ten seconds, so later ones are only drawn."""
    if not any(Path().glob("*/report.html")):
        return nullcontext()
    sys.path.append(str(Path(__file__).parent))
    from synthetic import quick_reports

    return quick_reports()


if __name__ == "__main__":
    _serve(sys.argv[1])
