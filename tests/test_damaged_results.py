"""A results folder with a damaged file ends in one message with a remedy, or in a report that says what is left out."""

from __future__ import annotations

import json
import random
import shutil
import sys

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillroom import cli
from stillroom.errors import UserError
from stillroom.folders import EXPERIMENT
from stillroom.provenance import record_run
from synthetic import quick_reports, write_results

TRIAL = f"{EXPERIMENT}/trial_00000003_combined_seed_1"
FAILED = f"{EXPERIMENT}/trial_00000002_combined_seed_0"
OBJECTS = [
    "planned.json",
    "run.json",
    "corpus/corpus.json",
    "baselines/teacher.json",
    "baselines/student.json",
    "baselines/student_test.json",
    f"{TRIAL}/result.json",
    f"{FAILED}/error.json",
]
TABLES = [
    "corpus/corpus.parquet",
    "baselines/teacher.parquet",
    "baselines/student.parquet",
    f"{TRIAL}/predictions.parquet",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of two groups and two seeds with one failed trial."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    write_results(folder, seeds=(0, 1), drop=[("combined", 0)], overrides=["groups=[task_only, combined]"])
    return folder


@pytest.fixture
def results(whole, tmp_path):
    """A copy of it to damage; the bootstrap and the pictures, which come after all reading, are left out."""
    with quick_reports(whole=False):
        yield shutil.copytree(whole, tmp_path / "results")


def told(results, monkeypatch, capsys):
    """Exit code and output of `stillroom report FOLDER`, in this process."""
    monkeypatch.setattr(sys, "argv", ["stillroom", "report", str(results)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


def require_told(results, path, monkeypatch, capsys, refused):
    """The file is named with what to do, in one message and with nothing written; or the page is there, and says it."""
    code, output = told(results, monkeypatch, capsys)
    assert "Traceback" not in output
    if refused:
        assert code == 2, output
        assert str(path) in output
        assert "delete " in output or "`stillroom run STUDY`" in output
        assert not (results / "report.html").exists()
    else:
        assert code == 0, output
        assert str(path) in (results / "report.html").read_text()


def test_an_undamaged_folder_is_reported(results, monkeypatch, capsys):
    """The check refuses nothing that is whole."""
    assert told(results, monkeypatch, capsys)[0] == 0
    assert (results / "report.html").is_file()


def cut(content):
    """What a process killed while writing in place would have left."""
    return content[: len(content) // 2]


BYTES = {
    "empty": lambda content: b"",
    "truncated": cut,
    "its first byte": lambda content: content[:1],
    "zeros": lambda content: bytes(len(content)),
    "no text": lambda content: b"\xff\xfe\x00" + content,
    "random": lambda content: random.Random(0).randbytes(len(content)),
}


@pytest.mark.parametrize("damage", BYTES)
@pytest.mark.parametrize("name", OBJECTS + TABLES)
def test_torn_files_are_named_with_a_remedy(results, name, damage, monkeypatch, capsys):
    """Every file a report reads, torn in every way that a disk or a copy tears files."""
    path = results / name
    path.write_bytes(BYTES[damage](path.read_bytes()))
    require_told(results, path, monkeypatch, capsys, refused="error.json" not in name)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{}", '[{"trial": 1}]', "[" * 50_000, "1" * 6000])
@pytest.mark.parametrize("name", OBJECTS)
def test_json_of_another_shape_is_named_with_a_remedy(results, name, content, monkeypatch, capsys):
    """A list, nothing, no object; nested beyond what can be read; a number that Python does not take."""
    (results / name).write_text(content)
    require_told(results, results / name, monkeypatch, capsys, refused="error.json" not in name)


# without planned.json a folder is read as a study's name
@pytest.mark.parametrize("name", [name for name in OBJECTS + TABLES if name != "planned.json"])
def test_a_folder_in_a_files_place_is_named_with_a_remedy(results, name, monkeypatch, capsys):
    """As a failed copy leaves it; and the file's absence says no more than it must."""
    (results / name).unlink()
    (results / name).mkdir()
    require_told(results, results / name, monkeypatch, capsys, refused="error.json" not in name)


NEEDED = {
    "planned.json": ("study", "snapshot", "fingerprint", "corpus", "baselines", "trials"),
    "run.json": ("stages",),
    "corpus/corpus.json": ("fingerprint", "counts", "test_counts"),
    "baselines/teacher.json": ("fingerprint", "metrics"),
    f"{TRIAL}/result.json": (
        *("trial", "config", "metrics", "epochs", "gradients", "gradient_shares", "coverage", "step"),
    ),
    f"{FAILED}/error.json": ("error",),
}


@pytest.mark.parametrize("wrong", ["absent", "list of texts", "number", "null"])
@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NEEDED.items() for key in keys])
def test_a_key_that_is_absent_or_of_another_type_is_named_with_a_remedy(results, name, key, wrong, monkeypatch, capsys):
    """Each key that the report reads, at the top of each file."""
    value = json.loads((results / name).read_text())
    other = {"list of texts": ["x"], "number": 2.5, "null": None}
    value = {k: v for k, v in value.items() if k != key} | ({} if wrong == "absent" else {key: other[wrong]})
    (results / name).write_text(json.dumps(value))
    require_told(results, results / name, monkeypatch, capsys, refused="error.json" not in name)


def renamed(table):
    """Its last needed column under another name."""
    name = "prompt" if "prompt" in table.column_names else "correct"
    return table.rename_columns(["other" if n == name else n for n in table.column_names])


def without_ids(table):
    """The examples' ids all absent."""
    return table.set_column(0, "example_id", pa.nulls(len(table), pa.string()))


def as_text(table):
    """A column of truths or answers as numbers."""
    name = "answer" if "answer" in table.column_names else "correct"
    return table.set_column(table.column_names.index(name), name, pa.array([1.5] * len(table)))


FOREIGN = {
    "no rows": lambda table: table.slice(0, 0),
    "half the rows": lambda table: table.slice(0, len(table) // 2),
    "a column renamed": renamed,
    "ids absent": without_ids,
    "another type": as_text,
    "another table": lambda table: pa.table({"a": [1, 2]}),
}


@pytest.mark.parametrize("damage", FOREIGN)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_shape_is_named_with_a_remedy(results, name, damage, monkeypatch, capsys):
    """Whole Parquet files that are not what was written."""
    pq.write_table(FOREIGN[damage](pq.read_table(results / name)), results / name)
    require_told(results, results / name, monkeypatch, capsys, refused=True)


def test_files_of_another_trial_are_not_taken_for_its_own(results, monkeypatch, capsys):
    """A result or predictions copied from a neighbour; the same predictions of other examples."""
    other = next((results / EXPERIMENT).glob("*task_only_seed_0"))
    for name, says in (
        ("result.json", "it is the result of"),
        ("predictions.parquet", "not the ones that were measured"),
    ):
        kept = (results / TRIAL / name).read_bytes()
        shutil.copy(other / name, results / TRIAL / name)
        code, output = told(results, monkeypatch, capsys)
        assert (code, says in output, str(results / TRIAL / name) in output) == (2, True, True), output
        (results / TRIAL / name).write_bytes(kept)
    path = results / TRIAL / "predictions.parquet"
    rows = pd.read_parquet(path)
    rows["example_id"] = rows["example_id"].str.upper() + "x"
    rows.to_parquet(path)
    code, output = told(results, monkeypatch, capsys)
    assert code == 2
    assert f"{path} has other examples than {results / 'corpus' / 'corpus.parquet'}" in output


def test_a_trials_folder_named_out_of_the_results_is_refused(results, monkeypatch, capsys):
    """`planned.json` of a stranger reads nothing elsewhere."""
    planned = json.loads((results / "planned.json").read_text())
    planned["trials"][0]["name"] = "../../elsewhere"
    (results / "planned.json").write_text(json.dumps(planned))
    require_told(results, results / "planned.json", monkeypatch, capsys, refused=True)


def test_a_flipped_bit_of_predictions_is_noticed(results, monkeypatch, capsys):
    """Their pages carry checksums; where the bit was of the frame around them, the shape or the numbers tell."""
    path = results / TRIAL / "predictions.parquet"
    content = path.read_bytes()
    for place in range(64, len(content) // 2, len(content) // 20):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        require_told(results, path, monkeypatch, capsys, refused=True)


def test_what_a_file_says_of_itself_does_not_steer_the_terminal(results, monkeypatch, capsys):
    """A key with an escape in it is named in the message, as an escape."""
    path = results / TRIAL / "result.json"
    value = json.loads(path.read_text())
    row = {"split": "validation", "task": "\x1b[31mred", "measure": "accuracy", "value": 0.5}
    path.write_text(json.dumps({**value, "metrics": [*value["metrics"], row]}))
    code, output = told(results, monkeypatch, capsys)
    assert code == 2
    assert "the task \\x1b[31mred is not in the study" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[0]], "appears twice"),
        (lambda rows: [row for row in rows if row["task"] != "quiz"], "on the validation split, task quiz, is missing"),
        (lambda rows: [row for row in rows if row["measure"] != "accuracy"], "accuracy on the validation split"),
        (lambda rows: [*rows, {**rows[0], "split": "tset"}], "split: Input should be 'train', 'validation'"),
        (lambda rows: [*rows, {**rows[0], "task": "quiz", "measure": "loss"}], "is not a measure of a task"),
    ],
)
def test_numbers_that_are_not_there_once_are_named(results, change, message, monkeypatch, capsys):
    """A report that finds a number twice, or not, or of a split that is none, takes nothing for it."""
    for place, value in places(results):
        before = place.read_text()
        rows = value["epochs"][-1]["metrics"] if "epochs" in value else value["metrics"]
        rows[:] = change(list(rows))
        place.write_text(json.dumps(value))
        code, output = told(results, monkeypatch, capsys)
        assert (code, message in output, str(place) in output) == (2, True, True), output
        place.write_text(before)


def places(results):
    """A trial's result and a baseline's measurement, with what is in them."""
    for name in (f"{TRIAL}/result.json", "baselines/teacher.json"):
        yield results / name, json.loads((results / name).read_text())


def leaves(value, path=()):
    """Paths to every value of a JSON document, of each list the first two."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTS)
def test_no_value_of_a_file_ends_in_a_traceback(results, name, monkeypatch, capsys):
    """One value after the other, at whatever depth, replaced by one of another kind: a message or a page."""
    original = (results / name).read_text()
    paths = [path for path in leaves(json.loads(original)) if path]
    rng = random.Random(name)
    refused = 0
    for path in rng.sample(paths, min(len(paths), 40)):
        value = json.loads(original)
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = rng.choice([None, "x", -1, [], {}, True, 1e400, ["x"], {"x": 1}])
        (results / name).write_text(json.dumps(value))
        code, output = told(results, monkeypatch, capsys)
        assert code in (0, 2), (path, inner[path[-1]], output)
        refused += code == 2
    assert refused or "error.json" in name


def test_a_log_of_another_shape_is_named(tmp_path):
    """Before it is written to: what a stage did is done, and its record is not lost in a traceback."""
    (tmp_path / "run.json").write_text('{"stages": []}')
    with pytest.raises(UserError, match=r"run.json is damaged"):
        record_run(tmp_path / "run.json", "sweep", {}, {})


def test_a_results_folder_is_reported_as_it_was_planned(results, monkeypatch, capsys):
    """An override would be ignored, and believed."""
    monkeypatch.setattr(sys, "argv", ["stillroom", "report", str(results), "--set", "analysis.alpha=0.1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--set changes a study" in capsys.readouterr().err
