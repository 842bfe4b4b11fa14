"""What was found: every contrast of a study on every measure, with its test, its interval and its verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy import ndarray

from stillroom.analysis.numbers import equals, points
from stillroom.analysis.questions import Question, Recipe, question_of, unasked_pairs
from stillroom.analysis.statistics import (
    Comparison,
    bootstrap_intervals,
    compare,
    equivalence_p,
    fewest_seeds,
    holm_adjusted,
    interaction_p,
    mean_interval,
    seeds_needed,
)
from stillroom.config import Analysis

Pair = tuple[str, str]


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

    def saturated(self, task: str) -> Literal["floor", "ceiling"] | None:
        """Whether the mean accuracy of every group on a task is within the equivalence margin of 0, or of 1.

        Groups cannot be told apart there, whatever they learnt.
        """
        scored = [[v for (name, _), v in self.accuracies[task].items() if name == group] for group in self.groups]
        means, margin = [np.mean(values) for values in scored if values], self.analysis.equivalence_margin
        if means and max(means) <= margin:
            return "floor"
        return "ceiling" if means and min(means) >= 1 - margin else None

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
        return [family for family in (unasked, *before, self.primary, secondary) if family]

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
            arrays = {group: np.array(list(by_seed.values())) for group, by_seed in scores.items()}
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
            sentence = f"{row.first} against {row.second} on {row.measure}: undecided{never_took_effect(alike)}"
        else:
            verdict = _verdict(row, family, equivalence, self.analysis)
            within = mean_interval(np.array(list(by_seed.values())), 2 * self.analysis.alpha)
            sentence = _sentence(row, family, verdict, equivalence, within, self.analysis, missing)
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
                found |= {(pair, used): interval for pair, interval in zip(pairs, intervals, strict=True)}
        return iter([found.get(contrast, (math.nan, math.nan)) for contrast in contrasts])

    def _has_predictions(self, pair: Pair, seeds: Sequence[int]) -> bool:
        return all((group, seed) in self.predictions for group in pair for seed in seeds)

    def _right(self, group: str, seeds: Sequence[int], measure: str) -> ndarray:
        rows = [self.predictions[group, seed] for seed in seeds]
        chosen = (
            rows if measure == self.overall else [predictions[predictions["task"] == measure] for predictions in rows]
        )
        return np.stack([predictions["correct"].to_numpy() for predictions in chosen]).astype(np.float64)

    def interactions(self, pairs: Sequence[Pair]) -> dict[Pair, Interaction]:
        """By contrast of one family: the group × task interaction."""
        by_task, missing = {}, []
        for task in self.tasks:
            by_task[task], lacking = self.scores({group for pair in pairs for group in pair}, task)
            missing += [trial for trial in lacking if trial not in missing]
        raw, seeds = [], []
        for first, second in pairs:
            seeds = [seed for seed in self.seeds if all(seed in scores[first] for scores in by_task.values())]
            values = [[scores[first][seed] - scores[second][seed] for scores in by_task.values()] for seed in seeds]
            raw.append(interaction_p(np.array(values).reshape(len(seeds), len(self.tasks))))
        adjusted = holm_adjusted([1.0 if math.isnan(p) else p for p in raw])
        return {
            pair: Interaction(p, math.nan if math.isnan(p) else by_family, len(seeds), len(pairs), tuple(missing))
            for pair, p, by_family in zip(pairs, raw, adjusted, strict=True)
        }


@dataclass(frozen=True)
class Interaction:
    """Whether one contrast's difference depends on the task."""

    p: float
    """NaN without spread, or with fewer than two seeds or tasks."""
    adjusted_p: float
    """Holm-adjusted over the family."""
    seeds: int
    family: int
    """Contrasts over which p is adjusted."""
    missing: tuple[tuple[str, int], ...]
    """Trials of the family that are."""

    def verdict(self, analysis: Analysis) -> tuple[str, str]:
        """The verdict in a few words, and the rest of its sentence."""
        if self.missing and not self.seeds:
            return "undecided", _lacking(self.missing)
        if math.isfinite(self.adjusted_p) and self.adjusted_p <= analysis.alpha:
            return "the benefit differs between tasks", f" (interaction, adjusted p {equals(self.adjusted_p)})"
        if self.seeds < 2 or self.family * 2 / 2**self.seeds > analysis.alpha:
            return "undecided", _too_few(self.seeds, self.family, analysis.alpha)
        if not math.isfinite(self.adjusted_p):
            return "undecided", ": the difference is the same on every task, without spread"
        return "no evidence that it differs", f" (interaction, adjusted p {equals(self.adjusted_p)})"


def _sentence(
    row: Comparison,
    family: int,
    verdict: str,
    equivalence: float,
    within: tuple[float, float],
    analysis: Analysis,
    missing: list[tuple[str, int]],
) -> str:
    """`within`: the interval of coverage 1 − 2α, which TOST compares with the margin."""
    name = f"{row.first} against {row.second} on {row.measure}"
    level = f"{100 * (1 - analysis.alpha):g} %"
    seen = f"{points(row.difference)} points, {level} interval {points(row.low)} to {points(row.high)}"
    if verdict == "undecided":
        sentence = f"{name}: undecided{_why(row, family, analysis, missing)}"
    elif verdict == "equivalent":
        margin = f"±{100 * analysis.equivalence_margin:g} points"
        inside = f"{100 * (1 - 2 * analysis.alpha):g} % interval {points(within[0])} to {points(within[1])}"
        shown = f"{points(row.difference)} points, {inside}"
        sentence = f"{name}: equivalent within {margin} ({shown}; TOST p {equals(equivalence)})"
    else:
        sentence = f"{name}: {verdict} ({seen}; adjusted p {equals(row.adjusted_p)})"
        needed = seeds_needed(row.effect_size, analysis.alpha, contrasts=family)
        if verdict.startswith("no evidence") and needed and needed > row.seeds:
            sentence += (
                f"; to detect an effect of this size (d_z = {row.effect_size:.2f}) with 80 % power takes {needed} seeds"
            )
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


def never_took_effect(seeds: Sequence[int]) -> str:
    """How the sentence on two groups that are identical at these seeds ends."""
    listed = ", ".join(map(str, seeds))
    return (
        f": their trials are identical at seed{'s' if len(seeds) != 1 else ''} {listed}, so the term that tells them "
        "apart never took effect"
    )


def _why(row: Comparison, family: int, analysis: Analysis, missing: list[tuple[str, int]]) -> str:
    if missing and analysis.incomplete == "refuse":
        return _lacking(missing)
    return _too_few(row.seeds, family, analysis.alpha, f"{points(row.difference)} points seen; " if row.seeds else "")


def _lacking(missing: Sequence[tuple[str, int]]) -> str:
    listed = ", ".join(f"{group} seed {seed}" for group, seed in missing[:5])
    return f": trials are missing ({listed}{', …' if len(missing) > 5 else ''}) and the study declares no verdict then"


def _too_few(seeds: int, family: int, alpha: float, seen: str = "") -> str:
    adjusted = f", adjusted over {family} contrasts," if family > 1 else ""
    return (
        f" with {seeds} seed{'s' if seeds != 1 else ''}: {seen}the exact test{adjusted} cannot reach {alpha:g} with "
        f"fewer than {fewest_seeds(alpha, family)}"
    )
