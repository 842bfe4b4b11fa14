"""What is timed of a study is scaled by its own counts, with an error that the spread of the pieces gives."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pretend_gpu import pretend_gpu
from stillroom.cli import app
from stillroom.config import Group
from stillroom.preflight import measuring
from stillroom.preflight.measuring import _drawn, _largest, rate_of
from stillroom.studies import load_study
from studies import study_file


def test_a_rates_interval_holds_the_true_rate_as_often_as_it_says():
    """Over simulated pieces of random sizes, whose seconds err by 10 %; and pieces without a spread have no error."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        units = rng.integers(200, 600, size=8)
        found = rate_of((0.5 * units * rng.normal(1, 0.1, size=8)).tolist(), units.tolist())
        held += abs(found.seconds - 0.5) <= found.error
    assert 0.92 <= held / 400 <= 0.98
    exact = rate_of([1.0, 2.0, 3.0], [10, 20, 30])
    assert exact.seconds == pytest.approx(0.1)
    assert exact.error == pytest.approx(0, abs=1e-12)


def test_the_group_of_most_terms_is_timed_and_none_that_needs_the_teachers_answers():
    """Its store has none; and what is drawn of a few examples comes again."""
    study = load_study("quickstart")
    assert _largest(study).name == "combined"
    answers = Group(name="answers", terms=("task", "kd", "hidden", "attention", "values"), task={"targets": "teacher"})
    study = study.model_copy(update={"groups": (answers, *study.groups)})
    assert _largest(study).name == "combined"
    drawn = _drawn([*"abc"], 7)
    assert len(drawn) == 7
    assert set(drawn[:3]) == set("abc")


@pytest.mark.slow
def test_a_measured_plan_gives_time_for_every_stage_and_leaves_nothing_behind(
    tmp_path, monkeypatch, teacher_ref, student_ref
):
    """On a terminal and as JSON; what was timed is said, and the study's own folders are not made."""
    monkeypatch.chdir(tmp_path)
    study = study_file(tmp_path, teacher_ref.model, student_ref.model)
    told = CliRunner().invoke(app, ["plan", study, "--measure", "--json"])
    assert told.exit_code == 0, told.output
    plan = json.loads(told.stdout)
    hours = plan["measured"]["hours"]
    assert plan["cpu_hours"] is None
    assert plan["measured"]["machine"] in plan["measured"]["how"][0]
    assert "steps of combined" in plan["measured"]["how"][0]
    assert [name for name, measured in hours.items() if measured["hours"] > 0] == ["teacher", "training", "evaluation"]
    assert all(measured["error"] >= 0 for measured in hours.values())
    assert hours["training"]["pieces"] == 8
    assert hours["evaluation"]["pieces"] == 3 * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]
    shown = CliRunner().invoke(app, ["plan", study, "--measure"])
    assert "Time on this machine, measured" in shown.stdout
    assert "estimated" in shown.stdout


def test_a_gpus_steps_are_timed_when_they_are_done(monkeypatch, tmp_path):
    """A step is told of while it is still queued: what was timed was the step before it, the first one included."""
    seen = []

    def trained(*_, progress, **__):
        for done in range(1, 4):
            progress(done, 3)

    sources = SimpleNamespace(study=load_study("quickstart"), student_ref=None, tokenizers=[None, None])
    monkeypatch.setattr(measuring, "train", trained)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: seen.append("timed") or len(seen))
    monkeypatch.setattr(measuring, "encode_examples", lambda *_, **__: [[0]] * 3 * sources.study.training.batch_size)
    with pretend_gpu():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("done"))
        measuring._stepped(sources, None, [None], tmp_path, lambda *_: None)
    assert seen == ["done", "timed"] * 3
