"""The study's questions and its hypothesis, answered in words that follow from the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy import ndarray

from stillroom.analysis.numbers import equals, listed, points
from stillroom.analysis.questions import (
    COMBINING,
    HELPS,
    PLACEBO,
    WHITE_BOX,
    Question,
    Recipe,
    question_of,
    unasked_pairs,
)
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
MOST_SEEDS = 20
"""Seeds that a study may have: `sweep.seeds`."""


@dataclass(frozen=True)
class Finding:
    """One contrast on one measure, and what may be said of it."""

    comparison: Comparison
    family: int
    """Contrasts over which p is adjusted."""
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
    """A question, its answer in one sentence and contrast by contrast, and the findings behind it."""

    question: str
    short: str
    sentences: tuple[str, ...]
    findings: tuple[Finding, ...]
    """Over all tasks together and by task; none where they are another question's."""


@dataclass(frozen=True)
class Evidence:
    """What a study's verdicts are made from."""

    accuracies: Mapping[str, Mapping[tuple[str, int], float]]
    """By measure, then by group and seed of the finished trials. The first measure is accuracy over all tasks
    together, every other one a task's."""
    analysis: Analysis
    seeds: Sequence[int]
    """Planned ones."""
    groups: Mapping[str, Recipe]
    """Planned ones, in the study's order: a group without a finished trial is missing, not absent."""
    predictions: Mapping[tuple[str, int], pd.DataFrame]
    """By group and seed, rows sorted by example; may be empty."""
    student: str | None = None
    """What tables call the student before training, which has the same values at every seed; None: not measured."""
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

    @property
    def primary(self) -> list[Pair]:
        """Declared contrasts of groups that the study has."""
        return [pair for pair in self.analysis.primary if set(pair) <= set(self.groups)]

    @property
    def families(self) -> list[list[Pair]]:
        """Every contrast of the study, by the families over which p is adjusted.

        The two declared ones; black box against labels alone; and each group against the student before training, a
        family of its own each: it is asked of every group, and none is chosen for its answer.
        """
        secondary = [pair for pair in self.analysis.secondary if set(pair) <= set(self.groups)]
        unasked = unasked_pairs(self.groups, [*self.primary, *secondary])
        before = [[(group, self.student)] for group in self.groups] if self.student else []
        return [own for own in (unasked, *before, self.primary, secondary) if own]

    def baseline_of(self, group: str) -> Pair | None:
        """The contrast that says what a group gains: a declared primary one, else labels alone, a declared one, or the
        student before training."""
        primary, secondary = self.primary, [p for p in self.analysis.secondary if set(p) <= set(self.groups)]
        before = [(group, self.student)] if self.student else []
        pairs = [*primary, *unasked_pairs(self.groups, [*primary, *secondary]), *secondary, *before]
        return next((pair for pair in pairs if pair[0] == group), None)

    def question(self, pair: Pair) -> Question:
        """The question that a contrast answers."""
        first, second = (self.groups.get(name) for name in pair)
        return question_of(first, second)

    def scores(self, groups: set[str], measure: str) -> tuple[dict[str, dict[int, float]], list[tuple[str, int]]]:
        """By group one value a seed, over the same seeds; and which planned trials are missing or not finite."""
        values = {trial: value for trial, value in self.accuracies[measure].items() if math.isfinite(value)}
        missing = [(group, seed) for group in sorted(groups) for seed in self.seeds if (group, seed) not in values]
        whole = [seed for seed in self.seeds if all((group, seed) in values for group in groups)]
        if missing and self.analysis.incomplete == "refuse":
            whole = []
        return {group: {seed: values[group, seed] for seed in whole} for group in groups}, missing

    def findings(self, families: Sequence[Sequence[Pair]], measure: str) -> tuple[Finding, ...]:
        """Every contrast of every family on one measure."""
        scored = [self.scores({group for pair in pairs for group in pair}, measure) for pairs in families]
        seeds = [tuple(next(iter(scores.values()))) for scores, _ in scored]
        bootstraps = self._bootstraps(
            [(pair, used) for pairs, used in zip(families, seeds, strict=True) for pair in pairs], measure
        )
        found = []
        for pairs, (scores, missing) in zip(families, scored, strict=True):
            arrays = {group: np.array(list(own.values())) for group, own in scores.items()}
            for row in compare(pairs, arrays, measure, self.analysis.alpha):
                found.append(self._finding(row, len(pairs), scores, missing, next(bootstraps)))
        return tuple(found)

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
        return Finding(row, family, equivalence, verdict, sentence, by_seed, bootstrap)

    def _bootstraps(
        self, contrasts: Sequence[tuple[Pair, tuple[int, ...]]], measure: str
    ) -> Iterator[tuple[float, float]]:
        """An interval a contrast; contrasts over the same seeds share the draws."""
        found: dict[tuple[Pair, tuple[int, ...]], tuple[float, float]] = {}
        for used in dict.fromkeys(seeds for _, seeds in contrasts if seeds):
            pairs = [pair for pair, seeds in contrasts if seeds == used and self._has_predictions(pair, seeds)]
            right = {group: self._right(group, used, measure) for group in {name for pair in pairs for name in pair}}
            if pairs:
                differences = [right[first] - right[second] for first, second in pairs]
                intervals = bootstrap_intervals(differences, np.random.default_rng(0), alpha=self.analysis.alpha)
                found |= {(pair, used): own for pair, own in zip(pairs, intervals, strict=True)}
        return iter([found.get(contrast, (math.nan, math.nan)) for contrast in contrasts])

    def _has_predictions(self, pair: Pair, seeds: Sequence[int]) -> bool:
        return all((group, seed) in self.predictions for group in pair for seed in seeds)

    def _right(self, group: str, seeds: Sequence[int], measure: str) -> ndarray:
        rows = [self.predictions[group, seed] for seed in seeds]
        chosen = rows if measure == self.overall else [own[own["task"] == measure] for own in rows]
        return np.stack([own["correct"].to_numpy() for own in chosen]).astype(np.float64)

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
    """Every question that the study's contrasts answer, then task dependence and the hypothesis.

    A contrast of groups that the study lacks is left out, and so is a question without a contrast. Where a planned
    trial of a contrast is missing, the default rule gives no verdict; `common_seeds` uses the seeds that all groups of
    the family have.
    """
    families = evidence.families
    by_question: dict[str, list[Finding]] = {}
    yes: dict[Pair, int] = {}
    found = [finding for measure in evidence.accuracies for finding in evidence.findings(families, measure)]
    for finding in found:
        question = evidence.question(_groups(finding))
        by_question.setdefault(question.text, []).append(finding)
        yes[_groups(finding)] = question.yes
    answers = [_answer(text, findings, evidence, yes) for text, findings in by_question.items()]
    white = [finding for finding in by_question.get(WHITE_BOX, []) if _groups(finding) in evidence.primary]
    return [
        *sorted(answers, key=lambda answer: _place(answer.question)),
        *_task_dependence(evidence),
        *_hypothesis(white, evidence.analysis),
    ]


