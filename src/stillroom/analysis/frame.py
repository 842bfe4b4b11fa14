"""Results on disk as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from stillroom.analysis.reading import read_planned, read_results
from stillroom.evaluation.metrics import Key, Metric, by_key, column_names
from stillroom.files import atomic_path
from stillroom.folders import ResultsFolder, TrialFolder


def summary_row(result: dict[str, Any]) -> dict[str, Any]:
    """One trial as a row: its configuration, its last epoch's metrics, its gradient shares."""
    config, values = result["config"], by_key(result["metrics"])
    names = column_names(values)
    trained = {names[key]: value for key, value in values.items() if key[0] != "test"}
    tested = {names[key]: value for key, value in values.items() if key[0] == "test"}
    facts = {k: v for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    of_epoch = {name: value for name, value in facts.items() if name in result["epochs"][-1]}
    shares = {f"gradient_share_{term}": share for term, share in result["gradient_shares"].items()}
    return {
        "trial": result["trial"],
        "config/distill_type": config["distill_type"],
        "config/seed": config["seed"],
        **trained,
        **of_epoch,
        **tested,
        **{name: value for name, value in facts.items() if name not in of_epoch},
        **shares,
        **{
            f"weight_{term}": settings["weight"]
            for term, settings in config["objective"].items()
            if settings.get("share")
        },
    }


def summary_frame(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per trial, in the order given."""
    return pd.DataFrame([summary_row(result) for result in results])


def write_summary(results: Path) -> None:
    """Write `results_summary.csv` in a results folder: a row a planned trial, finished or not.

    `status` is finished, failed or missing; a trial that is not finished has no metrics.
    """
    planned = read_planned(results)
    trials = planned["trials"]
    folders = [ResultsFolder(results).trial(trial["name"]).path for trial in trials]
    frame = summary_frame(read_results(results, planned))
    frame.insert(0, "status", "finished")
    done = set(frame["trial"]) if len(frame) else set()
    absent = [
        {
            "status": "failed" if TrialFolder(folder).error.is_file() else "missing",
            "trial": trial["name"],
            "config/distill_type": trial["group"],
            "config/seed": trial["seed"],
        }
        for trial, folder in zip(trials, folders, strict=True)
        if trial["name"] not in done
    ]
    with atomic_path(ResultsFolder(results).summary) as temporary:
        pd.concat([frame, pd.DataFrame(absent)]).to_csv(temporary, index=False)


OVERALL: Key = ("validation", None, "accuracy")


def accuracy_keys(keys: Iterable[Key], split: str = "validation") -> dict[str, Key]:
    """What accuracy was measured on, as tables call it: all tasks together, then each task.

    All together is called `all`; where a task is called so, `all tasks`, which no task can be called.
    """
    tasks = {key[1]: key for key in keys if key[1] and (key[0], key[2]) == (split, "accuracy")}
    return {"all tasks" if "all" in tasks else "all": (split, None, "accuracy"), **tasks}


def worse_or_equal(teacher: Iterable[Metric], student: Iterable[Metric]) -> list[str]:
    """Tasks on which the teacher's accuracy is no better than the student's before training."""
    one, other = by_key(teacher), by_key(student)
    _, *tasks = accuracy_keys(one).items()
    return [task for task, key in tasks if one[key] <= other[key]]


@dataclass(frozen=True)
class Measured:
    """What was measured of a finished trial after its last epoch."""

    group: str
    seed: int
    values: Mapping[Key, float]


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; of fewer than two a deviation of NaN, of none both."""

    mean: float
    std: float


@dataclass(frozen=True)
class Row:
    """A row of a table of groups: a group with its seeds, or a baseline with none."""

    name: str
    seeds: int
    cells: Mapping[str, Spread]


def group_table(
    trials: Sequence[Measured],
    groups: Sequence[str],
    baselines: Mapping[str, Sequence[Metric]],
    wanted: Mapping[str, Key],
) -> list[Row]:
    """The baselines and then each group, with what is `wanted` by the heading of its column."""
    rows = []
    for name, metrics in baselines.items():
        values = by_key(metrics)
        rows.append(Row(name, 0, {label: Spread(values.get(key, math.nan), math.nan) for label, key in wanted.items()}))
    for group in groups:
        trial_values = [trial.values for trial in trials if trial.group == group]
        rows.append(Row(group, len(trial_values), {label: _spread(trial_values, key) for label, key in wanted.items()}))
    return rows


def _spread(trials: Sequence[Mapping[Key, float]], key: Key) -> Spread:
    values = pd.Series([values.get(key, math.nan) for values in trials], dtype=float)
    return Spread(float(values.mean()), float(values.std()))
