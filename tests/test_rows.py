"""Rows as users have them: every usual kind of file gives the same ones, or says which line to fix."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillroom.config import Corpus, TaskColumns, TaskData
from stillroom.data import json_lists
from stillroom.data import rows as rows_module
from stillroom.data.corpus import _rank, build_corpus
from stillroom.data.rows import load_rows, source_digest
from stillroom.data.tasks import get_task
from stillroom.errors import UserError

ROWS = [{"Question": f"What is {n}, doubled?", "answer": f'{2 * n}, or "{n} + {n}"\nin two lines'} for n in range(6)]
TASK = {"generation": {"prompt": "{question}", "answer": "{answer}"}}


def as_csv(mark=",", end="\r\n"):
    """The rows as a spreadsheet saves them."""
    cells = [["Question", "answer"], *([row["Question"], row["answer"]] for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return end.join(mark.join(row) for row in quoted) + end


LINES = "".join(json.dumps(row) + "\r\n" for row in ROWS)
FILES = {
    "rows.jsonl": LINES.encode(),
    "bom.jsonl": ("\ufeff" + LINES + "\n\n").encode(),
    "rows.json": json.dumps(ROWS).encode(),
    "inside.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "rows.csv": ("\ufeff" + as_csv()).encode(),
    "semicolons.csv": as_csv(";", "\n").encode(),
    "rows.tsv": as_csv("\t").encode(),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.csv.bz2": bz2.compress(as_csv().encode()),
    "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "rows.jsonl.zst": pa.compress(LINES.encode(), "zstd", asbytes=True),
}


def task_and_data(path, task=TASK, split="train"):
    """A task of those columns, and where its rows are."""
    data = TaskData(dataset=str(path), examples=4, split=split, **task)
    return get_task("own", data), data


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    """Byte order marks, line ends, quotes, separators and columns in another case are no part of a row."""
    (tmp_path / name).write_bytes(FILES[name])
    rows = list(load_rows(*task_and_data(tmp_path / name), 0, "corpus.tasks.own"))
    assert rows == [{"question": row["Question"], "answer": row["answer"]} for row in ROWS]


def test_a_folder_gives_a_split_by_its_file_or_as_datasets_saved_it(tmp_path):
    """Parquet alone or in a folder, another kind in a folder, and `save_to_disk` with splits or without."""
    from datasets import Dataset, DatasetDict

    expected = [{"question": row["Question"], "answer": row["answer"]} for row in ROWS]
    for folder in ("parquet", "csv"):
        (tmp_path / folder).mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "parquet" / "dev.parquet")
    (tmp_path / "csv" / "dev.csv").write_text(as_csv(), newline="")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "alone")
    DatasetDict(dev=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "splits")
    for place in ("parquet/dev.parquet", "parquet", "csv", "alone", "splits"):
        task, data = task_and_data(tmp_path / place, split="dev")
        assert list(load_rows(task, data, 0, "own")) == expected, place
        assert source_digest(data), place
    before = source_digest(data)
    Dataset.from_list(ROWS[1:]).save_to_disk(tmp_path / "splits" / "dev")
    assert source_digest(data) != before
    for place, there in (("parquet", "dev"), ("splits", "dev")):
        with pytest.raises(UserError, match=f"splits there: {there}"):
            load_rows(*task_and_data(tmp_path / place, split="test"), 0, "own")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "question,answer\nx,y,z\n", "a.csv, line 2: 3 cells, but the header names 2 columns"),
        ("a.csv", "question,question\nx,y\n", "a.csv, line 1: columns need different names"),
        ("a.csv", 'question,answer\n"x\n', r"a.csv, line 2: not valid CSV: unexpected end of data"),
        ("a.csv", "question,answer\n", "a.csv has no rows"),
        ("a.csv", "frage,antwort\nx,y\n", r"lacks the columns \['question', 'answer'\]; it has \['frage', 'antwort'\]"),
        ("a.json", '{"a": 1}', "a.json: expected a list of objects; one object per line is a `.jsonl` file"),
        ("a.json", '[{"question": 1}, 2]', "a.json, row 2: expected an object, not '2'"),
        ("a.json", '[{"question": 1},', "a.json, row 2: not valid JSON: Expecting value"),
        ("a.json", '[{"question": 1} {"question": 2}]', "a.json, row 1: not valid JSON: Expecting ',' delimiter"),
        ("a.json", '[{"question": 1}] 2', "a.json: not valid JSON: there is more after the list's end"),
        ("a.json", '[{"question": ' + "9" * 5000 + "}]", "a.json, row 1: a number has too many digits"),
        ("a.json", "[" + '{"a":' * 100000, "a.json, row 1: nested too deeply"),
        ("a.json", '[{"question": 1}q]', "a.json, row 1: not valid JSON: Expecting ',' delimiter"),
        ("a.json", '{"m"": 1, "d": []}', "a.json: not valid JSON: Expecting ':' delimiter"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.json", '{"data": []}', "a.json has no rows"),
        ("a.json", "{}", "a.json: expected a list of objects"),
        ("a.json", "3", "a.json: expected a list of objects"),
        ("a.json", "", "a.json: not valid JSON: Expecting value"),
        ("a.json", '{"a": [{"question": 1}], "b": []}', "a.json: expected a list of objects"),
        ("a.json", '{"a": [{"question": 1}], 3: 4}', "a.json: not valid JSON: Expecting property name"),
        ("a.json", '{"a": [{"question": 1}]', "a.json: not valid JSON: Expecting ',' delimiter"),
        ("a.json", '{"a" [{"question": 1}]}', "a.json: not valid JSON: Expecting ':' delimiter"),
        ("a.json", '{"a": [{"question": 1}, 2]}', "a.json, row 2: expected an object, not '2'"),
        ("a.json", '{"a": [{"question": 1}]} 2', "a.json: not valid JSON: there is more after the object's end"),
        ("a.jsonl.gz", "no gzip", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", "no zstd", "a.jsonl.zst cannot be read"),
        ("a.parquet", "no parquet", "a.parquet cannot be loaded"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_where(tmp_path, name, content, message):
    """The line, and what to do."""
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(UserError, match=message):
        load_rows(*task_and_data(tmp_path / name), 0, "corpus.tasks.own")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@example(rows=[], piece=1, indent=None, escaped=True, around=[("", 1.5), ("", -2.5e-300)], place=2)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=5),
    piece=st.integers(1, 24),
    indent=st.sampled_from([None, 1]),
    escaped=st.booleans(),
    around=st.none() | st.lists(st.tuples(st.text(max_size=3), VALUES), max_size=4),
    place=st.integers(0, 4),
)
def test_a_list_read_in_pieces_is_what_it_is_as_a_whole(tmp_path_factory, rows, piece, indent, escaped, around, place):
    """Wherever the pieces part it: in a number, a name, an escape, a surrogate pair. Alone, or among other members."""
    whole = rows
    if around is not None:
        members = [(f"{n}{name}", value) for n, (name, value) in enumerate(around) if not isinstance(value, list)]
        whole = dict([*members[:place], ("data", rows), *members[place:]])
    text = json.dumps(whole, indent=indent, ensure_ascii=escaped)
    path = tmp_path_factory.mktemp("pieces") / "a.json"
    path.write_text(text, "utf-8", errors="replace", newline="")
    with pytest.MonkeyPatch.context() as patch:
        for module in (rows_module, json_lists):
            patch.setattr(module, "PIECE", piece)
        found = list(rows_module._read_json(path))
    expected = json.loads(path.read_text("utf-8"))
    assert repr(found) == repr(expected if around is None else expected["data"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "inside.json", "a.csv", "a.jsonl.zst", "a.parquet", "saved"])
def test_what_is_held_of_a_large_source_is_what_is_asked_for(tmp_path, name):
    """Of 10 MB half at most, and the examples are those that a sort of all rows chooses."""
    from datasets import Dataset

    rows = [{"question": f"Say {n % 4000}. {n:01900}", "answer": f"{n % 7}"} for n in range(5000)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, compression=None, use_dictionary=False)
    elif name == "a.csv":
        lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)]
        (tmp_path / name).write_text("\n".join(lines))
    elif name == "saved":
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
    else:
        text = json.dumps(rows).encode() if name.endswith(".json") else text
        text = b'{"version": 1, "data": ' + text + b"}" if name == "inside.json" else text
        (tmp_path / name).write_bytes(pa.compress(text, "zstd", asbytes=True) if name.endswith("zst") else text)
    task, data = task_and_data(tmp_path / name)
    every = sorted((task.build(row) for row in rows), key=lambda e: _rank(e.example_id, "sample0"))
    del rows, text
    corpus = Corpus(tasks={"own": data.model_copy(update={"examples": 20})}, max_length=4096)
    build_corpus(corpus, [])  # what is loaded once
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        built = build_corpus(corpus, [])
        held = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert {e.example_id for e in built.all} == {e.example_id for e in every[:20]}
    assert built.counts["own"]["source_rows"] == 5000
    assert held < 5e6, held


def test_a_row_that_cannot_be_used_is_counted_and_the_first_is_told(tmp_path, tokenizers):
    """NaN and nulls are no text; numbers are, and numbers as texts; an optional column may be any of the former."""
    rows = [{"instruction": f"Add {n}", "input": text, "output": out} for n, (text, out) in enumerate(
        [("1 and 2", 3), (None, "4.5"), ("", "5"), (float("nan"), "6"), ("x", None), ("y", float("nan"))]
    )]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "{instruction}\n{input}", "optional": ["input"], "answer": "{output}"}
    _, data = task_and_data(tmp_path / "a.jsonl", {"generation": columns})
    examples = build_corpus(Corpus(tasks={"own": data}), tokenizers)
    assert {e.prompt: e.answer for e in examples.all} == {
        "Add 0\n1 and 2": " 3",
        "Add 1": " 4.5",
        "Add 2": " 5",
        "Add 3": " 6",
    }
    assert examples.counts["own"]["unusable"] == 2
    assert examples.faults["own"].startswith("row 4 of ")
    assert "column 'output' is empty or not text: None" in examples.faults["own"]


def test_an_answer_without_a_pattern_is_the_whole_text():
    """Strictly but for white space around it; flexibly without case, other white space and punctuation at its ends."""
    task = get_task("own", TaskColumns(**TASK))
    assert [task.extract_strict(text) for text in (" Paris.\n", "paris", " ")] == ["Paris.", "paris", None]
    assert task.extract_flexible("  PARIS,\n France. ") == task.extract_flexible("paris, france") == "paris, france"
    assert task.extract_flexible(" ... ") == "..."
    assert task.stop == ("Question:",)
    columns = {**TASK["generation"], "stop": ["\n", "Q:"]}
    assert get_task("own", TaskColumns(generation=columns)).stop == ("\n", "Q:")


def test_choices_in_a_cell_are_read_as_the_list_that_they_spell():
    """A CSV has no lists; a label there is a text, and `label_is` says if it is an index."""
    columns = {"prompt": "{q}", "choices": "options", "label": "gold", "label_is": "index"}
    task = get_task("own", TaskColumns(choice=columns))
    example = task.build({"q": "Which?", "options": '["red", "blue"]', "gold": "1"})
    assert (example.choices, example.gold) == ((" red", " blue"), 1)
    with pytest.raises(ValueError, match="begins like a list, but is not JSON"):
        task.build({"q": "Which?", "options": "[red]", "gold": "1"})
    with pytest.raises(ValueError, match="set label_is: index"):
        get_task("own", TaskColumns(choice={**columns, "label_is": None})).build(
            {"q": "Which?", "options": '["red", "blue"]', "gold": "1"}
        )
