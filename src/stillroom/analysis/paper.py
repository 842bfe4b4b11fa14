"""For the paper: tidy CSVs, LaTeX tables (booktabs), and the facts that the NeurIPS checklist asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from stillroom.analysis.escaping import latex_escaped
from stillroom.analysis.evidence import Finding
from stillroom.analysis.frame import group_table
from stillroom.analysis.results import StudyResults
from stillroom.analysis.verdicts import Answer
from stillroom.files import atomic_path, write_text
from stillroom.folders import ResultsFolder


def accuracy_rows(results: StudyResults) -> pd.DataFrame:
    """Tidy: group, seed, task, examples, correct, accuracy; from the predictions alone. Baselines have no seed."""
    parts = [(group, str(seed), predictions) for (group, seed), predictions in results.predictions.items()]
    parts += [(label, "", predictions) for label, predictions in results.baseline_predictions.items()]
    rows = []
    for group, seed, predictions in parts:
        for task, part in [
            (results.overall, predictions),
            *((task, predictions[predictions["task"] == task]) for task in results.tasks),
        ]:
            right = int(part["correct"].sum())
            share = right / len(part)
            rows.append(
                {
                    "group": group,
                    "seed": seed,
                    "task": task,
                    "examples": len(part),
                    "correct": right,
                    "accuracy": share,
                }
            )
    return pd.DataFrame(rows)


def distinct_findings(answers: Sequence[Answer]) -> list[Finding]:
    """Every finding once, in the order of the questions; the hypothesis repeats those of the fourth."""
    seen = {(f.comparison.first, f.comparison.second, f.comparison.measure): f for a in answers for f in a.findings}
    return list(seen.values())


def comparison_rows(answers: Sequence[Answer]) -> pd.DataFrame:
    """Tidy: a row a contrast and measure, all that is known of it; differences as shares of accuracy."""
    rows = []
    for finding in distinct_findings(answers):
        low, high = finding.bootstrap
        more = {"equivalence_p": finding.equivalence, "bootstrap_low": low, "bootstrap_high": high}
        rows.append({**asdict(finding.comparison), **more, "verdict": finding.verdict})
    return pd.DataFrame(rows)


def coverage_rows(results: StudyResults) -> pd.DataFrame:
    """A row per task: the counts and shares of the alignment."""
    return pd.DataFrame([{"task": task, **task_coverage} for task, task_coverage in results.coverage.items()])


def study_tables(results: StudyResults, answers: Sequence[Answer]) -> dict[str, pd.DataFrame]:
    """The raw tables by file name, each tidy: a row an observation."""
    tables = {
        "results_summary": results.frame,
        "accuracy": accuracy_rows(results),
        "comparisons": comparison_rows(answers),
        "epochs": results.epochs.drop(columns=["split", "task", "measure"]),
        "gradients": results.gradients,
        "coverage": coverage_rows(results),
        "costs": results.costs,
    }
    return {name: table for name, table in tables.items() if len(table)}


def latex_table(caption: str, label: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs table: the first column left, the others right; cells are LaTeX already."""
    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        rf"  \caption{{{caption}}}",
        rf"  \label{{{label}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
        r"    \toprule",
        f"    {' & '.join(headings)} \\\\",
        r"    \midrule",
        *(f"    {' & '.join(row)} \\\\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def accuracy_latex(results: StudyResults) -> str:
    """Accuracy by group and task, mean ± standard deviation over seeds, in percent."""
    rows = []
    for row in group_table(results.measured, results.groups, results.baseline_metrics, results.accuracy_keys):
        cells = [_mean_and_spread(cell.mean, cell.std) for cell in row.cells.values()]
        rows.append([latex_escaped(row.name), str(row.seeds) if row.name in results.groups else "--", *cells])
    headings = ["Group", "Seeds", results.overall.capitalize(), *(latex_escaped(task) for task in results.tasks)]
    tuned = results.study["teacher"]["fine_tune"]["method"] != "none"
    teacher = "the teacher, fine-tuned on the training split" if tuned else "the teacher, as it was published"
    caption = (
        f"Validation accuracy (\\%), mean $\\pm$ standard deviation over seeds. Baselines: {teacher}, and the student "
        f"before training.{_incomplete(results)}"
    )
    return latex_table(caption, "tab:accuracy", headings, rows)


def _mean_and_spread(mean: float, spread: float) -> str:
    if not math.isfinite(mean):
        return "--"
    return f"{100 * mean:.1f}" + (f" $\\pm$ {100 * spread:.1f}" if math.isfinite(spread) else "")


def comparison_latex(results: StudyResults, answers: Sequence[Answer]) -> str:
    """A table a question: difference, interval, exact p, adjusted p, effect size, verdict of each contrast."""
    tables, shown = [], set[tuple[str, str, str]]()
    level = f"{100 * (1 - results.study['analysis']['alpha']):g}"
    interval = f"{level}\\,\\% interval"
    headings = ["Contrast", "On", "$\\Delta$", interval, "$p$", "$p_{\\mathrm{Holm}}$", "$d_z$", "Verdict"]
    for number, answer in enumerate(answers, 1):
        rows = []
        for finding in answer.findings:
            row = finding.comparison
            key = (row.first, row.second, row.measure)
            if key in shown:
                continue
            shown.add(key)
            rows.append(
                [
                    f"{latex_escaped(row.first)} $-$ {latex_escaped(row.second)}",
                    latex_escaped(row.measure),
                    _signed(row.difference),
                    f"[{_signed(row.low)}, {_signed(row.high)}]" if math.isfinite(row.low) else "--",
                    *(_probability(p) for p in (row.p, row.adjusted_p)),
                    f"${row.effect_size:.2f}$" if math.isfinite(row.effect_size) else "--",
                    latex_escaped(finding.verdict),
                ]
            )
        if rows:
            seeds = sorted({finding.comparison.seeds for finding in answer.findings})
            caption = (
                f"{latex_escaped(answer.question)} Paired differences of validation accuracy in percentage points at "
                f"the same seed ({', '.join(map(str, seeds))} seeds), Student's $t$ interval; exact sign-flip test, "
                f"Holm-adjusted over its family of contrasts.{_incomplete(results)}"
            )
            tables.append(latex_table(caption, f"tab:contrasts-{number}", headings, rows))
    return "\n".join(tables)


def _probability(p: float) -> str:
    if not math.isfinite(p):
        return "--"
    return f"{p:.3f}" if p >= 0.0005 else "$<$0.001"


def _signed(difference: float) -> str:
    """In points, in math mode, where a hyphen is a minus sign."""
    return f"${100 * difference:+z.1f}$" if math.isfinite(difference) else "--"


def _incomplete(results: StudyResults) -> str:
    if not (absent := len(results.missing)):
        return ""
    return f" Incomplete: {absent} {'trial is' if absent == 1 else 'trials are'} missing."


def checklist(results: StudyResults) -> str:
    """The facts that the NeurIPS paper checklist asks for, as Markdown; what only authors know is left to them."""
    study, stages = results.study, results.run["stages"]
    latest = max(stages.values(), key=lambda stage: str(stage["finished"]))
    models = [f"- {role}: `{_pinned(study[role])}`" for role in ("teacher", "student")]
    data = [
        f"- {name}: `{task_data['dataset']}`, split `{task_data['split']}`, "
        f"revision `{task_data['revision'] or 'none given'}`, " + _drawn(results, name)
        for name, task_data in study["corpus"]["tasks"].items()
    ]
    hours = (results.costs["train_seconds"].sum() + results.costs["evaluation_seconds"].sum()) / 3600
    gpus = ", ".join(latest["hardware"]["gpus"]) or "none"
    state = f"{len(results.finished)} of {len(results.trials)} planned trials are finished"
    lines = [
        "# Facts for the NeurIPS paper checklist",
        "",
        "Generated from the results folder. Licences, broader impact and limits of scope are for the authors to state.",
        "",
        "## Claims and limits",
        f"- {state}; {len(study['sweep']['seeds'])} seeds a group; every contrast was declared in the study file, "
        "or is asked of every study (black box against labels alone, each group against the student before training).",
        "- Verdicts follow from the numbers by declared rules; no difference is read as equality without TOST.",
        "## Experimental setting",
        *models,
        *data,
        f"- split: {100 * study['corpus']['validation_share']:g} % held out by example id, split seed "
        f"{study['corpus']['split_seed']}; at most {study['corpus']['max_length']} tokens under either tokenizer",
        *(f"- training.{name}: {value}" for name, value in study["training"].items()),
        "## Statistical significance",
        "- error bars: standard deviation over seeds in tables, Student's t intervals over seeds in figures, at "
        f"{100 * (1 - study['analysis']['alpha']):g} %; a bootstrap over seeds and examples together beside them",
        "- test: exact paired sign-flip, Holm-adjusted over each family; effect size d_z; smallest reachable p given",
        "- sources of variation held fixed within a seed: initial weights, projector, order of batches, dropout",
        "## Compute",
        f"- hardware: {latest['hardware']['cores']} cores, accelerators: {gpus}",
        f"- trials took {hours:.2f} hours of wall clock in total (training and evaluation)",
        "## Reproducibility",
        f"- code: commit `{latest['commit'] or 'not a checkout'}`; versions in `run.json`",
        f"- teacher data: `{results.snapshot}`, validated before training and read-only",
        "- per-example predictions of every trial are kept; every figure can be recomputed from them",
    ]
    return "\n".join(lines) + "\n"


def _drawn(results: StudyResults, task: str) -> str:
    if results.other_corpus:
        asked = results.study["corpus"]["tasks"][task]["examples"]
        return f"{asked} examples asked for; those in this folder are another study's"
    counts = results.corpus[task]
    return f"{counts['train']} training and {counts['validation']} validation examples"


def _pinned(model: dict[str, Any]) -> str:
    return str(model["model"]) + (f"@{model['revision']}" if model["revision"] else "")


def write_paper(results: StudyResults, answers: Sequence[Answer], tables: dict[str, pd.DataFrame]) -> None:
    """Write `tables/*.csv` (those of `study_tables`) and `paper/` into the results folder."""
    for name, table in tables.items():
        with atomic_path(ResultsFolder(results.folder).tables / f"{name}.csv") as path:
            table.to_csv(path, index=False)
    write_text(ResultsFolder(results.folder).paper / "accuracy.tex", accuracy_latex(results))
    write_text(ResultsFolder(results.folder).paper / "contrasts.tex", comparison_latex(results, answers))
    write_text(ResultsFolder(results.folder).paper / "checklist.md", checklist(results))
