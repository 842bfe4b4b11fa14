"""Accuracy, calibration, likelihood and agreement: plain functions of tables of predictions (`evaluation.evaluate`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from stillroom.errors import UserError
from stillroom.files import atomic_path

_BINS = 10


def accuracy_metrics(predictions: pd.DataFrame, prefix: str = "validation_") -> dict[str, float]:
    """Accuracy over all examples, per task, and the tasks' unweighted mean; flexible accuracy where it differs.

    Keys: `<prefix>accuracy`, `<prefix>accuracy_macro`, `<prefix>accuracy_<task>`; for a generation task also
    `<prefix>accuracy_<task>_flexible`, for a choice task `<prefix>ece_<task>`. All are shares of 1.
    """
    by_task = predictions.groupby("task", sort=True)
    accuracy = by_task["correct"].mean()
    metrics = {f"{prefix}accuracy": float(predictions["correct"].mean())}
    metrics[f"{prefix}accuracy_macro"] = float(accuracy.mean())
    for task, value in accuracy.items():
        metrics[f"{prefix}accuracy_{task}"] = float(value)
        own = by_task.get_group(task)
        if own["scores"].notna().all():
            metrics[f"{prefix}ece_{task}"] = calibration_error(own)
        else:
            metrics[f"{prefix}accuracy_{task}_flexible"] = float(own["correct_flexible"].mean())
    return metrics


def calibration_error(predictions: pd.DataFrame) -> float:
    """Expected calibration error of choice predictions: 0 if they are right as often as they are sure.

    An answer's confidence is the chosen answer's share of the choices' probability, softmax(scores). Over ten bins
    of equal width, (0, 0.1], …, (0.9, 1]: the mean of |share right − mean confidence|, weighted by the bins' counts.
    Naeini, Cooper and Hauskrecht, AAAI 2015; in this form Guo et al., ICML 2017, equation 3.
    """
    if predictions.empty:
        raise UserError("the calibration error of no predictions is not defined")
    scores = [np.asarray(own, dtype=float) for own in predictions["scores"]]
    confidence = np.array([1 / np.exp(own - own.max()).sum() for own in scores])
    right = predictions["correct"].to_numpy(dtype=float)
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(right))


def agreement(student: pd.DataFrame, teacher: pd.DataFrame) -> dict[str, float]:
    """Share of a choice task's examples on which student and teacher choose the same answer, by task.

    Both tables must hold the same examples in the same order, else `UserError`.
    """
    if list(student["example_id"]) != list(teacher["example_id"]):
        raise UserError("agreement: the two tables of predictions are not of the same examples in the same order")
    same = student["prediction"].to_numpy() == teacher["prediction"].to_numpy()
    of_choices = student["scores"].notna().to_numpy()
    by_task = pd.Series(same[of_choices]).groupby(student["task"].to_numpy()[of_choices], sort=True).mean()
    return {str(task): float(share) for task, share in by_task.items()}


def nll_metrics(predictions: pd.DataFrame) -> dict[str, float]:
    """Mean negative log-likelihood of the gold answer's text, nats an example, per task."""
    return {str(task): float(value) for task, value in predictions.groupby("task")["answer_nll"].mean().items()}


def save_predictions(predictions: pd.DataFrame, path: Path) -> None:
    """Write predictions as Parquet, whole or not at all; a byte that changes later is noticed when they are read."""
    with atomic_path(path) as temporary:
        predictions.to_parquet(temporary, index=False, write_page_checksum=True)
