"""Files are complete or absent, whoever is killed meanwhile, and what a killed writer leaves is removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

from stillroom.experiment.workspace import Workspace
from stillroom.files import atomic_path, remove_leftovers, remove_tree, write_json
from stillroom.studies import load_study

KILLED = """
import os, signal, sys
from pathlib import Path
from stillroom.files import atomic_path
with atomic_path(Path(sys.argv[1])) as path:
    if sys.argv[2] == "folder":
        path.mkdir(parents=True)
        path = path / "inside"
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""

PLACES = {
    "results/corpus/corpus.parquet": "file",
    "results/models/teacher": "folder",
    "results/baselines/teacher.json": "file",
    "results/knowledge_distillation_experiment/trial_x/checkpoint_1": "folder",
    "results/knowledge_distillation_experiment/trial_x/predictions_1.parquet": "file",
    "results/run.json": "file",
    "results/figures/accuracy.png": "file",
    "offline_teacher_data/part-00000.parquet": "file",
    "offline_teacher_data_2026-01-01T000000Z": "folder",
}


def killed_writing(path, kind):
    """What a process leaves that is killed in the middle of writing `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], check=False)
    assert done.returncode == -9
    (left,) = path.parent.glob(f".{path.name}.*.tmp")
    return left


@pytest.mark.slow
def test_whatever_a_killed_writer_leaves_the_next_command_removes(tmp_path, finished_study):
    """Nine kinds of leftovers stayed for ever, though the docs said that they would not."""
    shutil.copytree(finished_study.results, tmp_path / "results")
    left = [killed_writing(tmp_path / place, kind) for place, kind in PLACES.items()]
    overrides = [f"paths.results={tmp_path / 'results'}", f"paths.store={tmp_path / 'offline_teacher_data'}"]
    workspace = Workspace(load_study(str(finished_study.results.parent / "tiny.yaml"), overrides))
    assert all(path.exists() for path in left)
    _ = workspace.examples
    assert [path for path in left if path.exists()] == []


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    """Two processes share a folder; one that starts must not take what the other has begun."""
    with atomic_path(tmp_path / "own") as unfinished:
        unfinished.write_text("being written")
        other = unfinished.with_name(unfinished.name.replace(f".{os.getpid()}.", f".{os.getppid()}."))
        other.write_text("another's")
        elsewhere = unfinished.with_name(
            unfinished.name.replace(f".{os.getpid()}.", ".1.").replace(unfinished.name.split(".")[2], "node")
        )
        elsewhere.write_text("another machine's")
        remove_leftovers(tmp_path)
        assert unfinished.exists()
        assert other.exists()
        assert elsewhere.exists()
        os.utime(elsewhere, (time.time() - 10**6,) * 2)
        remove_leftovers(tmp_path)
        assert not elsewhere.exists()
    assert (tmp_path / "own").read_text() == "being written"


def test_a_long_name_leaves_room_for_a_temporary_one(tmp_path):
    """A file system allows 255 bytes a name; the name meanwhile must not need more than the name itself."""
    with atomic_path(tmp_path / ("n" * 250)) as path:
        path.write_text("x")
    (tmp_path / "folder").mkdir()
    remove_tree(tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["n" * 250]


def test_a_name_comes_after_its_content_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut must not leave a whole-looking file of zeros under the name."""
    path, seen = tmp_path / "result.json", []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda handle: (seen.append(path.exists()), real(handle)))
    write_json(path, {"a": 1})
    assert seen == [False]