def _place(question: str) -> int:
    """Where a question stands on the page: those of every study first, signals one by one between them."""
    order = (HELPS, WHITE_BOX, None, COMBINING, PLACEBO)
    return order.index(question) if question in order else 2 if question.endswith("worth more?") else len(order)


def _groups(finding: Finding) -> Pair:
    return finding.comparison.first, finding.comparison.second


_WORDS = {"improves": "better", "worse": "worse", "equivalent": "equivalent"}


def plain_answer(findings: Sequence[Finding], yes: Mapping[Pair, int], analysis: Analysis, student: str | None) -> str:
    """One sentence: yes, no or not known, then what was found of each group.

    `yes`: by contrast, the group whose better accuracy says yes. `student`: the name of the student before training;
    contrasts with it decide on yes or no only where there are no others.
    """
    deciding = [f for f in findings if f.comparison.second != student] or findings
    lead = _lead([(f.verdict, yes[_groups(f)]) for f in deciding])
    parts = [
        part
        for own in (deciding, [f for f in findings if f not in deciding])
        for verdict in _VERDICTS
        for part in _said([f for f in own if f.verdict == verdict], verdict, analysis, len(own), student)
    ]
    said = "; ".join(parts)
    return f"{lead}: {said}." if lead else f"{said}."


_VERDICTS = ("improves", "worse", "equivalent", "no evidence of a difference", "undecided")


