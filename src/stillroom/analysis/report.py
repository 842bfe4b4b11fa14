"""The report: an HTML page and a terminal table, from the results folder alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from stillroom.analysis.evidence import Evidence
from stillroom.analysis.figures import inline_panels, page_colour, save_figure, study_figures
from stillroom.analysis.frame import group_table, worse_or_equal
from stillroom.analysis.numbers import decimal, duration, listed, percent
from stillroom.analysis.paper import distinct_findings, study_tables, write_paper
from stillroom.analysis.questions import recipes
from stillroom.analysis.results import StudyResults
from stillroom.analysis.samples import sample_seed, samples_of
from stillroom.analysis.tables import (
    contrast_table,
    cost_table,
    harness_table,
    kind_table,
    stage_table,
    summaries,
    trial_table,
)
from stillroom.analysis.verdicts import Answer, answer_questions, what_it_takes
from stillroom.config import TERMS, WEAK_SIGNAL
from stillroom.evaluation.metrics import Key, by_key
from stillroom.files import write_text
from stillroom.folders import ResultsFolder

SELDOM_ALIGNED = 0.5
"""A kind of text of whose predictions fewer are aligned is remarked upon."""


def answers_of(results: StudyResults, bootstrap: bool = True) -> list[Answer]:
    """The questions' answers from a results folder; the bootstrap reads every trial's predictions."""
    return answer_questions(evidence_of(results, bootstrap))


def evidence_of(results: StudyResults, bootstrap: bool = True) -> Evidence:
    """What the verdicts are made from; with `bootstrap` every trial's predictions, too."""
    seeds, student = results.study["sweep"]["seeds"], results.labels["student"]
    accuracies, predictions = dict(results.accuracies), dict(results.predictions) if bootstrap else {}
    if measured := by_key(results.baseline_metrics.get(student, [])):
        for name, key in results.accuracy_keys.items():
            accuracies[name] = accuracies[name] | {(student, seed): measured[key] for seed in seeds}
    if bootstrap and student in results.baseline_predictions:
        predictions |= {(student, seed): results.baseline_predictions[student] for seed in seeds}
    return Evidence(
        accuracies=accuracies,
        analysis=results.analysis,
        seeds=seeds,
        groups=recipes(results.study),
        predictions=predictions,
        student=student if measured else None,
        identical=results.identical,
    )


def gradient_rows(results: StudyResults) -> list[dict[str, Any]]:
    """By group: each term's mean share of the gradient, and which added terms stayed under `WEAK_SIGNAL`."""
    rows = []
    for group in results.groups:
        trials = results.frame[results.frame["config/distill_type"] == group]
        columns = {term: f"gradient_share_{term}" for term in TERMS}
        shares = {
            term: float(trials[column].mean())
            for term, column in columns.items()
            if column in trials and trials[column].notna().any()
        }
        weak = [term for term, share in shares.items() if term != "task" and share < WEAK_SIGNAL]
        rows.append({"group": group, "shares": shares, "weak": weak})
    return rows


def errors_of(results: StudyResults) -> list[str]:
    """What makes numbers worthless, each a sentence: groups that were to differ and are the same."""
    return [
        f"The trials of {first} and {second} are identical at every epoch (seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}), though "
        "their objectives differ: the term that tells these groups apart never took effect. No number here compares "
        "them. Check that the teacher's data reach that term, then train both groups again."
        for (first, second), seeds in results.identical.items()
    ]


def warnings_of(results: StudyResults, evidence: Evidence) -> list[str]:
    """What a reader must know beside the answers, each a sentence."""
    found = []
    if results.missing:
        names = ", ".join(f"{trial['group']} seed {trial['seed']}" for trial in results.missing)
        found.append(
            f"Incomplete: {len(results.missing)} of {len(results.trials)} trials "
            f"{'is' if len(results.missing) == 1 else 'are'} missing ({names}). "
            "No mean here is final."
        )
    if results.stale:
        found.append(
            f"What was measured of the {' and the '.join(results.stale)} belongs to another study and is left out: "
            "`stillroom run STUDY` measures what is missing."
        )
    if results.other_corpus:
        found.append(
            "The examples in this folder belong to another study, so they are not the ones that these trials saw. "
            "`stillroom run STUDY` brings both to one study."
        )
    if len(results.baseline_metrics) == 2:
        teacher, student = (results.baseline_metrics[label] for label in results.labels.values())
        if tasks := worse_or_equal(teacher, student):
            found.append(
                f"The teacher does not outperform the student before training on {listed(tasks)}: expect no gain "
                "from distillation there."
            )
    margin = f"{100 * evidence.analysis.equivalence_margin:g} points"
    for extreme, place in (("floor", "above 0 %"), ("ceiling", "below 100 %")):
        if tasks := [task for task in evidence.tasks if evidence.saturated(task) == extreme]:
            found.append(
                f"On {listed(tasks)} no group is more than {margin} {place}: groups cannot be told apart there, "
                "whatever they learnt."
            )
    by_terms: dict[str, list[str]] = {}
    for row in gradient_rows(results):
        if row["weak"]:
            by_terms.setdefault(listed(row["weak"]), []).append(row["group"])
    for terms, groups in by_terms.items():
        found.append(
            f"The {terms} term contributed under {100 * WEAK_SIGNAL:g} % of the gradient in {listed(groups)}: such a "
            "group may differ from its baseline in name only."
        )
    for kind, counts in results.kinds.items():
        share = counts["aligned_predictions"] / counts["predictions"] if counts["predictions"] else 1.0
        if share < SELDOM_ALIGNED:
            found.append(
                f"Only {percent(share)} of the predictions of {kind} are made where teacher and student have read the "
                "same text: the teacher's predictions hardly reach them."
            )
    return found + rising_losses(results)


