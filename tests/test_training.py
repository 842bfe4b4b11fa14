"""A trial: repeatable to the bit, paired across groups, resumable, saved as a plain model with its projector beside."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from setups import ALL, EVALUATION, TIMES, TRAINING, numbers, run
from small_things import STUDENT_SHAPE, make_store, write_model
from stillroom.config import GROUPS, Group, Lora, ModelRef, Objective
from stillroom.data.tasks import TASKS
from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_column
from stillroom.evaluation.scoring import evaluate
from stillroom.files import read_json
from stillroom.models.adapters import lora_adapter, without_adapters
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.terms import terms_of
from stillroom.terms.hidden_states import HiddenTerm
from stillroom.training import train_student
from stillroom.training.train_student import Trial, train


@pytest.fixture(scope="module")
def few(examples):
    """Half of the examples: three steps an epoch say as much of a trial as six."""
    return replace(examples, train=examples.train[::2], validation=examples.validation[::2])


@pytest.fixture(scope="module")
def unseen(examples):
    """Other examples of the built-in tasks."""
    built = [TASKS[n].build(row) for n in ("sentiment", "quiz", "arithmetic") for row in TASKS[n].generate_rows(77, 6)]
    assert not {e.prompt for e in built} & {e.prompt for e in examples.all}
    return built


@pytest.fixture(scope="module")
def combined(tmp_path_factory, student_ref, store, few):
    """One finished trial of the combined group, and its folder."""
    folder = tmp_path_factory.mktemp("trial")
    return run(folder, student_ref, store, few), folder


@pytest.fixture(scope="module")
def tested(tmp_path_factory, student_ref, store, few, unseen):
    """The same trial, evaluated on other examples at its end."""
    folder = tmp_path_factory.mktemp("tested")
    return run(folder, student_ref, store, few, test=unseen), folder


def test_the_deterministic_option_runs_every_term_and_is_off_again_after(tmp_path, student_ref, store, few):
    """No operation of a trial is one that torch refuses then; the numbers are those without it."""
    seen = []
    options = {"epochs": 1, "report": lambda metrics: seen.append(torch.are_deterministic_algorithms_enabled())}
    found = [
        numbers(run(tmp_path / str(on), student_ref, store, few, deterministic=on, **options)) for on in (True, False)
    ]
    assert seen == [True, False]
    assert found[0] == found[1]


def test_the_same_trial_twice_gives_identical_numbers(tmp_path, combined, student_ref, store, few):
    """Every metric of every epoch, to the bit, and every measured gradient."""
    again = run(tmp_path, student_ref, store, few)
    assert numbers(again) == numbers(combined[0])
    assert again["gradients"] == combined[0]["gradients"]


def test_every_metric_of_the_specification_is_there(combined):
    """Total and components, on training and validation, accuracy in all its forms, coverage and gradients."""
    result, folder = combined
    last = by_column(result["epochs"][-1]["metrics"])
    for part in ("train", "validation"):
        for name in ("loss", "task_loss", "kd_loss", "hidden_loss", "attention_loss"):
            assert last[f"{part}_{name}"] > 0
    for name in ("accuracy", "accuracy_macro", "accuracy_sentiment", "accuracy_quiz", "accuracy_arithmetic"):
        assert 0 <= last[f"validation_{name}"] <= 1
    objective = GROUPS["combined"].objective(Objective())
    weights = {name: weight for name, weight in objective.weights.items() if weight > 0}
    assert [*weights] == ["task", "kd", "hidden", "attention"]
    total = sum(weights[n] * last[f"validation_{n}_loss"] for n in weights)
    assert last["validation_loss"] == pytest.approx(total)
    assert set(result["gradient_shares"]) == {"task", "kd", "hidden", "attention"}
    assert sum(result["gradient_shares"].values()) == pytest.approx(1)
    assert set(result["coverage"]) == {"sentiment", "quiz", "arithmetic"}
    assert by_column(read_json(folder / "result.json")["metrics"]) == last


def test_predictions_are_kept_and_give_the_accuracy(combined, few):
    """One row an example, from which every accuracy can be computed again."""
    result, folder = combined
    frame = pd.read_parquet(folder / "predictions.parquet")
    assert list(frame["example_id"]) == [e.example_id for e in few.validation]
    measured = by_column(result["metrics"])
    assert frame["correct"].mean() == measured["validation_accuracy"]
    accuracy = frame[frame["task"] == "quiz"]["correct"].mean()
    assert accuracy == measured["validation_accuracy_quiz"]


def test_a_checkpoint_is_a_plain_model_with_the_projector_beside_it(combined, student_ref, store):
    """AutoModelForCausalLM loads it; the projector was trained, is not lost, and is not inside."""
    folder = combined[1]
    assert [p.name for p in folder.glob("checkpoint_*")] == ["checkpoint_2"]
    checkpoint = folder / "checkpoint_2"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert not any("projector" in name for name in load_file(checkpoint / "model.safetensors"))
    projector = load_file(checkpoint / "projector.safetensors")
    assert projector["hidden.weight"].shape == (store.layout.width, model.config.hidden_size)
    before = load_model(student_ref)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    from stillroom.training.distillation_student import DistillationStudent

    untrained = DistillationStudent(before, terms_of(ALL, store, before.config), seed=0).trained["hidden"].weight
    assert not torch.equal(projector["hidden.weight"], untrained)
    assert not (checkpoint / "trainer_state.pt").exists()
    assert load_tokenizer(type(student_ref)(model=str(checkpoint))).eos_token_id is not None


def test_a_groups_scale_reaches_its_training(tmp_path, student_ref, store, few):
    """With weights that do not move, `teacher_rms` divides the hidden loss by the store's mean square, exactly."""
    scaled = Group(name="hidden", terms=("task", "kd", "hidden"), hidden={"scale": "teacher_rms"})
    still = TRAINING.model_copy(update={"learning_rate": 1e-12, "epochs": 1})
    found = [
        train(Trial("t", group, 0), student_ref, still, Objective(), EVALUATION, few, store.path, tmp_path / name)
        for name, group in (("plain", GROUPS["hidden"]), ("scaled", scaled))
    ]
    found = [by_column(result["metrics"]) for result in found]
    for name in ("train_hidden_loss", "validation_hidden_loss"):
        assert found[0][name] / found[1][name] == pytest.approx(store.hidden_mean_square, rel=1e-4)


