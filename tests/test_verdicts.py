"""The words of the report follow from the numbers, and say what they cannot say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from stillroom.analysis import evidence as evidence_module
from stillroom.analysis.evidence import Evidence, _verdict
from stillroom.analysis.questions import HELPS, PLACEBO, WHITE_BOX, Recipe, question_of
from stillroom.analysis.statistics import Comparison, detectable_by_signs
from stillroom.analysis.verdicts import Needed, what_it_takes
from stillroom.analysis.verdicts import answer_questions as answers_from
from stillroom.config import GROUPS, Analysis

SEEDS = tuple(range(7))
ANALYSIS = Analysis(simple_tasks=("easy",), hard_tasks=("hard",), equivalence_margin=0.02)
NOISE = np.array([0.001, -0.001, 0.002, -0.002, 0.0005, -0.0005, 0.0])


def frame(effects, seeds=SEEDS, drop=()):
    """One row a trial; `effects[group] = (easy, hard)` is added to 0.5, with a little noise that differs by group."""
    rows = []
    for number, (group, (easy, hard)) in enumerate(effects.items()):
        for seed in seeds:
            if (group, seed) in drop:
                continue
            noise = float(np.roll(NOISE, number)[seed % 7])
            values = {"easy": 0.5 + easy + noise, "hard": 0.5 + hard + 3 * noise}
            row = {f"validation_accuracy_{task}": value for task, value in values.items()}
            mean = sum(values.values()) / 2
            rows.append({"config/distill_type": group, "config/seed": seed, "validation_accuracy": mean, **row})
    return pd.DataFrame(rows)


def accuracies(table):
    """The table's columns by measure, then by group and seed."""
    trials = list(zip(table["config/distill_type"], table["config/seed"], strict=True))
    columns = {"all": "validation_accuracy"} | {task: f"validation_accuracy_{task}" for task in ("easy", "hard")}
    return {measure: dict(zip(trials, table[column], strict=True)) for measure, column in columns.items()}


NOTHING = dict.fromkeys(("black_box", "hidden", "attention", "combined"), (0.0, 0.0))


def recipe(*terms, **settings):
    """A group of these terms with plain settings."""
    return Recipe({term: settings.get(term, {}) for term in terms})


RECIPES = {name: recipe(*group.terms) for name, group in GROUPS.items()}
COMBINED = "Does combining the signals help?"
WHICH = "Hidden states or attention: which is worth more?"
TASKS = "Does the benefit depend on the task?"
HYPOTHESIS = "The hypothesis: alike on simple tasks, white-box better on hard ones"


def evidence(table, analysis, seeds, groups=None, **more):
    """The evidence of a table alone, all its groups planned."""
    planned = groups or {name: RECIPES[name] for name in dict.fromkeys(table["config/distill_type"])}
    return Evidence(accuracies(table), analysis, tuple(seeds), planned, {}, **more)


def answer_questions(table, analysis, seeds, groups=None, **more):
    """The answers from a table alone, by question."""
    return {answer.question: answer for answer in answers_from(evidence(table, analysis, seeds, groups, **more))}


def verdicts(answers, question):
    """Verdicts of one answer, by (first, measure)."""
    return {(f.comparison.first, f.comparison.measure): f.verdict for f in answers[question].findings}


def test_a_hypothesis_that_holds_is_said_to_hold():
    """Alike on the simple task, better on the hard one."""
    effects = {**NOTHING, "hidden": (0, 0.1), "attention": (0, 0.1), "combined": (0, 0.2)}
    answers = answer_questions(frame(effects), ANALYSIS, SEEDS)
    white = verdicts(answers, WHITE_BOX)
    assert {white[group, "all"] for group in ("hidden", "attention", "combined")} == {"improves"}
    assert (white["hidden", "easy"], white["hidden", "hard"]) == ("equivalent", "improves")
    assert verdicts(answers, COMBINED)["combined", "all"] == "improves"
    assert verdicts(answers, COMBINED)["combined", "easy"] == "equivalent"
    says = "Yes: hidden (+5.0 points), attention (+5.0 points) and combined (+10.0 points) beat black_box."
    assert answers[WHITE_BOX].short == says
    assert "the benefit differs between tasks" in answers[TASKS].sentences[0]
    assert answers[HYPOTHESIS].short.startswith("Supported")


