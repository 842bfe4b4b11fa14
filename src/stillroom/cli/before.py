"""Commands that cost nothing: the plan and the doctor."""

from __future__ import annotations

import json as json_format

import typer

from stillroom.cli.options import BEFORE, JsonOption, SetOption, StudyArgument, app, say


@app.command(rich_help_panel=BEFORE)
def plan(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """What a study will cost: examples, tokens, bytes, steps. Needs no weights.

    Example: stillroom plan paper
    """
    from stillroom.preflight.planning import plan_study, print_plan
    from stillroom.studies import load_study

    print_plan(plan_study(load_study(study, set_ or [])), as_json=json)
    if not json:
        say(f"Nothing was made. Next: stillroom doctor {study}")


@app.command(rich_help_panel=BEFORE)
def doctor(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Check this machine against a study before hours are spent; exit code 1 if there is something to do.

    Example: stillroom doctor paper
    """
    from stillroom.preflight.doctor import examine, print_findings
    from stillroom.studies import load_study

    findings = examine(load_study(study, set_ or []))
    fine = all(finding.fine for finding in findings)
    if json:
        typer.echo(json_format.dumps([finding.__dict__ for finding in findings], indent=2, ensure_ascii=False))
    else:
        print_findings(findings)
        say(f"All is well. Next: stillroom run {study}" if fine else "Next: see to the lines marked todo")
    if not fine:
        raise typer.Exit(1)