def _lead(found: Sequence[tuple[str, int]]) -> str:
    """Yes, no or neither, of (verdict, which group's gain says yes); empty where the question is no yes-or-no one."""
    if not all(way for _, way in found):
        return ""
    gains = [verdict == ("improves" if way > 0 else "worse") for verdict, way in found]
    verdicts = {verdict for verdict, _ in found}
    if all(gains):
        return "Yes"
    if any(gains):
        return "In part"
    if "undecided" in verdicts:
        return "Not known"
    return "Not shown" if "no evidence of a difference" in verdicts else "No"


def _said(findings: Sequence[Finding], verdict: str, analysis: Analysis, of: int, student: str | None) -> Iterator[str]:
    """What one verdict says, a clause for each group that others were compared with."""
    for second in dict.fromkeys(f.comparison.second for f in findings):
        own = [f.comparison for f in findings if f.comparison.second == second]
        shown = [row.first + ("" if row.seeds == 0 else f" ({points(row.difference)} points)") for row in own]
        several, names = len(own) > 1, listed(shown)
        if 3 < len(own) == of and all(row.seeds for row in own):
            least, most = (pick(row.difference for row in own) for pick in (min, max))
            several, names = False, f"each of the {of} groups ({points(least)} to {points(most)} points)"
        second = f"the {second}" if second == student else second
        if verdict == "improves":
            yield f"{names} {'beat' if several else 'beats'} {second}"
        elif verdict == "worse":
            yield f"{names} {'are' if several else 'is'} worse than {second}"
        elif verdict == "equivalent":
            margin = f"±{100 * analysis.equivalence_margin:g} points"
            yield f"{names} {'are' if several else 'is'} equivalent to {second} within {margin}"
        elif verdict == "undecided":
            yield f"these runs cannot tell {names.removeprefix('each of ')} from {second}"
        else:
            yield f"there is no evidence that {names} {'differ' if several else 'differs'} from {second}"


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
    seen = f"{points(row.difference)} points, {level} interval {points(row.low)} to {points(row.high)}"
    if verdict == "undecided":
        sentence = f"{name}: undecided{_why(row, family, analysis, missing)}"
    elif verdict == "equivalent":
        margin = f"±{100 * analysis.equivalence_margin:g} points"
        sentence = f"{name}: equivalent within {margin} ({seen}; TOST p {equals(equivalence)})"
    else:
        sentence = f"{name}: {verdict} ({seen}; adjusted p {equals(row.adjusted_p)})"
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
    seen = f"{points(row.difference)} points seen; " if row.seeds else ""
    return (
        f" with {row.seeds} seed{'s' if row.seeds != 1 else ''}: {seen}the exact test{adjusted} cannot reach "
        f"{analysis.alpha:g} with fewer than {least}"
    )


def _answer(question: str, findings: Sequence[Finding], evidence: Evidence, yes: Mapping[Pair, int]) -> Answer:
    """The answer is read off the accuracy over all tasks together; the findings hold the tasks too."""
    overall = [finding for finding in findings if finding.comparison.measure == evidence.overall]
    short = plain_answer(overall, yes, evidence.analysis, evidence.student)
    return Answer(question, short, tuple(f"{f.sentence}." for f in overall), tuple(findings))


def _task_dependence(evidence: Evidence) -> list[Answer]:
    question = "Does the benefit depend on the task?"
    alpha = evidence.analysis.alpha
    brief: dict[str, list[str]] = {}
    sentences = []
    for (first, second), (p, seeds) in evidence.interactions(evidence.primary).items():
        if alike := evidence.alike((first, second)):
            verdict, more = "undecided", _never_took_effect(alike)
        elif not math.isfinite(p) or (p > alpha and 2 / 2**seeds > alpha):
            verdict, more = "undecided", f" with {seeds} seed{'s' if seeds != 1 else ''}"
        elif p <= alpha:
            verdict, more = "the benefit differs between tasks", f" (interaction p {equals(p)})"
        else:
            verdict, more = "no evidence that it differs", f" (interaction p {equals(p)})"
        brief.setdefault(verdict, []).append(f"{first} against {second}")
        sentences.append(f"{first} against {second}: {verdict}{more}.")
    if not sentences or len(evidence.tasks) < 2:
        return []
    leads = {
        "the benefit differs between tasks": "It does for",
        "no evidence that it differs": "There is no evidence of it for",
        "undecided": "It is not known for",
    }
    short = " ".join(f"{lead} {listed(brief[verdict])}." for verdict, lead in leads.items() if verdict in brief)
    return [Answer(question, short, tuple(sentences), ())]


