"""Tasks made of a file's columns in a study file: no code, and as well pinned as a registered one."""

from __future__ import annotations

import json

import pytest

from stillroom.config import Corpus, Evaluation, TaskData, UserError
from stillroom.corpus import build_corpus, load_corpus, save_corpus
from stillroom.evaluation import evaluate
from stillroom.metrics import accuracy_metrics
from stillroom.models import load_model, load_tokenizer
from stillroom.sources import Sources
from stillroom.studies import load_study
from stillroom.tasks import get_task, task_of

CHOICE = {"prompt": "Is {thing} an animal?\nAnswer:", "choices": ["no", "yes"], "label": "animal"}
GENERATION = {"prompt": "{a} and {b} make", "answer": "a total of {sum}.", "pattern": r"total of (-?\d+)"}
THINGS = [("a dog", 1), ("a saw", 0), ("a cat", "yes"), ("iron", "no"), ("a horse", True), ("a fig", 0)]


def lines(path, rows):
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Rows of both kinds."""
    things = [{"thing": thing, "animal": animal, "unused": None} for thing, animal in THINGS]
    sums = [{"a": a, "b": b, "sum": a + b} for a in range(4) for b in range(3)]
    return lines(tmp_path / "things.jsonl", things), lines(tmp_path / "sums.jsonl", sums)


def corpus_of(files, **changes):
    """A corpus of two tasks that no code knows."""
    things = TaskData(dataset=files[0], examples=6, choice={**CHOICE, **changes})
    return Corpus(tasks={"animals": things, "sums": TaskData(dataset=files[1], examples=12, generation=GENERATION)})


@pytest.fixture
def tokenizers(teacher_ref, student_ref):
    """The test pair's."""
    return [load_tokenizer(teacher_ref), load_tokenizer(student_ref)]


def test_columns_become_the_examples_that_one_would_write_by_hand(files, tokenizers):
    """Prompt, answer, choices, gold, from an index, a text or a truth value; and back from disk."""
    built = build_corpus(corpus_of(files), tokenizers)
    by_prompt = {example.prompt: example for example in built.all}
    for thing, animal in THINGS:
        example = by_prompt[f"Is {thing} an animal?\nAnswer:"]
        gold = 1 if animal in (1, "yes") else 0
        assert (example.choices, example.gold, example.answer) == ((" no", " yes"), gold, (" no", " yes")[gold])
    assert by_prompt["3 and 2 make"].answer == " a total of 5."
    assert by_prompt["3 and 2 make"].choices is None


def test_a_saved_corpus_knows_its_tasks(files, tokenizers, tmp_path):
    """A worker that reads the corpus alone can score it: the definition travels with each example."""
    built = build_corpus(corpus_of(files), tokenizers)
    save_corpus(built, tmp_path / "corpus", "x")
    read, _ = load_corpus(tmp_path / "corpus")
    assert read == built
    sums = next(example for example in read.all if example.task == "sums")
    assert task_of(sums).extract_strict("total of 3, no: total of -4") == "3"
    assert task_of(sums).extract_flexible("total of 3, no: total of -4") == "-4"
    assert task_of(sums).extract_strict("nothing") is None


def test_a_model_is_scored_on_them(files, tokenizers, student_ref, monkeypatch):
    """Choices by likelihood, generated text by the pattern's first and last match."""
    examples = build_corpus(corpus_of(files), tokenizers).validation
    said = {example.prompt: f"{example.answer} Or a total of 99." for example in examples}
    monkeypatch.setattr(
        "stillroom.evaluation.generate", lambda model, tokenizer, prompts, *rest: [said[p] for p in prompts]
    )
    found = evaluate(load_model(student_ref), tokenizers[1], examples, Evaluation(max_new_tokens=4))
    rows = found.set_index("task")
    sums, animals = rows.loc[["sums"]], rows.loc[["animals"]]
    assert sums["correct"].all()
    assert not sums["correct_flexible"].any()
    assert set(animals["prediction"]) <= {"no", "yes"}
    assert (animals["correct"] == (animals["prediction"] == animals["gold"])).all()
    metrics = accuracy_metrics(found)
    assert metrics["validation_accuracy_sums"] == 1
    assert metrics["validation_accuracy_sums_flexible"] == 0
    assert "validation_accuracy_animals_flexible" not in metrics


