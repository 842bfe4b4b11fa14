"""Mistakes through the command line: one message that names field, file or example, exit code 2, no traceback."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mistakes import MISTAKES
from small_things import TEACHER_SHAPE, write_model
from studies import study_file


@pytest.fixture
def mistaken(capsys, monkeypatch):
    """Call the command line; the message it must end with."""
    from stillroom.cli import main

    # its data base takes seconds to make, and none of these mistakes is its
    monkeypatch.setattr("stillroom.experiment.tracker.Tracker.check", lambda self: None)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["stillroom", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        assert stop.value.code == 2, captured
        assert "Traceback" not in captured.out + captured.err
        assert captured.err.count("error: ") == 1, captured.err
        return captured.err

    return call


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_wrong_setting(mistaken, override, message):
    """Every mistake that the tests of the configuration know, as a user makes it."""
    assert message in mistaken("plan", "quickstart", "--set", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("objective.kd.weight=.nan", "objective.kd.weight"),
        ("sweep.seeds=0", "sweep.seeds"),
        ("sweep.retries=-1", "sweep.retries"),
        ("sweep.keep_checkpoints=some", "sweep.keep_checkpoints"),
        ("analysis.primary=[[hidden]]", "analysis.primary"),
        ("analysis.simple_tasks=[sst2]", "analysis names the task 'sst2'"),
        ("corpus.tasks.no/where={dataset: builtin, examples: 9}", "corpus.tasks.no/where"),
        ("corpus.tasks={..: {dataset: builtin, examples: 9}}", "corpus.tasks"),
    ],
)
def test_a_nonsensical_value(mistaken, override, message):
    """Infinite, not a number, too few, or a name that is no name."""
    assert message in mistaken("plan", "quickstart", "--set", override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a mapping of sections"),
        (b"- a list", "a mapping of sections"),
        (b"a: [", "not valid YAML"),
        (b"name: x", "teacher: Field required"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"name: a\nname: b", "name twice"),
    ],
)
def test_a_broken_study_file(mistaken, tmp_path, content, message):
    """What is no study is named."""
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    said = mistaken("plan", path)
    assert str(path) in said
    assert message in said


def test_a_study_that_is_a_folder_or_absent(mistaken, tmp_path):
    """The shipped ones are listed."""
    for path in (tmp_path, tmp_path / "absent.yaml"):
        assert "paper, paper-llama2, quickstart, signals, small" in mistaken("plan", path)


SENTIMENT = [{"sentence": f"the film number {n} was fine", "label": n % 2} for n in range(30)]


def parquet(change):
    """A data set's folder with one changed table."""

    def write(folder):
        rows = [dict(row) for row in SENTIMENT]
        frame = pd.DataFrame(change(rows))
        (folder / "data").mkdir()
        frame.to_parquet(folder / "data" / "train.parquet")
        return folder / "data"

    return write


def lines(content):
    """A file of JSON lines."""

    def write(folder):
        (folder / "data.jsonl").write_bytes(content)
        return folder / "data.jsonl"

    return write


def broken_parquet(folder):
    """A folder whose table is none."""
    (folder / "data").mkdir()
    (folder / "data" / "train.parquet").write_bytes(b"PAR1 and nothing more")
    return folder / "data"


def with_label(label):
    """The rows with another label."""
    return lambda rows: [{**row, "label": label} for row in rows]


