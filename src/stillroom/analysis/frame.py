"""Results on disk as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from stillroom.analysis.reading import PLANNED as PLANNED
from stillroom.analysis.reading import read_planned, read_results
from stillroom.config import ERROR, EXPERIMENT
from stillroom.files import atomic_path

SUMMARY = "results_summary.csv"


def summary_row(result: dict[str, Any]) -> dict[str, Any]:
    """One trial as a row: its configuration, its last epoch's metrics, its gradient shares."""
    config = result["config"]
    metrics = {k: v for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    shares = {f"gradient_share_{term}": share for term, share in result["gradient_shares"].items()}
    return {
        "trial": result["trial"],
        "config/distill_type": config["distill_type"],
        "config/seed": config["seed"],
        **metrics,
        **shares,
    }


def summary_frame(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row a trial, in the order given."""
    return pd.DataFrame([summary_row(result) for result in results])


def write_summary(results: Path) -> None:
    """Write `results_summary.csv` in a results folder: a row a planned trial, finished or not.

    `status` is finished, failed or missing; a trial that is not finished has no metrics.
    """
    planned = read_planned(results)
    trials = planned["trials"]
    folders = [results / EXPERIMENT / trial["name"] for trial in trials]
    frame = summary_frame(read_results(results, planned))
    frame.insert(0, "status", "finished")
    done = set(frame["trial"]) if len(frame) else set()
    absent = [
        {
            "status": "failed" if (folder / ERROR).is_file() else "missing",
            "trial": trial["name"],
            "config/distill_type": trial["group"],
            "config/seed": trial["seed"],
        }
        for trial, folder in zip(trials, folders, strict=True)
        if trial["name"] not in done
    ]
    with atomic_path(results / SUMMARY) as temporary:
        pd.concat([frame, pd.DataFrame(absent)]).to_csv(temporary, index=False)


def accuracy_columns(frame: pd.DataFrame, prefix: str = "validation_accuracy_") -> dict[str, str]:
    """Column name by task of `validation_accuracy_<task>`."""
    skip = ("_macro", "_flexible")
    return {c.removeprefix(prefix): c for c in frame.columns if c.startswith(prefix) and not c.endswith(skip)}


def worse_or_equal(teacher: dict[str, float], student: dict[str, float]) -> list[str]:
    """Tasks on which the teacher's accuracy is no better than the student's before training."""
    columns = accuracy_columns(pd.DataFrame([teacher]))
    return [task for task, column in columns.items() if teacher[column] <= student[column]]


def group_table(
    frame: pd.DataFrame,
    groups: Sequence[str],
    baselines: dict[str, dict[str, float]],
    columns: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Mean and standard deviation of accuracy by group, over all and per task; the baselines beside them.

    Index: row name. Columns: seeds, then for `accuracy` and each task `<name>_mean` and `<name>_std`; `columns` asks
    for others, by name. A group with one seed has no standard deviation (NaN), a baseline neither.
    """
    columns = columns or {"accuracy": "validation_accuracy", **accuracy_columns(frame)}
    rows: dict[str, dict[str, float]] = {}
    for name, metrics in baselines.items():
        rows[name] = {"seeds": 0} | {f"{k}_mean": metrics.get(c, float("nan")) for k, c in columns.items()}
    for group in groups:
        own = frame[frame["config/distill_type"] == group]
        rows[group] = {"seeds": len(own)}
        for key, column in columns.items():
            rows[group][f"{key}_mean"] = own[column].mean() if len(own) else float("nan")
            rows[group][f"{key}_std"] = own[column].std() if len(own) > 1 else float("nan")
    return pd.DataFrame.from_dict(rows, orient="index")
