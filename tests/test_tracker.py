"""Each tracker holds what the results folder holds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sqlite3
import struct
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest

from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_column
from stillroom.experiment import wandb_runs
from stillroom.experiment.mlflow_runs import MLflowRuns
from stillroom.experiment.tracked import history
from stillroom.experiment.tracker import Tracker
from stillroom.experiment.wandb_runs import WandbRuns
from stillroom.files import read_json
from stillroom.folders import EXPERIMENT
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
        tracker = MLflowRuns(study, results)
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


@pytest.fixture
def two_trials(tmp_path):
    """A results folder with two trials and a report, and its study."""
    study = write_results(tmp_path, seeds=(0,), overrides=[f"paths.results={tmp_path}"])
    folders = sorted((tmp_path / EXPERIMENT).iterdir())
    for folder in folders[2:]:
        shutil.rmtree(folder)
    (tmp_path / "report.html").write_text("<p>A report.</p>\n")
    return study, folders[:2]


def logged_twice(study, results, folders):
    """As a command does that is run again."""
    for _ in range(2):
        tracker = Tracker(study, results)
        tracker.check()
        tracker.log_snapshot(results / "offline_teacher_data_20260101T000000Z", "0123456789abcdef")
        for folder in folders:
            tracker.log_trial(folder)
        tracker.log_report(results / "report.html")


def framed(data, head, length, body):
    """The bodies of records: a header's format, which of its fields is the length, and what follows a body."""
    at = 0
    while at < len(data):
        fields = struct.unpack_from(head, data, at)
        at += struct.calcsize(head)
        yield fields, data[at : at + fields[length]]
        at += fields[length] + body


def test_tensorboard_files_have_every_number_of_a_trial_once(two_trials, tmp_path):
    """Read back from the bytes: each epoch's metrics and gradient norms at their steps, the settings as text."""
    from tensorboardX.proto.event_pb2 import Event

    study, folders = two_trials
    logged_twice(study.model_copy(update={"trackers": ("tensorboard",)}), tmp_path, folders)
    assert sorted(p.name for p in (tmp_path / "tensorboard").iterdir()) == [folder.name for folder in folders]
    for folder in folders:
        (file,) = (tmp_path / "tensorboard" / folder.name).iterdir()
        found, text = {}, ""
        for _, body in framed(file.read_bytes(), "<QI", 0, 4):
            event = Event.FromString(body)
            for value in event.summary.value:
                if value.HasField("tensor"):
                    text += value.tensor.string_val[0].decode()
                else:
                    assert (event.step, value.tag) not in found, "twice"
                    found[event.step, value.tag] = value.simple_value
        result = read_json(folder / "result.json")
        numbers = {(step, name): value for step, row in history(result).items() for name, value in row.items()}
        assert found == pytest.approx(numbers, rel=1e-6)
        for epoch in result["epochs"]:
            accuracy = by_column(epoch["metrics"])["validation_accuracy"]
            assert found[epoch["step"], "validation_accuracy"] == pytest.approx(accuracy, rel=1e-6)
        row = result["gradients"][-1]
        assert found[row["step"], "gradient_norm_task"] == pytest.approx(row["norms"]["task"], rel=1e-6)
        assert f"| distill_type | {result['config']['distill_type']} |" in text


