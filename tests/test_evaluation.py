"""Accuracy against brute force; batch size and padding change no prediction."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.analysis.frame import worse_or_equal
from stillroom.config import Evaluation
from stillroom.encoding import encode
from stillroom.evaluation import accuracy_metrics, answer_scores, evaluate, generate
from stillroom.models import load_model, load_tokenizer


@pytest.fixture(scope="module")
def model(student_ref):
    """The student."""
    return load_model(student_ref)


@pytest.fixture(scope="module")
def tokenizer(student_ref):
    """The student's tokenizer."""
    return load_tokenizer(student_ref)


def log_likelihood(ref, tokenizer, prompt, answer):
    """Sum of the answer's token log-probabilities, one sequence alone, eager."""
    model = AutoModelForCausalLM.from_pretrained(ref.model, attn_implementation="eager").eval()
    encoding = encode(tokenizer, prompt + answer)
    with torch.no_grad():
        logprobs = model(torch.from_numpy(encoding.ids.astype("int64"))[None]).logits[0].log_softmax(-1)
    own = [t for t in range(1, len(encoding)) if encoding.ends[t] > len(prompt)]
    return sum(float(logprobs[t - 1, encoding.ids[t]]) for t in own)


def test_choices_are_scored_by_the_likelihood_of_their_text(student_ref, model, tokenizer, examples):
    """Shared prefixes and batching are only faster; scores are those of each choice on its own."""
    some = [e for e in examples.all if e.choices][::6]
    scores, _ = answer_scores(model, tokenizer, some, 400)
    for example, found in zip(some, scores, strict=True):
        expected = [log_likelihood(student_ref, tokenizer, example.prompt, choice) for choice in example.choices]
        assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(("batch_tokens", "batch_size"), [(1, 1), (150, 3), (100_000, 64)])
def test_batch_size_and_padding_change_no_prediction(model, tokenizer, examples, batch_tokens, batch_size):
    """Scores, generated text and verdicts are the same one by one and all at once."""
    reference = evaluate(model, tokenizer, examples.validation, Evaluation(max_new_tokens=16))
    settings = Evaluation(max_new_tokens=16, batch_tokens=batch_tokens, generation_batch_size=batch_size)
    found = evaluate(model, tokenizer, examples.validation, settings)
    for column in ("example_id", "prediction", "correct", "generated"):
        assert found[column].equals(reference[column])


def test_generation_is_greedy_decoding(student_ref, model, tokenizer, examples):
    """Against a loop of argmax over whole forward passes, without a cache."""
    prompts = [e.prompt for e in examples.validation if not e.choices]
    texts = generate(model, tokenizer, prompts, Evaluation(max_new_tokens=10))
    plain = AutoModelForCausalLM.from_pretrained(student_ref.model, attn_implementation="eager").eval()
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(10):
            with torch.no_grad():
                ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        assert text == expected.split("Question:")[0]


def test_a_models_own_generation_settings_do_not_count(model, tokenizer, examples):
    """A checkpoint's sampling or repetition penalty must not leak into greedy evaluation."""
    prompts = [e.prompt for e in examples.validation if not e.choices]
    plain = generate(model, tokenizer, prompts, Evaluation(max_new_tokens=12))
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True
    try:
        assert generate(model, tokenizer, prompts, Evaluation(max_new_tokens=12)) == plain
    finally:
        model.generation_config.repetition_penalty, model.generation_config.do_sample = 1.0, False


def test_generation_stops_once_the_answer_is_complete(model, tokenizer, monkeypatch):
    """After a line `#### n` nothing that follows can change the strict answer."""
    from stillroom.evaluation import _Answered, _finished

    assert _finished("3+4=7\n#### 7\n")
    assert _finished("7\nQuestion: and")
    assert not _finished("3+4=7\n#### 7")
    ids = tokenizer(["x #### 7\n", "x #### 7 y"], add_special_tokens=False, padding=False)["input_ids"]
    longest = max(map(len, ids))
    rows = torch.tensor([[tokenizer.eos_token_id] * (longest - len(row)) + row for row in ids])
    assert _Answered(tokenizer, 0)(rows, None).tolist() == [True, False]


def test_metrics_are_shares_of_right_answers(model, tokenizer, examples):
    """Over all examples, per task, and the tasks' unweighted mean."""
    frame = evaluate(model, tokenizer, examples.validation, Evaluation(max_new_tokens=4))
    frame["correct"] = [n % 3 == 0 for n in range(len(frame))]
    metrics = accuracy_metrics(frame)
    assert metrics["validation_accuracy"] == sum(frame["correct"]) / len(frame)
    by_task = {t: g["correct"].mean() for t, g in frame.groupby("task")}
    for task, value in by_task.items():
        assert metrics[f"validation_accuracy_{task}"] == value
    assert metrics["validation_accuracy_macro"] == pytest.approx(sum(by_task.values()) / len(by_task))
    assert "validation_accuracy_arithmetic_flexible" in metrics


def test_a_teacher_with_nothing_to_give_is_called_out():
    """Equal is not better."""
    teacher = {"validation_accuracy": 0.9, "validation_accuracy_a": 0.5, "validation_accuracy_b": 0.9}
    student = {"validation_accuracy": 0.5, "validation_accuracy_a": 0.5, "validation_accuracy_b": 0.4}
    assert worse_or_equal(teacher, student) == ["a"]
