"""MLflow holds what the results folder holds."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from contextlib import closing

import pytest

from stillroom.config import EXPERIMENT
from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_column
from stillroom.experiment.tracker import Tracker
from stillroom.files import read_json
from stillroom.studies import load_study
from synthetic import write_results


@pytest.mark.slow
def test_study_trials_metrics_snapshot_and_report_are_in_the_tracker(tmp_path, monkeypatch):
    """A run for the study, a child a trial, metrics by epoch, gradient norms by step, the report; each once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    results = tmp_path / "results"
    study = write_results(results, seeds=(0, 1), overrides=["paths.results=results"])
    folders = sorted((results / EXPERIMENT).iterdir())
    (results / "report.html").write_text("<p>A report.</p>\n")
    for _ in range(2):  # the same command again logs nothing twice
        tracker = Tracker(study, results)
        tracker.log_snapshot(results / "offline_teacher_data_20260101T000000Z", "0123456789abcdef")
        for folder in folders:
            tracker.log_trial(folder)
        tracker.log_report(results / "report.html")
    assert "MLFLOW_TRACKING_URI" not in os.environ, "the next study of this process would be written here"
    import mlflow

    runs = mlflow.search_runs(experiment_names=[study.name], output_format="list")
    parents = [run for run in runs if run.data.tags.get("kind") == "study"]
    children = {run.data.tags["trial"]: run for run in runs if run.data.tags.get("kind") == "trial"}
    assert len(parents) == 1
    assert len(runs) == 1 + len(folders)
    assert parents[0].data.tags["snapshot_fingerprint"] == "0123456789abcdef"
    assert parents[0].data.params["training.learning_rate"] == str(study.training.learning_rate)
    client = mlflow.MlflowClient()
    assert [file.path for file in client.list_artifacts(parents[0].info.run_id)] == ["report.html"]
    for folder in folders:
        result, run = read_json(folder / "result.json"), children[folder.name]
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.params["distill_type"] == result["config"]["distill_type"]
        history = client.get_metric_history(run.info.run_id, "validation_accuracy")
        assert [(m.step, m.value) for m in history] == [
            (epoch["step"], pytest.approx(by_column(epoch["metrics"])["validation_accuracy"]))
            for epoch in result["epochs"]
        ]
        norms = client.get_metric_history(run.info.run_id, "gradient_norm_task")
        assert [m.step for m in norms] == [row["step"] for row in result["gradients"]]


ODD = ("it's", "a?b", "a%41b", "100% x", "a#b", "a[b]", 'a"b', "a\\b", "a@b:c;d&e=f", "dir é 日本")


@pytest.mark.parametrize("name", ODD)
@pytest.mark.slow
def test_any_folder_can_have_a_tracker(tmp_path, monkeypatch, name):
    """A path may hold what means something in a URL or in SQL: the file is in it, nothing beside it, one run."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    results = tmp_path / name / "results"
    study = load_study("quickstart")
    parents = set()
    for _ in range(2):
        tracker = Tracker(study, results)
        tracker.check()
        parents.add(tracker._parent)
    assert len(parents) == 1
    (results / "report.html").write_text("a report")
    tracker.log_report(results / "report.html")
    assert (results / "mlflow.db").stat().st_size > 0
    assert [path.name for path in (results / "mlartifacts").rglob("*.html")] == ["report.html"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def _other_version(file):
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")


def _without_a_table(file):
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("drop table experiments")


def _a_folder(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"no database" * 500),
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        _other_version,
        _without_a_table,
        _a_folder,
    ],
    ids=["garbage", "half", "another version's", "a table short", "a folder"],
)
@pytest.mark.slow
def test_a_tracker_that_cannot_be_used_is_one_message_at_once(tmp_path, monkeypatch, capfd, damage):
    """Which file it is and that nothing is lost; no traceback, and no minutes of MLflow's trying again."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    study = load_study("quickstart")
    Tracker(study, tmp_path).check()
    results = tmp_path / "results"  # another address: MLflow keeps a database it has opened, and does not look again
    results.mkdir()
    damage(shutil.copy(tmp_path / "mlflow.db", results / "mlflow.db"))
    began = time.monotonic()
    with pytest.raises(UserError, match=r"mlflow\.db, cannot be written .* nothing is lost: .* move the file away"):
        Tracker(study, results).check()
    assert time.monotonic() - began < 20
    assert "Traceback" not in capfd.readouterr().err
