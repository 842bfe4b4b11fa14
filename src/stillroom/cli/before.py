"""Commands that cost nothing: the plan and the doctor's checks."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from stillroom.cli.options import (
    BARS,
    BEFORE,
    JsonOption,
    SetOption,
    StudyArgument,
    app,
    collect_as_usual,
    finish,
    following,
    say,
    warn,
)


@app.command(rich_help_panel=BEFORE)
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="a file of rows: .jsonl, .json, .csv, .tsv or .parquet")],
    teacher: Annotated[str, typer.Option(metavar="MODEL", help="directory or hub id")],
    student: Annotated[str, typer.Option(metavar="MODEL", help="directory or hub id")],
    study: Annotated[Path, typer.Option(metavar="FILE.yaml", help="file to write")] = Path("study.yaml"),
    json: JsonOption = False,
) -> None:
    """Write a first study for your rows and models; guess which columns ask and answer, and say what was guessed.

    Example: stillroom init rows.csv --teacher models/teacher --student models/student
    """
    from stillroom.preflight.starting import write_study

    start = write_study(data, teacher, student, study)
    if not json:
        for guess in start.guesses:
            say(f"Guessed: {guess}.")
    finish(json, start.__dict__, f"{start.path}.", f"read it, then {following('plan', str(start.path), None)}")


@app.command(rich_help_panel=BEFORE)
def fields(
    section: Annotated[
        str, typer.Argument(metavar="[SECTION]", help="such as training, corpus.tasks or sweep.seeds")
    ] = "",
    json: JsonOption = False,
) -> None:
    """List what a study file can say: every field of a section with its type, default and meaning.

    Example: stillroom fields training
    """
    from stillroom.cli.printing import print_fields
    from stillroom.studies.fields import fields_of

    found = fields_of(section)
    if json:
        typer.echo(json_format.dumps(found, indent=2, ensure_ascii=False))
    else:
        print_fields(found)


@app.command(rich_help_panel=BEFORE)
def plan(
    study: StudyArgument,
    measure: Annotated[
        bool, typer.Option("--measure", help="time a few pieces of each stage on this machine; needs the weights")
    ] = False,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Estimate what a study will cost (bytes, steps, hours), and what it can find out. Needs no weights.

    Example: stillroom plan paper
    """
    from stillroom.cli.printing import print_plan
    from stillroom.preflight.planning import plan_study
    from stillroom.studies import load_study

    loaded = load_study(study, set_ or [])
    planned = plan_study(loaded, guess_this_cpu=not measure)
    if measure:
        from stillroom.preflight.measuring import measure_study

        collect_as_usual()
        planned["measured"] = measure_study(loaded, BARS)
    for text in (*planned["warnings"], *planned["design"]["warnings"]):
        warn(text)
    print_plan(planned, as_json=json)
    if not json:
        say(f"Next: {following('doctor', study, set_)}")


@app.command(rich_help_panel=BEFORE)
def doctor(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Check that this machine can run a study, before hours are spent; exit code 1 if there is something to fix.

    Example: stillroom doctor paper
    """
    from stillroom.cli.printing import print_findings
    from stillroom.preflight.doctor import examine
    from stillroom.studies import load_study

    findings = examine(load_study(study, set_ or []))
    fine = all(finding.fine for finding in findings)
    if json:
        typer.echo(json_format.dumps([finding.__dict__ for finding in findings], indent=2, ensure_ascii=False))
    else:
        print_findings(findings)
        ready = f"Ready. Next: {following('run', study, set_)}"
        say(ready if fine else "Next: fix the items marked todo")
    if not fine:
        raise typer.Exit(1)
