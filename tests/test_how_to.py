"""The how-to pages that a reader can follow with two small models: followed as they stand."""

from __future__ import annotations

import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pages
from small_things import STUDENT_SHAPE, TEACHER_SHAPE, write_model
from stillroom.afterwards.export import export_trial
from stillroom.cli import app
from stillroom.config import ModelRef
from stillroom.files import read_json
from stillroom.models.hub import load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def follow(tmp_path, monkeypatch, byte_level, sentencepiece):
    """Does what a page of `docs/how-to` says in an empty folder with two models; returns the folder."""

    def follow_page(name):
        write_model(tmp_path / "models" / "teacher", byte_level, TEACHER_SHAPE, 1)
        write_model(tmp_path / "models" / "student", sentencepiece, STUDENT_SHAPE, 2)
        environment = pages.shell(tmp_path, pages.ROOT / "src")
        pages.follow(pages.ROOT / "docs" / "how-to" / name, tmp_path, environment)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return follow_page


def test_chats(follow):
    """Two templates, one of which trims; trained, scored and compared on every turn."""
    folder = follow("chats.md")
    results = [read_json(p) for p in folder.glob("results/knowledge_distillation_experiment/*/result.json")]
    assert {result["config"]["distill_type"] for result in results} == {"task_only", "combined"}
    assert all(result["coverage"]["adding"]["token_coverage"] > 0.5 for result in results)
    (trial,) = folder.glob("results/knowledge_distillation_experiment/trial_*_combined_*")
    exported = export_trial(trial, folder / "exported")
    ends = read_json(exported / "generation_config.json")["eos_token_id"]
    assert ends == load_tokenizer(ModelRef(model=str(exported))).eos_token_id, "plain.jinja ends a turn with EOS"
    counts = read_json(folder / "results" / "corpus" / "corpus.json")["counts"]["adding"]
    assert (counts["used"], counts["unusable"], counts["trimmed"]) == (20, 0, 0)


def test_data(follow):
    """The CSV, the compressed file and the plain texts are read and learnt; texts are no part of any accuracy."""
    folder = follow("data.md")
    counts = read_json(folder / "results" / "corpus" / "corpus.json")["counts"]
    assert {task: task_counts["used"] for task, task_counts in counts.items()} == {
        "capitals": 30,
        "sums": 20,
        "notes": 30,
    }
    (result,) = (read_json(p) for p in folder.glob("results/knowledge_distillation_experiment/*/result.json"))
    assert result["coverage"]["notes"]["aligned_predictions"] > 0
    assert {row["task"] for row in result["metrics"]} == {None, "capitals", "sums"}
    assert (folder / "results" / "report.html").is_file()


def test_students(follow):
    """LoRA, a schedule and checkpointing in one trial; merged and adapter are the same model."""
    folder = follow("students.md")
    (trial,) = folder.glob("results/knowledge_distillation_experiment/trial_*")
    assert read_json(trial / "result.json")["epoch"] == 2
    assert {p.name for p in (folder / "my-adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    card = (folder / "my-adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "LoRA layers of rank 8 and alpha 16" in card
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        merged, adapter = (
            AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits for name in ("my-student", "my-adapter")
        )
    assert torch.allclose(merged, adapter, atol=1e-5)


def test_imported(follow):
    """Served log-probabilities to a report, without a forward pass of the teacher; DistillKit's columns, too."""
    folder = follow("imported.md")
    results = [read_json(p) for p in folder.glob("results/knowledge_distillation_experiment/*/result.json")]
    assert {result["config"]["distill_type"] for result in results} == {"task_only", "black_box"}
    assert [p.name for p in (folder / "results" / "baselines").glob("*.json")] == ["student.json"]
    assert read_json(folder / "from_distillkit" / "manifest.json")["layout"]["top_k"] == 20
    assert (folder / "results" / "report.html").is_file()


def test_trackers(follow):
    """Every tracker has the one trial; Weights & Biases is added to a finished study."""
    folder = follow("trackers.md")
    (trial,) = folder.glob("results/knowledge_distillation_experiment/trial_*")
    assert [p.name for p in (folder / "results" / "tensorboard").iterdir()] == [trial.name]
    written = (trial / "result.json").read_bytes()
    (command,) = next(b for b in pages.blocks(pages.ROOT / "docs/how-to/trackers.md") if "WANDB" in b.text).commands
    done = CliRunner(env={"WANDB_MODE": "offline"}).invoke(app, shlex.split(command.split("stillroom ")[1]))
    assert done.exit_code == 0, done.output
    assert len(list((folder / "results" / "wandb").glob("offline-run-*"))) == 2
    assert (trial / "result.json").read_bytes() == written, "trained again"
