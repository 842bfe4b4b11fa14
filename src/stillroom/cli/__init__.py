"""The command line: one command a stage, no logic."""

from __future__ import annotations

import atexit
import codecs
import errno
import gc
import io
import math
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import typer

from stillroom.cli import before  # isort: skip - each registers its commands, in the order that --help lists them
from stillroom.cli import stages  # isort: skip
from stillroom.cli import after  # isort: skip
from stillroom.cli.options import BARS, SELDOM, app
from stillroom.credentials import redact

INTERRUPTED = 130
"""Typer's exit code for Ctrl-C."""


_AGAIN_SECONDS = 60
"""How long after Ctrl-C another is taken for impatience: what is being ended would break off in the middle."""


def program() -> None:
    """`stillroom`: `main`, after which the process ends at once.

    Taking apart what was imported takes up to a second and saves nothing.
    """
    ended = {"code": 1}
    atexit.register(_end_at_once, ended)  # registered first, so called last: after what other libraries have to finish
    try:
        main()
        ended["code"] = 0
    except SystemExit as stop:
        ended["code"] = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except KeyboardInterrupt:  # while bars or Ray were being ended
        ended["code"] = INTERRUPTED
        raise


def _end_at_once(ended: dict[str, int]) -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError, AttributeError):
            pass  # nobody reads it any more, it is closed, or there is none
        except OSError:  # a full disk
            ended["code"] = ended["code"] or 1
    os._exit(ended["code"])


def main() -> None:
    """A command: a user's mistake ends with one message and exit code 2, Ctrl-C with 130, a fault of ours with 1.

    What is printed at the end names no credential.
    """
    from stillroom.errors import UserError

    gc.set_threshold(*SELDOM)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="replace")  # ASCII has no minus sign
    warnings.simplefilter("ignore", FutureWarning)  # other packages' notices to their own developers
    signal.signal(signal.SIGINT, _Interruption())
    try:
        with closing(BARS), _ending_ray():  # off the terminal, and gone, before anything is said of an error
            app()
    except UserError as error:
        typer.secho(redact(f"error: {error}"), err=True, fg="red")
        _leave(2)
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            again = shlex.join(["stillroom", *sys.argv[1:]])
            typer.secho(redact(f"Stopped. Finished work is saved. To resume: {again}"), err=True)
        _leave(stop.code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # writing a file says which
            typer.secho(f"error: cannot write the output: {os.strerror(error.errno)}", err=True, fg="red")
            _leave(2)
        typer.secho(redact(traceback.format_exc()), err=True)
        typer.secho("Internal error in stillroom; please report it. Finished work is saved.", err=True)
        _leave(1)


class _Interruption:
    """What Ctrl-C does: it interrupts, once."""

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, *_: Any) -> None:
        if time.monotonic() - self._last > _AGAIN_SECONDS:
            self._last = time.monotonic()
            raise KeyboardInterrupt


@contextmanager
def _ending_ray() -> Iterator[None]:
    """Leave no process of Ray behind, whatever happens."""
    try:
        yield
    finally:
        if "ray" in sys.modules:
            from stillroom.experiment.ray_processes import end_ray

            end_ray()


def _leave(code: Any) -> NoReturn:
    # an interruption would break off what the interpreter does as it ends; not before: children would inherit this
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


__all__ = ["after", "app", "before", "main", "program", "stages"]
