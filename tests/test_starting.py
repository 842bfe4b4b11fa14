"""A start without a study: `init` writes one that loads, and says its guesses; `fields` lists what can be in one."""

from __future__ import annotations

import csv
import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from stillroom.cli import app
from stillroom.data.corpus import build_corpus
from stillroom.errors import UserError
from stillroom.preflight.starting import write_study
from stillroom.studies import load_study
from stillroom.studies.fields import fields_of, sections

N = range(20)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
DATA = {
    "question": ([{"id": n, "Question": f"What is {n}?", "Answer": f"It is {n}"} for n in N], "generation"),
    "instruction": (
        [{"instruction": f"Add 1 to {n}", "input": "" if n % 2 else "now", "output": n + 1} for n in N],
        "generation",
    ),
    "labels": ([{"sentence": f"Film {n} was fine", "label": n % 3} for n in N], "choice"),
    "choices": ([{"question": f"Which {n}?", "choices": ["a", "b"], "answer": n % 2} for n in N], "choice"),
    "two others": ([{"Country": f"Country {n}", "Capital": f"City {n}"} for n in N], "generation"),
    "chats": ([{"messages": [{"role": "user", "content": f"{n}"}, *TURNS[1:]]} for n in N], "chat"),
}


@pytest.mark.parametrize("name", DATA)
def test_a_study_is_written_for_the_usual_columns(tmp_path, name, tokenizers):
    """It loads, its task is of the kind that the rows are, and its examples can be drawn of them."""
    rows, kind = DATA[name]
    (tmp_path / "my rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = write_study(tmp_path / "my rows.jsonl", "a/teacher", "a/student", tmp_path / "study.yaml")
    study = load_study(str(tmp_path / "study.yaml"))
    assert (start.rows, start.usable) == (20, 20)
    ((task, data),) = study.corpus.tasks.items()
    assert task == "my-rows"
    assert [name for name in ("choice", "generation", "chat") if getattr(data, name)] == [kind]
    if kind != "chat":  # which needs templates
        assert len(build_corpus(study.corpus, tokenizers).all) == 18
    with pytest.raises(UserError, match=r"study.yaml exists; name another file"):
        write_study(tmp_path / "my rows.jsonl", "a/teacher", "a/student", tmp_path / "study.yaml")


def test_what_cannot_be_guessed_is_said(tmp_path):
    """No question, or too few rows that can be used."""
    (tmp_path / "a.csv").write_text("colour,size,weight\n" + "red,1,2\n" * 9)
    with pytest.raises(
        UserError, match=r"columns \['colour', 'size', 'weight'\]: none looks like a question and an answer"
    ):
        write_study(tmp_path / "a.csv", "t", "s", tmp_path / "study.yaml")
    with (tmp_path / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["same", "1"], ["same", "2"], ["other", ""]])
    with pytest.raises(UserError, match=r"b.csv: 1 of 3 rows can be used .*row 2: column 'answer' is empty"):
        write_study(tmp_path / "b.csv", "t", "s", tmp_path / "study.yaml")
    (tmp_path / "c.jsonl").write_text('{"a.b": "x", "c": "y"}\n' * 4)
    with pytest.raises(UserError, match=r"columns cannot be used in a template: .*rename them"):
        write_study(tmp_path / "c.jsonl", "t", "s", tmp_path / "study.yaml")
    assert not (tmp_path / "study.yaml").exists()


def test_the_command_says_its_guesses_and_what_to_do_next(tmp_path):
    """On a terminal; brackets and quotes of a row's names are no markup."""
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(f"q{n},a{n}\n" for n in N))
    command = ["init", str(tmp_path / "a.csv"), "--teacher", "t", "--student", "s", "--study", str(tmp_path / "s.yaml")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "Guessed: 'question' is the question, 'answer' its answer, which counts as a whole." in done.output
    assert "Guessed: 20 of 20 rows can be used." in done.output
    assert f"stillroom plan {tmp_path / 's.yaml'}" in done.output


def test_fields_lists_sections_and_single_fields():
    """By path, with or without what stands for a name; a misspelt one is asked about."""
    assert [*fields_of("")] == [name for name, _ in sections()]
    assert [*fields_of("corpus.tasks.chat")] == ["corpus.tasks.<name>.chat"]
    assert fields_of("training.schedule")["training"][0]["default"] == "`constant`"
    assert {"teacher", "teacher.fine_tune", "teacher.fine_tune.training"} == {*fields_of("teacher")}
    with pytest.raises(UserError, match=r"no section or field 'trainng'; did you mean training\?"):
        fields_of("trainng")
    done = CliRunner().invoke(app, ["fields", "sweep.seeds"])
    assert done.exit_code == 0, done.output
    assert "seeds: list of integer, required" in done.output


def test_a_default_is_spelt_as_a_study_spells_it():
    """What `stillroom fields` shows can be copied into a file and is the default."""
    for rows in fields_of("").values():
        for row in rows:
            assert not re.search(r"True|False|\('", row["default"]), row
    (stop,) = fields_of("corpus.tasks.generation.stop")["corpus.tasks.<name>.generation"]
    assert yaml.safe_load(stop["default"].strip("`")) == ["Question:"]
    (primary,) = fields_of("analysis.primary")["analysis"]
    assert yaml.safe_load(primary["default"].strip("`"))[0] == ["hidden", "black_box"]


@pytest.mark.parametrize("name", ["2024.jsonl", "no.jsonl", "null.jsonl", "0x1f.jsonl", "sst2.jsonl", "😀data.jsonl"])
def test_a_file_of_any_name_gives_a_study_that_loads(tmp_path, name):
    """A name that YAML reads as a number, that of an embedded task, one outside the Basic Multilingual Plane."""
    data = tmp_path / name
    data.write_text("".join(json.dumps({"question": f"q{n}", "answer": f"a{n}"}) + "\n" for n in range(8)))
    write_study(data, "builtin:teacher", "builtin:student", tmp_path / "mine.yaml")
    study = load_study(str(tmp_path / "mine.yaml"))
    (task,) = study.corpus.tasks.values()
    assert task.dataset == str(data)


def test_a_missing_label_is_no_class(tmp_path, tokenizers):
    """Neither as null nor as an empty cell; the rows that lack it are left out."""
    for kind in ("jsonl", "csv"):
        rows = [{"text": f"t{n}", "label": (None, "yes", "no", "no")[n % 4]} for n in range(40)]
        data = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            data.write_text("text,label\n" + "".join(f"{row['text']},{row['label'] or ''}\n" for row in rows))
        start = write_study(data, "builtin:teacher", "builtin:student", tmp_path / f"{kind}.yaml")
        (task,) = load_study(str(start.path)).corpus.tasks.values()
        assert task.choice.choices == ("no", "yes")
        assert (start.rows, start.usable) == (40, 30)
