"""The command line: one command a stage, no logic."""

from __future__ import annotations

import shlex
import sys
import traceback
import warnings
from contextlib import closing

import typer

from stillroom.cli import before  # isort: skip - each registers its commands, in the order that --help lists them
from stillroom.cli import stages  # isort: skip
from stillroom.cli import after  # isort: skip
from stillroom.cli.options import BARS, app
from stillroom.credentials import redact


def main() -> None:
    """Entry point: a user's mistake ends with one message and exit code 2, Ctrl-C with 130, a fault of ours with 1.

    What is printed at the end names no credential.
    """
    from stillroom.errors import UserError

    warnings.simplefilter("ignore", FutureWarning)  # other packages' notices to their own developers
    try:
        with closing(BARS):  # taken off the terminal before anything is said of an error
            app()
    except UserError as error:
        typer.secho(redact(f"error: {error}"), err=True, fg="red")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == 130:  # Typer's word for Ctrl-C
            typer.secho(redact(f"stopped; to go on: {shlex.join(['stillroom', *sys.argv[1:]])}"), err=True)
        raise
    except Exception:
        typer.secho(redact(traceback.format_exc()), err=True)
        typer.secho("this is a fault of stillroom's; what is finished is on disk, the same command goes on", err=True)
        sys.exit(1)


__all__ = ["after", "app", "before", "main", "stages"]
