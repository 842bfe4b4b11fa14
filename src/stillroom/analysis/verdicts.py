"""The four questions and the hypothesis, answered in words that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy import ndarray

from stillroom.analysis.frame import accuracy_columns
from stillroom.analysis.statistics import Comparison, compare, equivalence_p, interaction_p, seeds_needed
from stillroom.config import Analysis


@dataclass(frozen=True)
class Finding:
    """One contrast on one measure, and what may be said of it."""

    comparison: Comparison
    equivalence: float
    """p of TOST at the declared margin."""
    verdict: str
    """improves, worse, equivalent, no evidence of a difference, or undecided."""
    sentence: str


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a sentence, and the findings behind it."""

    question: str
    answer: str
    findings: tuple[Finding, ...]


def answer_questions(frame: pd.DataFrame, analysis: Analysis, planned_seeds: Sequence[int]) -> list[Answer]:
    """The four research questions and the hypothesis, from one row a trial.

    A contrast of groups the study has not is left out. Where a planned trial of a contrast is missing, the default
    rule gives no verdict; `common_seeds` goes on with the seeds that all groups of the family have.
    """
    tasks = accuracy_columns(frame)
    groups = set(frame["config/distill_type"])
    primary = [pair for pair in analysis.primary if set(pair) <= groups]
    secondary = [pair for pair in analysis.secondary if set(pair) <= groups]
    overall = _findings(frame, primary, "validation_accuracy", "all", analysis, planned_seeds)
    signals = [pair for pair in secondary if "combined" not in pair]
    combining = [pair for pair in secondary if "combined" in pair]
    both = _findings(frame, [*signals, *combining], "validation_accuracy", "all", analysis, planned_seeds)
    by_task = {task: _findings(frame, primary, column, task, analysis, planned_seeds) for task, column in tasks.items()}
    return [
        _answer("Do white-box signals improve over black-box distillation?", overall),
        _answer("Hidden states or attention: which is worth more?", both[: len(signals)]),
        _answer("Does combining the signals help?", both[len(signals) :]),
        _task_dependence(frame, primary, by_task, tasks, analysis, planned_seeds),
        _hypothesis(by_task, analysis),
    ]


def _scores(
    frame: pd.DataFrame, groups: set[str], column: str, analysis: Analysis, seeds: Sequence[int]
) -> tuple[dict[str, ndarray], list[tuple[str, int]]]:
    """One value a seed for each group, over the same seeds, and which planned trials are missing or not finite."""
    values = {
        (str(group), int(seed)): float(value)
        for group, seed, value in zip(frame["config/distill_type"], frame["config/seed"], frame[column], strict=True)
        if math.isfinite(value)
    }
    missing = [(group, seed) for group in sorted(groups) for seed in seeds if (group, seed) not in values]
    whole = [seed for seed in seeds if all((group, seed) in values for group in groups)]
    if missing and analysis.incomplete == "refuse":
        whole = []
    return {group: np.array([values[group, seed] for seed in whole]) for group in groups}, missing


def _findings(
    frame: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    column: str,
    measure: str,
    analysis: Analysis,
    seeds: Sequence[int],
) -> tuple[Finding, ...]:
    if not pairs:
        return ()
    scores, missing = _scores(frame, {g for pair in pairs for g in pair}, column, analysis, seeds)
    findings = []
    for row in compare(pairs, scores, measure, analysis.alpha):
        alike = equivalence_p(scores[row.first] - scores[row.second], analysis.equivalence_margin)
        findings.append(_finding(row, alike, analysis, missing))
    return tuple(findings)


def _finding(row: Comparison, equivalence: float, analysis: Analysis, missing: list[tuple[str, int]]) -> Finding:
    verdict = _verdict(row, equivalence, analysis)
    name = f"{row.first} against {row.second} on {row.measure}"
    points = f"{100 * row.difference:+.1f} points, 95 % interval {100 * row.low:+.1f} to {100 * row.high:+.1f}"
    points = points.replace("95 %", f"{100 * (1 - analysis.alpha):g} %")
    if verdict == "undecided":
        sentence = f"{name}: undecided{_why(row, analysis, missing)}"
    elif verdict == "equivalent":
        margin = f"±{100 * analysis.equivalence_margin:g} points"
        sentence = f"{name}: equivalent within {margin} ({points}; TOST p = {equivalence:.3g})"
    else:
        sentence = f"{name}: {verdict} ({points}; adjusted p = {row.adjusted_p:.3g})"
        needed = seeds_needed(row.effect_size, analysis.alpha)
        if verdict.startswith("no evidence") and needed:
            sentence += f"; an effect of this size (d_z = {row.effect_size:.2f}) would take {needed} seeds"
    if missing and row.seeds:
        sentence += f"; over {row.seeds} seeds, since trials are missing"
    return Finding(row, equivalence, verdict, sentence)


