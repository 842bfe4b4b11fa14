"""The teacher's own answers as labels: generated and kept with the store, learnt by a group, counted where unusable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers

import reference
from setups import EVALUATION, TRAINING, Setup, changed, dense
from small_things import write_model
from stillroom.config import GROUPS, Group, Objective, Signals
from stillroom.config.objective import TaskLoss
from stillroom.data.encoding import encode
from stillroom.data.label_noise import with_label_noise
from stillroom.data.tasks.example import Example
from stillroom.errors import UserError
from stillroom.evaluation.generation import teacher_answers
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.offline_teacher_data import archive, capture, made_from, verify_saved_data
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.studies import load_study
from stillroom.training import train_student
from stillroom.training.batches import _is_right, with_teacher_answers
from stillroom.training.train_student import Trial, train

GROUP = Group(name="text_only", terms=("task",), task={"targets": "teacher"})
SAID = (" a plain answer", " #### 12", "", None, " word" * 90)


def answered_store(folder, ref, examples, said=SAID):
    """A store whose teacher says one of a few things to each prompt."""
    signals = Signals(top_k=8, dtype="float32", shard_examples=16, batch_tokens=512, teacher_answers=True)
    tokenizer = load_tokenizer(ref)
    origin = made_from(ref.model, "float32", tokenizer, signals, examples.all, 12)

    def answer(asked):
        return [said[int(example.example_id, 16) % len(said)] for example in asked]

    capture(load_model(ref), tokenizer, examples.all, signals, folder, origin, answer=answer)
    verify_saved_data(folder)
    return SignalStore.open(folder)


@pytest.fixture(scope="module")
def answered(tmp_path_factory, teacher_ref, examples):
    """One for looking at."""
    return answered_store(tmp_path_factory.mktemp("answered") / "data", teacher_ref, examples)


def test_an_answer_is_what_plain_greedy_decoding_writes(teacher_ref, examples):
    """Token after token from the model's own logits; of a choice task up to the end of the line, else to the limit."""
    model, tokenizer = load_model(teacher_ref), load_tokenizer(teacher_ref)
    asked = [examples.train[n] for n in (0, 20, 40)]
    found = teacher_answers(model, tokenizer, asked, EVALUATION)
    for example, answer in zip(asked, found, strict=True):
        ids = encode(tokenizer, example.prompt).ids.tolist()
        start, stop = len(ids), "\n" if example.choices else "Question:"
        text, ended = "", False
        while len(ids) - start < EVALUATION.max_new_tokens and not ended:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            text = tokenizer.decode(ids[start:], skip_special_tokens=True)
            ended = ids[-1] == tokenizer.eos_token_id or stop in text
        assert answer == (text.split(stop)[0].rstrip() if ended else None)


def test_answers_are_kept_verified_and_archived(tmp_path, answered, store, teacher_ref, examples):
    """They lie in the shards: the gate's checksums and the snapshot hold them; other stores are what they were."""
    assert set(answered.answers) == {example.example_id for example in examples.all}
    assert set(answered.answers.values()) == set(SAID)
    made = answered_store(tmp_path / "data", teacher_ref, examples)
    assert SignalStore.open(archive(made.path)).answers == answered.answers
    shard = made.path / made.manifest["shards"][0]["name"]
    content = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(content.replace(b"a plain answer", b"another answer"))
    with pytest.raises(UserError, match="SHA-256 differs"):
        verify_saved_data(made.path)
    assert "teacher_answers" not in store.manifest["made_from"]
    with pytest.raises(UserError, match=r"not in this store; set signals.teacher_answers"):
        _ = store.answers


@pytest.mark.parametrize("pair", ["different", "same"])
def test_the_task_term_of_the_teachers_answers_equals_the_reference(
    pair, tmp_path, student_ref, teacher_ref, byte_level, answered, examples
):
    """Cross-entropy of prompt + the teacher's answer, by loops; an unusable answer supervises nothing."""
    ref = student_ref if pair == "different" else write_model(tmp_path, byte_level, {**SHAPE}, 9)
    setup = Setup(ref, answered, changed(Objective(), task={"targets": "teacher"}, **OFF))
    chosen = examples.train[:12]
    prepared, counts = with_teacher_answers(setup.items(chosen), setup.tokenizer, answered, 100)
    terms, usable = [], 0
    for example in chosen:
        answer = answered.answers[example.example_id]
        student = dense(ref, example.prompt + (answer or ""), add_eos=True)
        if answer and len(student["ids"]) <= 100:
            terms += reference.task_terms(student, len(example.prompt))
            usable += 1
    assert 0 < usable < len(chosen)
    batches = [setup.collate(prepared[:5]), setup.collate(prepared[5:])]
    sums, found = setup.runner._backward(batches, setup.objective.weights, lambda total: total)
    assert float(sums["task"]) / found["task"] == pytest.approx(np.mean(terms), rel=2e-5)
    assert found["task"] == len(terms)
    total = {key: sum(task_counts[key] for task_counts in counts.values()) for key in ("answers", "empty", "too_long")}
    assert total["answers"] - total["empty"] - total["too_long"] == usable


