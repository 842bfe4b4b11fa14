"""Test splits that lm-evaluation-harness evaluates: a task of one's own, offline, from the study file to the report."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from stillroom.analysis.report import write_report
from stillroom.config import Evaluation
from stillroom.errors import UserError
from stillroom.evaluation.harness_tasks import Harness
from stillroom.evaluation.metrics import by_key
from stillroom.experiment.jobs import run_trial
from stillroom.experiment.sharded_trial import train_sharded
from stillroom.experiment.workspace import Workspace
from stillroom.files import read_json
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.split_products import split_products
from stillroom.preflight import doctor
from stillroom.preflight.planning import plan_study
from stillroom.studies import load_study
from studies import study_file

BY_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "options",
    "doc_to_target": "gold",
    "num_fewshot": 2,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 1.5},
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{options[gold]}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4, "do_sample": False},
    "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def task_folder(tmp_path):
    """A folder of two tasks for the harness, over one file of rows."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ["red", "blue", "green", "yellow"]
    rows = [
        {"question": f"After {words[n % 4]} comes", "options": [f" {w}" for w in words], "gold": (n + 1) % 4}
        for n in range(24)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    files = {"test": str(folder / "rows.json"), "train": str(folder / "rows.json")}
    for name, definition in (("colours", BY_CHOICE), ("colours_written", WRITTEN)):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")}}
        task = {"task": name, "test_split": "test", "fewshot_split": "train", **data, **definition}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


def splits(task_folder, **more):
    """Both tasks as test splits."""
    return {
        "colours": {"harness": "colours", "include_path": str(task_folder), "examples": 20, **more},
        "in_words": {"harness": "colours_written", "include_path": str(task_folder), "examples": "all"},
    }


def plain(model, task_folder):
    """What the harness's own front door says of a model's folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = {}
    for name, limit in (("colours", 20), ("colours_written", None)):
        found |= simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "float32"},
            device="cpu",
            tasks=[name],
            limit=limit,
            task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
            bootstrap_iters=0,
        )["results"]
    return {
        ("test", "colours", "acc"): found["colours"]["acc,none"],
        ("test", "colours", "acc_norm"): found["colours"]["acc_norm,none"],
        ("test", "in_words", "exact_match_first"): found["colours_written"]["exact_match,first"],
    }


@pytest.mark.slow
def test_its_numbers_are_those_of_the_harness_alone_in_every_table(
    tmp_path, task_folder, monkeypatch, teacher_ref, student_ref
):
    """Of trial and baselines, as its own command gives them of the saved folders; other rows are other trials.

    A student sharded over two processes has the same numbers.
    """
    evaluation = {"max_new_tokens": 8, "test_splits": splits(task_folder)}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only"], evaluation=evaluation)
    workspace = Workspace(load_study(path))
    workspace.baselines()
    workspace.capture()
    workspace.verify()
    workspace.archive()
    result = workspace.train_one("task_only", 0)
    (plan,) = workspace.plans()
    numbers = {key: value for key, value in by_key(result["metrics"]).items() if key[0] == "test"}
    assert numbers == plain(plan.folder / "checkpoint_1", task_folder)
    for role, ref in (("teacher", teacher_ref), ("student", student_ref)):
        kept = read_json(tmp_path / "results" / "baselines" / f"{role}_test.json")
        assert by_key(kept["metrics"]) == plain(ref.model, task_folder)
    frame = pd.read_csv(tmp_path / "results" / "results_summary.csv")
    assert frame["test_acc_norm_colours"].tolist() == [numbers["test", "colours", "acc_norm"]]
    page = write_report(tmp_path / "results").read_text()
    assert "colours: 20 examples of its task colours, version 1.5" in page
    assert f"<td>{numbers['test', 'colours', 'acc']:.4f}</td>" in page

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where no GPU is to be used, processes are forks
    by_two = partial(train_sharded, count=2, threads=1)
    sharded = by_key(run_trial(replace(plan, experiment=tmp_path / "sharded"), by=by_two)["metrics"])
    assert {key: sharded[key] for key in numbers} == pytest.approx(numbers)

    again = Workspace(load_study(path))
    assert [plan.folder for plan in again.plans()] == [plan.folder]
    rows = json.loads((task_folder / "rows.json").read_text())
    (task_folder / "rows.json").write_text(json.dumps(rows[::-1]))
    with pytest.raises(UserError, match="colours: the harness's task is not the one that this study was started with"):
        Harness.load(again.study.evaluation.harness_splits, again.examples.harness)
    assert Workspace(load_study(path)).plans()[0].folder != plan.folder


def test_it_is_refused_by_name_before_anything_is_spent(tmp_path, task_folder, monkeypatch, teacher_ref, student_ref):
    """A task that is not there, of other kinds or without the harness: by plan, doctor, and before the corpus."""

    def refused(message, **changes):
        split = {**splits(task_folder)["colours"], **changes}
        evaluation = {"test_splits": {"colours": split}}
        path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only"], evaluation=evaluation)
        study = load_study(path)
        with pytest.raises(UserError, match=message):
            _ = Workspace(study).examples
        (line,) = doctor._harness(study)
        assert not line.fine
        return study

    unknown = r"test_splits.colours.harness: 'colors' is none of the tasks in .*tasks"
    with pytest.raises(UserError, match=unknown):
        plan_study(refused(unknown, harness="colors"))
    refused("colours.include_path: nowhere is not a folder", include_path="nowhere")
    refused("colours.examples: 30 asked for, but colours has 24 rows", examples=30)
    code = {"task": "code", "unsafe_code": True, "include": "colours.yaml"}
    (task_folder / "code.yaml").write_text(yaml.safe_dump(code))
    refused("code runs code that the model writes", harness="code")
    (task_folder / "rows.json").unlink()
    refused("the harness cannot load colours: ")
    for field, value in (("split", "train"), ("dataset", "rows.json")):
        with pytest.raises(UserError, match=f"{field}: the harness's task has data of its own"):
            refused("", **{field: value})
    with pytest.raises(UserError, match="'quiz' is a task of the corpus; name it otherwise"):
        load_study("quickstart", ["evaluation.test_splits={quiz: {harness: arc_challenge, examples: 9}}"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    absent = "test_splits.colours.harness: lm-evaluation-harness is not installed: pip install 'lm_eval"
    with pytest.raises(UserError, match=absent):
        plan_study(refused(absent))


def test_nothing_of_ours_is_left_changed(task_folder, student_ref):
    """Neither seeds nor tokenizer nor model; a model scored by parts, as on a GPU, gives the same numbers."""
    evaluation = Evaluation.model_validate({"test_splits": splits(task_folder)})
    harness = Harness.load(evaluation.harness_splits)
    model, tokenizer = load_model(student_ref), load_tokenizer(student_ref)
    model.config.tie_word_embeddings = True
    tokenizer.pad_token = None
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = harness.metrics(model, tokenizer, evaluation)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert tokenizer.pad_token is None
    assert "tie_weights" not in vars(model)
    assert harness.metrics(model, tokenizer, evaluation) == found, "few-shot examples are drawn anew"
    by_parts = split_products(load_model(student_ref, "bfloat16").float(), torch.bfloat16)
    by_parts.config.tie_word_embeddings = True
    assert len(harness.metrics(by_parts, tokenizer, evaluation)) == len(found) == 3
