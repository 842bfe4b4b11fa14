"""What a machine with a GPU is asked to do, and what it need not have."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import LlamaConfig

import gpu
import options
from pretend_gpu import pretend_gpu
from processes import start
from stillroom.config import Evaluation, Objective
from stillroom.data.encoding import encode_many
from stillroom.evaluation.generation import continuations, generate
from stillroom.experiment.workspace import Workspace
from stillroom.files import read_json
from stillroom.models.architecture import check_capture, miniature
from stillroom.models.hub import load_config, load_model, load_tokenizer
from stillroom.models.sizes import heads, width
from stillroom.signals import Layout, compute_signals
from stillroom.studies import load_study
from stillroom.terms import terms_of
from studies import study_file

A_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

BARE = """
import sys

sys.modules.update(dict.fromkeys(("ray", "mlflow", "datasets")))  # importing any of them is an ImportError

from stillroom.cli import app

study = sys.argv[1]
for command in (
    ["capture", study],
    ["verify", study, "--recompute", "2"],
    ["archive", study],
    ["train", study, "--group", "combined", "--seed", "0"],
):
    app(command, standalone_mode=False)
"""


@pytest.mark.slow
def test_capture_verify_archive_and_train_need_no_ray_mlflow_or_datasets(tmp_path, teacher_ref, student_ref):
    """A bare GPU machine has none of them; that nothing is tracked there is said, once a command."""
    study = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["combined"])
    done = subprocess.run(
        [sys.executable, "-c", BARE, study], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflow is not installed, so nothing is tracked") == 2
    assert list((tmp_path / "results").glob("*/trial_*_combined_seed_0/result.json"))


@A_CARD
@pytest.mark.slow
def test_a_gpu_computes_what_a_cpu_computes(tmp_path):
    """Signals, losses and gradients in every precision; trials that resume; float16's scaler: each within its bound."""
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--stages", "correct", "--output", str(tmp_path / "gpu.json")])
    found = read_json(tmp_path / "gpu.json", "stages")["stages"]["correct"]
    assert ended.value.code == 0, found.get("error")


@pytest.mark.slow
def test_every_branch_for_a_gpu_computes_what_a_cpu_computes(tmp_path):
    """On a pretended GPU: nothing mixes devices, and the host waits nowhere in a training step."""
    stages = ("correct", "capture", "evaluation", "trial")
    with pretend_gpu(), pytest.raises(SystemExit) as ended:
        gpu.main(["--tiny", "--stages", ",".join(stages), "--output", str(tmp_path / "gpu.json")])
    found = read_json(tmp_path / "gpu.json", "stages")["stages"]
    assert ended.value.code == 0, [figures.get("error") for figures in found.values()]
    assert found["correct"]["waits for the device in two combined steps"] == {}


@pytest.mark.slow
def test_every_option_of_the_loss_runs_on_a_gpu_and_waits_for_nothing(tmp_path):
    """A step of every group of `signals`, on a pretended GPU; the teacher's head goes there once, before the steps."""
    few = [f"--set=corpus.tasks.{task}.examples=20" for task in ("sentiment", "quiz", "arithmetic")]
    with pretend_gpu() as card:
        options.main(["signals", "--rounds", "1", "--steps", "1", *few, "--output", str(tmp_path / "out.json")])
    rows = read_json(tmp_path / "out.json", "rows", "hardware", "versions")["rows"]
    assert len(rows) > 20
    assert all(row["median"] > 0 for row in rows)
    where = ("terms/", "training/step", "training/collation")
    assert {place for place in card.waits if place.startswith(where)} == {
        "terms/full_support.py FullSupport.to",
        "training/step.py StepRunner._norm",  # what a share is found from
        "training/step.py losses_of.<locals>.<dictcomp>",  # at the end
    }


def test_random_weights_touch_no_gpu(student_ref, store):
    """On two GPUs PyTorch warned that it keeps the state of both, in the first lines that a user saw."""
    with pretend_gpu(2) as cards, warnings.catch_warnings(action="error"):
        miniature(LlamaConfig())
        (projected, *_) = terms_of(Objective(), store, load_config(student_ref))
        assert projected.trained(0).weight.device == torch.device("cpu")
        assert cards.seeds == []
        torch.manual_seed(0)
        assert cards.seeds == [0]