SHAPE = {"hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
OFF = {term: {"weight": 0.0} for term in ("kd", "hidden", "attention", "values")}


def test_a_trial_learns_the_teachers_answers_on_the_batches_of_every_group(
    tmp_path, student_ref, answered, examples, monkeypatch
):
    """Paired with the others: the same examples in the same batches; its result says what became of the answers."""
    few = examples.__class__(examples.train[:24], examples.validation[:4], examples.counts)
    training = TRAINING.model_copy(update={"epochs": 1})
    seen, losses = {}, {}
    whole = train_student._micro_batches

    def watched(*given):
        batches = whole(*given)
        seen[name].append([example for batch in batches for example in batch.examples])
        return batches

    monkeypatch.setattr(train_student, "_micro_batches", watched)
    for name, group in (("gold", GROUPS["task_only"]), ("text_only", GROUP)):
        seen[name] = []
        result = train(
            Trial("t", group, 0), student_ref, training, Objective(), EVALUATION, few, answered.path, tmp_path / name,
            max_length=100,
        )  # fmt: skip
        losses[name] = {row["measure"]: row["value"] for row in result["metrics"] if row["split"] == "train"}
    assert seen["gold"] == seen["text_only"]
    assert losses["gold"]["task_loss"] != losses["text_only"]["task_loss"]
    counts = result["teacher_answers"]
    assert sum(task_counts["answers"] for task_counts in counts.values()) == 24
    assert any(task_counts["empty"] for task_counts in counts.values())
    assert any(task_counts["too_long"] for task_counts in counts.values())


def test_a_batch_without_one_usable_answer_is_a_step_like_any_other(student_ref, answered, examples):
    """No row for the output head: a loss of 0, and no gradient that is not finite."""
    setup = Setup(student_ref, answered, changed(Objective(), task={"targets": "teacher"}, **OFF))
    unusable = [example for example in examples.train if not answered.answers[example.example_id]][:3]
    prepared, _ = with_teacher_answers(setup.items(unusable), setup.tokenizer, answered, 100)
    sums, counts = setup.runner._backward([setup.collate(prepared)], setup.objective.weights, lambda total: total)
    assert counts["task"] == 0
    assert float(sums["task"]) == 0
    assert all(torch.isfinite(p.grad).all() for p in setup.student.parameters() if p.grad is not None)


def test_what_cannot_be_learnt_from_text_alone_is_refused():
    """By the field, before the teacher runs; and a group that doesn't use it keeps its trials' names."""
    none = ["analysis.primary=[]", "analysis.secondary=[]"]
    declared = "groups=[{name: t, terms: [task], task: {targets: teacher}}]"
    with pytest.raises(UserError, match=r"group 't' learns the teacher's answers: set signals.teacher_answers: true"):
        load_study("quickstart", [declared, *none])
    load_study("quickstart", [declared, *none, "signals.teacher_answers=true"])
    both = "groups=[{name: t, terms: [task, kd], task: {targets: teacher}}]"
    with pytest.raises(UserError, match=r"group 't' .*task must be its only term"):
        load_study("quickstart", [both, *none, "signals.teacher_answers=true"])
    assert "targets" not in TaskLoss().model_dump()
    assert TaskLoss(targets="teacher").model_dump()["targets"] == "teacher"


def test_an_answer_begins_with_the_space_that_its_first_token_has(sentencepiece, byte_level):
    """`▁b` at a text's beginning is decoded without its space; the student would learn another word than is scored."""
    for tokenizer in (sentencepiece, byte_level):
        prompt, answer = "text: a film\nlabel:", " positive"
        row = Example("sentiment", prompt, answer)
        wanted = encode(tokenizer, prompt + answer).ids.tolist()
        last = len(encode(tokenizer, prompt).ids)
        assert wanted[:last] == encode(tokenizer, prompt).ids.tolist()
        chain = [*wanted[last - 1 :], tokenizer.eos_token_id]
        assert len(set(chain)) == len(chain), "each token then has one that follows it"
        model = write_by_heart(len(tokenizer), chain)
        assert teacher_answers(model, tokenizer, [row], EVALUATION) == [answer]


def write_by_heart(vocabulary, chain):
    """A model that continues each of these tokens with the next one."""
    shape = {"hidden_size": 4 * len(chain), "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=vocabulary, **shape, bos_token_id=None, eos_token_id=chain[-1])
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            weights.zero_()
        model.model.norm.weight.fill_(1)
        for place, (token, following) in enumerate(itertools.pairwise(chain)):
            model.model.embed_tokens.weight[token, place] = model.lm_head.weight[following, place] = 1
    return model


def test_an_answer_is_right_by_the_true_label(answered, examples, student_ref):
    """Label noise changes what is learnt, not what is right."""
    noisy = with_label_noise([row for row in examples.train if row.choices], {"sentiment": 1.0, "quiz": 1.0})
    assert all(row.answer.strip() != row.choices[row.gold].strip() for row in noisy)
    assert all(_is_right(row, row.choices[row.gold]) and not _is_right(row, row.answer) for row in noisy)
