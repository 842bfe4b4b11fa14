"""`docs/elsewhere.md`: the published numbers of a run of the same outline, through stillroom's own statistics."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from stillroom.analysis.numbers import interval, p_value, points
from stillroom.analysis.questions import recipes
from stillroom.analysis.sameness import identical_groups
from stillroom.analysis.verdicts import Evidence, answer_questions
from stillroom.config import Analysis
from stillroom.studies import load_study

PAGE = re.sub(r"\s+", " ", (Path(__file__).parent.parent / "docs" / "elsewhere.md").read_text("utf-8"))
SEEDS = range(7)
TASKS = ("sst2", "mmlu", "gsm8k")

# latestsummary.csv of j8ckfi/white-box-vs-black-box-distillation at dd66c0f, last epoch, seeds 0 to 6. The file gives
# shares; these are the numbers of examples whose quotients they are.
SIZES = {
    "sst2": (165, 184, 191, 195, 203, 205, 201),
    "mmlu": (69, 70, 74, 72, 64, 65, 74),
    "gsm8k": (82, 80, 67, 67, 60, 69, 63),
}
RIGHT = {
    "black_box": {
        "sst2": (152, 176, 180, 188, 190, 188, 167),
        "mmlu": (65, 66, 71, 68, 62, 62, 71),
        "gsm8k": (81, 79, 66, 65, 58, 67, 58),
    },
    "hidden": {
        "sst2": (155, 172, 181, 187, 192, 186, 190),
        "mmlu": (66, 65, 71, 64, 61, 62, 71),
        "gsm8k": (81, 79, 66, 65, 56, 66, 61),
    },
    "attention": {
        "sst2": (154, 177, 182, 189, 189, 188, 195),
        "mmlu": (68, 67, 70, 68, 61, 62, 73),
        "gsm8k": (80, 79, 66, 64, 58, 66, 61),
    },
    "combined": {
        "sst2": (154, 177, 182, 189, 189, 188, 195),
        "mmlu": (68, 67, 70, 68, 61, 62, 73),
        "gsm8k": (80, 79, 66, 64, 58, 66, 61),
    },
}
ACCURACY = {  # validation_accuracy
    "black_box": (0.943038, 0.961078, 0.954819, 0.961078, 0.948012, 0.935103, 0.875740),
    "hidden": (0.955696, 0.946108, 0.957831, 0.946108, 0.944954, 0.926254, 0.952663),
    "attention": (0.955696, 0.967066, 0.957831, 0.961078, 0.941896, 0.932153, 0.973373),
    "combined": (0.955696, 0.967066, 0.957831, 0.961078, 0.941896, 0.932153, 0.973373),
}
LOSS = {  # train_loss
    "black_box": (
        0.0626958638883,
        0.0154989334532,
        0.0236817035578,
        0.0164671815591,
        0.0184698734187,
        0.0191774561926,
        0.0644074454525,
    ),
    "hidden": (
        0.0426580361303,
        0.0264890234785,
        0.0272320844800,
        0.0185124747039,
        0.0445842357154,
        0.0249582047995,
        0.0227907942939,
    ),
    "attention": (
        0.0247726294444,
        0.0370056844000,
        0.0404565815393,
        0.0285059839941,
        0.0256682868083,
        0.0313613277855,
        0.0149404329394,
    ),
    "combined": (
        0.0247726294444,
        0.0370056844000,
        0.0404565815393,
        0.0285059839941,
        0.0256682868083,
        0.0313613277855,
        0.0149404329394,
    ),
}


def accuracies(tasks=TASKS):
    """By group one value a seed, over the examples of these tasks together."""
    sizes = np.sum([SIZES[task] for task in tasks], axis=0)
    return {group: np.sum([right[task] for task in tasks], axis=0) / sizes for group, right in RIGHT.items()}


@pytest.fixture(scope="module")
def study():
    """The shipped study of the same two models; its groups, contrasts and margin are the outline's."""
    return load_study("paper-llama2").model_dump(mode="json")