def test_a_hypothesis_that_fails_is_said_to_fail():
    """A white-box group that is worse on a hard task contradicts it."""
    answers = answer_questions(frame({**NOTHING, "hidden": (0, -0.1)}), ANALYSIS, SEEDS)
    assert verdicts(answers, WHITE_BOX)["hidden", "all"] == "worse"
    says = "No: hidden (−5.0 points) is worse than black_box; attention ("
    assert answers[WHITE_BOX].short.startswith(says)
    assert answers[HYPOTHESIS].short.startswith("Contradicted by hidden on hard (worse), attention on hard")


@pytest.mark.parametrize("level", [-0.49, 0.49])
def test_a_hypothesis_is_not_contradicted_where_there_is_no_room_to_gain(level):
    """A hard task that no group has learnt, or that all can do, makes groups equivalent whatever they learnt."""
    effects = dict.fromkeys(NOTHING, (0.0, level))
    answers = answer_questions(frame(effects), ANALYSIS, SEEDS)
    assert verdicts(answers, WHITE_BOX)["hidden", "hard"] == "equivalent"
    says = "Not known: 3 of 6 declared contrasts are as it predicts, and none contradicts it."
    assert answers[HYPOTHESIS].short == says
    one_learns = answer_questions(frame({**effects, "combined": (0, 0.8 * level)}), ANALYSIS, SEEDS)
    assert one_learns[HYPOTHESIS].short.startswith("Contradicted by ")
    assert "hidden on hard (equivalent)" in one_learns[HYPOTHESIS].short


def test_no_difference_is_not_called_equality_without_a_test():
    """Equivalent only within the declared margin; otherwise no evidence, with the seeds it would take."""
    answers = answer_questions(frame(NOTHING), ANALYSIS, SEEDS)
    assert set(verdicts(answers, WHITE_BOX).values()) == {"equivalent"}
    assert answers[WHITE_BOX].short.startswith("No: ")
    strict = ANALYSIS.model_copy(update={"equivalence_margin": 0.0001})
    noisy = answer_questions(frame(NOTHING), strict, SEEDS)
    assert set(verdicts(noisy, WHITE_BOX).values()) == {"no evidence of a difference"}
    assert noisy[WHITE_BOX].short.startswith("Not shown: there is no evidence that hidden")


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)])
def test_too_few_seeds_give_no_verdict_and_say_how_many_it_takes(seeds):
    """Adjusted over three contrasts fewer than seven seeds cannot reach 0.05, however large the effect; seven can."""
    effects = {**NOTHING, "hidden": (0.3, 0.3)}
    answer = answer_questions(frame(effects, seeds), ANALYSIS, seeds)[WHITE_BOX]
    hidden = answer.findings[0]
    assert hidden.verdict == "undecided"
    assert f"with {len(seeds)} seed" in hidden.sentence
    assert "adjusted over 3 contrasts, cannot reach 0.05 with fewer than 7" in hidden.sentence
    assert answer.short.startswith("Not known: ")
    assert "these runs cannot tell hidden (" in answer.short
    open_ = evidence(frame(effects, seeds), ANALYSIS, seeds)
    needed = what_it_takes(open_, answers_from(open_))
    assert needed.seeds == tuple(range(7))
    assert needed.says[0].endswith(
        "no result could reach p ≤ 0.05 after Holm's adjustment over 3 contrasts: that takes 7 seeds."
    )
    whole = evidence(frame(effects, range(7)), ANALYSIS, range(7))
    answers = answers_from(whole)
    assert answers[0].findings[0].verdict == "improves"
    assert not any("no result could reach" in said for said in what_it_takes(whole, answers).says)


def test_a_missing_trial_stops_verdicts_unless_the_study_declares_otherwise():
    """Never dropped in silence: no verdict by default; with the declared rule, said beside it."""
    effects = {**NOTHING, "hidden": (0.1, 0.1), "attention": (0.1, 0.1), "combined": (0.1, 0.1)}
    table = frame(effects, range(8), drop={("hidden", 3)})
    refused = answer_questions(table, ANALYSIS, range(8))[WHITE_BOX]
    assert {f.verdict for f in refused.findings} == {"undecided"}
    assert "hidden seed 3" in refused.sentences[0]
    refusing = evidence(table, ANALYSIS, range(8))
    says = what_it_takes(refusing, answers_from(refusing))
    assert says.says[0] == "6 comparisons are waiting for missing trials; run the same command again to train them."
    assert says.seeds == ()
    common = ANALYSIS.model_copy(update={"incomplete": "common_seeds"})
    given = answer_questions(table, common, range(8))[WHITE_BOX]
    assert given.findings[0].comparison.seeds == 7
    assert "over 7 seeds, since trials are missing" in given.sentences[0]


