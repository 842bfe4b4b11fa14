"""The study's questions and its hypothesis, answered in words that follow from the numbers.

The verdict and the sentence of a single contrast are in `evidence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stillroom.analysis.evidence import Evidence, Finding, Pair, never_took_effect
from stillroom.analysis.numbers import listed, points
from stillroom.analysis.questions import COMBINING, HELPS, PLACEBO, WHITE_BOX
from stillroom.analysis.statistics import fewest_seeds, seeds_needed
from stillroom.config import Analysis

MOST_SEEDS = 20
"""Seeds that a study may have: `sweep.seeds`."""


@dataclass(frozen=True)
class Answer:
    """A question, its answer in one sentence and contrast by contrast, and the findings behind it."""

    question: str
    short: str
    sentences: tuple[str, ...]
    findings: tuple[Finding, ...]
    """Over all tasks together and by task; none where they are another question's."""


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
        *_hypothesis(white, evidence),
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
    contrasts with it never decide on yes or no, since the labels alone may account for all of a gain over it.
    """
    deciding = [f for f in findings if f.comparison.second != student]
    lead = _lead([(f.verdict, yes[_groups(f)]) for f in deciding]) if deciding else _NO_CONTROL
    parts = [
        part
        for subset in (deciding, [f for f in findings if f not in deciding])
        for verdict in _VERDICTS
        for part in _said([f for f in subset if f.verdict == verdict], verdict, analysis, len(subset), student)
    ]
    said = "; ".join(parts)
    if lead:
        return f"{lead}: {said}."
    begins_with_a_group = said.startswith(tuple(f.comparison.first for f in findings))
    return f"{said}." if begins_with_a_group else f"{said[:1].upper()}{said[1:]}."


_NO_CONTROL = "Not known, since no group is compared with one that is trained on the labels alone"

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
        comparisons = [f.comparison for f in findings if f.comparison.second == second]
        shown = [row.first + ("" if row.seeds == 0 else f" ({points(row.difference)} points)") for row in comparisons]
        several, names = len(comparisons) > 1, listed(shown)
        if 3 < len(comparisons) == of and all(row.seeds for row in comparisons):
            least, most = (pick(row.difference for row in comparisons) for pick in (min, max))
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
            each = names.replace("each of", "any of", 1)
            yield f"there is no evidence that {each} {'differ' if several else 'differs'} from {second}"


def _answer(question: str, findings: Sequence[Finding], evidence: Evidence, yes: Mapping[Pair, int]) -> Answer:
    """The answer is read off the accuracy over all tasks together; the findings hold the tasks too."""
    overall = [finding for finding in findings if finding.comparison.measure == evidence.overall]
    short = plain_answer(overall, yes, evidence.analysis, evidence.student)
    return Answer(question, short, tuple(f"{f.sentence}." for f in overall), tuple(findings))


def _task_dependence(evidence: Evidence) -> list[Answer]:
    question = "Does the benefit depend on the task?"
    brief: dict[str, list[str]] = {}
    sentences = []
    for (first, second), interaction in evidence.interactions(evidence.primary).items():
        if alike := evidence.alike((first, second)):
            verdict, more = "undecided", never_took_effect(alike)
        else:
            verdict, more = interaction.verdict(evidence.analysis)
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


def _hypothesis(findings: Sequence[Finding], evidence: Evidence) -> list[Answer]:
    """`findings`: white box against black box, by task. Equivalence contradicts it only where there is room to gain."""
    analysis = evidence.analysis
    question = "The hypothesis: alike on simple tasks, white-box better on hard ones"
    simple = [f for f in findings if f.comparison.measure in analysis.simple_tasks]
    hard = [f for f in findings if f.comparison.measure in analysis.hard_tasks]
    if not simple or not hard:
        return []
    alike = all(f.verdict == "equivalent" for f in simple)
    better = all(f.verdict == "improves" for f in hard)
    against = [
        *(f for f in simple if f.verdict in ("improves", "worse")),
        *(f for f in hard if f.verdict == "worse"),
        *(f for f in hard if f.verdict == "equivalent" and not evidence.saturated(f.comparison.measure)),
    ]
    if alike and better:
        verdict = short = "Supported: every declared contrast is as it predicts"
    elif against:
        verdict = "Contradicted by at least one declared contrast"
        named = listed([f"{f.comparison.first} on {f.comparison.measure} ({_WORDS[f.verdict]})" for f in against])
        short = f"Contradicted by {named}"
    else:
        verdict = "Undecided: not every declared contrast has a verdict, and none contradicts it"
        settled = sum(f.verdict == "equivalent" for f in simple) + sum(f.verdict == "improves" for f in hard)
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
    if absent := [f for f in found if f.verdict == "undecided" and f.comparison.seeds < planned]:
        waiting = "1 comparison is" if len(absent) == 1 else f"{len(absent)} comparisons are"
        says.append(f"{waiting} waiting for missing trials; run the same command again to train them.")
    family = max((f.family for f in found if f.verdict == "undecided"), default=0)
    if family and (needed := fewest_seeds(analysis.alpha, family)) > planned:
        adjusted = f" after Holm's adjustment over {family} contrasts" if family > 1 else ""
        says.append(
            f"With {planned} seed{'s' if planned != 1 else ''} no result could reach p ≤ {analysis.alpha:g}{adjusted}: "
            f"that takes {needed} seeds."
        )
        least = needed if needed <= MOST_SEEDS else least
    wanted = [
        (f"{f.comparison.first} against {f.comparison.second}", n)
        for f in found
        if f.verdict.startswith("no evidence")
        and (n := seeds_needed(f.comparison.effect_size, analysis.alpha, contrasts=f.family))
        and n > planned
    ]
    if within := [(name, n) for name, n in wanted if n <= MOST_SEEDS]:
        several = listed([f"{n} seeds for {name}" for name, n in within])
        says.append(f"If a true difference equals the observed one, detecting it with 80 % power takes {several}.")
        least = max(least, *(n for _, n in within))
    if beyond := [name for name, n in wanted if n > MOST_SEEDS]:
        says.append(
            f"The observed difference of {listed(beyond)} is small relative to its spread: detecting it would take "
            f"more than the {MOST_SEEDS} seeds that a study may have. More validation examples make the spread smaller."
        )
    more = [seed for seed in range(planned + least) if seed not in evidence.seeds]
    return Needed(tuple(says), (*evidence.seeds, *more[: least - planned]) if least > planned else ())