@pytest.fixture(scope="module")
def identical(study):
    """What `stillroom report` finds the same, of groups that were to differ."""
    groups = recipes(study)
    results = [
        {
            "config": {"seed": seed, "distill_type": group, "objective": groups[group].terms},
            "epochs": [{"metrics": [{"split": "train", "task": None, "measure": "task_loss", "value": loss}]}],
        }
        for group, losses in LOSS.items()
        for seed, loss in enumerate(losses)
    ]
    return identical_groups(results)


@pytest.fixture(scope="module")
def findings(study, identical):
    """Each contrast on each measure, as the report would judge it."""
    measures = {"all": TASKS, **{task: (task,) for task in TASKS}}
    evidence = Evidence(
        accuracies={
            name: {(group, seed): by_seed[seed] for group, by_seed in accuracies(tasks).items() for seed in SEEDS}
            for name, tasks in measures.items()
        },
        analysis=Analysis(**study["analysis"]),
        seeds=list(SEEDS),
        groups=recipes(study),
        predictions={},
        identical=identical,
    )
    found = [finding for answer in answer_questions(evidence) for finding in answer.findings]
    return {(f.comparison.first, f.comparison.second, f.comparison.measure): f for f in found}


def test_the_counts_give_the_published_accuracies():
    """Whole numbers of examples explain every share of the file, so nothing here was copied wrongly."""
    for group, values in accuracies().items():
        np.testing.assert_allclose(values, ACCURACY[group], atol=6e-7)
    for seed in SEEDS:
        cells = (f"{100 * values[seed]:.1f}" for values in accuracies().values())
        assert f"| {seed} | {' | '.join(cells)} |" in PAGE
    assert f"| mean | {' | '.join(f'{100 * values.mean():.1f}' for values in accuracies().values())} |" in PAGE


def test_the_report_finds_two_groups_to_be_one(identical, findings):
    """Attention and combined are the same at every seed: an error, and no verdict between them."""
    assert identical == {("attention", "combined"): list(SEEDS)}
    assert {findings["combined", "attention", name].verdict for name in ("all", *TASKS)} == {"undecided"}
    listed = ", ".join(map(str, SEEDS))
    assert f"“The trials of attention and combined are identical at every epoch (seed {listed})" in PAGE


def test_no_white_box_group_is_shown_to_be_better(findings):
    """The page's table is what the declared contrasts give, and the paper's p is none of theirs."""
    for group in ("hidden", "attention", "combined"):
        found = findings[group, "black_box", "all"]
        row = found.comparison
        assert found.verdict == "no evidence of a difference"
        verdict = "none: identical to attention" if group == "combined" else found.verdict
        figures = (
            f"{points(row.difference)} | {interval(row.low, row.high)} | {p_value(row.p)} | {p_value(row.adjusted_p)}"
        )
        assert f"| {group} | {figures} | {verdict} |" in PAGE
        assert findings[group, "black_box", "gsm8k"].verdict == "equivalent"
    assert (
        "to detect an effect of this size (d_z = 0.43) with 80 % power takes 60 seeds"
        in findings["attention", "black_box", "all"].sentence
    )
    assert "An effect of the size seen (d_z = 0.43) would take 60 seeds" in PAGE
    first, second = accuracies()["attention"], accuracies()["black_box"]
    apart, paired = stats.ttest_ind(first, second), stats.ttest_rel(first, second)
    assert f"is {apart.statistic:.2f} (p = {apart.pvalue:.3f})" in PAGE
    assert f"the paired one {paired.statistic:.2f} (p = {paired.pvalue:.3f})" in PAGE


def test_one_seed_carries_the_difference():
    """Without the trial that broke down in its first epoch, groups and spreads are alike."""
    first, second = accuracies()["attention"], accuracies()["black_box"]
    assert f"at {100 * 27 / 338:.0f} % accuracy after its first epoch and ended at {100 * second[6]:.1f} %" in PAGE
    without = first[:6] - second[:6]
    assert f"Without that seed the difference is {points(without.mean())} points" in PAGE
    spread, remaining, other = (100 * values.std(ddof=1) for values in (second, second[:6], first[:6]))
    assert f"falls from {spread:.1f} points to {remaining:.1f}, beside attention's {other:.1f}" in PAGE
