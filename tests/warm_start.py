"""`stillroom` for a shell, forked from a process that has imported torch and the like: a start takes no eight seconds.

Each command imports the package's own modules again from its PYTHONPATH: a page may change them on the way.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

_SLOW = (
    "transformers.models.llama.modeling_llama",
    "peft",
    "mlflow",
    "pandas",
    "pyarrow",
    "scipy.stats",
    "matplotlib.figure",
)
_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(call).to_bytes(4, "big")], [0, 1, 2])
server.sendall(call)
sys.exit(int(server.makefile().read()))
"""


@cache
def client():
    """The text of a program that runs `stillroom`, and the process that serves it for as long as this one lives."""
    address = str(Path(tempfile.mkdtemp(prefix="warm", dir="/tmp")) / "socket")  # a socket's path must be short
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"
    return _CLIENT.format(python=sys.executable, address=address), server


def _serve(address):
    for slow in _SLOW:
        importlib.import_module(slow)
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
            _answer(connection)
        connection.close()


def _answer(connection):
    connection.settimeout(None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(connection, 4, 3)
    arguments, folder, environment = json.loads(connection.makefile("rb").read(int.from_bytes(size, "big")))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = environment["PYTHONPATH"]
    sys.argv = ["stillroom", *arguments]
    code = 1
    try:
        from stillroom.cli import main

        main()
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


if __name__ == "__main__":
    _serve(sys.argv[1])