class Stop(Exception):
    """Stands for a process that dies."""


@pytest.mark.parametrize("group", ["combined", "black_box"])
def test_a_stopped_trial_ends_with_the_numbers_of_an_unstopped_one(tmp_path, student_ref, store, few, group):
    """Weights, optimizer, step count and measured gradients go on from the checkpoint, to the bit."""

    def stop(metrics):
        raise Stop

    whole = run(tmp_path / "whole", student_ref, store, few, group)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", student_ref, store, few, group, report=stop)
    assert (tmp_path / "stopped" / "checkpoint_1" / "trainer_state.pt").is_file()
    resumed = run(tmp_path / "stopped", student_ref, store, few, group)
    assert numbers(resumed) == numbers(whole)
    assert resumed["gradients"] == whole["gradients"]
    first, second = (load_file(tmp_path / n / "checkpoint_2" / "model.safetensors") for n in ("whole", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("place", ["evaluate", "save_predictions", "write_json", "drop_superseded"])
def test_a_trial_stopped_after_its_last_epoch_only_finishes(
    tmp_path, tested, student_ref, store, few, unseen, monkeypatch, place
):
    """Wherever the process died: the weights of the last epoch are evaluated and no step is taken again."""
    whole, undisturbed = tested
    epochs = [0]
    real = getattr(train_student, place)

    def stop(*arguments, **options):
        if epochs[0] == TRAINING.epochs:
            raise Stop
        return real(*arguments, **options)

    def count(metrics):
        epochs[0] = metrics["epoch"]

    monkeypatch.setattr(train_student, place, stop)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", student_ref, store, few, test=unseen, report=count)
    monkeypatch.undo()
    assert (tmp_path / "stopped" / "checkpoint_2" / "trainer_state.pt").is_file()
    monkeypatch.setattr(train_student.StepRunner, "update", lambda *_: pytest.fail("a step was taken again"))
    resumed = run(tmp_path / "stopped", student_ref, store, few, test=unseen)
    assert numbers(resumed) == numbers(whole)
    for key in whole:
        assert resumed[key] == whole[key] or key in ("epochs", "test_evaluation_seconds", *TIMES), key
    folders = (undisturbed, tmp_path / "stopped")
    files = [sorted(p.name for p in folder.rglob("*") if p.is_file()) for folder in folders]
    assert files[0] == files[1]
    for name in ("predictions.parquet", "predictions_test.parquet"):
        first, second = (pd.read_parquet(folder / name) for folder in folders)
        pd.testing.assert_frame_equal(first, second)


def test_the_test_examples_are_evaluated_once_and_change_nothing_else(tested, combined, student_ref, unseen):
    """Their accuracy is that of their predictions, those of the saved model; training and validation stay the same."""
    result, folder = tested
    assert numbers(result) == numbers(combined[0])
    frame = pd.read_parquet(folder / "predictions_test.parquet")
    assert list(frame["example_id"]) == [e.example_id for e in unseen]
    measured = by_column(result["metrics"])
    assert measured["test_accuracy"] == frame["correct"].mean()
    for task, task_rows in frame.groupby("task"):
        assert measured[f"test_accuracy_{task}"] == task_rows["correct"].mean()
    scored = evaluate(load_model(ModelRef(model=str(folder / "checkpoint_2"))), *evaluated(student_ref, unseen))
    pd.testing.assert_frame_equal(scored, frame)
    assert not any(key.startswith("test_") for key in combined[0])


def evaluated(student_ref, unseen):
    """The other arguments of `evaluate`."""
    return load_tokenizer(student_ref), unseen, EVALUATION


def test_groups_of_a_seed_start_alike_and_seeds_differ(tmp_path, student_ref, store, few, monkeypatch):
    """Same initial student, projector, batches and dropout for all groups of a seed; other batches for another."""
    import stillroom.training.train_student as ts

    seen = {}

    class Spy(ts.StepRunner):
        def update(self, micro, optimizer):
            key = (self.key, "first")
            if key not in seen:
                weights = {n: p.detach().clone() for n, p in self.student.named_parameters()}
                seen[key] = weights, [b.examples for b in micro], torch.random.get_rng_state()
            return super().update(micro, optimizer)

    monkeypatch.setattr(ts, "StepRunner", Spy)
    for group, seed in (("black_box", 0), ("combined", 0), ("black_box", 1)):
        Spy.key = (group, seed)
        run(tmp_path / f"{group}{seed}", student_ref, store, few, group, seed, epochs=1)
    a, b, c = (seen[((g, s), "first")] for g, s in (("black_box", 0), ("combined", 0), ("black_box", 1)))
    assert {*b[0]} - {*a[0]} == {"trained.hidden.weight", "trained.hidden.bias"}
    assert all(torch.equal(weight, b[0][name]) for name, weight in a[0].items())
    assert a[1] == b[1]
    assert torch.equal(a[2], b[2])
    assert a[1] != c[1]


def test_all_checkpoints_are_kept_when_asked(tmp_path, student_ref, store, few):
    """`keep_checkpoints=all` keeps each epoch's; optimizer states go once they are no longer needed."""
    run(tmp_path, student_ref, store, few, "task_only", keep_checkpoints="all")
    assert sorted(p.name for p in tmp_path.glob("checkpoint_*")) == ["checkpoint_1", "checkpoint_2"]
    assert not list(tmp_path.glob("*/trainer_state.pt"))


@pytest.mark.parametrize("best", [1, 2])
def test_the_best_checkpoint_is_kept_when_asked(tmp_path, student_ref, store, few, monkeypatch, best):
    """`keep_checkpoints=best` leaves the epoch of highest validation accuracy alone, and it loads."""
    real, passed = train_student.accuracy_metrics, []

    def scripted(predictions):
        passed.append([p.name for p in sorted(tmp_path.glob("checkpoint_*"))])
        metrics = real(predictions)
        for row in metrics:
            if (row["task"], row["measure"]) == (None, "accuracy"):
                row["value"] = float(len(passed) == best)
        return metrics

    monkeypatch.setattr(train_student, "accuracy_metrics", scripted)
    result = run(tmp_path, student_ref, store, few, "task_only", keep_checkpoints="best", epochs=3)
    assert passed[2] == (["checkpoint_2"] if best == 2 else ["checkpoint_1", "checkpoint_2"])
    assert [p.name for p in tmp_path.glob("checkpoint_*")] == [f"checkpoint_{best}"]
    assert result["epoch"] == 3
    load_model(ModelRef(model=str(tmp_path / f"checkpoint_{best}")))


def test_without_a_store_the_task_loss_alone_is_trained(tmp_path, student_ref, few):
    """What fine-tuning a teacher uses."""
    result = run(tmp_path, student_ref, None, few, "task_only")
    assert "validation_kd_loss" not in by_column(result["metrics"])
    first, last = (by_column(epoch["metrics"])["train_task_loss"] for epoch in result["epochs"])
    assert last < first


def test_lora_trains_the_adapters_and_saves_them_merged(tmp_path, student_ref, few):
    """A model fine-tuned with LoRA is saved as a plain one whose weights have moved."""
    result = run(tmp_path, student_ref, None, few, "task_only", adapter=lora_adapter(Lora(rank=4)))
    first, last = (by_column(epoch["metrics"])["train_task_loss"] for epoch in result["epochs"])
    assert last < first
    names = set(load_file(tmp_path / "checkpoint_2" / "model.safetensors"))
    assert not any("lora" in name for name in names)
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint_2").state_dict()
    before = load_model(student_ref).state_dict()
    assert any(not torch.equal(moved[n], before[n]) for n in before if "q_proj" in n)
    assert torch.equal(moved["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_the_seed_decides_an_adapters_first_weights(tmp_path, student_ref, few):
    """A fine-tuned teacher's fingerprint says what it was made from: chance from elsewhere must not be part of it."""
    adapter, loss = lora_adapter(Lora(rank=4)), []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        result = run(tmp_path / str(number), student_ref, None, few, "task_only", seed, adapter=adapter, epochs=1)
        loss.append(by_column(result["metrics"])["train_loss"])
    assert loss[0] == loss[1] != loss[2]


def test_merged_adapters_compute_what_the_adapters_did(student_ref):
    """Merging changes the form, not the function."""
    model = lora_adapter(Lora(rank=4))(load_model(student_ref))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 20)[None]
    merged = without_adapters(model)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_with_float32_weights(tmp_path, student_ref, store, few, precision):
    """Autocast (and, for float16, the gradient scaler) around float32 weights and losses."""
    result = run(tmp_path, student_ref, store, few, precision=precision, learning_rate=1e-3)
    first, last = (by_column(epoch["metrics"])["train_task_loss"] for epoch in result["epochs"])
    assert last < first
    assert result["skipped_steps"] <= 2
    assert load_file(tmp_path / "checkpoint_2" / "model.safetensors")["model.norm.weight"].dtype == getattr(
        torch, precision
    )


def test_non_finite_steps_are_skipped_counted_and_at_last_fatal(tmp_path, student_ref, store, few, monkeypatch):
    """One bad step costs one step; a run of them stops the trial and names the examples."""
    import stillroom.training.train_student as ts

    class Broken(ts.StepRunner):
        calls, bad = 0, range(2, 3)

        def losses(self, batch, weights, counts):
            total, sums = super().losses(batch, weights, counts)
            if torch.is_grad_enabled():
                Broken.calls += 1
            return (total * float("nan") if Broken.calls in Broken.bad else total), sums

    monkeypatch.setattr(ts, "StepRunner", Broken)
    result = run(tmp_path / "one", student_ref, store, few, "task_only", gradient_interval=0)
    assert result["skipped_steps"] == 1
    assert all(
        torch.isfinite(t).all() for t in load_file(tmp_path / "one" / "checkpoint_2" / "model.safetensors").values()
    )
    Broken.calls, Broken.bad = 0, range(1, 1000)
    with pytest.raises(
        UserError, match=r"4 steps in a row had non-finite gradients; the last on examples \['[0-9a-f]{16}'"
    ):
        run(tmp_path / "many", student_ref, store, few, "task_only", gradient_interval=0, max_skipped_steps=3)


def test_coverage_under_the_floor_is_refused_with_the_figures(tmp_path, student_ref, store, few):
    """A pair of tokenizers that hardly meet is not trained on in silence."""
    with pytest.raises(UserError, match=r"minimum_coverage=99%.*sentiment: \d+\.\d% of student tokens"):
        run(tmp_path, student_ref, store, few, minimum_coverage=0.99)


def test_training_refuses_an_unverified_store(tmp_path, student_ref, store, few):
    """The gate is mandatory."""
    copy = shutil.copytree(store.path, tmp_path / "data")
    (copy / "verified.json").unlink()

    with pytest.raises(UserError, match="has not been verified"):
        run(tmp_path / "trial", student_ref, SignalStore.open(copy), few)


def test_a_student_with_the_teachers_tokenizer_needs_no_other_path(tmp_path, teacher_ref, few):
    """One tokenizer on both sides trains through the same code; alignment is whole."""
    store = make_store(tmp_path / "s", teacher_ref, few)
    result = run(tmp_path / "t", teacher_ref, store, few, epochs=1)
    assert all(task_coverage["token_coverage"] == 1.0 for task_coverage in result["coverage"].values())


def test_the_optimizer_is_the_studys(tmp_path, student_ref, store, few, monkeypatch):
    """AdamW at the study's rate and decay, over every weight of the student and its projector."""
    import stillroom.training.train_student as ts

    class Stop(Exception):
        pass

    def look(self, micro, optimizer):
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW
        assert (group["lr"], group["weight_decay"]) == (3e-3, 0.25)
        assert {id(p) for p in group["params"]} == {id(p) for p in self.student.parameters()}
        raise Stop

    monkeypatch.setattr(ts.StepRunner, "update", look)
    with pytest.raises(Stop):
        run(tmp_path, student_ref, store, few, weight_decay=0.25, gradient_interval=0)


def test_dropout_is_new_at_each_step_and_measuring_does_not_move_it(tmp_path, sentencepiece, store, few, monkeypatch):
    """A function of seed and step: however often the gradient is measured, the weights end the same."""
    import stillroom.training.train_student as ts

    ref = write_model(tmp_path / "student", sentencepiece, {**STUDENT_SHAPE, "attention_dropout": 0.3}, 3)
    states, real = [], ts.StepRunner.update

    def look(self, micro, optimizer):
        states.append(bytes(torch.random.get_rng_state().tolist()))
        return real(self, micro, optimizer)

    monkeypatch.setattr(ts.StepRunner, "update", look)
    few = replace(few, train=few.train[::3], validation=few.validation[:1])
    results = [run(tmp_path / str(n), ref, store, few, gradient_interval=n) for n in (0, 1)]
    found = [by_column(result["metrics"])["train_task_loss"] for result in results]
    half = len(states) // 2
    assert states[:half] == states[half:]
    assert len(set(states)) == half
    assert found[0] == found[1]


def test_a_half_precision_trial_scores_what_it_saves(tmp_path, student_ref, store, few):
    """Weights rounded as the checkpoint's, in the evaluation's dtype: its predictions are those of the saved model."""
    few = replace(few, train=few.train[::3], validation=few.validation[:3])
    unseen = [example for example in few.train if example.choices][:6]
    run(tmp_path, student_ref, store, few, "task_only", precision="bfloat16", test=unseen)
    saved = load_model(ModelRef(model=str(tmp_path / "checkpoint_2")), EVALUATION.dtype)
    for name, examples in (("predictions", few.validation), ("predictions_test", unseen)):
        kept = pd.read_parquet(tmp_path / f"{name}.parquet")
        pd.testing.assert_frame_equal(evaluate(saved, load_tokenizer(student_ref), examples, EVALUATION), kept)


def test_a_stores_tokenizer_that_is_not_its_own_is_refused(tmp_path, student_ref, store, few):
    """The map of vocabularies is made from it: another one would give each id another meaning."""
    copy = shutil.copytree(store.path, tmp_path / "data")
    shutil.rmtree(copy / "tokenizer")
    load_tokenizer(student_ref).save_pretrained(copy / "tokenizer")

    with pytest.raises(UserError, match="is not the tokenizer the store was made with"):
        run(tmp_path / "trial", student_ref, SignalStore.open(copy), few)


def test_a_student_whose_attention_is_captured_wrongly_is_not_trained(tmp_path, student_ref, store, few, monkeypatch):
    """Checked on a real text before the first step."""

    def refuse(*arguments):
        raise UserError("captured wrongly")

    monkeypatch.setattr("stillroom.training.train_student.check_capture", refuse)
    with pytest.raises(UserError, match="captured wrongly"):
        run(tmp_path, student_ref, store, few, "attention")


@pytest.mark.parametrize("term", ["kd", "hidden"])
def test_a_term_that_compares_nothing_stops_the_trial(tmp_path, student_ref, store, few, monkeypatch, term):
    """A public run of this kind of study trained all its groups on cross-entropy alone, and nothing said so."""
    few = few.__class__(few.train[:8], few.validation[:2], few.counts)
    if term == "kd":
        monkeypatch.setattr("stillroom.terms.NextTokenTerms.compared", lambda self, item: item.alignment.pairs[:0])
    else:
        whole = HiddenTerm.collate
        nothing = {"count": 0}
        monkeypatch.setattr(HiddenTerm, "collate", lambda self, *batch: replace(whole(self, *batch), **nothing))
    with pytest.raises(UserError, match=rf"the term {term} is on, but in a whole epoch no example had anything"):
        run(tmp_path, student_ref, store, few, "hidden", epochs=1)
    assert not (tmp_path / "result.json").exists()
