"""What a run resumes from, or hands on, is what was written, to the bit."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open

from stillroom.afterwards.export import export_trial
from stillroom.config import GROUPS, Evaluation, ModelRef, Objective, Training
from stillroom.errors import UserError
from stillroom.evaluation.metrics import overall_metrics
from stillroom.files import read_json, write_json
from stillroom.models.hub import load_model
from stillroom.models.split_products import scoring_copy
from stillroom.training.checkpoints import (
    DIGESTS,
    PROGRESS,
    STATE,
    TrainingState,
    best_epoch,
    checkpoints,
    require_whole,
)
from stillroom.training.distillation_student import save_model
from stillroom.training.fine_tuning import fine_tuned_teacher
from stillroom.training.train_student import Trial, train

TRAINING = Training(learning_rate=3e-3, epochs=2, precision="float32", gradient_interval=0)


class StoppedError(Exception):
    """Stands for a process that dies after an epoch."""


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory, student_ref, store, examples):
    """The folder of a trial that was stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("unfinished") / "trial"

    def stop(metrics):
        raise StoppedError

    arguments = (student_ref, TRAINING, Objective(), Evaluation(max_new_tokens=4), examples, store.path)
    with pytest.raises(StoppedError):
        train(Trial("t", GROUPS["combined"], 0), *arguments, folder, report=stop)
    return folder, arguments


def flipped(path, rng):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def test_a_flipped_bit_in_what_a_trial_resumes_from_is_found(unfinished, tmp_path):
    """Of 300 flipped bits in `trainer_state.pt` 298 loaded with other values, and none was noticed."""
    folder, _ = unfinished
    whole = (folder / "checkpoint_1" / STATE).read_bytes()
    require_whole(folder / "checkpoint_1")
    rng = random.Random(0)
    copy = shutil.copytree(folder / "checkpoint_1", tmp_path / "checkpoint_1")
    for _ in range(100):
        flipped(copy / STATE, rng)
        with pytest.raises(UserError, match=rf"{STATE} is damaged.*delete .*checkpoint_1"):
            require_whole(copy)
        (copy / STATE).write_bytes(whole)


def test_a_checkpoint_that_is_written_beside_the_evaluation_is_whole_or_absent(unfinished, tmp_path, monkeypatch):
    """No name of its own before the evaluation is over; what breaks that off takes it along."""
    _, arguments = unfinished
    seen = []

    def broken(*given, **options):
        seen.append([path.name for path in tmp_path.iterdir() if path.name.startswith(("checkpoint", ".checkpoint"))])
        raise StoppedError

    monkeypatch.setattr("stillroom.training.train_student._validation_losses", broken)
    with pytest.raises(StoppedError):
        train(Trial("t", GROUPS["combined"], 0), *arguments, tmp_path)
    assert len(seen[0]) == 1
    assert seen[0][0].startswith(".checkpoint_1.")
    assert not list(tmp_path.glob("*checkpoint*"))


def test_what_the_thread_cannot_write_stops_the_trial(unfinished, tmp_path, monkeypatch):
    """A disk that fills up while the student is evaluated: one message, and no checkpoint."""
    _, arguments = unfinished

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stillroom.training.checkpoints._write_state", full)
    with pytest.raises(UserError, match=r"cannot write .*checkpoint_1: No space left on device"):
        train(Trial("t", GROUPS["combined"], 0), *arguments, tmp_path)
    assert not list(tmp_path.glob("*checkpoint*"))


@pytest.mark.parametrize("damage", ["emptied", "weights", "projector", "digests", "missing"])
def test_a_trial_with_a_damaged_checkpoint_stops_and_resumes_without_it(unfinished, tmp_path, damage):
    """No traceback; the message names the file, and doing what it says leads on."""
    folder, arguments = unfinished
    copy = shutil.copytree(folder, tmp_path / "trial")
    checkpoint = copy / "checkpoint_1"
    name = {"weights": "model.safetensors", "projector": "projector.safetensors", "digests": DIGESTS}.get(damage, STATE)
    if damage == "missing":
        (checkpoint / "model.safetensors").unlink()
    elif damage == "emptied":
        (checkpoint / STATE).write_bytes(b"")
    elif damage == "digests":
        (checkpoint / DIGESTS).write_text("[1, 2")
    else:
        flipped(checkpoint / name, random.Random(1))
    trial = Trial("t", GROUPS["combined"], 0)
    with pytest.raises(UserError, match=r"checkpoint_1"):
        train(trial, *arguments, copy)
    shutil.rmtree(checkpoint)
    assert len(train(trial, *arguments, copy)["epochs"]) == 2