@pytest.mark.slow
def test_a_teacher_over_two_gpus_computes_what_it_does_on_one(teacher_ref, examples):
    """Its signals, and its answers while rows end: what is cached of a layer lies where the layer does."""
    prompts = [example for example in examples.train if not example.choices][:5]
    found = []
    for count in (1, 2):
        with pretend_gpu(count):
            model, tokenizer = load_model(teacher_ref, device="auto"), load_tokenizer(teacher_ref)
            places = {parameter.device.index for parameter in model.parameters()}
            assert places == set(range(count))
            free = generate(model, tokenizer, prompts, Evaluation(max_new_tokens=24))
            stops = tuple(text[place : place + 2] for place, text in enumerate(free))
            ended = continuations(model, tokenizer, prompts, Evaluation(max_new_tokens=24), stops)
            encodings = encode_many(tokenizer, [example.text for example in prompts])
            layout = Layout(8, width(model.config), heads(model.config), "float32", "int32")
            signals = compute_signals(model, encodings, layout, torch.float32)
            found.append((free, ended, signals))
    one, two = found
    assert one[:2] == two[:2]
    assert len({len(text) for text, _ in one[1]}) > 1
    for alone, spread in zip(one[2], two[2], strict=True):
        assert all(torch.equal(alone[name], spread[name]) for name in alone)


@pytest.mark.slow
def test_every_line_of_the_gpu_check_runs_at_a_tiny_size(tmp_path):
    """On the day a card is at hand nothing is to be debugged: each stage ends, with figures in the file."""
    stages = [stage for stage in gpu.STAGES if stage not in ("correct", "sharing")]  # the one above; more processes
    arguments = ["--tiny", "--stages", ",".join(stages), "--output", str(tmp_path / "gpu.json")]
    running = start(tmp_path / "log", gpu.main, arguments)
    assert running.end() == 0, running.output
    record = read_json(tmp_path / "gpu.json")
    assert list(record["stages"]) == stages
    assert record["stages"]["study"]["hours of the study"] > 0
    assert not record["failed"]


def test_determinism_is_prepared_before_anything_is_computed(tmp_path, teacher_ref, student_ref, monkeypatch):
    """cuBLAS looks at its variable once: set by the trial, it came too late in a process that had captured."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    for on in (False, True):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
        file = study_file(tmp_path, teacher_ref.model, student_ref.model)
        Workspace(load_study(file, [f"training.deterministic={on}"]))
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == on
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ""


def test_the_teachers_check_does_not_grow_with_the_square_of_a_text(teacher_ref):
    """The eager path keeps every layer's maps: 34 GB at 4,096 tokens of a 7B teacher. All else sees the whole text."""
    model, seen = load_model(teacher_ref), []
    forward = type(model.base_model).forward

    def spy(*args, **kwargs):
        seen.append((kwargs["input_ids"].shape[1], bool(kwargs.get("output_attentions"))))
        return forward(model.base_model, *args, **kwargs)

    model.base_model.forward = spy
    check_capture(model, torch.randint(3, 90, (1, 400)))
    assert [length for length, with_maps in seen if with_maps] == [256]
    assert [length for length, with_maps in seen if not with_maps].count(400) >= 3


def test_a_stage_that_fails_leaves_its_error_and_the_next_one_runs(tmp_path, monkeypatch):
    """A card that is lent for minutes is not given back half used; nor is a stage begun after the budget."""

    def fails(inputs, figures):
        figures["first"] = 1
        raise RuntimeError("no such kernel")

    def works(inputs, figures):
        figures["second"] = 2

    monkeypatch.setattr(gpu, "STAGES", {"ceilings": fails, "correct": works})
    inputs = gpu.Inputs(gpu.load_study("quickstart"), tmp_path, tmp_path, tiny=True)
    record = gpu.run(inputs, ["ceilings", "correct"], float("inf"), tmp_path / "gpu.json")
    written = read_json(tmp_path / "gpu.json")
    assert record["failed"] == written["failed"] == ["ceilings"]
    assert written["stages"]["ceilings"]["error"] == "RuntimeError: no such kernel"
    assert written["stages"]["ceilings"]["first"] == 1
    assert written["stages"]["correct"]["second"] == 2
    assert gpu.run(inputs, ["correct"], -1.0, None)["skipped"] == ["correct"]
