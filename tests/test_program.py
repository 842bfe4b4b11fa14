"""The program as a process: it ends at once, but with the right code, and not before what is to be finished."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

_CALL = "from stillroom.cli import program; program()"
_LAST = """
import atexit, threading, time
from stillroom import cli

class Late:
    def __del__(self):
        print("taken apart")

kept = Late()

def main():
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    atexit.register(print, "library")
    print("command")
    raise SystemExit(CODE)

cli.main = main
cli.program()
"""


def _run(code, *arguments, shell=None):
    """Output is kept until there is much of it, or the process ends."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = ["bash", "-c", shell] if shell else [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=buffered)


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, "stillroom 0.1.0\n", ""),
        (["plan"], 2, "", "Missing argument"),
    ],
)
def test_its_exit_code_and_output_are_those_of_the_command(arguments, code, out, err):
    """Of a pipe too, which is written to when it is full or flushed."""
    done = _run(_CALL, *arguments)
    assert (done.returncode, done.stdout) == (code, out)
    assert err in done.stderr


@pytest.mark.parametrize(("given", "code"), [("None", 0), ("2", 2), ("'words'", 1)])
def test_threads_and_libraries_finish_and_nothing_is_taken_apart(given, code):
    """A library writes at the end what it still holds; objects are not destroyed one by one, which takes a second."""
    done = _run(_LAST.replace("CODE", given))
    assert (done.returncode, done.stdout) == (code, "command\nthread\nlibrary\n")


def test_an_internal_error_is_no_success():
    """What escapes a command ends the process as an error of Python's does."""
    done = _run(_LAST.replace("raise SystemExit(CODE)", "raise RuntimeError('escaped')"))
    assert done.returncode == 1
    assert "RuntimeError: escaped" in done.stderr


@pytest.mark.parametrize(("target", "code"), [("| sleep 0", 0), ("> /dev/full", 1)])
def test_what_cannot_be_written_at_the_end_is_an_error_but_for_a_reader_that_has_gone(target, code):
    """`stillroom fields | head -1` is well; a table that did not fit on the disk is not."""
    slow = _LAST.replace("raise SystemExit(CODE)", "time.sleep(0.3)")
    done = _run(None, shell=f"{sys.executable} -c {shlex.quote(slow)} {target}; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (code, "")


def test_ctrl_c_that_comes_late_has_its_own_code():
    """Pressed while bars or Ray are being ended."""
    done = _run(_LAST.replace("raise SystemExit(CODE)", "raise KeyboardInterrupt"))
    assert done.returncode == 130
