"""Commands that do a study's work: one a stage, and `run` for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillroom.cli.options import (
    BARS,
    STAGES,
    JsonOption,
    SetOption,
    StudyArgument,
    app,
    complete_study,
    finish,
    following,
    open_workspace,
    say,
    warn,
)

if TYPE_CHECKING:
    from stillroom.experiment.workspace import Workspace


@app.command(rich_help_panel=STAGES)
def run(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Run every stage in order; resumes after an interruption.

    Example: stillroom run quickstart
    """
    workspace = open_workspace(study, set_)
    workspace.tracker.check()  # before hours are spent, not after
    _tell_unusable(workspace)
    workspace.fine_tune()
    _tell_baselines(workspace.baselines(), json)
    workspace.capture()
    _tell_unchecked(workspace.verify())
    workspace.archive()
    errors = workspace.sweep()
    if len(errors) < len(workspace.study.groups) * len(workspace.study.sweep.seeds):  # else there is nothing to report
        workspace.report()
        _finish_report(workspace.results, json, errors)
    _fail_on(errors)


@app.command("fine-tune", rich_help_panel=STAGES)
def fine_tune(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Fine-tune the teacher on the training split, if the study says so.

    Example: stillroom fine-tune small
    """
    model = open_workspace(study, set_).fine_tune().model
    finish(json, {"teacher": model}, f"Teacher: {model}.", following("evaluate", study, set_))


@app.command(rich_help_panel=STAGES)
def evaluate(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Measure the teacher and the student before training on the validation split.

    Example: stillroom evaluate small
    """
    workspace = open_workspace(study, set_)
    _tell_unusable(workspace)
    measured = workspace.baselines()
    _tell_baselines(measured, json)
    made = f"Results are in {workspace.results / 'baselines'}."
    finish(json, measured, made, following("capture", study, set_))


@app.command(rich_help_panel=STAGES)
def capture(
    study: StudyArgument,
    set_: SetOption = None,
    slice_: Annotated[
        str | None, typer.Option("--slice", metavar="I/N", help="capture slice I of N, in this process")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray workers that share the work; 0: this process does it alone")
    ] = 0,
    json: JsonOption = False,
) -> None:
    """Run the teacher once over the corpus and store its signals; resumes after an interruption.

    Example: stillroom capture small --slice 1/2
    """
    from stillroom.errors import UserError
    from stillroom.offline_teacher_data.shards import Slice

    if slice_ and workers:
        raise UserError("--slice and --workers: give one of them; workers divide the store among themselves")
    workspace = open_workspace(study, set_)
    _tell_unusable(workspace)
    store = workspace.capture(Slice.parse(slice_) if slice_ else None, workers)
    facts: dict[str, Any]
    if store is None:
        facts = {"store": workspace.store_path, "slice": slice_, "finished": False}
        made = f"{workspace.store_path}: slice {slice_} is captured; the last slice to finish completes the store."
        return finish(json, facts, made, f"the other slices, or {following('capture', study, set_)}")
    facts = {"store": store.path, "examples": len(store)}
    return finish(json, facts, f"{store.path}: signals of {len(store)} examples.", following("verify", study, set_))


@app.command("import", rich_help_panel=STAGES)
def import_(
    study: StudyArgument,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="FILES", help="JSON Lines with prompt_logprobs of every example")
    ] = None,
    requests: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write what the teacher has to read, as token ids")
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Fill the store with log-probabilities captured elsewhere, such as by a vLLM server, instead of `capture`.

    Example: stillroom import study.yaml answers.jsonl
    """
    from stillroom.errors import UserError
    from stillroom.offline_teacher_data import write_requests

    if bool(files) == bool(requests):
        raise UserError("give the FILES to import, or --requests FILE to write what the teacher has to read")
    workspace = open_workspace(study, set_)
    _tell_unusable(workspace)
    if requests:
        workspace.require_aligned()
        write_requests(workspace.tokenizers[0], workspace.examples.all, requests)
        facts: dict[str, Any] = {"requests": requests, "examples": len(workspace.examples.all)}
        then = f"capture their prompt_logprobs, then {following('import', study, set_)} FILES"
        return finish(json, facts, f"{requests}: {facts['examples']} examples.", then)
    store = workspace.import_signals(files or [])
    facts = {"store": store.path, "examples": len(store)}
    made = f"{store.path}: log-probabilities of {len(store)} examples."
    return finish(json, facts, made, following("verify", study, set_))


@app.command(rich_help_panel=STAGES)
def verify(
    study: StudyArgument,
    set_: SetOption = None,
    samples: Annotated[int, typer.Option(min=1, help="rows to rebuild and check")] = 20,
    recompute: Annotated[int, typer.Option(min=0, help="rows to compare with a new forward pass of the teacher")] = 0,
    json: JsonOption = False,
) -> None:
    """Check the store before training: checksums of every shard, values of sampled rows.

    Example: stillroom verify small --samples 50 --recompute 20
    """
    workspace = open_workspace(study, set_)
    record = workspace.verify(samples, recompute)
    _tell_unchecked(record)
    measured = {
        "recomputed": "recomputed, largest difference",
        "with_output_head": "with output head, largest difference",
        "full_support": "full support, KL from the teacher's own distribution in nats per token",
    }
    for how, what in measured.items():
        if (errors := record.get(how)) and not json:
            say(f"{what}: {', '.join(f'{name} {error:.2g}' for name, error in errors.items())}")
    made = f"{record['store']}: {record['sampled']} of {record['examples']} examples checked, all shards whole."
    finish(json, record, made, following("archive", study, set_))


@app.command(rich_help_panel=STAGES)
def archive(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Make the verified store a read-only, dated snapshot, which the trials read.

    Example: stillroom archive small
    """
    workspace = open_workspace(study, set_)
    workspace.tracker.check()
    path = workspace.archive()
    finish(json, {"snapshot": path}, f"{path}.", following("sweep", study, set_))