def test_a_diverged_trial_is_a_missing_one():
    """A NaN accuracy is not averaged away."""
    table = frame(NOTHING)
    table.loc[0, "validation_accuracy"] = np.nan
    found = verdicts(answer_questions(table, ANALYSIS, SEEDS), WHITE_BOX)
    assert {verdict for (_, measure), verdict in found.items() if measure == "all"} == {"undecided"}


ONE = {"task": {"weight": 1.0}, "kd": {"divergence": "forward_kl"}, "hidden": {"layers": [["last", "last"]]}}


@pytest.mark.parametrize(
    ("first", "second", "question", "yes"),
    [
        (recipe("task", "kd"), recipe("task"), HELPS, 1),
        (recipe("task"), recipe("task", "hidden"), HELPS, -1),
        (recipe("task"), None, HELPS, 1),
        (recipe("task", "kd", "values"), recipe("task", "kd"), WHITE_BOX, 1),
        (recipe("task", "kd"), recipe("task", "hidden"), WHITE_BOX, -1),
        (recipe("task", "kd", "hidden"), recipe("task", "kd", "attention"), WHICH, 0),
        (recipe("task", "kd", "attention"), recipe("task", "hidden"), WHICH, 0),
        (recipe("task", "values"), recipe("task", "hidden"), "Hidden states or value relations: which", 0),
        (recipe("kd", "hidden", "values"), recipe("kd", "hidden"), COMBINED, 1),
        (recipe("kd", "hidden"), recipe("kd", "attention", "hidden"), COMBINED, -1),
        (recipe("task", "kd", "hidden"), recipe("task", "hidden"), "Do the teacher's predictions help beside", 1),
        (recipe("task", "kd"), recipe("kd"), "Do the labels help beside the other signals?", 1),
        (recipe("task", "kd", kd={"divergence": "reverse_kl"}), recipe("task", "kd", kd={"divergence": "forward_kl"}),
         "Does it matter how a signal is used: kd.divergence?", 0),
        (Recipe(ONE), Recipe({**ONE, "hidden": {"layers": [[8, 4]]}}), "Does it matter how", 0),
        (recipe("task", task={"targets": "teacher"}), recipe("task"), HELPS, 1),
        (recipe("task", task={"targets": "teacher"}), recipe("task", "kd"), "The teacher's answers as text, or its", 0),
        (Recipe(ONE), Recipe(ONE, frozenset({"hidden"})), PLACEBO, 1),
        (Recipe(ONE, frozenset({"hidden"})), recipe("task", "kd"), PLACEBO, 0),
    ],
)  # fmt: skip
def test_a_contrast_is_filed_by_what_its_groups_are_trained_with(first, second, question, yes):
    """Whatever they are called: no contrast without a white-box term stands under the white-box question."""
    found = question_of(first, second)
    assert found.text.startswith(question)
    assert found.yes == yes


def test_a_study_of_other_signals_is_asked_its_own_questions():
    """Groups named as one likes: the questions are those of their terms, and what none asks is not on the page."""
    plain, other = recipe("task", "kd"), recipe("task", "kd", kd={"divergence": "reverse_kl"})
    groups = {"labels": recipe("task"), "a": plain, "b": other, "v": recipe("task", "kd", "values")}
    analysis = ANALYSIS.model_copy(update={"primary": (("v", "a"), ("b", "a")), "secondary": ()})
    effects = {"labels": (-0.1, -0.1), "a": (0, 0), "b": (0, 0), "v": (0.1, 0.1)}
    answers = answer_questions(frame(effects), analysis, SEEDS, groups)
    assert list(answers) == [
        HELPS, WHITE_BOX, "Does it matter how a signal is used: kd.divergence?", TASKS, HYPOTHESIS
    ]  # fmt: skip
    assert {first for first, _ in verdicts(answers, WHITE_BOX)} == {"v"}
    assert {first for first, _ in verdicts(answers, HELPS)} == {"a", "b"}  # both are compared with by the study
    undeclared = ANALYSIS.model_copy(update={"primary": (("v", "a"),), "secondary": ()})
    assert {first for first, _ in verdicts(answer_questions(frame(effects), undeclared, SEEDS, groups), HELPS)} == {"a"}


