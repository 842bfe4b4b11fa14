"""Tasks made of a file's columns in a study file: no code, and as well pinned as a registered one."""

from __future__ import annotations

import json

import pytest

from stillroom.config import ChoiceColumns, Corpus, Evaluation, TaskColumns, TaskData
from stillroom.data.corpus import build_corpus, load_corpus, save_corpus, with_test_splits
from stillroom.data.tasks import get_task, task_of
from stillroom.errors import UserError
from stillroom.evaluation.metrics import accuracy_metrics, by_column
from stillroom.evaluation.scoring import evaluate
from stillroom.experiment.sources import Sources
from stillroom.models.hub import load_model
from stillroom.studies import load_study

CHOICE = {"prompt": "Is {thing} an animal?\nAnswer:", "choices": ["no", "yes"], "label": "animal"}
GENERATION = {"prompt": "{a} and {b} make", "answer": "a total of {sum}.", "pattern": r"total of (-?\d+)"}
THINGS = [("a dog", 1), ("a saw", 0), ("a cat", "yes"), ("iron", "no"), ("a horse", 1.0), ("a fig", 0)]


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


def test_columns_become_the_examples_that_one_would_write_by_hand(files, tokenizers):
    """Prompt, answer, choices, gold, from an index, whole or as a float, or a text; and back from disk."""
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
        "stillroom.evaluation.scoring.generate", lambda model, tokenizer, asked, *rest: [said[e.prompt] for e in asked]
    )
    found = evaluate(load_model(student_ref), tokenizers[1], examples, Evaluation(max_new_tokens=4))
    rows = found.set_index("task")
    sums, animals = rows.loc[["sums"]], rows.loc[["animals"]]
    assert sums["correct"].all()
    assert not sums["correct_flexible"].any()
    assert set(animals["prediction"]) <= {"no", "yes"}
    assert (animals["correct"] == (animals["prediction"] == animals["gold"])).all()
    metrics = by_column(accuracy_metrics(found))
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
        "evaluation.test_splits={}",
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
        ({"choice": {**CHOICE, "prompt": "No column"}}, "choice.prompt: contains no column"),
        ({"choice": {**CHOICE, "prompt": "{thing}: "}}, "ends in white space"),
        ({"choice": {**CHOICE, "prompt": "{thing.__class__}"}}, "not the name of a column"),
        ({"choice": {**CHOICE, "choices": ["one"]}}, "choice.choices"),
        ({"choice": {**CHOICE, "choices": ["one", " "]}}, "must be different texts, none of them empty"),
        ({"choice": {**CHOICE, "choices": ["one", " one"]}}, "must be different texts, none of them empty"),
        ({"choice": {**CHOICE, "label_is": "number"}}, "choice.label_is"),
        ({"generation": {**GENERATION, "pattern": "(" * 900}}, "not a regular expression"),
        ({"generation": {**GENERATION, "pattern": "(a{1,99999999999})"}}, "not a regular expression"),
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
        ('{"thing": "\\ud800", "animal": 1}\n', "'thing' holds half of a surrogate pair: '\\ud800'"),
        ('{"thing": ' + "9" * 5000 + ', "animal": 1}\n', "things.jsonl, line 1: a number has too many digits"),
        ('{"thing": ' + "[" * 50000 + ', "animal": 1}\n', "things.jsonl, line 1: nested too deep"),
        ('{"thing": "a", "animal": 1}\n{"other": ' + '{"a":' * 50000, "things.jsonl, line 2: nested too deep"),
    ],
)
def test_a_faulty_file_is_named_by_its_line_or_column(files, tmp_path, tokenizers, content, message):
    """The user's own data is where most mistakes are."""
    (tmp_path / "things.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        build_corpus(corpus_of(files), tokenizers)
    assert message in str(error.value)


STARS = ("1", "2", "3", "4", "5")
BOOLS, WORDS = ("True", "False"), ("no", "yes")


@pytest.mark.parametrize(
    ("choices", "label", "label_is", "gold"),
    [
        *((STARS, n, None, n - 1) for n in range(1, 6)),  # 16 of 20 were off by one
        *((STARS, n, "index", n) for n in range(5)),
        *((STARS, f"{n}", None, n - 1) for n in range(1, 6)),
        (STARS, 3.0, None, 2),
        (STARS, 0, "text", "neither"),
        (STARS, 0, None, "label_is"),
        (STARS, 9, None, "neither"),
        (("1.0", "2.0"), 1, None, 0),
        (("1", "0"), 1, None, 0),
        (BOOLS, True, None, 0),
        (BOOLS, False, None, 1),
        (("true", "false"), True, None, 0),
        (WORDS, True, None, "neither"),
        (WORDS, True, "index", "neither"),
        (WORDS, 1, None, 1),
        (WORDS, 1.0, None, 1),
        (WORDS, 1.5, None, "neither"),
        (WORDS, float("nan"), None, "neither"),
        (WORDS, -1, None, "neither"),
        (WORDS, 1, "text", "neither"),
        (WORDS, "1", None, "set label_is: index"),
        (WORDS, "1", "index", 1),
        (WORDS, "yes", "index", "neither"),
        (WORDS, " yes", None, 1),
        (WORDS, None, None, "neither"),
        ([4, 7, 0, 2], 0, None, "label_is"),  # a row's own: nothing is known of the column
        ([4, 7, 0, 2], 0, "text", 2),
        ([4, 7, 0, 2], 0, "index", 0),
        ([12, 70, 30, 20], 1, None, 1),
        ([0, 1], 1, None, 1),
    ],
)
def test_a_label_is_read_as_what_it_is(choices, label, label_is, gold):
    """Its text first, a truth value never as an index, and no index where it could be a text."""
    of_the_row = isinstance(choices, list)
    columns = ChoiceColumns(prompt="{x}", choices="own" if of_the_row else choices, label="y", label_is=label_is)
    build = get_task("stars", TaskColumns(choice=columns)).build
    row = {"x": "a", "y": label, "own": choices}
    if isinstance(gold, int):
        example = build(row)
        assert (example.gold, example.answer) == (gold, f" {choices[gold]}")
    else:
        with pytest.raises(UserError if gold == "label_is" else ValueError, match=gold) as error:
            build(row)
        assert gold != "label_is" or "corpus.tasks.stars.choice.label_is: label 0 could be" in str(error.value)


def test_a_registered_tasks_label_is_an_index_alone():
    """A truth value, a text or -1 (the hub's hidden labels) is none."""
    for name, row in (("sst2", {"sentence": "x"}), ("sentiment", {"sentence": "x"})):
        assert get_task(name).build({**row, "label": 1.0}).gold == 1
        for label in (True, "1", -1, 0.5, None, float("nan"), [1]):
            with pytest.raises(ValueError, match="'label' must be a whole number from 0 to 1"):
                get_task(name).build({**row, "label": label})
    row = {"question": "?", "subject": None, "choices": list("abcd"), "answer": -1}
    for name in ("mmlu", "quiz"):
        with pytest.raises(ValueError, match="'answer' must be a whole number from 0 to 3"):
            get_task(name).build(row)
    with pytest.raises(ValueError, match="each must be text"):
        get_task("mmlu").build({**row, "choices": "abcd", "answer": 1})


NO_TEXTS = [
    [{"role": "user", "content": "x" * 500}],
    {"a": 1},
    float("nan"),
    float("inf"),
    True,
    b"bytes",
    None,
    "",
    " \n",
    "half \ud800",
    [],
]


@pytest.mark.parametrize("value", NO_TEXTS, ids=lambda value: repr(value)[:20])
def test_what_is_no_text_is_never_trained_on(value):
    """A value that Python alone would write so makes a row unusable, in a template, a choice or a registered task."""
    columns = TaskColumns(choice=ChoiceColumns(prompt="{x}", choices="own", label="y", label_is="index"))
    wrote = TaskColumns(generation={"prompt": "{x}", "answer": "{y}", "pattern": "(.+)"})
    good = {"x": "a", "own": ["b", 2], "y": 1}
    assert get_task("own", columns).build(good).choices == (" b", " 2")
    tries = [("own", columns, {**good, "x": value}), ("own", columns, {**good, "own": ["b", value]})]
    tries += [("wrote", wrote, {**good, "x": value}), ("wrote", wrote, {**good, "y": value})]
    tries += [(name, None, {"sentence": value, "label": 1}) for name in ("sst2", "sentiment")]
    tries += [(name, None, {"question": value, "answer": "#### 4"}) for name in ("gsm8k", "arithmetic")]
    for name, columns, row in tries:
        with pytest.raises(ValueError, match=r"column '\w+' (is empty or not text|holds half of a surrogate)") as error:
            get_task(name, columns).build(row)
        assert len(str(error.value)) < 400
        assert str(error.value).encode()


def test_unusable_rows_are_counted_and_the_first_is_shown(tmp_path, files, tokenizers):
    """Whoever reads the counts sees what is wrong with the first; of test splits too, and back from disk."""
    rows = [json.loads(line) for line in (tmp_path / "things.jsonl").read_text().splitlines()]
    chat = [{"role": "user", "content": "a dog"}]
    odd = lines(
        tmp_path / "odd.jsonl", [rows[0], {"thing": chat, "animal": 1}, {"thing": None, "animal": 1}, *rows[1:]]
    )
    settings = corpus_of((odd, files[1]))
    built = build_corpus(settings, tokenizers)
    fault = f"row 1 of {odd}/train: column 'thing' is empty or not text: [{{'content': 'a dog', 'role': 'user'}}]"
    assert built.counts["animals"]["unusable"] == 2
    assert built.faults == {"animals": fault}
    other = lines(tmp_path / "other.jsonl", [{"thing": "an ox", "animal": 7}, {"thing": "an owl", "animal": 1}])
    data = settings.tasks["animals"].model_copy(update={"dataset": other, "examples": 2})
    built = with_test_splits(built, {"animals": data}, settings, tokenizers, 256)
    assert (built.test_counts["animals"]["unusable"], built.faults) == (1, {"animals": fault})
    assert built.test_faults["animals"].startswith(f"row 0 of {other}/train: label 7 is neither")
    save_corpus(built, tmp_path / "corpus", "x")
    assert load_corpus(tmp_path / "corpus")[0] == built
    more = settings.model_copy(
        update={"tasks": {"animals": settings.tasks["animals"].model_copy(update={"examples": 9})}}
    )
    with pytest.raises(
        UserError, match=r"9 asked for, but only 6 can be used .*; the first that is unusable: row 1 of"
    ):
        build_corpus(more, tokenizers)


def test_an_answer_with_a_space_of_its_own_gets_no_second():
    """White space separates it from the prompt once, whoever wrote it."""
    wrote = get_task("own", TaskColumns(generation={"prompt": "{x}", "answer": "{y}", "pattern": "(.+)"}))
    for given, answer in (("a", " a"), (" a", " a"), ("\na", "\na")):
        assert wrote.build({"x": "?", "y": given}).answer == answer
    chosen = TaskColumns(choice=ChoiceColumns(prompt="{x}", choices=[" a", "b"], label="y"))
    example = get_task("chosen", chosen).build({"x": "?", "y": "a"})
    assert (example.choices, example.gold) == ((" a", " b"), 0)


def test_a_definitions_identity_stands():
    """A field that is not given changes no store that exists: definition and id as they were before it."""
    columns = TaskColumns(choice=CHOICE)
    assert columns.definition == (
        '{"choice":{"prompt":"Is {thing} an animal?\\nAnswer:","choices":["no","yes"],"label":"animal"}}'
    )
    example = get_task("animals", columns).build({"thing": "a dog", "animal": 1})
    assert example.example_id == "94908612177075ef"


def test_a_registered_tasks_name_is_not_taken(tmp_path):
    """Two tasks of one name would be mixed up in every table."""
    with pytest.raises(UserError, match="built-in task"):
        get_task("sst2", TaskData(dataset="x.jsonl", examples=4, choice=CHOICE))
    with pytest.raises(UserError, match="define it there"):
        get_task("animals", TaskData(dataset="x.jsonl", examples=4))


def test_ids_of_registered_tasks_examples_stand():
    """The new part of an example's identity changes no store that exists: an id as it was before there was one."""
    example = get_task("sst2").build({"sentence": "a gem .", "label": 1})
    assert example.example_id == "348004077660b7c6"
