"""The command line: one command a stage, no logic."""

from __future__ import annotations

import sys
import warnings

import typer

from stillroom.cli import after, before, stages  # each registers its commands
from stillroom.cli.options import app


def main() -> None:
    """Entry point: a user's mistake ends with one message and exit code 2, Ctrl-C with 130."""
    from stillroom.config import UserError

    warnings.simplefilter("ignore", FutureWarning)  # other packages' notices to their own developers
    warnings.filterwarnings("ignore", message="Glyph")  # a letter of a text that the picture's font has not
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho(f"stopped; to go on: {' '.join(['stillroom', *sys.argv[1:]])}", err=True)
        sys.exit(130)


__all__ = ["after", "app", "before", "main", "stages"]
