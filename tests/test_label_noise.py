"""Label noise: what students learn wrong on purpose, and what stays right."""

from dataclasses import replace

import pytest

from stillroom.config import ChoiceColumns, Corpus, TaskData
from stillroom.data.corpus import build_corpus
from stillroom.data.label_noise import is_mislabelled, with_label_noise, without_label_noise
from stillroom.data.tasks import TASKS
from stillroom.errors import UserError
from stillroom.experiment.workspace import Workspace
from stillroom.studies import load_study
from studies import study_file

QUIZ = [TASKS["quiz"].build(row) for row in TASKS["quiz"].generate_rows(3, 1500)]


def test_the_declared_share_of_answers_is_wrong_and_gold_stays_right():
    """Each wrong choice comes as often as another, and scoring still knows the right one."""
    noisy = with_label_noise(QUIZ, {"quiz": 0.3})
    wrong = [(noised, was) for noised, was in zip(noisy, QUIZ, strict=True) if noised != was]
    assert abs(len(wrong) / len(QUIZ) - 0.3) < 0.04
    assert all(noised == replace(was, answer=noised.answer) and noised.answer in was.choices for noised, was in wrong)
    by = [(noised.choices.index(noised.answer) - noised.gold) % 4 for noised, _ in wrong]
    assert all(abs(by.count(n) / len(by) - 1 / 3) < 0.1 for n in (1, 2, 3))
    assert [is_mislabelled(noised) for noised in noisy] == [
        noised != was for noised, was in zip(noisy, QUIZ, strict=True)
    ]
    assert without_label_noise(noisy) == QUIZ


def test_what_is_wrong_is_the_examples_own():
    """Neither the order nor the other examples, tasks or a larger share change which answers are wrong."""
    some, more = with_label_noise(QUIZ, {"quiz": 0.2}), with_label_noise(QUIZ[::-1], {"quiz": 0.5, "sst2": 1.0})[::-1]
    assert all(noised == other for noised, other in zip(some, more, strict=True) if is_mislabelled(noised))
    assert with_label_noise(QUIZ, {"sst2": 1.0}) == QUIZ
    assert all(map(is_mislabelled, with_label_noise(QUIZ, {"quiz": 1.0})))


def test_students_learn_it_and_neither_the_teacher_nor_validation_does(tmp_path, teacher_ref, student_ref):
    """The corpus that is kept has the wrong answers in its training split alone; the teacher is fine-tuned without."""
    tasks = {
        "quiz": {"dataset": "builtin", "examples": 60, "label_noise": 0.5},
        "sentiment": {"dataset": "builtin", "examples": 20},
    }
    corpus, split = {"tasks": tasks, "max_length": 128}, {"quiz": {"dataset": "builtin", "examples": 10}}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, corpus=corpus, evaluation={"test_splits": split})
    workspace = Workspace(load_study(path))
    examples = workspace.examples
    wrong = [example for example in examples.train if is_mislabelled(example)]
    assert len(wrong) == examples.counts["quiz"]["mislabelled"] > 15
    assert {example.task for example in wrong} == {"quiz"}
    assert not any(map(is_mislabelled, [*examples.validation, *examples.test, *workspace.fine_tuning_examples.train]))
    assert "mislabelled" not in examples.counts["sentiment"]
    assert Workspace(load_study(path)).examples == examples


def test_noise_needs_choices_and_room(tokenizers, tmp_path):
    """A task without choices, and a wrong answer that is too long, are named."""
    data = TaskData(dataset="builtin", examples=20, label_noise=0.2)
    with pytest.raises(UserError, match=r"corpus.tasks.arithmetic.label_noise: arithmetic has no choices"):
        build_corpus(Corpus(tasks={"arithmetic": data}), tokenizers)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"n": {n}, "label": 0}}\n' for n in range(10)))
    asked = ChoiceColumns(prompt="Number {n}", choices=("yes", "no " * 40), label="label", label_is="index")
    data = TaskData(dataset=str(tmp_path / "rows.jsonl"), examples=10, label_noise=1.0, choice=asked)
    with pytest.raises(UserError, match=r"corpus.tasks.own.label_noise: with the wrong answer ' no no .* raise corpus"):
        build_corpus(Corpus(tasks={"own": data}, max_length=40), tokenizers)


def test_a_study_without_noise_says_nothing_of_it():
    """The field came later: at its default it is in no fingerprint."""
    assert "label_noise" not in TaskData(dataset="builtin", examples=20).model_dump()