@pytest.mark.parametrize(
    "changes",
    [{"choices": ["yes", "no"]}, {"prompt": "Is {thing}  an animal?\nAnswer:"}, {"choices": ["no", "yes", "maybe"]}],
    ids=["order", "wording", "one more"],
)
def test_a_changed_definition_is_another_example(files, tokenizers, changes):
    """Nothing stored under the old definition can be taken for the new one's."""
    before = {e.example_id for e in build_corpus(corpus_of(files), tokenizers).all if e.task == "animals"}
    after = {e.example_id for e in build_corpus(corpus_of(files, **changes), tokenizers).all if e.task == "animals"}
    assert not before & after


def test_an_edited_file_is_read_again(files, tmp_path, teacher_ref, student_ref):
    """The corpus on disk is used only while the file it came from is as it was."""
    overrides = [
        f"teacher.model={teacher_ref.model}",
        f"student.model={student_ref.model}",
        f"paths.results={tmp_path / 'results'}",
        "analysis={}",
        "evaluation.official={}",
        "corpus.tasks=" + json.dumps({"animals": {"dataset": files[0], "examples": 6, "choice": CHOICE}}),
    ]
    study = load_study("quickstart", overrides)
    assert len({e.prompt for e in Sources(study).examples.all}) == 6
    rows = [json.loads(line) for line in (tmp_path / "things.jsonl").read_text().splitlines()]
    lines(tmp_path / "things.jsonl", [{**row, "thing": f"{row['thing']}, then,"} for row in rows])
    assert all("then" in example.prompt for example in Sources(study).examples.all)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"choice": {**CHOICE, "prompt": "No column"}}, "choice.prompt: shows no column"),
        ({"choice": {**CHOICE, "prompt": "{thing}: "}}, "ends in white space"),
        ({"choice": {**CHOICE, "prompt": "{thing.__class__}"}}, "not the name of a column"),
        ({"choice": {**CHOICE, "choices": ["one"]}}, "choice.choices"),
        ({"choice": {**CHOICE, "lable": "x"}}, "choice.lable: unknown key"),
        ({"generation": {**GENERATION, "pattern": r"\d+"}}, "has 0 groups"),
        ({"generation": {**GENERATION, "pattern": "(("}}, "not a regular expression"),
        ({"choice": CHOICE, "generation": GENERATION}, "both choice and generation"),
    ],
)
def test_a_faulty_definition_is_named_by_its_field(task, message):
    """Before anything is read."""
    whole = json.dumps({"own": {"dataset": "x.jsonl", "examples": 4, **task}})
    with pytest.raises(UserError, match="own") as error:
        load_study("quickstart", ["analysis={}", f"corpus.tasks={whole}"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"thing": "a", "animal": 1}\n{"thing"\n', "things.jsonl, line 2: not valid JSON"),
        ('["a"]\n', "line 1: expected an object"),
        ("", "has no rows"),
        ('{"thing": "a"}\n', "lacks the columns ['animal']"),
        ('{"thing": "a", "animal": "perhaps"}\n', "label 'perhaps' is neither"),
        ('{"thing": null, "animal": 1}\n', "column 'thing' is empty"),
    ],
)
def test_a_faulty_file_is_named_by_its_line_or_column(files, tmp_path, tokenizers, content, message):
    """The user's own data is where most mistakes are."""
    (tmp_path / "things.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        build_corpus(corpus_of(files), tokenizers)
    assert message in str(error.value)


def test_a_registered_tasks_name_is_not_taken(tmp_path):
    """Two tasks of one name would be mixed up in every table."""
    with pytest.raises(UserError, match="registered task"):
        get_task("sst2", TaskData(dataset="x.jsonl", examples=4, choice=CHOICE))
    with pytest.raises(UserError, match="define it there"):
        get_task("animals", TaskData(dataset="x.jsonl", examples=4))


def test_ids_of_registered_tasks_examples_stand():
    """The new part of an example's identity changes no store that exists: an id as it was before there was one."""
    example = get_task("sst2").build({"sentence": "a gem .", "label": 1})
    assert example.example_id == "348004077660b7c6"
