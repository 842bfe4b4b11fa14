"""The four questions and the hypothesis, answered in words that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy import ndarray

from stillroom.analysis.statistics import (
    Comparison,
    bootstrap_intervals,
    compare,
    equivalence_p,
    fewest_seeds,
    interaction_p,
    seeds_needed,
)
from stillroom.config import Analysis

Pair = tuple[str, str]


@dataclass(frozen=True)
class Finding:
    """One contrast on one measure, and what may be said of it."""

    comparison: Comparison
    equivalence: float
    """p of TOST at the declared margin."""
    verdict: str
    """improves, worse, equivalent, no evidence of a difference, or undecided."""
    sentence: str
    by_seed: dict[int, float]
    """The differences behind the comparison."""
    bootstrap: tuple[float, float]
    """Interval over seeds and examples together; NaN without predictions or seeds."""


@dataclass(frozen=True)
class Answer:
    """A question, its answer in a line and in full, and the findings behind it."""

    question: str
    short: str
    answer: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Evidence:
    """What a study's verdicts are made from."""

    accuracies: Mapping[str, Mapping[tuple[str, int], float]]
    """By measure, then by group and seed of the finished trials. The first measure is accuracy over all tasks
    together, every other one a task's."""
    analysis: Analysis
    seeds: Sequence[int]
    """Planned ones."""
    groups: Sequence[str]
    """Planned ones: a group of which no trial is finished is missing, not absent."""
    predictions: Mapping[tuple[str, int], pd.DataFrame]
    """By group and seed, rows sorted by example; may be empty."""
    combining: Set[str] = frozenset({"combined"})
    """Groups that have both signals: a secondary contrast with one of them is about combining."""
    identical: Mapping[Pair, Sequence[int]] = field(default_factory=dict)
    """Seeds at which two groups are the same though their objectives differ: a fault, so there is no verdict."""

    def alike(self, pair: Pair) -> Sequence[int]:
        """Seeds at which these two, in either order, are identical."""
        return self.identical.get(pair) or self.identical.get(pair[::-1]) or ()

    @property
    def overall(self) -> str:
        """The measure that is accuracy over all tasks together."""
        return next(iter(self.accuracies))

    @property
    def tasks(self) -> list[str]:
        """The measures that are a task's accuracy."""
        return list(self.accuracies)[1:]

    def scores(self, groups: set[str], measure: str) -> tuple[dict[str, dict[int, float]], list[tuple[str, int]]]:
        """By group one value a seed, over the same seeds; and which planned trials are missing or not finite."""
        values = {trial: value for trial, value in self.accuracies[measure].items() if math.isfinite(value)}
        missing = [(group, seed) for group in sorted(groups) for seed in self.seeds if (group, seed) not in values]
        whole = [seed for seed in self.seeds if all((group, seed) in values for group in groups)]
        if missing and self.analysis.incomplete == "refuse":
            whole = []
        return {group: {seed: values[group, seed] for seed in whole} for group in groups}, missing

    def findings(self, pairs: Sequence[Pair], measure: str) -> tuple[Finding, ...]:
        """Every contrast of one family on one measure."""
        if not pairs:
            return ()
        scores, missing = self.scores({group for pair in pairs for group in pair}, measure)
        arrays = {group: np.array(list(own.values())) for group, own in scores.items()}
        rows = compare(pairs, arrays, measure, self.analysis.alpha)
        bootstraps = self._bootstraps(pairs, list(scores[pairs[0][0]]), measure)
        return tuple(
            self._finding(row, len(rows), scores, missing, bootstrap)
            for row, bootstrap in zip(rows, bootstraps, strict=True)
        )

    def _finding(
        self,
        row: Comparison,
        family: int,
        scores: dict[str, dict[int, float]],
        missing: list[tuple[str, int]],
        bootstrap: tuple[float, float],
    ) -> Finding:
        by_seed = {seed: scores[row.first][seed] - scores[row.second][seed] for seed in scores[row.first]}
        equivalence = equivalence_p(np.array(list(by_seed.values())), self.analysis.equivalence_margin)
        if alike := self.alike((row.first, row.second)):
            verdict = "undecided"
            sentence = f"{row.first} against {row.second} on {row.measure}: undecided{_never_took_effect(alike)}"
        else:
            verdict = _verdict(row, family, equivalence, self.analysis)
            sentence = _sentence(row, family, verdict, equivalence, self.analysis, missing)
        return Finding(row, equivalence, verdict, sentence, by_seed, bootstrap)

    def _bootstraps(self, pairs: Sequence[Pair], seeds: Sequence[int], measure: str) -> list[tuple[float, float]]:
        if not seeds or not self.predictions:
            return [(math.nan, math.nan)] * len(pairs)
        right = {
            group: np.stack([self._correct(group, seed, measure) for seed in seeds]).astype(np.float64)
            for group in {group for pair in pairs for group in pair}
        }
        differences = [right[first] - right[second] for first, second in pairs]
        return bootstrap_intervals(differences, np.random.default_rng(0), alpha=self.analysis.alpha)

    def _correct(self, group: str, seed: int, measure: str) -> ndarray:
        own = self.predictions[group, seed]
        chosen = own if measure == self.overall else own[own["task"] == measure]
        return chosen["correct"].to_numpy()

    def interactions(self, pairs: Sequence[Pair]) -> dict[Pair, tuple[float, int]]:
        """By contrast: p of the group × task interaction, and over how many seeds."""
        found = {}
        for first, second in pairs:
            by_task = [self.scores({first, second}, task)[0] for task in self.tasks]
            seeds = [seed for seed in self.seeds if all(seed in own[first] for own in by_task)]
            values = [[own[first][seed] - own[second][seed] for own in by_task] for seed in seeds]
            found[first, second] = interaction_p(np.array(values).reshape(len(seeds), len(self.tasks))), len(seeds)
        return found


