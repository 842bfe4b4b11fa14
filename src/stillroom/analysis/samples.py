"""What the models answered to a few examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from stillroom.analysis.results import StudyResults


@dataclass(frozen=True)
class Sample:
    """A validation example, and what each model answered to it."""

    kind: str
    """Why it was chosen."""
    prompt: str
    gold: str
    answers: tuple[tuple[str, str, bool], ...]
    """Model, what it said, whether that is right: the baselines, then each group."""


def sample_seed(results: StudyResults) -> int:
    """The first seed at which the most groups are finished."""
    counts = {
        seed: sum((group, seed) in results.predictions for group in results.groups)
        for seed in results.study["sweep"]["seeds"]
    }
    return int(max(counts, key=counts.__getitem__))


def samples_of(results: StudyResults) -> dict[str, list[Sample]]:
    """By task an example on which the groups differ most, one that all get right, one that none does; groups at
    `sample_seed`. The same folder gives the same examples."""
    seed = sample_seed(results)
    groups = {name: results.predictions[name, seed] for name in results.groups if (name, seed) in results.predictions}
    held_out = results.examples[results.examples["split"] == "validation"]
    prompts = dict(zip(held_out["example_id"], held_out["prompt"], strict=True))
    models = results.baseline_predictions | groups
    found = {}
    for task in results.tasks:
        by_model = {name: rows[rows["task"] == task].set_index("example_id") for name, rows in models.items()}
        right = pd.DataFrame({name: by_model[name]["correct"] for name in groups}).mean(axis=1)
        chosen = {
            "The groups differ": (right - 0.5).abs()[(right > 0) & (right < 1)],
            "Every group is right": right[right == 1],
            "No group is right": right[right == 0],
        }
        found[task] = [
            Sample(
                kind,
                prompts.get(example, "(not among the examples of this folder)"),
                str(next(iter(by_model.values())).loc[example, "gold"]),
                tuple(
                    (name, _said(rows.loc[example]), bool(rows.loc[example, "correct"]))
                    for name, rows in by_model.items()
                ),
            )
            for kind, values in chosen.items()
            if len(values)
            for example in [str(values.sort_index().idxmin())]
        ]
    return found


def _said(row: Any) -> str:
    written = row.get("generated")
    text = written if isinstance(written, str) else row["prediction"]
    return text.strip() if isinstance(text, str) else "no answer"
