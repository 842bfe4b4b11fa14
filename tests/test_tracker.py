"""MLflow holds what the results folder holds."""

from __future__ import annotations

import os

import pytest

from stillroom.config import EXPERIMENT
from stillroom.experiment.tracker import Tracker
from stillroom.files import read_json
from synthetic import write_results


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
            (epoch["step"], pytest.approx(epoch["validation_accuracy"])) for epoch in result["epochs"]
        ]
        norms = client.get_metric_history(run.info.run_id, "gradient_norm_task")
        assert [m.step for m in norms] == [row["step"] for row in result["gradients"]]