DATA = {
    "missing columns": (parquet(lambda rows: [{"text": "x"} for _ in rows]), "lacks the columns ['sentence', 'label']"),
    "no rows": (parquet(lambda rows: pd.DataFrame({"sentence": [], "label": []})), "cannot be loaded"),
    "labels out of range": (parquet(with_label(7)), "no row can be used; the first that is unusable: row 0"),
    "labels below range": (parquet(with_label(-1)), "no row can be used; the first that is unusable: row 0"),
    "labels that are text": (parquet(with_label("good")), "no row can be used; the first that is unusable: row 0"),
    "labels that are absent": (parquet(with_label(None)), "no row can be used; the first that is unusable: row 0"),
    "a table that is none": (broken_parquet, "cannot be loaded"),
    "a folder without the split": (lambda folder: folder, "train.parquet is missing; splits there: none"),
    "a file that is not there": (lambda folder: folder / "absent.jsonl", "absent.jsonl is missing: no such file"),
    "a name that is no data set": (lambda folder: "nobody/nothing", "cannot be loaded"),
    "a line that is no JSON": (lines(b'{"sentence": "a", "label": 1}\n{"sentence"'), "line 2: not valid JSON"),
    "a line that is no object": (lines(b"[1, 2]"), "line 1: expected an object"),
    "a file of no lines": (lines(b"\n"), "has no rows"),
    "a file that is no text": (lines(b"\xff\xfe\x00"), "data.jsonl: not text in UTF-8"),
    "one text, over and over": (parquet(lambda rows: [rows[0]] * 30), "20 asked for, but only 1 can be used"),
}


@pytest.mark.parametrize("what", DATA)
def test_data_that_cannot_be_used(mistaken, tmp_path, teacher_ref, student_ref, what):
    """The task's field and the file or row are named, before any model is loaded."""
    write, message = DATA[what]
    tasks = {"sst2": {"dataset": str(write(tmp_path)), "examples": 20}}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, corpus={"tasks": tasks, "max_length": 128})
    said = mistaken("capture", path)
    assert message in said
    assert "corpus.tasks.sst2" in said or "data.jsonl" in said or "absent.jsonl" in said
    assert not (tmp_path / "offline_teacher_data").exists()
    if what != "a name that is no data set":  # which the hub may have
        assert message in (planned := mistaken("plan", path))
        assert "corpus.tasks.sst2" in planned


def test_rows_that_are_left_out_are_told_of_once(tmp_path, monkeypatch, capsys, teacher_ref, student_ref):
    """How many and the first of them, on standard error, before the models run: the user may not know of them."""
    from stillroom.cli import main

    rows = [{"sentence": "no label", "label": 9}, *SENTIMENT, {"sentence": None, "label": 0}]
    tasks = {"sst2": {"dataset": str(parquet(lambda _: rows)(tmp_path)), "examples": 20}}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, corpus={"tasks": tasks, "max_length": 128})
    monkeypatch.setattr("sys.argv", ["stillroom", "evaluate", str(path), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    said = capsys.readouterr()
    assert json.loads(said.out)
    (warning,) = (line for line in said.err.splitlines() if "cannot be used" in line)
    assert warning.startswith("warning: sst2: 2 of 32 rows cannot be used and are left out; the first is row 0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("corpus.tasks.quiz.examples=9000", "corpus.tasks.quiz.examples: 9000 asked for, but only"),
        ("corpus.max_length=8", "can be used"),
        ("corpus.tasks.sst2={dataset: builtin, examples: 9}", "corpus.tasks.sst2.dataset: this task has no built-in"),
        ("corpus.tasks.poetry={dataset: builtin, examples: 9}", "corpus.tasks.poetry: unknown task"),
        ("signals.top_k=401", "signals.top_k: 401 exceeds the teacher's vocabulary of 400"),
        ("teacher.model=./nowhere", "./nowhere: no such directory"),
        ("teacher.model=nobody/nothing", "nobody/nothing"),
        ("teacher.model=builtin:professor", "built in are builtin:teacher, builtin:student"),
        ("student.model={folder}", "{folder}"),
        ("paths.results={file}/results", "{file}/results"),
        ("paths.store={file}/store", "{file}/store"),
        ("paths.store={file}", "{file}"),
        ("paths.results=/proc/nowhere", "/proc/nowhere"),
        ("paths.store=/proc/nowhere", "/proc/nowhere"),
    ],
)
def test_a_setting_that_does_not_fit_what_is_there(mistaken, tmp_path, teacher_ref, student_ref, override, message):
    """Figures, models and paths that only a look at the machine can find wrong."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    places = {"file": tmp_path / "file", "folder": tmp_path / "folder"}
    if "max_length" in override:
        message = "only 0 can be used"
    override = override.format(**places) if "{f" in override else override
    path = study_file(tmp_path, teacher_ref.model, student_ref.model)
    assert message.format(**places) in mistaken("capture", path, "--set", override)


def change_weights(folder):
    """One value that is not a number in the last layer."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_weight(folder):
    """All weights but one."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickled(folder):
    """The weights as torch.save writes them."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without(name):
    """A model's folder without one file."""
    return lambda folder: (folder / name).unlink()


def change_config(**changes):
    """Other fields in config.json."""

    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def without_eos(folder):
    """A tokenizer that never ends."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def halve(name):
    """Half of a file."""

    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


MODELS = {
    "weights that are not numbers": (change_weights, "LlamaForCausalLM gives NaN or infinite values"),
    "weights that are pickled": (only_pickled, "only safetensors weights are loaded, and it has pytorch_model.bin"),
    "no weights": (without("model.safetensors"), "only safetensors weights are loaded, and it has no weights"),
    "a missing weight": (without_a_weight, "its files lack 1 of its weights, model.layers.1.mlp.up_proj.weight"),
    "a layer too many": (
        change_config(num_hidden_layers=1),
        "weights that its config.json does not know, model.layers.1.",
    ),
    "half of the weights": (halve("model.safetensors"), "cannot be loaded"),
    "no configuration": (without("config.json"), "cannot be loaded"),
    "half a configuration": (halve("config.json"), "cannot be loaded"),
    "an architecture nobody knows": (change_config(model_type="perceptron"), "cannot be loaded"),
    "a model that is no language model": (
        change_config(model_type="vit", architectures=["ViTModel"]),
        "cannot be loaded",
    ),
    "no tokenizer": (without("tokenizer.json"), "cannot be loaded"),
    "half a tokenizer": (halve("tokenizer.json"), "cannot be loaded"),
    "a tokenizer without an end": (without_eos, "has no EOS token"),
}


@pytest.mark.parametrize("what", MODELS)
def test_a_model_that_cannot_be_used(mistaken, tmp_path, teacher_ref, student_ref, what):
    """The model's folder and the reason, or the examples on which it gave no numbers."""
    change, message = MODELS[what]
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_ref.model, teacher)
    change(teacher)
    said = mistaken("capture", study_file(tmp_path, str(teacher), student_ref.model))
    assert message in said
    assert str(teacher) in said or "LlamaForCausalLM" in said
    assert not list((tmp_path / "offline_teacher_data").glob("*part-*"))


