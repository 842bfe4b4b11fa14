"""Metrics of predictions against loops written from their definitions."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from stillroom.errors import UserError
from stillroom.evaluation.metrics import accuracy_metrics, agreement, by_column, by_key, calibration_error, column_names


def choices(*rows, task="quiz"):
    """Predictions of a choice task from (probabilities of the choices, gold index)."""
    table = []
    for number, (probabilities, gold) in enumerate(rows):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        table.append(
            {
                "example_id": f"{task}{number}",
                "task": task,
                "prediction": "ABCD"[best],
                "gold": "ABCD"[gold],
                "correct": best == gold,
                "correct_flexible": best == gold,
                "scores": [math.log(p) - 3.0 for p in probabilities],  # likelihoods of texts do not add up to 1
            }
        )
    return pd.DataFrame(table)


def generated(*right, task="arithmetic"):
    """Predictions of a generation task from whether each is right strictly and flexibly."""
    return pd.DataFrame(
        {"example_id": f"{task}{n}", "task": task, "prediction": str(n), "correct": strict, "correct_flexible": loose}
        for n, (strict, loose) in enumerate(right)
    )


def by_definition(predictions):
    """The error by a loop over bins and examples."""
    total = 0.0
    for low in range(10):
        inside = []
        for _, row in predictions.iterrows():
            share = max(math.exp(s) for s in row["scores"]) / sum(math.exp(s) for s in row["scores"])
            if low / 10 < share <= (low + 1) / 10:
                inside.append((share, row["correct"]))
        if inside:
            gap = sum(right for _, right in inside) / len(inside) - sum(share for share, _ in inside) / len(inside)
            total += len(inside) / len(predictions) * abs(gap)
    return total


def test_calibration_error_of_a_worked_example():
    """Two bins: 0.7 right half the time twice over, 0.95 right always: (2·0.2 + 1·0.05) / 3."""
    found = calibration_error(choices(([0.7, 0.3], 0), ([0.3, 0.7], 0), ([0.95, 0.05], 0)))
    assert found == pytest.approx((2 * 0.2 + 0.05) / 3)


def test_calibration_error_is_nought_when_as_right_as_sure():
    """Nine of ten right at 0.9; misses and hits of one bin cancel, those of two bins do not."""
    assert calibration_error(choices(*[([0.9, 0.1], 0)] * 9, ([0.9, 0.1], 1))) == pytest.approx(0, abs=1e-12)
    assert calibration_error(choices(([0.6, 0.4], 0), ([0.9, 0.1], 1))) == pytest.approx((0.4 + 0.9) / 2)


def test_calibration_error_is_the_sum_over_ten_bins():
    """On spread-out confidences, against the definition."""
    rows = []
    for n in range(60):
        weights = [1 + (7 * n + 3 * k) % 11 + (9 * n if k == n % 4 else 0) for k in range(4)]
        rows.append(([w / sum(weights) for w in weights], (n // 3) % 4))
    table = choices(*rows)
    assert 0.05 < calibration_error(table) < 0.95
    assert calibration_error(table) == pytest.approx(by_definition(table))


def test_bins_are_closed_above_and_no_predictions_are_an_error():
    """One half is in the fifth bin, one in the tenth; likelihoods far apart do not overflow."""
    assert calibration_error(choices(([0.5, 0.5], 0), ([0.55, 0.45], 1))) == pytest.approx((0.5 + 0.55) / 2)
    assert calibration_error(choices(([1 - 1e-12, 1e-12], 0), ([0.95, 0.05], 0))) == pytest.approx(0.025)
    certain = choices(([0.9, 0.1], 0)).assign(scores=[[-1.0, -2000.0]])
    assert calibration_error(certain) == 0
    with pytest.raises(UserError, match="no predictions"):
        calibration_error(choices(([0.5, 0.5], 0)).iloc[:0])


def test_metrics_are_shares_of_right_answers():
    """Over all examples, per task, the tasks' unweighted mean; each kind of task has its own extra."""
    quiz = choices(([0.7, 0.3], 0), ([0.3, 0.7], 0), ([0.95, 0.05], 0))
    table = pd.concat([quiz, generated((True, True), (False, True), (False, False), (False, False), (False, True))])
    metrics = accuracy_metrics(table, "test")
    assert by_key(metrics) == {
        ("test", None, "accuracy"): pytest.approx(3 / 8),
        ("test", None, "accuracy_macro"): pytest.approx((2 / 3 + 1 / 5) / 2),
        ("test", "quiz", "accuracy"): pytest.approx(2 / 3),
        ("test", "quiz", "calibration_error"): pytest.approx(0.15),
        ("test", "arithmetic", "accuracy"): pytest.approx(1 / 5),
        ("test", "arithmetic", "accuracy_flexible"): pytest.approx(3 / 5),
    }
    assert sorted(by_column(metrics)) == [
        "test_accuracy",
        "test_accuracy_arithmetic",
        "test_accuracy_arithmetic_flexible",
        "test_accuracy_macro",
        "test_accuracy_quiz",
        "test_ece_quiz",
    ]


def test_no_two_numbers_have_one_column_whatever_tasks_are_called():
    """Tasks named like a measure of another: each keeps a column, the one of all tasks together its own name."""
    keys = [("validation", None, measure) for measure in ("accuracy", "accuracy_macro")]
    keys += [("validation", task, "accuracy") for task in ("macro", "all", "accuracy", "x", "x_flexible")]
    keys += [("validation", task, "accuracy_flexible") for task in ("x", "x_flexible")]
    assert column_names(keys) == {
        ("validation", None, "accuracy"): "validation_accuracy",
        ("validation", None, "accuracy_macro"): "validation_accuracy_macro",
        ("validation", "macro", "accuracy"): "validation_accuracy:macro",
        ("validation", "all", "accuracy"): "validation_accuracy_all",
        ("validation", "accuracy", "accuracy"): "validation_accuracy_accuracy",
        ("validation", "x", "accuracy"): "validation_accuracy_x",
        ("validation", "x_flexible", "accuracy"): "validation_accuracy:x_flexible",
        ("validation", "x", "accuracy_flexible"): "validation_accuracy_flexible:x",
        ("validation", "x_flexible", "accuracy_flexible"): "validation_accuracy_x_flexible_flexible",
    }


def test_agreement_is_the_share_of_choices_that_are_the_teachers():
    """Wrong together counts, right or wrong alone does not; generation has no agreement; other examples are refused."""
    a, b, c = [0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.3, 0.1, 0.6]
    student = choices((a, 0), (b, 0), (a, 0), (b, 0), (a, 1))
    teacher = choices((a, 0), (b, 0), (b, 0), (c, 0), (a, 1))  # the last but one: both wrong, each in its way
    mood = choices(([0.7, 0.3], 0), ([0.3, 0.7], 0), task="sentiment")
    words = generated((True, True))
    found = agreement(pd.concat([student, words, mood]), pd.concat([teacher, words, mood]))
    assert found == {"quiz": 0.6, "sentiment": 1.0}
    with pytest.raises(UserError, match="same examples"):
        agreement(student, teacher.iloc[::-1])