def test_whether_distilling_helps_is_asked_of_every_study():
    """Black box against labels alone is a family of one, each group against the student before training another."""
    effects = {"task_only": (0, 0), **NOTHING, "black_box": (0.1, 0.1), "hidden": (-0.2, -0.2)}
    table = frame(effects)
    before = pd.DataFrame(
        [{**row, "config/distill_type": "before"} for row in frame({"before": (-0.1, -0.1)}).to_dict("records")]
    )
    for column in [name for name in before if name.startswith("validation")]:
        before[column] = 0.4
    both = pd.concat([table, before])
    groups = {name: RECIPES[name] for name in effects}
    answers = answer_questions(both, ANALYSIS, SEEDS, groups, student="before")
    found = {
        (f.comparison.first, f.comparison.second): f for f in answers[HELPS].findings if f.comparison.measure == "all"
    }
    assert set(found) == {("black_box", "task_only"), *((group, "before") for group in effects)}
    assert {f.family for f in found.values()} == {1}
    assert found["black_box", "task_only"].verdict == "improves"
    assert found["hidden", "before"].verdict == "worse"
    assert found["hidden", "before"].comparison.difference == pytest.approx(-0.1)
    assert answers[HELPS].short.startswith(
        "Yes: black_box (+10.0 points) beats task_only; task_only (+10.0 points), bla"
    )
    assert answers[HELPS].short.endswith("hidden (−10.0 points) is worse than the before.")
    primary = [f for f in answers[WHITE_BOX].findings if f.comparison.measure == "all"]
    assert {f.family for f in primary} == {3}


def test_no_gain_over_the_student_before_training_says_that_distilling_helps():
    """The labels may account for all of it; without a black box, every distilled group is set against them."""
    before = {("before", seed): 0.4 for seed in SEEDS}

    def asked(*names):
        table = frame(dict.fromkeys(names, (0.2, 0.2)))
        values = {measure: {**found, **before} for measure, found in accuracies(table).items()}
        groups = {name: RECIPES[name] for name in names}
        answers = answers_from(Evidence(values, ANALYSIS, SEEDS, groups, {}, student="before"))
        return next(answer for answer in answers if answer.question == HELPS)

    for groups in (["task_only"], ["black_box", "hidden"]):
        says = "Not known, since no group is compared with one that is trained on the labels alone: "
        assert asked(*groups).short.startswith(says + groups[0])
    whole = asked("task_only", "hidden", "attention")
    contrasts = {(f.comparison.first, f.comparison.second, f.family) for f in whole.findings}
    assert contrasts >= {("hidden", "task_only", 2), ("attention", "task_only", 2)}
    assert whole.short.startswith("No: hidden")


def test_advice_never_asks_for_the_seeds_that_a_study_has():
    """Seven seeds that show nothing are not enough, whatever the size of the effect seen in them."""
    table = frame({"black_box": (0, 0), "hidden": (0, 0)})
    seen = np.array([0.05, 0.05, 0.06, 0.05, 0.04, 0.05, -0.001])
    values = {("hidden", seed): 0.5 + seen[seed] for seed in SEEDS} | {("black_box", seed): 0.5 for seed in SEEDS}
    analysis = ANALYSIS.model_copy(update={"primary": (("hidden", "black_box"),), "secondary": (), "alpha": 0.0157})
    only = replace(evidence(table, analysis, SEEDS), accuracies={"all": values})
    (answer, *_) = answers_from(only)
    assert answer.findings[0].verdict == "no evidence of a difference"
    assert "power takes" not in answer.sentences[0]
    assert what_it_takes(only, [answer]) == Needed((), ())
    strict = replace(only, analysis=analysis.model_copy(update={"alpha": 1e-6}))
    assert what_it_takes(strict, answers_from(strict)).seeds == (), "no study may have 21 seeds"


def test_equivalence_is_told_with_the_interval_that_it_is_decided_by():
    """TOST at 5 % looks at the 90 % interval, which lies within the margin; one of 95 % need not."""
    answers = answer_questions(frame(NOTHING), ANALYSIS, SEEDS)
    assert "90 % interval" in answers[WHITE_BOX].sentences[0]
    assert "95 % interval" not in answers[WHITE_BOX].sentences[0]