def answer_questions(evidence: Evidence) -> list[Answer]:
    """The four research questions and the hypothesis.

    A contrast of groups the study has not is left out. Where a planned trial of a contrast is missing, the default
    rule gives no verdict; `common_seeds` goes on with the seeds that all groups of the family have.
    """
    groups = set(evidence.groups)
    primary = [pair for pair in evidence.analysis.primary if set(pair) <= groups]
    secondary = [pair for pair in evidence.analysis.secondary if set(pair) <= groups]
    first = {measure: evidence.findings(primary, measure) for measure in evidence.accuracies}
    second = {measure: evidence.findings(secondary, measure) for measure in evidence.accuracies}
    signals = [f for own in second.values() for f in own if evidence.combining.isdisjoint(_groups(f))]
    combining = [f for own in second.values() for f in own if not evidence.combining.isdisjoint(_groups(f))]
    by_task = [finding for task in evidence.tasks for finding in first[task]]
    return [
        _answer("Do white-box signals improve over black-box distillation?", first[evidence.overall], evidence.overall),
        _answer("Hidden states or attention: which is worth more?", signals, evidence.overall),
        _answer("Does combining the signals help?", combining, evidence.overall),
        _task_dependence(evidence, primary, by_task),
        _hypothesis(by_task, evidence.analysis),
    ]


def _groups(finding: Finding) -> Pair:
    return finding.comparison.first, finding.comparison.second


def _sentence(
    row: Comparison,
    family: int,
    verdict: str,
    equivalence: float,
    analysis: Analysis,
    missing: list[tuple[str, int]],
) -> str:
    name = f"{row.first} against {row.second} on {row.measure}"
    level = f"{100 * (1 - analysis.alpha):g} %"
    points = f"{100 * row.difference:+z.1f} points, {level} interval {100 * row.low:+z.1f} to {100 * row.high:+z.1f}"
    if verdict == "undecided":
        sentence = f"{name}: undecided{_why(row, family, analysis, missing)}"
    elif verdict == "equivalent":
        margin = f"±{100 * analysis.equivalence_margin:g} points"
        sentence = f"{name}: equivalent within {margin} ({points}; TOST p = {equivalence:.3g})"
    else:
        sentence = f"{name}: {verdict} ({points}; adjusted p = {row.adjusted_p:.3g})"
        needed = seeds_needed(row.effect_size, analysis.alpha, contrasts=family)
        if verdict.startswith("no evidence") and needed:
            sentence += f"; an effect of this size (d_z = {row.effect_size:.2f}) would take {needed} seeds"
    if missing and row.seeds:
        sentence += f"; over {row.seeds} seeds, since trials are missing"
    return sentence


