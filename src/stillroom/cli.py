"""The command line: one command a stage, no logic."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stillroom.stages import Workspace

app = typer.Typer(
    name="stillroom",
    help="Measure what each signal of a large language model is worth when a small one is distilled from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="quickstart, small, paper, or a YAML file")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override any field; repeat as needed")
]


def _workspace(study: str, overrides: list[str] | None) -> Workspace:
    from stillroom.progress import ProgressBars
    from stillroom.stages import Workspace
    from stillroom.studies import load_study

    return Workspace(load_study(study, overrides or []), ProgressBars())


def _say(text: str) -> None:
    from rich import print as rich_print
    from rich.markup import escape

    rich_print(escape(text))


@app.command()
def plan(study: StudyArgument, set_: SetOption = None, json: bool = typer.Option(False, help="print JSON")) -> None:
    """What a study will cost: examples, tokens, bytes, steps. Needs no weights.

    Example: stillroom plan paper
    """
    from stillroom.planning import plan_study, print_plan
    from stillroom.studies import load_study

    print_plan(plan_study(load_study(study, set_ or [])), as_json=json)


@app.command()
def doctor(study: StudyArgument, set_: SetOption = None) -> None:
    """Check this machine against a study before hours are spent.

    Example: stillroom doctor paper
    """
    from stillroom.doctor import examine, print_findings
    from stillroom.studies import load_study

    if not print_findings(examine(load_study(study, set_ or []))):
        raise typer.Exit(1)


@app.command()
def adapt(study: StudyArgument, set_: SetOption = None) -> None:
    """Fine-tune the teacher on the training part, if the study says so.

    Example: stillroom adapt small
    """
    workspace = _workspace(study, set_)
    _say(f"teacher: {workspace.adapt().model}. Next: stillroom capture {study}")


@app.command()
def capture(study: StudyArgument, set_: SetOption = None) -> None:
    """Run the teacher once over the corpus and store its signals; goes on where it stopped.

    Example: stillroom capture small
    """
    workspace = _workspace(study, set_)
    store = workspace.capture()
    _say(f"{store.path}: signals of {len(store)} examples. Next: stillroom verify {study}")


@app.command()
def verify(
    study: StudyArgument,
    set_: SetOption = None,
    samples: int = typer.Option(20, min=1, help="rows to rebuild and check"),
    recompute: int = typer.Option(0, min=0, help="rows to compare with a new forward pass of the teacher"),
) -> None:
    """The gate before training: checksums of every shard, values of sampled rows.

    Example: stillroom verify small --samples 50 --recompute 20
    """
    workspace = _workspace(study, set_)
    record = workspace.verify(samples, recompute)
    _say(f"{workspace.store_path}: {record['sampled']} of {record['examples']} examples checked, all shards whole.")
    for how in ("recomputed", "with_output_head"):
        if errors := record.get(how):
            listed = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
            _say(f"{how.replace('_', ' ')}, largest difference: {listed}")
    _say(f"Next: stillroom archive {study}")


@app.command()
def archive(study: StudyArgument, set_: SetOption = None) -> None:
    """Keep the verified store as a read-only, dated snapshot, which trials read.

    Example: stillroom archive small
    """
    _say(f"{_workspace(study, set_).archive()}. Next: stillroom sweep {study}")


@app.command()
def train(
    study: StudyArgument,
    group: Annotated[str, typer.Option(help="the trial's group")],
    seed: Annotated[int, typer.Option(help="the trial's seed")],
    set_: SetOption = None,
) -> None:
    """Train one trial in this process, without Ray.

    Example: stillroom train small --group hidden --seed 0
    """
    workspace = _workspace(study, set_)
    result = workspace.train_one(group, seed)
    _say(f"{result['trial']}: accuracy {result['validation_accuracy']:.3f}. Next: stillroom report {study}")


@app.command()
def sweep(study: StudyArgument, set_: SetOption = None) -> None:
    """Run the trials that are missing on Ray Tune and write results_summary.csv.

    Example: stillroom sweep small
    """
    workspace = _workspace(study, set_)
    _fail_on(workspace.sweep())
    _say(f"{workspace.results / 'results_summary.csv'}. Next: stillroom report {study}")


@app.command()
def evaluate(study: StudyArgument, set_: SetOption = None) -> None:
    """Measure the teacher and the untouched student on the validation part.

    Example: stillroom evaluate small
    """
    _warn(_workspace(study, set_).baselines())


@app.command()
def report(study: StudyArgument, set_: SetOption = None) -> None:
    """Write report.html and print the table.

    Example: stillroom report small
    """
    from stillroom.analysis.report import print_table

    workspace = _workspace(study, set_)
    path = workspace.report()
    print_table(workspace.results)
    _say(f"{path}")


@app.command()
def run(study: StudyArgument, set_: SetOption = None) -> None:
    """Every stage in order; goes on where it stopped.

    Example: stillroom run quickstart
    """
    from stillroom.analysis.report import print_table

    workspace = _workspace(study, set_)
    workspace.adapt()
    _warn(workspace.baselines())
    workspace.capture()
    workspace.verify()
    workspace.archive()
    errors = workspace.sweep()
    path = workspace.report()
    print_table(workspace.results)
    _say(f"Report: {path}")
    _fail_on(errors)


def _warn(baselines: dict[str, Any]) -> None:
    for name in ("teacher", "student"):
        metrics = baselines[name]["metrics"]
        label = "teacher" if name == "teacher" else "untouched student"
        _say(f"{label}: accuracy {metrics['validation_accuracy']:.3f}")
    for task in baselines["teacher_no_better"]["tasks"]:
        _say(f"warning: on {task} the teacher is no better than the untouched student: it has nothing to give there")


def _fail_on(errors: dict[str, str]) -> None:
    from stillroom.config import UserError

    if errors:
        lines = [f"  {name}: {message}" for name, message in errors.items()]
        raise UserError("\n".join(["trials failed; run the same command again to retry them:", *lines]))


def main() -> None:
    """Entry point: a user's mistake ends with one message and exit code 2, Ctrl-C with 130."""
    from stillroom.config import UserError

    warnings.simplefilter("ignore", FutureWarning)  # other packages' notices to their own developers
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
    except KeyboardInterrupt:
        typer.secho(f"stopped; to go on: {' '.join(['stillroom', *sys.argv[1:]])}", err=True)
        sys.exit(130)


__all__ = ["app", "main"]
