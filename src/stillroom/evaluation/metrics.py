"""Accuracy, calibration, likelihood and agreement: plain functions of tables of predictions (`scoring.evaluate`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd

from stillroom.errors import UserError
from stillroom.files import atomic_path

_BINS = 10

Key = tuple[str, str | None, str]
"""What a number is: its split, its task (None: of all tasks together), its measure."""


class Metric(TypedDict):
    """One number that training or evaluation gave, as it is kept in `result.json`."""

    split: str
    """`train`, `validation` or `test`."""
    task: str | None
    """None: of all tasks together."""
    measure: str
    """`accuracy`, `accuracy_macro`, `accuracy_flexible`, `calibration_error`, `loss`, or a term's `<term>_loss`.

    Of a task of lm-evaluation-harness, whatever it calls its number: `acc`, `acc_norm`, `exact_match_strict-match`, ….
    """
    value: float


def overall_metrics(values: Mapping[str, float], split: str) -> list[Metric]:
    """Numbers of all tasks together, by measure, as rows."""
    return [Metric(split=split, task=None, measure=measure, value=value) for measure, value in values.items()]


def by_key(metrics: Iterable[Metric]) -> dict[Key, float]:
    """Values by split, task and measure."""
    return {(row["split"], row["task"], row["measure"]): row["value"] for row in metrics}


TASK_MEASURES = {
    "accuracy": "{split}_accuracy_{task}",
    "accuracy_flexible": "{split}_accuracy_{task}_flexible",
    "calibration_error": "{split}_ece_{task}",
}
"""What we measure of a task by itself, and how a table with a column for each number calls it."""
_OTHER_MEASURE = "{split}_{measure}_{task}"


def column_names(keys: Iterable[Key]) -> dict[Key, str]:
    """What a table with a column for each number calls it: `validation_accuracy`, `validation_accuracy_<task>`, ….

    No two are called the same: where a task's own name makes its column another's (a task `macro`), the task comes
    after a colon (`validation_accuracy:macro`).
    """
    names = {key: _column(*key) for key in keys}
    taken = Counter(names.values())
    return {
        key: f"{key[0]}_{key[2]}:{key[1]}" if taken[name] > 1 and key[1] is not None else name
        for key, name in names.items()
    }


def _column(split: str, task: str | None, measure: str) -> str:
    form = "{split}_{measure}" if task is None else TASK_MEASURES.get(measure, _OTHER_MEASURE)
    return form.format(split=split, task=task, measure=measure)


def by_column(metrics: Iterable[Metric]) -> dict[str, float]:
    """Values by the name that a table's column has."""
    values = by_key(metrics)
    return {name: values[key] for key, name in column_names(values).items()}


def accuracy_metrics(predictions: pd.DataFrame, split: str = "validation") -> list[Metric]:
    """Accuracy over all examples, the tasks' unweighted mean (`accuracy_macro`), and accuracy per task.

    A generation task also has `accuracy_flexible`, a choice task `calibration_error`. All are shares of 1.
    """
    by_task = predictions.groupby("task", sort=True)
    accuracy = by_task["correct"].mean()
    overall = {"accuracy": float(predictions["correct"].mean()), "accuracy_macro": float(accuracy.mean())}
    metrics = overall_metrics(overall, split)
    for task, value in accuracy.items():
        rows = by_task.get_group(task)
        measures = {"accuracy": float(value)}
        if rows["scores"].notna().all():
            measures["calibration_error"] = calibration_error(rows)
        else:
            measures["accuracy_flexible"] = float(rows["correct_flexible"].mean())
        metrics += [
            Metric(split=split, task=str(task), measure=name, value=measured) for name, measured in measures.items()
        ]
    return metrics


def calibration_error(predictions: pd.DataFrame) -> float:
    """Expected calibration error of choice predictions: 0 if they are right as often as they are sure.

    An answer's confidence is the chosen answer's share of the choices' probability, softmax(scores). Over ten bins
    of equal width, (0, 0.1], …, (0.9, 1]: the mean of |share right − mean confidence|, weighted by the bins' counts.
    Naeini, Cooper and Hauskrecht, AAAI 2015; in this form Guo et al., ICML 2017, equation 3.
    """
    if predictions.empty:
        raise UserError("there are no predictions, so there is no calibration error")
    scores = [np.asarray(choice_scores, dtype=float) for choice_scores in predictions["scores"]]
    confidence = np.array([1 / np.exp(choice_scores - choice_scores.max()).sum() for choice_scores in scores])
    right = predictions["correct"].to_numpy(dtype=float)
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(right))


def agreement(student: pd.DataFrame, teacher: pd.DataFrame) -> dict[str, float]:
    """Share of a choice task's examples on which student and teacher choose the same answer, by task.

    Both tables must hold the same examples in the same order, else `UserError`.
    """
    if list(student["example_id"]) != list(teacher["example_id"]):
        raise UserError("agreement: the two tables of predictions do not have the same examples in the same order")
    same = student["prediction"].to_numpy() == teacher["prediction"].to_numpy()
    of_choices = student["scores"].notna().to_numpy()
    by_task = pd.Series(same[of_choices]).groupby(student["task"].to_numpy()[of_choices], sort=True).mean()
    return {str(task): float(share) for task, share in by_task.items()}


def nll_metrics(predictions: pd.DataFrame) -> dict[str, float]:
    """Mean negative log-likelihood of the gold answer's text, nats per example, by task."""
    return {str(task): float(value) for task, value in predictions.groupby("task")["answer_nll"].mean().items()}


def save_predictions(predictions: pd.DataFrame, path: Path) -> None:
    """Write predictions as Parquet, whole or not at all; a byte that changes later is noticed when they are read."""
    with atomic_path(path) as temporary:
        predictions.to_parquet(temporary, index=False, write_page_checksum=True)