def test_an_earlier_training_of_the_same_name_is_not_taken_for_newer(unfinished, tmp_path):
    """A final checkpoint without its result counted as the newest, so that each new one was dropped."""
    folder, arguments = unfinished
    copy = tmp_path / "trial"
    shutil.copytree(folder / "checkpoint_1", copy / "checkpoint_7")
    (copy / "checkpoint_7" / STATE).unlink()
    result = train(Trial("t", GROUPS["combined"], 0), *arguments, copy)
    assert [path.name for path in checkpoints(copy)] == ["checkpoint_2"]
    assert [epoch["epoch"] for epoch in result["epochs"]] == [1, 2]


def test_a_fine_tuned_teacher_is_found_where_its_results_were_moved_and_refused_where_damaged(unfinished, tmp_path):
    """Its path was that of the old working directory; a flipped bit in it changed every shard unnoticed."""
    folder, _ = unfinished
    results = tmp_path / "results" / "teacher"
    shutil.copytree(folder / "checkpoint_1", results / "trial_x" / "checkpoint_1")
    write_json(results / "adapted.json", {"origin": "x", "model": "trial_x/checkpoint_1", "epochs": []})
    assert fine_tuned_teacher(results, "x") == results / "trial_x" / "checkpoint_1"
    assert fine_tuned_teacher(results, "y") is None
    moved = shutil.move(results, tmp_path / "moved")
    assert fine_tuned_teacher(tmp_path / "moved", "x") == tmp_path / "moved" / "trial_x" / "checkpoint_1"
    flipped(tmp_path / "moved" / "trial_x" / "checkpoint_1" / "model.safetensors", random.Random(2))
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        fine_tuned_teacher(tmp_path / "moved", "x")
    assert moved


@pytest.mark.slow
def test_a_damaged_student_is_not_exported(finished_study, tmp_path):
    """A flipped bit in a final checkpoint was handed on."""
    results = shutil.copytree(finished_study.results, tmp_path / "results")
    (trial,) = results.glob("knowledge_distillation_experiment/*_combined_seed_0")
    export_trial(trial, tmp_path / "whole")
    assert not (tmp_path / "whole" / DIGESTS).exists()
    (weights,) = trial.glob("checkpoint_*/model.safetensors")
    flipped(weights, random.Random(3))
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        export_trial(trial, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_each_epoch_says_which_weights_it_ended_in(unfinished, tmp_path):
    """By which two groups that never differed are known; another group's are others."""
    folder, arguments = unfinished
    results = {
        group: train(Trial("t", GROUPS[group], 0), *arguments, tmp_path / group) for group in ("task_only", "hidden")
    }
    first, second = ([epoch["weights"] for epoch in result["epochs"]] for result in results.values())
    assert len({*first, *second}) == 4
    assert read_json(folder / "checkpoint_1" / PROGRESS)["epochs"][0]["weights"]
    assert read_json(folder / "checkpoint_1" / DIGESTS)[STATE]


def test_the_best_epoch_is_the_earliest_of_the_highest():
    """As the study's documentation says."""
    values = enumerate((0.4, 0.5, 0.5, 0.3), 1)
    rows = [{"epoch": n, "metrics": overall_metrics({"accuracy": value}, "validation")} for n, value in values]
    assert best_epoch(rows) == 2


def test_skipped_steps_stop_a_trial_only_in_a_row():
    """A float16 trial skips one now and then; that is no divergence."""
    state = TrainingState()
    for finite in (False, True) * 5:
        state.count_step(finite, [], limit=1)
    assert (state.skipped, state.consecutive) == (5, 0)
    state.count_step(False, [], limit=1)
    with pytest.raises(UserError, match="2 steps in a row"):
        state.count_step(False, [], limit=1)


def test_a_checkpoint_in_16_bits_is_the_model_that_was_scored(tmp_path, byte_level):
    """Weights are rounded, buffers are not; weights that are tied are written once."""
    shape = {"vocab_size": len(byte_level), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": None, "bos_token_id": 1}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 8}
    latent = {"q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    routed = transformers.DeepseekV3Config(
        **shape, **heads, **experts, **latent, moe_intermediate_size=16, first_k_dense_replace=1
    )
    tied = transformers.LlamaConfig(**shape, **heads, tie_word_embeddings=True)
    ids = torch.randint(3, 200, (2, 20))
    for name, config in (("routed", routed), ("tied", tied)):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for buffer, values in model.named_buffers():
            if "correction" in buffer:
                values.copy_(5 + 0.01 * torch.randn_like(values))
        (tmp_path / name).mkdir()
        save_model(model, byte_level, tmp_path / name, torch.bfloat16)
        again = load_model(ModelRef(model=str(tmp_path / name)), "float32")
        with torch.no_grad():
            scored = scoring_copy(model, "bfloat16", "float32")(ids).logits
            torch.testing.assert_close(again(ids).logits, scored, rtol=0, atol=1e-5)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) == (name == "routed")  # noqa: SIM118 is no mapping
