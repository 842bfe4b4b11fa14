"""A small study of small models as a file, and its stages one after the other."""

from __future__ import annotations

import yaml

from stillroom.experiment.workspace import Workspace
from stillroom.studies import load_study


def study_file(tmp_path, teacher_dir, student_dir, **changes):
    """A small study of local models on the built-in tasks."""
    tasks = {name: {"dataset": "builtin", "examples": 20} for name in ("sentiment", "quiz", "arithmetic")}
    study = {
        "name": "tiny",
        "teacher": {"model": teacher_dir, "dtype": "float32"},
        "student": {"model": student_dir},
        "corpus": {"tasks": tasks, "max_length": 128},
        "signals": {"top_k": 64, "dtype": "float32", "shard_examples": 16, "minimum_coverage": 0.0},
        "groups": ["task_only", "combined"],
        "training": {"epochs": 1, "precision": "float32", "gradient_interval": 2},
        "evaluation": {"max_new_tokens": 8},
        "sweep": {"seeds": [0], "cpus_per_trial": 1, "retries": 0},
        "paths": {"store": str(tmp_path / "offline_teacher_data"), "results": str(tmp_path / "results")},
        **changes,
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(study))
    return str(path)


def prepared(path, *overrides):
    """The stages before the trials."""
    workspace = Workspace(load_study(path, overrides))
    workspace.baselines()
    workspace.capture()
    workspace.verify()
    workspace.archive()
    return workspace


def run(path, *overrides):
    """Every stage, as `stillroom run` does."""
    workspace = prepared(path, *overrides)
    return workspace, workspace.sweep()


def reported(path, *groups):
    """Every stage without a launcher: a trial of each group in this process, and the report."""
    workspace = prepared(path)
    for group in groups:
        workspace.train_one(group, 0)
    workspace.report()
    return workspace
