"""What a running sweep shows."""

from __future__ import annotations

from types import SimpleNamespace

from stillroom.config import GROUPS, Training
from stillroom.experiment.watching import SweepWatch
from stillroom.folders import TrialFolder
from stillroom.progress import ProgressBars
from stillroom.training.train_student import Trial


def test_a_sweep_is_watched_epoch_by_epoch(tmp_path, monkeypatch, capsys):
    """Trials done, running and failed, and the newest accuracy; a failed trial that starts again is running."""
    plans = []
    for number, group in enumerate(("task_only", "black_box", "hidden")):
        trial = Trial(f"{number:08d}", GROUPS[group], 0)
        plans.append(
            SimpleNamespace(trial=trial, training=Training(epochs=2), files=TrialFolder(tmp_path / trial.name))
        )
    plans[0].files.path.mkdir()
    plans[0].files.result.write_text("{}")
    shown = []
    watch = SweepWatch(plans, lambda what, done, total, note="": shown.append((done, total, note)))
    names = [plan.trial.name for plan in plans]
    watch.show()
    assert shown[-1] == (2, 6, "1 of 3 trials done")
    watch.tell("started", {"trial": names[1]})
    watch.tell("epoch", {"trial": names[1], "epoch": 1, "validation_accuracy": 0.625})
    assert shown[-1] == (3, 6, "1 of 3 trials done, 1 running; black_box seed 0, epoch 1: accuracy 62.5 %")
    watch.tell("started", {"trial": names[2]})
    watch.tell("failed", {"trial": names[2]})
    assert shown[-1][2].startswith("1 of 3 trials done, 1 running, 1 failed")
    watch.tell("started", {"trial": names[2]})
    assert "failed" not in shown[-1][2]
    watch.tell("epoch", {"trial": names[1], "epoch": 2, "validation_accuracy": 0.625})
    assert shown[-1][:2] == (3, 6), "a bar that is full before the trial has ended would be drawn twice"
    watch.tell("finished", {"trial": names[1]})
    assert shown[-1][:2] == (4, 6)
    monkeypatch.setattr("stillroom.progress.QUIET_SECONDS", 0)
    ProgressBars()("training", 1, 2, "a note")
    assert capsys.readouterr().err == "training: 1/2; a note\n"