@app.command(rich_help_panel=STAGES)
def sweep(study: StudyArgument, set_: SetOption = None, json: JsonOption = False) -> None:
    """Run the trials that are missing and write results_summary.csv.

    Example: stillroom sweep small
    """
    workspace = open_workspace(study, set_)
    errors = workspace.sweep()
    summary = workspace.folder.summary
    finish(json, {"summary": summary, "failed": errors}, f"{summary}.", following("report", study, set_))
    _fail_on(errors)


@app.command(rich_help_panel=STAGES)
def train(
    study: StudyArgument,
    group: Annotated[str, typer.Option(help="the trial's group")],
    seed: Annotated[int, typer.Option(help="the trial's seed")],
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Train one trial in this process, without Ray.

    Example: stillroom train small --group hidden --seed 0
    """
    from stillroom.evaluation.metrics import by_key

    workspace = open_workspace(study, set_)
    workspace.tracker.check()
    result = workspace.train_one(group, seed)
    made = f"{result['trial']}: accuracy {by_key(result['metrics'])['validation', None, 'accuracy']:.3f}."
    finish(json, result, made, following("report", study, set_))


@app.command(rich_help_panel=STAGES)
def report(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY|FOLDER", help="a study, or a results folder alone", autocompletion=complete_study
        ),
    ],
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Write report.html with its figures and tables, and print the answers.

    Example: stillroom report small
    """
    from stillroom.analysis.report import write_report
    from stillroom.errors import UserError
    from stillroom.experiment.reporting import as_planned, report_planned
    from stillroom.folders import ResultsFolder
    from stillroom.studies import load_study

    folder = Path(study)
    if ResultsFolder(folder).planned.is_file():
        if set_:
            raise UserError(f"--set changes a study; {folder} is a results folder, reported as it was planned")
        write_report(folder)
    elif (planned := as_planned(load_study(study, set_ or []))) is not None:  # then nothing of it needs PyTorch
        folder = report_planned(planned).parent
    else:
        workspace = open_workspace(study, set_)
        workspace.report()
        folder = workspace.results
    _finish_report(folder, json, {})


def _finish_report(folder: Path, as_json: bool, errors: dict[str, str]) -> None:
    from stillroom.cli.printing import print_answers
    from stillroom.folders import ResultsFolder

    path = ResultsFolder(folder).report
    BARS.close()
    if not as_json:
        print_answers(folder)
    facts = {"report": path, "summary": ResultsFolder(folder).summary, "failed": errors}
    finish(as_json, facts, f"Report: {path}.", "open it in a browser")


def _tell_baselines(baselines: dict[str, Any], as_json: bool) -> None:
    from stillroom.config import BASELINE_LABELS
    from stillroom.evaluation.metrics import by_key

    for name, label in BASELINE_LABELS.items():
        if not as_json and name in baselines:
            say(f"{label}: accuracy {by_key(baselines[name]['metrics'])['validation', None, 'accuracy']:.3f}")
    for task in baselines["teacher_no_better"]["tasks"]:
        warn(f"on {task} the teacher is no better than the student before training; expect no gain there")


def _tell_unusable(workspace: Workspace) -> None:
    """Rows of the study's data that were left out, with the first of each task: the user may not know of them."""
    examples = workspace.examples
    for counts, faults in (
        (examples.counts, examples.faults),
        (examples.test_counts, examples.test_faults),
    ):
        for task, fault in faults.items():
            many = f"{counts[task]['unusable']} of {counts[task]['source_rows']} rows cannot be used and are left out"
            warn(f"{task}: {many}; the first is {fault}")


def _tell_unchecked(record: dict[str, Any]) -> None:
    if "not_checked" in record:
        warn(f"not checked: {record['not_checked']}; `stillroom verify --recompute 20` runs the teacher instead")


def _fail_on(errors: dict[str, str]) -> None:
    from stillroom.errors import UserError

    if errors:
        lines = [f"  {name}: {message}" for name, message in errors.items()]
        raise UserError("\n".join(["trials failed; run the same command again to retry them:", *lines]))