def test_an_interaction_follows_the_rules_of_its_family():
    """Adjusted over the primary contrasts; and no verdict where a trial of one of them is missing."""
    table = frame({**NOTHING, "hidden": (0.0, 0.1)}, range(6))
    assert (
        "undecided with 6 seeds: the exact test, adjusted over 3"
        in answer_questions(table, ANALYSIS, range(6))[TASKS].sentences[1]
    )
    table = frame({**NOTHING, "hidden": (0.0, 0.1)}, drop={("combined", 3)})
    answer = answer_questions(table, ANALYSIS, SEEDS)[TASKS]
    assert answer.short.startswith("It is not known for hidden")
    assert "trials are missing (combined seed 3)" in answer.sentences[0]
    whole = answer_questions(frame({**NOTHING, "hidden": (0.0, 0.1)}), ANALYSIS, SEEDS)[TASKS]
    assert whole.sentences[0].endswith("the benefit differs between tasks (interaction, adjusted p = 0.047).")


def test_questions_without_their_groups_are_not_asked():
    """A study of other groups still has a report."""
    assert answer_questions(frame({"black_box": (0, 0)}), ANALYSIS, SEEDS) == {}


def test_a_group_without_a_finished_trial_is_missing_not_absent():
    """No contrast is left out because nothing of a planned group is there yet."""
    table = frame({group: NOTHING[group] for group in ("black_box", "hidden", "attention")})
    planned = {name: RECIPES[name] for name in NOTHING}
    answer = answer_questions(table, ANALYSIS, SEEDS, planned)[WHITE_BOX]
    assert [f.comparison.first for f in answer.findings[:3]] == ["hidden", "attention", "combined"]
    assert {f.verdict for f in answer.findings} == {"undecided"}
    assert "combined seed 0" in answer.sentences[0]


def test_findings_carry_their_differences_and_a_bootstrap_over_examples():
    """The seeds' differences are those of the table; the bootstrap reads predictions, and one task's for a task."""
    rng = np.random.default_rng(1)
    rows, predictions = [], {}
    for group, chance in (("black_box", 0.5), ("hidden", 0.7)):
        for seed in SEEDS:
            right = rng.random(80) < chance
            tasks = np.where(np.arange(80) < 30, "easy", "hard")
            predictions[group, seed] = pd.DataFrame({"task": tasks, "correct": right})
            rows.append(
                {
                    "config/distill_type": group,
                    "config/seed": seed,
                    "validation_accuracy": right.mean(),
                    "validation_accuracy_easy": right[:30].mean(),
                    "validation_accuracy_hard": right[30:].mean(),
                }
            )
    table = pd.DataFrame(rows)
    evidence = Evidence(
        accuracies(table), ANALYSIS, SEEDS, {n: RECIPES[n] for n in ("black_box", "hidden")}, predictions
    )
    for measure, chosen in (("all", slice(None)), ("easy", slice(30)), ("hard", slice(30, None))):
        (finding,) = evidence.findings([[("hidden", "black_box")]], measure)
        means = {
            seed: predictions["hidden", seed]["correct"][chosen].mean()
            - predictions["black_box", seed]["correct"][chosen].mean()
            for seed in SEEDS
        }
        assert finding.by_seed == pytest.approx(means)
        low, high = finding.bootstrap
        assert low < finding.comparison.difference < high
        assert high - low > 0.05  # 30 to 80 examples leave more doubt than seven seeds' spread alone


@pytest.mark.parametrize(
    ("adjusted", "equivalence", "expected"),
    [
        (0.04, 0.9, "improves"),
        (0.04, 0.001, "improves"),  # small but shown: it comes before equivalence
        (0.06, 0.04, "equivalent"),
        (0.06, 0.06, "no evidence of a difference"),
        (0.06, float("nan"), "no evidence of a difference"),
        (float("nan"), 0.001, "undecided"),
    ],
)
def test_verdicts_turn_at_alpha(adjusted, equivalence, expected):
    """On the adjusted p first, whatever the raw one; then on that of TOST, at the same level."""
    row = Comparison("a", "b", "all", 7, 0.01, 0.0, 0.02, 0.02, adjusted, 1.0, 1.27, 2 / 2**7)
    assert _verdict(row, 3, equivalence, ANALYSIS) == expected
    if expected == "improves":
        assert _verdict(replace(row, difference=-0.01), 3, equivalence, ANALYSIS) == "worse"


