"""A trained student leaves the study as a plain model: no projector, its own numbers on its card, all files or none."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from stillroom.afterwards import export
from stillroom.afterwards.export import export_trial
from stillroom.cli import app
from stillroom.config import ModelRef
from stillroom.data.corpus import Examples, save_corpus
from stillroom.data.tasks.chats import chat
from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_column
from stillroom.evaluation.scoring import evaluate
from stillroom.files import read_json
from stillroom.models.hub import load_model, load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trial(finished_study):
    """The folder of the combined group's trial."""
    return next(p.folder for p in finished_study.plans() if p.trial.group.name == "combined")


@pytest.fixture(scope="module")
def exported(trial, tmp_path_factory):
    """It, exported."""
    return export_trial(trial, tmp_path_factory.mktemp("hub") / "student")


def test_it_loads_where_this_package_is_not_and_is_the_trained_model(exported, trial):
    """A fresh interpreter with Transformers alone; every weight as in the checkpoint; no projector, no file of ours."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"m = M.from_pretrained({str(exported)!r}); t = T.from_pretrained({str(exported)!r}); "
        "out = m.generate(**t('Review: the plot was bright\\nMood:', return_tensors='pt')); "
        "assert 'stillroom' not in sys.modules; print(out.shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 5
    weights = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    checkpoint = AutoModelForCausalLM.from_pretrained(trial / "checkpoint_2").state_dict()
    assert weights.keys() == checkpoint.keys()
    assert all(torch.equal(weights[name], checkpoint[name]) for name in weights)
    names = {path.name for path in exported.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("projector" in name or "trainer" in name for name in names)
    assert "projector" not in (exported / "config.json").read_text()


def test_its_predictions_are_those_of_the_trial(exported, trial, finished_study):
    """Scored again from the exported folder."""
    ref = ModelRef(model=str(exported))
    settings, held_out = finished_study.study.evaluation, finished_study.examples.validation
    found = evaluate(load_model(ref), load_tokenizer(ref), held_out, settings)
    kept = pd.read_parquet(trial / "predictions.parquet")
    assert found["example_id"].tolist() == kept["example_id"].tolist()
    assert found["prediction"].tolist() == kept["prediction"].tolist()


def test_its_generation_config_is_how_it_was_measured(exported):
    """Greedy, as long as the study's, ending at the tokenizer's EOS."""
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 8
    assert not settings.get("do_sample", False)
    assert settings["eos_token_id"] == AutoTokenizer.from_pretrained(exported).eos_token_id


def test_a_student_of_chats_stops_at_what_ends_a_turn(tokenizer, tmp_path, monkeypatch):
    """As it was measured: its template's own end of a turn, or EOS; elsewhere it would write the user's turns."""
    chat_tokenizer = copy.deepcopy(tokenizer)
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    chat_tokenizer.save_pretrained(tmp_path / "student")
    talk = chat("talk", [("user", "Hi"), ("assistant", "Hello")], [False, True])
    save_corpus(Examples([talk], [], {}), tmp_path / "results" / "corpus", "0")
    monkeypatch.setattr(export, "_planned", lambda trial: {"study": {"evaluation": {"max_new_tokens": 8}}})
    made = export._generation_config(tmp_path / "results" / "trials" / "trial", tmp_path / "student")
    assert made.eos_token_id == [chat_tokenizer.eos_token_id, chat_tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_card_says_data_method_metrics_and_limits(exported, trial, finished_study):
    """Its figures are the trial's own and the baselines'; its head is YAML that the hub reads; no folder is named."""
    card = (exported / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert "base_model" not in head  # a local folder is no name on the hub
    for heading in ("Data", "Method", "Metrics", "Limits"):
        assert f"\n## {heading}\n" in card
    result = read_json(trial / "result.json")
    before = read_json(finished_study.results / "baselines" / "student.json")["metrics"]
    teacher = read_json(finished_study.results / "baselines" / "teacher.json")["metrics"]
    for task in ("sentiment", "quiz", "arithmetic"):
        cells = re.search(rf"^\| {task} \| 3 \| (.*) \| (.*) \| (.*) \|$", card, re.M).groups()
        values = [by_column(rows)[f"validation_accuracy_{task}"] for rows in (before, result["metrics"], teacher)]
        assert cells == tuple(f"{value:.1%}" for value in values)
        assert f"| {task} | builtin | train | 27 | 3 |" in card
    for term, weight in {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}.items():
        assert f"| {term} | {weight} | {result['gradient_shares'][term]:.1%} |" in card
    assert str(finished_study.results.parent) not in card
    assert "{" not in card.replace("{folder}", "")


def test_a_hub_model_is_named_with_its_revision(finished_study, trial, tmp_path):
    """The hub links a model to the one it came from, and to its data."""
    results = tmp_path / "results"
    folder = results / trial.parent.name / trial.name
    folder.mkdir(parents=True)
    for path in (trial / "result.json", trial / "checkpoint_2"):
        (folder / path.name).symlink_to(path)
    (results / "corpus").symlink_to(finished_study.results / "corpus")
    planned = read_json(finished_study.results / "planned.json")
    planned["study"]["student"] |= {"model": "some/student", "revision": "abc"}
    planned["study"]["corpus"]["tasks"]["quiz"] |= {"dataset": "some/data", "revision": "def"}
    (results / "planned.json").write_text(json.dumps(planned))
    card = (export_trial(folder, tmp_path / "out") / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "some/student"
    assert head["datasets"] == ["some/data"]
    assert "at revision abc" in card
    assert "| quiz | some/data def | train |" in card
    assert "not measured" in card  # no baselines in that folder


def test_it_is_whole_or_absent(trial, tmp_path, monkeypatch):
    """A fault on the way leaves nothing; what is there already is not touched; an unfinished trial is refused."""
    monkeypatch.setattr(
        "stillroom.afterwards.export._generation_config", lambda *a: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(UserError, match="cannot write"):
        export_trial(trial, tmp_path / "student")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(UserError, match="exists"):
        export_trial(trial, tmp_path / "mine")
    with pytest.raises(UserError, match="not the folder of a finished trial"):
        export_trial(tmp_path, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_says_what_it_made(trial, tmp_path):
    """And for a machine, which files."""
    done = CliRunner().invoke(app, ["export", str(trial), str(tmp_path / "student"), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert "model.safetensors" in facts["files"]
    assert Path(facts["folder"]) == tmp_path / "student"


def test_it_is_pushed_with_its_card_or_says_how_to_do_it_by_hand(trial, tmp_path, monkeypatch):
    """A private repository unless asked otherwise; where the hub refuses, the folder stays and the message names it."""
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            calls.append((name, private, exist_ok))
            return type("Made", (), {"repo_id": name, "__str__": lambda self: f"https://hub/{name}"})()

        def upload_folder(self, repo_id, folder_path, commit_message):
            if "refused" in repo_id:
                raise OSError("403 Forbidden")
            calls.append((repo_id, {p.name for p in folder_path.iterdir()} >= {"README.md", "model.safetensors"}))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    done = CliRunner().invoke(app, ["export", str(trial), str(tmp_path / "a"), "--push", "me/student", "--json"])
    assert done.exit_code == 0, done.output
    assert calls == [("me/student", True, True), ("me/student", True)]
    assert json.loads(done.stdout)["pushed"] == "https://hub/me/student"
    done = CliRunner().invoke(app, ["export", str(trial), str(tmp_path / "b"), "--push", "me/refused", "--public"])
    assert isinstance(done.exception, UserError)
    assert calls[-1] == ("me/refused", False, True)
    assert re.search(
        r"me/refused: cannot be written on the hub: 403 Forbidden; .*hf upload me/refused", str(done.exception)
    )
    assert (tmp_path / "b" / "README.md").is_file()