def _verdict(row: Comparison, family: int, equivalence: float, analysis: Analysis) -> str:
    """In a word; undecided too where the adjusted p of a `family` of so many contrasts cannot reach α at all."""
    if row.seeds < 2 or not math.isfinite(row.adjusted_p):
        return "undecided"
    if row.adjusted_p <= analysis.alpha:
        return "improves" if row.difference > 0 else "worse"
    if math.isfinite(equivalence) and equivalence <= analysis.alpha:
        return "equivalent"
    return "undecided" if family * row.smallest_p > analysis.alpha else "no evidence of a difference"


def _never_took_effect(seeds: Sequence[int]) -> str:
    listed = ", ".join(map(str, seeds))
    return (
        f": their trials are identical at seed{'s' if len(seeds) != 1 else ''} {listed}, so the term that tells them "
        "apart never took effect"
    )


def _why(row: Comparison, family: int, analysis: Analysis, missing: list[tuple[str, int]]) -> str:
    if missing and analysis.incomplete == "refuse":
        listed = ", ".join(f"{group} seed {seed}" for group, seed in missing[:5])
        return (
            f": trials are missing ({listed}{', …' if len(missing) > 5 else ''}) and the study declares no verdict then"
        )
    least = fewest_seeds(analysis.alpha, family)
    adjusted = f", adjusted over {family} contrasts," if family > 1 else ""
    seen = f"{100 * row.difference:+z.1f} points seen; " if row.seeds else ""
    return (
        f" with {row.seeds} seed{'s' if row.seeds != 1 else ''}: {seen}the exact test{adjusted} cannot reach "
        f"{analysis.alpha:g} with fewer than {least}"
    )


def _answer(question: str, findings: Sequence[Finding], measure: str) -> Answer:
    """The answer is read off the overall accuracy, `measure`; the findings hold the tasks too."""
    overall = [finding for finding in findings if finding.comparison.measure == measure]
    if not overall:
        missing = "The study declares no contrast of its groups for this question."
        return Answer(question, missing, missing, ())
    short = "; ".join(f"{f.comparison.first} against {f.comparison.second}: {f.verdict}" for f in overall)
    return Answer(question, f"{short}.", ". ".join(f.sentence for f in overall) + ".", tuple(findings))


def _task_dependence(evidence: Evidence, pairs: Sequence[Pair], findings: Sequence[Finding]) -> Answer:
    question = "Does the benefit depend on the task?"
    alpha = evidence.analysis.alpha
    brief, sentences = [], []
    for (first, second), (p, seeds) in evidence.interactions(pairs).items():
        name = f"{first} against {second}"
        if alike := evidence.alike((first, second)):
            verdict, more = "undecided", _never_took_effect(alike)
        elif not math.isfinite(p) or (p > alpha and 2 / 2**seeds > alpha):
            verdict, more = "undecided", f" with {seeds} seed{'s' if seeds != 1 else ''}"
        elif p <= alpha:
            verdict, more = "the benefit differs between tasks", f" (interaction p = {p:.3g})"
        else:
            verdict, more = "no evidence that it differs", f" (interaction p = {p:.3g})"
        brief.append(f"{name}: {verdict}")
        sentences.append(f"{name}: {verdict}{more}")
    if not sentences:
        missing = "The study declares no contrast of its groups for this question."
        return Answer(question, missing, missing, ())
    return Answer(question, "; ".join(brief) + ".", ". ".join(sentences) + ".", tuple(findings))


def _hypothesis(findings: Sequence[Finding], analysis: Analysis) -> Answer:
    question = "The hypothesis: alike on simple tasks, white-box better on hard ones"
    simple = [f for f in findings if f.comparison.measure in analysis.simple_tasks]
    hard = [f for f in findings if f.comparison.measure in analysis.hard_tasks]
    if not simple or not hard:
        missing = "The study declares no tasks, or no contrast of its groups, to judge it by."
        return Answer(question, missing, missing, ())
    alike = all(f.verdict == "equivalent" for f in simple)
    better = all(f.verdict == "improves" for f in hard)
    against = any(f.verdict in ("improves", "worse") for f in simple) or any(
        f.verdict in ("worse", "equivalent") for f in hard
    )
    if alike and better:
        verdict = "Supported: every declared contrast is as it says"
    elif against:
        verdict = "Contradicted by at least one declared contrast"
    else:
        verdict = "Undecided: not every declared contrast has a verdict, and none contradicts it"
    counts = ", ".join(f"{f.comparison.first} on {f.comparison.measure}: {f.verdict}" for f in (*simple, *hard))
    return Answer(question, f"{verdict}.", f"{verdict} ({counts}).", (*simple, *hard))