def _hypothesis(findings: Sequence[Finding], analysis: Analysis) -> list[Answer]:
    """`findings`: white box against black box, by task."""
    question = "The hypothesis: alike on simple tasks, white-box better on hard ones"
    simple = [f for f in findings if f.comparison.measure in analysis.simple_tasks]
    hard = [f for f in findings if f.comparison.measure in analysis.hard_tasks]
    if not simple or not hard:
        return []
    alike = all(f.verdict == "equivalent" for f in simple)
    better = all(f.verdict == "improves" for f in hard)
    against = [
        *(f for f in simple if f.verdict in ("improves", "worse")),
        *(f for f in hard if f.verdict in ("worse", "equivalent")),
    ]
    if alike and better:
        verdict = short = "Supported: every declared contrast is as it predicts"
    elif against:
        verdict = "Contradicted by at least one declared contrast"
        named = listed([f"{f.comparison.first} on {f.comparison.measure} ({_WORDS[f.verdict]})" for f in against])
        short = f"Contradicted by {named}"
    else:
        verdict = "Undecided: not every declared contrast has a verdict, and none contradicts it"
        settled = sum(f.verdict in ("equivalent", "improves") for f in (*simple, *hard))
        total = len(simple) + len(hard)
        short = f"Not known: {settled} of {total} declared contrasts are as it predicts, and none contradicts it"
    counts = ", ".join(f"{f.comparison.first} on {f.comparison.measure}: {f.verdict}" for f in (*simple, *hard))
    return [Answer(question, f"{short}.", (f"{verdict} ({counts}).",), ())]


@dataclass(frozen=True)
class Needed:
    """What it would take to know what a study leaves open."""

    says: tuple[str, ...]
    """Sentences."""
    seeds: tuple[int, ...]
    """What to set `sweep.seeds` to; empty where no number of seeds that a study may have would do."""


def what_it_takes(evidence: Evidence, answers: Sequence[Answer]) -> Needed:
    """What stands between the answers and a verdict on every contrast over all tasks together, said once."""
    analysis, planned = evidence.analysis, len(evidence.seeds)
    found = [f for a in answers for f in a.findings if f.comparison.measure == evidence.overall]
    found = [f for f in found if not evidence.alike(_groups(f))]
    says, least = [], planned
    if absent := [f for f in found if f.verdict == "undecided" and not f.comparison.seeds]:
        says.append(f"{len(absent)} contrasts wait for trials that are missing: the same command again trains them.")
    family = max((f.family for f in found if f.verdict == "undecided"), default=0)
    if family and (needed := fewest_seeds(analysis.alpha, family)) > planned:
        adjusted = f" after Holm's adjustment over {family} contrasts" if family > 1 else ""
        says.append(
            f"With {planned} seed{'s' if planned != 1 else ''} no result could reach p ≤ {analysis.alpha:g}{adjusted}: "
            f"that takes {needed} seeds."
        )
        least = needed
    wanted = [
        (f"{f.comparison.first} against {f.comparison.second}", n)
        for f in found
        if f.verdict.startswith("no evidence")
        and (n := seeds_needed(f.comparison.effect_size, analysis.alpha, contrasts=f.family))
    ]
    if within := [(name, n) for name, n in wanted if n <= MOST_SEEDS]:
        several = listed([f"{n} seeds for {name}" for name, n in within])
        says.append(f"If a difference is as large as it looks here, showing it takes {several}.")
        least = max(least, *(n for _, n in within))
    if beyond := [name for name, n in wanted if n > MOST_SEEDS]:
        says.append(
            f"What was seen of {listed(beyond)} is small next to its spread: showing it would take more than the "
            f"{MOST_SEEDS} seeds that a study may have. More validation examples make the spread smaller."
        )
    more = [seed for seed in range(planned + least) if seed not in evidence.seeds]
    return Needed(tuple(says), (*evidence.seeds, *more[: least - planned]) if least > planned else ())
