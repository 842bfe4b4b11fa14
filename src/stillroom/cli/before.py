"""Commands that cost nothing: the plan and the doctor's checks."""

from __future__ import annotations

import json as json_format

import typer

from stillroom.cli.options import BEFORE, JsonOption, SetOption, StudyArgument, app, following, say, warn


@app.command(rich_help_panel=BEFORE)
def plan(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Estimate what a study will cost (bytes, steps, hours), and what it can find out. Needs no weights.

    Example: stillroom plan paper
    """
    from stillroom.cli.printing import print_plan
    from stillroom.preflight.planning import plan_study
    from stillroom.studies import load_study

    planned = plan_study(load_study(study, set_ or []))
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
        say(ready if fine else "Next: fix what the lines marked todo name")
    if not fine:
        raise typer.Exit(1)