@pytest.mark.slow
def test_weights_and_biases_offline_has_every_number_of_a_trial_once(two_trials, tmp_path, monkeypatch):
    """Its own files read back: a run a trial, in its group's name, and one for the study with the report."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    study, folders = two_trials
    logged_twice(study.model_copy(update={"trackers": ("wandb",)}), tmp_path, folders)
    runs, kept = {}, []
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        run, numbers = None, {}
        for data in _records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                run = record.run
            if record.HasField("artifact"):
                kept += [(entry.path, entry.size) for entry in record.artifact.manifest.contents]
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: float(item.value_json) for item in record.history.item}
                numbers |= {(record.history.step.num, k): v for k, v in items.items() if not k.startswith("_")}
        assert run.display_name not in runs, "logged twice"
        runs[run.display_name] = run, numbers
    assert set(runs) == {study.name, *(folder.name for folder in folders)}
    for folder in folders:
        result, (run, numbers) = read_json(folder / "result.json"), runs[folder.name]
        assert (run.project, run.run_group) == (study.name, result["config"]["distill_type"])
        wanted = {(step, name): value for step, row in history(result).items() for name, value in row.items()}
        assert numbers == pytest.approx(wanted)
    assert kept == [("report.html", (tmp_path / "report.html").stat().st_size)]
    (tmp_path / "report.html").write_text("<p>Another.</p>\n")
    Tracker(study.model_copy(update={"trackers": ("wandb",)}), tmp_path).log_report(tmp_path / "report.html")
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 3, "a new report takes the old one's place"


def _records(data):
    """The records of a LevelDB log, which are cut at blocks of 32 KiB, after a header of seven bytes."""
    whole, started = b"", 7
    for block in range(0, len(data), 32768):
        for (_, _, kind), part in framed(data[max(block, started) : block + 32768], "<IHB", 1, 0):
            whole += part
            if kind in (1, 4):  # the whole of a record, or its last part
                yield whole
                whole = b""


@pytest.mark.slow
def test_weights_and_biases_asks_nobody_anything(tmp_path, monkeypatch):
    """No login, or a server that does not answer: one message with the remedy, before hours are spent."""
    import wandb

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = WandbRuns(load_study("quickstart"), tmp_path / "results")
    with pytest.raises(UserError, match=r"nobody is logged in .* `wandb login`, or set WANDB_MODE=offline"):
        tracker.check()
    wandb.teardown()  # it reads its variables once a process
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"Biases, cannot be written .* nothing is lost: .*WANDB_MODE=offline"):
        tracker.check()
    assert not tracker.results.exists()
    # the service may have lost what says that it should end, and a command that waits for it never does
    assert not [child for child in psutil.Process().children() if child.name() == "wandb-core"]


class _WeightsAndBiases(BaseHTTPRequestHandler):
    """A server that knows its user and opens a run, and from then on answers nothing."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("query", "")
        if "mutation" in asked and "upsertBucket" not in asked:
            self.send_error(500)
            return
        project = {"id": "p", "name": "quickstart", "entity": {"id": "e", "name": "me"}}
        opened = {"bucket": {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": project}}
        known = {"viewer": {"id": "u", "username": "me", "entity": "me", "flags": "{}"}}
        answer = json.dumps({"data": {**known, "upsertBucket": {**opened, "inserted": True}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_a_sweep_does_not_wait_for_a_server_that_went_away(two_trials, tmp_path, monkeypatch):
    """Weights & Biases' own way is to wait until everything is uploaded, without a limit."""
    monkeypatch.setattr(wandb_runs, "_UPLOAD_SECONDS", 2)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    study, folders = two_trials
    with ThreadingHTTPServer(("127.0.0.1", 0), _WeightsAndBiases) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"cannot be written \(TimeoutError: .* nothing is lost"):
            WandbRuns(study, tmp_path).log_trial(folders[0])
        server.shutdown()


@pytest.mark.parametrize(("name", "command"), [("wandb", "wandb>=0.31"), ("tensorboard", "tensorboardX")])
def test_a_tracker_that_is_not_installed_is_refused_beforehand(tmp_path, monkeypatch, name, command):
    """By the doctor and by `run` at once, with the command that installs it; no tracker at all is fine."""
    from stillroom.preflight import doctor

    study = load_study("quickstart", [f"trackers=[{name}]"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{name} is not installed: pip install '{command}'"):
        Tracker(study, tmp_path).check()
    (line,) = doctor._trackers(study)
    assert not line.fine
    assert f"pip install '{command}'" in line.says
    Tracker(load_study("quickstart", ["trackers=[]"]), tmp_path).check()
    assert list(tmp_path.iterdir()) == []