_RISE = 1.02
"""A loss has risen where its mean over seeds is higher by this factor after the last epoch than after the first."""


def rising_losses(results: StudyResults) -> list[str]:
    """A remark for each term whose loss on the training split was higher after the last epoch than after the first."""
    found = []
    for term in (term for term in TERMS if term != "task"):
        rows = results.history("train", f"{term}_loss")
        means = rows.groupby(["group", "epoch"])["value"].mean().unstack() if len(rows) else None
        if means is None or means.shape[1] < 2:
            continue
        risen = [
            group
            for group in results.groups
            if group in means.index and means.loc[group].iloc[-1] > _RISE * means.loc[group].iloc[0]
        ]
        if risen:
            ends = listed(
                [f"{group} ({means.loc[group].iloc[0]:.3g} to {means.loc[group].iloc[-1]:.3g})" for group in risen]
            )
            found.append(f"The {term} loss rose over training in {ends}: the student hardly learnt that signal.")
    return found


def command_with(results: StudyResults, seeds: Sequence[int]) -> str:
    """The command that this folder's trials were run by, with other seeds."""
    recorded = shlex.split(str(results.run["stages"].get("sweep", {}).get("command", "")))
    parts = (
        recorded if recorded[:2] in (["stillroom", "run"], ["stillroom", "sweep"]) else ["stillroom", "run", "STUDY"]
    )
    kept = [
        part
        for n, part in enumerate(parts)
        if not _sets_seeds(part) and not (part == "--set" and _sets_seeds((*parts, "")[n + 1]))
    ]
    return shlex.join([*kept, "--set", f"sweep.seeds=[{','.join(map(str, seeds))}]"])


def _sets_seeds(part: str) -> bool:
    return part.removeprefix("--set=").startswith("sweep.seeds=")


def integrity_rows(results: StudyResults) -> list[tuple[str, str]]:
    """What was checked, and what came of it."""
    stages = results.run["stages"]
    verified = stages.get("verify", {})
    skipped = int(results.frame.get("skipped_steps", pd.Series(dtype=float)).sum())
    weak = [f"{row['group']} ({', '.join(row['weak'])})" for row in gradient_rows(results) if row["weak"]]
    rows = [
        ("trials finished", f"{len(results.finished)} of {len(results.trials)}"),
        ("prompts found in both training and held-out data", str(results.shared_prompts)),
        ("optimizer steps skipped for gradients that were not finite", str(skipped)),
        (f"terms under {100 * WEAK_SIGNAL:g} % of the gradient", "; ".join(weak) or "none"),
        ("teacher data", f"{results.snapshot}, fingerprint {results.fingerprint}"),
    ]
    if verified.get("fingerprint") == results.fingerprint:
        rows.append(("teacher data verified", f"{verified['finished']}, {_checked(verified)}"))
    elif verified:
        rows.append(("teacher data verified", "before archiving; the latest record is for other data"))
    for task, task_coverage in results.coverage.items():
        floor = results.study["signals"]["minimum_coverage"]
        rows.append(
            (
                f"alignment on {task}",
                f"{percent(task_coverage['token_coverage'])} of tokens (floor {100 * floor:g} %), "
                f"{percent(task_coverage['prediction_coverage'])} of predictions",
            )
        )
    return rows


def _checked(record: dict[str, Any]) -> str:
    parts = [f"{record.get('sampled', 0)} of {record.get('examples', 0)} examples sampled, every shard's checksum"]
    for how in ("recomputed", "with_output_head", "full_support"):
        if errors := record.get(how):
            listed = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
            parts.append(f"largest difference {how.replace('_', ' ')}: {listed}")
    return "; ".join(parts)