def test_a_hypothesis_is_supported_by_all_its_contrasts_or_not_at_all():
    """One hard contrast without a verdict leaves it undecided, however the others are."""
    analysis = ANALYSIS.model_copy(update={"equivalence_margin": 0.0025})
    answers = answer_questions(frame({**NOTHING, "hidden": (0, 0.1), "combined": (0, 0.1)}), analysis, SEEDS)
    found = verdicts(answers, WHITE_BOX)
    assert {found[group, "easy"] for group in ("hidden", "attention", "combined")} == {"equivalent"}
    assert {found[group, "hard"] for group in ("hidden", "combined")} == {"improves"}
    assert found["attention", "hard"] == "no evidence of a difference"
    assert answers[HYPOTHESIS].short.startswith("Not known: 5 of 6 declared contrasts are as it predicts")


SIZES = {"easy": 40, "hard": 160}


def simulated(rng, effects, analysis=ANALYSIS, spread=0.03):
    """Verdicts of one study that was never trained: of each seed, groups that share its luck and have their own.

    Each answers so many of a task's examples right, by chance; `effects` are added to an even chance.
    """
    trials, counted = [(group, seed) for seed in SEEDS for group in NOTHING], dict.fromkeys(SIZES)
    for task, size in SIZES.items():
        luck = rng.normal(0, spread, len(SEEDS))
        chances = [0.5 + luck[seed] + rng.normal(0, spread) + effects.get(group, 0.0) for group, seed in trials]
        counted[task] = rng.binomial(size, chances)
    measures = {task: right / SIZES[task] for task, right in counted.items()}
    measures = {"all": sum(counted.values()) / sum(SIZES.values()), **measures}
    table = {name: dict(zip(trials, map(float, values), strict=True)) for name, values in measures.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence_module, "seeds_needed", lambda *a, **k: None)  # words alone, and most of the time
        found = answers_from(Evidence(table, analysis, SEEDS, {name: RECIPES[name] for name in NOTHING}, {}))
    return {answer.question: answer for answer in found}


PRIMARY = ANALYSIS.model_copy(update={"secondary": ()})

DIFFERENCE = (2 * 0.25 / sum(SIZES.values()) + 2 * 0.03**2 * sum((n / 200) ** 2 for n in SIZES.values())) ** 0.5
"""Standard deviation over seeds of the difference of two such groups on all examples, nearly."""


def rate_is(hits, studies, expected, alternative):
    """Whether so many of the studies are compatible with a rate that is `expected` at most, or at least."""
    return binomtest(hits, studies, expected, alternative).pvalue > 0.005


@pytest.mark.slow
def test_studies_without_an_effect_get_no_verdict_of_one_more_often_than_they_may():
    """From accuracies to the report's words: a family's false claims, and an interaction's, are 5 % at most."""
    rng, studies, loud = np.random.default_rng(0), 400, Counter()
    for _ in range(studies):
        answers = simulated(rng, {})
        families = {question: answers[question] for question in (WHITE_BOX, WHICH, COMBINED)}
        for name, answer in families.items():
            for measure in ("all", *SIZES):
                found = {f.verdict for f in answer.findings if f.comparison.measure == measure}
                loud[name, measure] += bool(found & {"improves", "worse"})
        loud["interaction"] += any("the benefit differs" in sentence for sentence in answers[TASKS].sentences)
    assert all(rate_is(hits, studies, ANALYSIS.alpha, "greater") for hits in loud.values()), loud


@pytest.mark.slow
def test_studies_with_an_effect_of_the_planned_size_find_it_as_often_as_planned():
    """What `plan` calls detectable is found, in the right direction, by four studies in five; and margins hold."""
    rng, studies = np.random.default_rng(1), 200
    effect = detectable_by_signs(len(SEEDS), ANALYSIS.alpha, 3) * DIFFERENCE
    for sign, verdict in ((1, "improves"), (-1, "worse")):
        found = [simulated(rng, {"hidden": sign * effect}, PRIMARY)[WHITE_BOX].findings[0] for _ in range(studies)]
        assert {f.comparison.first for f in found} == {"hidden"}
        assert np.mean([f.verdict == verdict for f in found]) == pytest.approx(0.8, abs=0.09)
        assert not any(f.verdict in {"improves", "worse"} - {verdict} for f in found)
    at_the_margin = dict.fromkeys(("hidden", "attention", "combined"), ANALYSIS.equivalence_margin)
    found = [simulated(rng, at_the_margin, PRIMARY, 0.0)[WHITE_BOX].findings[0] for _ in range(studies)]
    alike = sum(finding.verdict == "equivalent" for finding in found)
    assert rate_is(alike, studies, ANALYSIS.alpha, "greater")
