"""The study whose truth is known: the whole instrument, from training to the words of the report, finds it."""

import pandas as pd
import pytest

from studies import run

SMALL = [
    "corpus.tasks.sentiment.examples=400",
    "corpus.tasks.quiz.examples=400",
    "training.gradient_interval=0",
    "sweep.seeds=[0, 1, 2, 3, 4, 5]",
    "analysis.primary=[[hidden, black_box]]",
    "analysis.secondary=[[misplaced, task_only]]",
    "groups=[task_only, black_box, hidden, {name: misplaced, terms: [task, kd], placebo: [kd], kd: {weight: 4.0}}]",
]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_sweeps", "quick_pictures")
def test_what_must_help_improves_and_what_must_harm_is_worse(tmp_path):
    """Signals that carry what noisy labels lost, predictions in wrong places: a verdict each, and the right one."""
    places = [f"paths.store={tmp_path / 'store'}", f"paths.results={tmp_path / 'results'}"]
    workspace, errors = run("control", *SMALL, *places)
    assert errors == {}
    workspace.report()
    found = pd.read_csv(tmp_path / "results" / "tables" / "comparisons.csv").set_index(["first", "second", "measure"])
    verdicts = found["verdict"].unstack("measure")["all"].to_dict()
    assert verdicts["black_box", "task_only"] == "improves"
    assert verdicts["hidden", "black_box"] == "improves"
    assert verdicts["misplaced", "task_only"] == "worse"