def _verdict(row: Comparison, equivalence: float, analysis: Analysis) -> str:
    if row.seeds < 2 or not math.isfinite(row.adjusted_p):
        return "undecided"
    if row.adjusted_p <= analysis.alpha:
        return "improves" if row.difference > 0 else "worse"
    if math.isfinite(equivalence) and equivalence <= analysis.alpha:
        return "equivalent"
    return "undecided" if row.smallest_p > analysis.alpha else "no evidence of a difference"


def _why(row: Comparison, analysis: Analysis, missing: list[tuple[str, int]]) -> str:
    if missing and analysis.incomplete == "refuse":
        listed = ", ".join(f"{group} seed {seed}" for group, seed in missing[:5])
        return (
            f": trials are missing ({listed}{', …' if len(missing) > 5 else ''}) and the study declares no verdict then"
        )
    least = math.ceil(math.log2(2 / analysis.alpha))
    seen = f"{100 * row.difference:+.1f} points seen; " if row.seeds else ""
    return (
        f" with {row.seeds} seed{'s' if row.seeds != 1 else ''}: {seen}the exact test cannot reach "
        f"{analysis.alpha:g} with fewer than {least}"
    )


def _answer(question: str, findings: tuple[Finding, ...]) -> Answer:
    if not findings:
        return Answer(question, "The study has not the groups for this question.", ())
    return Answer(question, ". ".join(f.sentence for f in findings) + ".", findings)


def _task_dependence(
    frame: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    by_task: dict[str, tuple[Finding, ...]],
    tasks: dict[str, str],
    analysis: Analysis,
    seeds: Sequence[int],
) -> Answer:
    question = "Does the benefit depend on the task?"
    findings = tuple(finding for own in by_task.values() for finding in own)
    sentences = []
    for first, second in pairs:
        columns = []
        for column in tasks.values():
            scores, _ = _scores(frame, {first, second}, column, analysis, seeds)
            columns.append(scores[first] - scores[second])
        p = interaction_p(np.stack(columns, axis=1)) if len({len(c) for c in columns}) == 1 else math.nan
        if not math.isfinite(p) or (p > analysis.alpha and 2 / 2 ** len(columns[0]) > analysis.alpha):
            sentences.append(f"{first} against {second}: undecided with {len(columns[0])} seeds")
        elif p <= analysis.alpha:
            sentences.append(f"{first} against {second}: the benefit differs between tasks (interaction p = {p:.3g})")
        else:
            sentences.append(f"{first} against {second}: no evidence that it differs (interaction p = {p:.3g})")
    return Answer(question, ". ".join(sentences) + "." if sentences else "The study has not the groups.", findings)


def _hypothesis(by_task: dict[str, tuple[Finding, ...]], analysis: Analysis) -> Answer:
    question = "The hypothesis: alike on simple tasks, white-box better on hard ones"
    simple = [f for task in analysis.simple_tasks for f in by_task.get(task, ())]
    hard = [f for task in analysis.hard_tasks for f in by_task.get(task, ())]
    if not simple or not hard:
        return Answer(question, "The study declares no tasks, or has not the groups, to judge it by.", ())
    alike = all(f.verdict == "equivalent" for f in simple)
    better = all(f.verdict == "improves" for f in hard)
    against = any(f.verdict in ("improves", "worse") for f in simple) or any(
        f.verdict in ("worse", "equivalent") for f in hard
    )
    if alike and better:
        verdict = "supported: every declared contrast is as it says"
    elif against:
        verdict = "contradicted by at least one declared contrast"
    else:
        verdict = "undecided: not every declared contrast has a verdict, and none contradicts it"
    counts = ", ".join(f"{f.comparison.first} on {f.comparison.measure}: {f.verdict}" for f in (*simple, *hard))
    return Answer(question, f"{verdict[0].upper()}{verdict[1:]} ({counts}).", (*simple, *hard))
