"""The command line's program, what its commands share, and how they end: one line, or JSON."""

from __future__ import annotations

import gc
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillroom import __version__
from stillroom.progress import ProgressBars

if TYPE_CHECKING:
    from stillroom.experiment.workspace import Workspace

app = typer.Typer(
    name="stillroom",
    help="Measure how much each signal of a large language model (its predictions, hidden states and attention) "
    "improves a small one that is distilled from it.",
    epilog="Exit codes: 0 done; 1 the doctor found something to fix, or an internal error; 2 a mistake to fix or a "
    "trial that failed (the message says which); 130 stopped with Ctrl-C. Run the same command again to resume.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BARS = ProgressBars()
"""Progress of the one command that this process runs."""

SELDOM, _USUAL = (100_000, 20, 100), gc.get_threshold()
"""How often Python looks for garbage: seldom while libraries are imported, whose million objects all stay."""

BEFORE, STAGES, AFTER = "Preparation", "Pipeline stages", "Results"
"""Headings under which `--help` lists the commands."""


def complete_study(incomplete: str) -> list[str]:
    """What a shell offers where a study is to stand: shipped names, and the YAML files and folders that begin so."""
    from glob import escape, glob

    from stillroom.studies import shipped_studies

    shipped = [name for name in shipped_studies() if name.startswith(incomplete)]
    begun = sorted(glob(f"{escape(incomplete)}*"))  # noqa: PTH207 - as typed, with its last slash or without
    files = [path for path in begun if path.endswith((".yaml", ".yml"))]
    return shipped + files + [f"{path}/" for path in begun if Path(path).is_dir()]


StudyArgument = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="a shipped study, such as quickstart, or a YAML file",
        autocompletion=complete_study,
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override any field; can be repeated")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print facts as JSON on standard output, and nothing else")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stillroom {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before the command."""


def open_workspace(study: str, overrides: list[str] | None) -> Workspace:
    """The study's stages, with progress shown."""
    from stillroom.experiment.workspace import Workspace
    from stillroom.studies import load_study

    collect_as_usual()
    return Workspace(load_study(study, overrides or []), BARS)


def collect_as_usual() -> None:
    """Look for garbage often, from now on: it may hold a model's memory."""
    gc.set_threshold(*_USUAL)


def say(text: str) -> None:
    """A line on standard output; brackets in it are no markup, and no break is put into what may be copied."""
    from rich import get_console

    BARS.close()
    get_console().print(text, markup=False, soft_wrap=True)


def following(stage: str, study: str, overrides: list[str] | None, *more: str) -> str:
    """The command of another stage of the study, with what was set for this one."""
    settings = (part for override in overrides or () for part in ("--set", override))
    return shlex.join(["stillroom", stage, study, *settings, *more])


def finish(as_json: bool, facts: dict[str, Any], made: str, then: str) -> None:
    """How a command ends: its facts for a machine, or what was made and what to do next."""
    BARS.close()
    if as_json:
        typer.echo(json.dumps(facts, indent=2, default=str, ensure_ascii=False))
    else:
        say(f"{made} Next: {then}".strip())


def warn(text: str) -> None:
    """A line on standard error, where it does not get into JSON."""
    BARS.close()
    typer.secho(f"warning: {text}", err=True, fg="yellow")