def test_an_example_that_no_tokenizer_can_align(mistaken, tmp_path, student_ref):
    """A tokenizer that has no token for any of a text's characters: the example is named, not trained on blindly."""
    digits = Tokenizer(models.BPE(vocab={**{str(n): n for n in range(10)}, "<end>": 10}, merges=[]))
    digits.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=digits, eos_token="<end>")
    teacher = write_model(tmp_path / "teacher", tokenizer, TEACHER_SHAPE, 7)
    tasks = {"sentiment": {"dataset": "builtin", "examples": 20}}
    signals = {"top_k": 4, "dtype": "float32"}
    changes = {"corpus": {"tasks": tasks, "max_length": 128}, "signals": signals}
    said = mistaken("capture", study_file(tmp_path, teacher.model, student_ref.model, **changes))
    assert "(sentiment), 'Review:" in said
    assert "a tokenizer has no token for any of its text; leave the row out" in said


@pytest.mark.slow
def test_stages_out_of_order(mistaken, tmp_path, teacher_ref, student_ref):
    """What is missing, and the command that makes it."""
    path = study_file(tmp_path, teacher_ref.model, student_ref.model)
    assert "run `stillroom capture`" in mistaken("verify", path)
    assert "run `stillroom capture`" in mistaken("archive", path)
    assert "run `stillroom capture`" in mistaken("sweep", path)
    assert "stillroom sweep" in mistaken("report", path)
    assert "group 'grey_box' is not in study 'tiny'" in mistaken("train", path, "--group", "grey_box", "--seed", 0)
    assert "expected i/n" in mistaken("capture", path, "--slice", "3/2")
    assert "does not exist" in mistaken("inspect", tmp_path / "nowhere")
    assert str(tmp_path) in mistaken("export", tmp_path, tmp_path / "out")
