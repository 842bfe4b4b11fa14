"""The tutorial, followed as it stands by a reader with two pairs of models and an empty folder."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

import pages
from small_things import STUDENT_SHAPE, TEACHER_SHAPE, write_model
from stillroom.files import read_json

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def followed(tmp_path_factory, byte_level, sentencepiece):
    """The folder of a reader who has done everything that the page says."""
    folder = tmp_path_factory.mktemp("reader")
    write_model(folder / "models" / "teacher", byte_level, TEACHER_SHAPE, 1)
    write_model(folder / "models" / "student", sentencepiece, STUDENT_SHAPE, 2)
    write_model(folder / "models" / "other-teacher", sentencepiece, TEACHER_SHAPE, 3)
    write_model(
        folder / "models" / "other-student",
        byte_level,
        {**STUDENT_SHAPE, "num_attention_heads": 2, "num_key_value_heads": 2},
        4,
    )
    shutil.copytree(pages.ROOT / "src" / "stillroom", folder / "src" / "stillroom")
    pages.follow(pages.ROOT / "docs" / "tutorial.md", folder, pages.shell(folder, folder / "src"))
    return folder


def test_a_task_without_code_is_trained_and_scored(followed):
    """Both kinds, every group, every seed; nothing of the files was lost on the way."""
    trials = pd.read_csv(followed / "results" / "results_summary.csv")
    counts = trials.groupby("config/distill_type").size().to_dict()
    assert counts == {"task_only": 2, "black_box": 2, "hidden": 2, "hidden_scaled": 2}
    assert trials[["validation_accuracy_larger", "validation_accuracy_sums"]].notna().all(axis=None)
    corpus = read_json(followed / "results" / "corpus" / "corpus.json")["counts"]
    assert (corpus["larger"]["source_rows"], corpus["sums"]["source_rows"]) == (90, 64)
    assert corpus["larger"]["unusable"] == corpus["sums"]["unusable"] == 0


def test_the_added_group_was_added_and_no_other_trained_again(followed):
    """Its weight is larger, and so is its share of the gradient."""
    trials = pd.read_csv(followed / "results" / "results_summary.csv").set_index("config/distill_type")
    shares = trials["gradient_share_hidden"].groupby(level=0).mean()
    assert shares["hidden_scaled"] > shares["hidden"]
    results = [read_json(p) for p in followed.glob("results/knowledge_distillation_experiment/*/result.json")]
    scaled = next(r for r in results if r["config"]["distill_type"] == "hidden_scaled")
    assert scaled["config"]["objective"]["hidden"]["scale"] == "teacher_rms"
    written = {p.parent.name: p.stat().st_mtime for p in followed.glob("results/*/trial_*/result.json")}
    newest = sorted(written, key=written.get)[-2:]
    assert all("hidden_scaled" in name for name in newest)


def test_the_other_pair_has_a_store_and_results_of_its_own(followed):
    """Two studies side by side, neither touched by the other."""
    first, second = (
        json.loads((followed / place / "manifest.json").read_text())["made_from"]
        for place in ("offline_teacher_data", "other/offline_teacher_data")
    )
    assert first["teacher"] != second["teacher"]
    assert len(pd.read_csv(followed / "other" / "results" / "results_summary.csv")) == 8
    for place in ("results", "other/results"):
        assert "larger" in (followed / place / "report.html").read_text()


def test_the_task_of_a_file_was_trained(followed):
    """One file and one name in the registry were enough."""
    trials = pd.read_csv(followed / "parity" / "results" / "results_summary.csv")
    assert trials["validation_accuracy_parity"].between(0, 1).all()
    assert len(trials) == 4


def test_the_pictures_and_the_student_are_there(followed):
    """What the page promises at its end."""
    assert len(list(followed.glob("*.png"))) == 1
    AutoModelForCausalLM.from_pretrained(followed / "my-student")
    assert "## Limits" in (followed / "my-student" / "README.md").read_text()
