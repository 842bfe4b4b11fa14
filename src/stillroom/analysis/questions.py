"""Which question a contrast answers: by what its two groups are trained with, never by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from stillroom.config import TERMS, Group, Objective

SIGNALS = {"kd": "predictions", "hidden": "hidden states", "attention": "attention", "values": "value relations"}
"""What each term takes from the teacher, in words."""
INNER = frozenset(SIGNALS) - {"kd"}
"""Terms that look inside the teacher: the white box."""

HELPS = "Does distilling help at all?"
WHITE_BOX = "Do white-box signals improve over black-box distillation?"
COMBINING = "Does combining the signals help?"
PLACEBO = "Is it the signal, or only more gradient?"


@dataclass(frozen=True)
class Recipe:
    """What a group is trained with."""

    terms: Mapping[str, Mapping[str, Any]]
    """The terms that are on, each with its settings."""
    placebo: Set[str] = frozenset()
    """Those whose signal is in the wrong places."""

    @property
    def answers(self) -> bool:
        """Whether the answers that it learns are the teacher's own."""
        return self.terms.get("task", {}).get("targets") == "teacher"

    @property
    def signals(self) -> Set[str]:
        """Terms that take something from the teacher."""
        return (self.terms.keys() & SIGNALS.keys()) | ({"task"} if self.answers else set())

    @property
    def inner(self) -> Set[str]:
        """Terms that look inside it."""
        return self.terms.keys() & INNER


def recipes(study: Mapping[str, Any]) -> dict[str, Recipe]:
    """The study's groups by name; `study` as in `planned.json`."""
    shared, found = Objective.model_validate(study["objective"]), {}
    for group in study["groups"]:
        whole = Group.model_validate(group).objective(shared).model_dump(mode="json")
        on = {term: settings for term, settings in whole.items() if settings["weight"] > 0}
        found[group["name"]] = Recipe(on, frozenset(term for term, settings in on.items() if settings.get("placebo")))
    return found


@dataclass(frozen=True)
class Question:
    """A question, and for which of a contrast's two groups a better accuracy says yes."""

    text: str
    yes: int
    """1: the first. −1: the second. 0: it is no yes-or-no question."""


def question_of(first: Recipe | None, second: Recipe | None) -> Question:
    """The question that `first` against `second` answers; None is the student before training."""
    more = _richer(first, second)
    if first is None or second is None or bool(first.signals) != bool(second.signals):
        return Question(HELPS, more)
    if first.placebo != second.placebo:
        compares = first.terms.keys() == second.terms.keys()  # else a placebo is set against having no such term
        return Question(PLACEBO, (1 if len(first.placebo) < len(second.placebo) else -1) if compares else 0)
    if first.inner != second.inner:
        if not (first.inner and second.inner):
            return Question(WHITE_BOX, 1 if first.inner else -1)
        if first.inner < second.inner or second.inner < first.inner:
            return Question(COMBINING, 1 if second.inner < first.inner else -1)
        sides = (_named(first.inner - second.inner), _named(second.inner - first.inner))
        one, other = sorted(sides, key=lambda side: [*SIGNALS.values()].index(side.split(" and ")[0]))
        return Question(f"{one[0].upper()}{one[1:]} or {other}: which is worth more?", 0)
    if first.answers != second.answers:
        return Question("The teacher's answers as text, or its predictions: which is worth more?", 0)
    if apart := first.terms.keys() ^ second.terms.keys():
        what = "the labels" if "task" in apart else "the teacher's predictions"
        return Question(f"Do {what} help beside the other signals?", more)
    settings = ", ".join(differing_settings(first, second)) or "chance alone"
    return Question(f"Does it matter how a signal is used: {settings}?", 0)


def differing_settings(first: Recipe, second: Recipe) -> list[str]:
    """Settings that two groups of the same terms have and that differ, such as `kd.divergence`."""
    return [
        f"{term}.{name}"
        for term in TERMS
        if term in first.terms and term in second.terms
        for name in dict.fromkeys((*first.terms[term], *second.terms[term]))
        if first.terms[term].get(name) != second.terms[term].get(name)
    ]


def unasked_pairs(groups: Mapping[str, Recipe], declared: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs that ask whether distilling helps and that a study need not declare: black box against labels alone.

    The black boxes are those that declared contrasts compare a white box with; where none does, the study's first; and
    in a study without any, every group that takes something from the teacher.
    """
    boxes = [
        name for name, recipe in groups.items() if "kd" in recipe.terms and not recipe.inner and not recipe.placebo
    ]
    compared = {name for pair in declared if all(group in groups for group in pair) for name in pair}
    distilled = [name for name, recipe in groups.items() if recipe.signals]
    wanted = [box for box in boxes if box in compared] or boxes[:1] or distilled
    alone = [name for name, recipe in groups.items() if not recipe.signals]
    pairs = [(box, other) for box in wanted for other in alone]
    return [pair for pair in pairs if pair not in declared and pair[::-1] not in declared]


def _richer(first: Recipe | None, second: Recipe | None) -> int:
    counts = [
        (-1 if recipe is None else len(recipe.signals), 0 if recipe is None else len(recipe.terms))
        for recipe in (first, second)
    ]
    return (counts[0] > counts[1]) - (counts[0] < counts[1])


def _named(terms: Set[str]) -> str:
    return " and ".join(words for term, words in SIGNALS.items() if term in terms)