def group_rows(study: dict[str, Any]) -> list[dict[str, str]]:
    """Each group's terms with their weights, and the settings of its own."""
    shared, rows = study["objective"], []
    for group in study["groups"]:
        by_term, shares = {term: group.get(term) or {} for term in group["terms"]}, group.get("share") or {}
        weights = {term: settings.get("weight", shared[term]["weight"]) for term, settings in by_term.items()}
        rows.append(
            {
                "name": group["name"],
                "terms": " + ".join(
                    f"share {shares[term]:g} of {term}" if term in shares else f"{weight:g} · {term}"
                    for term, weight in weights.items()
                ),
                "settings": ", ".join(
                    [
                        *(f"placebo {term}" for term in group.get("placebo", ())),
                        *(
                            f"{term}.{name} {value}"
                            for term, settings in by_term.items()
                            for name, value in settings.items()
                            if name != "weight"
                        ),
                    ]
                ),
            }
        )
    return rows


def settings_rows(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A study's fields by their dotted name, lists of plain values on one line."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in settings_rows(inner, f"{prefix}{key}.")]
    if isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        named = {
            inner.get("name", str(n)): {k: v for k, v in inner.items() if k != "name"} for n, inner in enumerate(value)
        }
        return settings_rows(named, prefix)
    return [(prefix[:-1], value if isinstance(value, str) else json.dumps(value))]


def write_report(folder: Path) -> Path:
    """Write `report.html`, `figures/`, `tables/` and `paper/`; returns the page's path.

    The same folder gives the same bytes. `UserError` if no trial is finished.
    """
    results = StudyResults.read(folder)
    results.read_all()
    evidence, groups = evidence_of(results), results.groups
    answers = answer_questions(evidence)
    figures = study_figures(results, evidence, distinct_findings(answers))
    for figure in figures:
        save_figure(figure, ResultsFolder(folder).figures)
    tables = study_tables(results, answers)
    write_paper(results, answers, tables)
    needed = what_it_takes(evidence, answers)
    measures = other_measures(results)
    environment = _environment()
    script = environment.get_template("report.js").render()
    page = environment.get_template("report.html.j2").render(
        results=results,
        study=results.study,
        answers=answers,
        summaries=summaries(results, evidence, answers),
        needed=needed,
        command=command_with(results, needed.seeds) if needed.seeds else "",
        contrast_tables={answer.question: contrast_table(answer.findings) for answer in answers if answer.findings},
        analysis=evidence.analysis,
        errors=errors_of(results),
        warnings=warnings_of(results, evidence),
        accuracy=group_table(results.measured, groups, results.baseline_metrics, results.accuracy_keys),
        measures=list(measures),
        others=group_table(results.measured_with_agreement, groups, results.baseline_metrics, measures),
        test=group_table(results.measured, groups, results.test_metrics, results.test_keys),
        harness=harness_table(results) if results.harness_keys else None,
        samples=samples_of(results),
        sample_seed=sample_seed(results),
        trials=trial_table(results),
        costs=cost_table(results),
        kinds=kind_table(results) if results.kinds else None,
        stages=stage_table(results.run["stages"]),
        gradients=gradient_rows(results),
        integrity=integrity_rows(results),
        group_rows=group_rows(results.study),
        settings=settings_rows({k: v for k, v in results.study.items() if k != "groups"}),
        figures={figure.name: (figure, inline_panels(figure)) for figure in figures},
        downloads=_downloads(folder, tables),
        terms=[term for term in TERMS if any(term in row["shares"] for row in gradient_rows(results))],
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_text(ResultsFolder(folder).report, page)
    return ResultsFolder(folder).report


def other_measures(results: StudyResults) -> dict[str, Key]:
    """What stands beside accuracy, where it was measured: where it is among a trial's numbers, by its label.

    All are shares but for the task loss.
    """
    keys: dict[str, Key] = {
        TASK_LOSS: ("validation", None, "task_loss"),
        "mean of tasks": ("validation", None, "accuracy_macro"),
        **{f"{task}, flexible extract": ("validation", task, "accuracy_flexible") for task in results.tasks},
        **{f"{task}, calibration error": ("validation", task, "calibration_error") for task in results.tasks},
        **{f"{task}, agreement with teacher": ("validation", task, "agreement") for task in results.tasks},
    }
    measured = {key for trial in results.measured_with_agreement for key in trial.values}
    return {label: key for label, key in keys.items() if key in measured}


TASK_LOSS = "task loss, nats per token"


def _downloads(folder: Path, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in [
        *(ResultsFolder(folder).tables / f"{name}.csv" for name in tables),
        *sorted(ResultsFolder(folder).paper.iterdir()),
    ]:
        kind = "text/csv" if path.suffix == ".csv" else "text/plain"
        count = len(tables[path.stem]) if path.suffix == ".csv" else None
        rows.append({"name": path.name, "rows": count, "bytes": path.stat().st_size, "uri": _data_uri(path, kind)})
    return rows


def _data_uri(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("stillroom.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "decimal": decimal, "duration": duration, "page_colour": page_colour}
    environment.filters["spread"] = lambda share: "" if math.isnan(share) else f"±\u00a0{100 * share:.1f}"
    return environment
