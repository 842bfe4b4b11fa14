"""Examples: the right wording, no duplicates, no leak, a split that depends on nothing but the example."""

from __future__ import annotations

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import normalizers

from stillroom.config import BenchmarkSplit, ChoiceColumns, Corpus, TaskColumns, TaskData
from stillroom.data.corpus import (
    Examples,
    build_corpus,
    check_leaks,
    folded,
    load_corpus,
    save_corpus,
    split,
    with_test_splits,
)
from stillroom.data.encoding import encode, encode_many, supervised_predictions
from stillroom.data.rows import read_lines
from stillroom.data.tasks import TASKS, Example, get_task
from stillroom.data.tasks.gsm8k import extract_flexible, extract_strict
from stillroom.errors import UserError
from stillroom.experiment.sources import Sources
from stillroom.models.hub import load_tokenizer
from stillroom.studies import load_study


def test_prompts_are_the_harness_wording():
    """lm-evaluation-harness' sst2, mmlu and gsm8k, zero-shot, character by character."""
    sst2 = get_task("sst2").build({"sentence": "a gem .", "label": 1})
    assert sst2.prompt == "a gem .\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert (sst2.answer, sst2.choices, sst2.gold) == (" positive", (" negative", " positive"), 1)
    row = {"question": " 1+1? ", "subject": "abstract_algebra", "choices": ["1", "2", "3", "4"], "answer": 1}
    mmlu = get_task("mmlu").build(row)
    assert mmlu.prompt == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert (mmlu.answer, mmlu.gold) == (" B", 1)
    gsm8k = get_task("gsm8k").build({"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 4"})
    assert gsm8k.text == "Question: How many?\nAnswer: 2+2 = <<2+2=4>>4\n#### 4"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 3+4 = 7\n#### 7", "7", "7"),
        ("#### 1,234", "1234", "1234"),
        ("#### -5.\nThen 9", "-5", "9"),
        ("it costs $12.50.", None, "12.50"),
        ("#### $70", None, "70"),
        ("no number", None, None),
        ("#### 3\n#### 4", "3", "4"),
    ],
)
def test_answers_are_read_as_the_harness_reads_them(text, strict, flexible):
    """First number after ####, and last number anywhere."""
    assert extract_strict(text) == strict
    assert extract_flexible(text) == flexible


def test_built_in_answers_are_right():
    """The generator's own arithmetic and choices, checked independently."""
    for row in TASKS["arithmetic"].generate_rows(3, 200):
        example = TASKS["arithmetic"].build(row)
        sums = [part.split(">>")[0].split("=") for part in example.answer.split("<<")[1:]]
        total = None
        for sum_, result in sums:
            left, sign, right = sum_.partition("+") if "+" in sum_ else sum_.partition("-")
            assert total in (None, int(left))
            total = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert total == int(result) >= 0
        assert extract_strict(example.answer) == str(total)
    kinds = {"pear": "fruit", "otter": "animal", "wrench": "tool", "kayak": "boat"}
    asked = [TASKS["quiz"].build(row) for row in TASKS["quiz"].generate_rows(3, 200)]
    known = [(e.answer, kinds[thing]) for e in asked if (thing := e.prompt.split(".")[0].split()[-1]) in kinds]
    assert len(known) > 10
    assert all(answer == f" {kind}" for answer, kind in known)


def local(tmp_path, rows, examples, task="sst2", **settings):
    """A corpus of one task from local Parquet."""
    folder = tmp_path / task
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return Corpus(tasks={task: TaskData(dataset=str(folder), examples=examples)}, **settings)


ROWS = [{"sentence": f"film number {n}", "label": n % 2, "idx": n} for n in range(40)]


def test_duplicates_are_dropped_and_long_ones_replaced(tmp_path, tokenizers):
    """White space and case do not make two examples; nothing is truncated; both are counted."""
    rows = [
        *ROWS,
        {"sentence": "FILM  number 3", "label": 0, "idx": 99},
        {"sentence": "long " * 200, "label": 0, "idx": 100},
    ]
    built = build_corpus(local(tmp_path, rows, 40, max_length=64), tokenizers)
    counts = built.counts["sst2"]
    assert (counts["used"], counts["duplicates"]) == (40, 1)
    assert counts["too_long"] <= 1
    assert len({e.prompt.lower() for e in built.all}) == 40
    with pytest.raises(UserError, match=r"examples: 41 asked for, but only 40 can be used.*'too_long': 1"):
        build_corpus(local(tmp_path, rows, 41, max_length=64), tokenizers)


def test_all_examples_are_those_that_can_be_used(tmp_path, tokenizers):
    """Every row but the duplicate, in the corpus and in a test split; of built-in rows there is no end."""
    rows = [*ROWS, {"sentence": "FILM  number 3", "label": 0, "idx": 99}]
    settings = local(tmp_path, rows, "all", max_length=64)
    built = build_corpus(settings, tokenizers)
    assert built.counts["sst2"]["used"] == 40
    fewer = build_corpus(local(tmp_path, rows, 30, max_length=64), tokenizers)
    assert {e.example_id for e in fewer.all} < {e.example_id for e in built.all}
    fewer = with_validation(tmp_path, local(tmp_path, rows, 30, max_length=64), ROWS, "all", tokenizers)
    assert len(fewer.test) == 10
    with pytest.raises(UserError, match=r"tasks.sst2.examples: 2 at least asked for, but only 1 can be used"):
        build_corpus(local(tmp_path, ROWS[:1], "all"), tokenizers)
    with pytest.raises(UserError, match=r"quiz.examples: built-in rows are made up as they are needed; say how many"):
        build_corpus(Corpus(tasks={"quiz": TaskData(dataset="builtin", examples="all")}), tokenizers)


def test_of_a_plain_text_every_token_is_learnt(tmp_path, tokenizers):
    """No prompt, no end of the text left out, duplicates told by the text itself."""
    rows = [{"text": f"On day {n % 20} the river rose."} for n in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "notes.parquet")
    data = TaskData(dataset=str(tmp_path / "notes.parquet"), examples="all", text={})
    built = build_corpus(Corpus(tasks={"notes": data}), tokenizers)
    assert (built.counts["notes"]["used"], built.counts["notes"]["duplicates"]) == (20, 10)
    example = built.train[0]
    for tokenizer in tokenizers:
        encoded = encode(tokenizer, example.text, add_eos=True)
        positions, targets = supervised_predictions(encoded, len(example.prompt))
        learnt = [t for t in range(1, len(encoded)) if encoded.ends[t]]  # all but a space that the tokenizer invented
        assert (positions + 1).tolist() == learnt
        assert targets.tolist() == encoded.ids[learnt].tolist()
        assert len(learnt) >= len(encoded) - 2


def test_the_split_depends_on_the_examples_and_the_seed_alone(tmp_path, tokenizers):
    """10 % of each task; the order of rows does not matter, another seed gives another part."""
    first = build_corpus(local(tmp_path, ROWS, 40), tokenizers)
    second = build_corpus(local(tmp_path, ROWS[::-1], 40), tokenizers)
    other = build_corpus(local(tmp_path, ROWS, 40, split_seed=1), tokenizers)
    ids = [{e.example_id for e in one.validation} for one in (first, second, other)]
    assert len(ids[0]) == 4
    assert ids[0] == ids[1] != ids[2]
    assert split(first.all, 0.1, 0)[1] == first.validation


def test_a_leak_is_named():
    """The same prompt in both splits stops the study."""
    example = Example("sst2", "A prompt", " positive")
    held_out = Example("sst2", "a  PROMPT", " negative")
    with pytest.raises(UserError, match=held_out.example_id):
        check_leaks([example], [held_out])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x", "label": 0}] * 3, r"lacks the columns \['sentence'\]"),
        (
            [{"sentence": "x", "label": 7}] * 3,
            "no row can be used; .*row 0 .*'label' must be a whole number from 0 to 1, not 7",
        ),
        ([{"sentence": None, "label": None}] * 3, "no row can be used"),
    ],
)
def test_unusable_data_are_named(tmp_path, tokenizers, rows, message):
    """Missing columns and wrong labels are said with the file, not trained on."""
    with pytest.raises(UserError, match=message):
        build_corpus(local(tmp_path, rows, 2), tokenizers)


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        ("sst2", {"sentence": "a gem .", "label": 1}, "sentence"),
        ("mmlu", {"question": "1+1?", "subject": "", "choices": ["1", "2", "3", "4"], "answer": 1}, "question"),
        ("gsm8k", {"question": "How many?", "answer": "#### 4"}, "question"),
        ("gsm8k", {"question": "How many?", "answer": "#### 4"}, "answer"),
        ("sentiment", {"sentence": "good", "label": 1}, "sentence"),
        ("quiz", {"question": "Which?", "choices": ["1", "2", "3", "4"], "answer": 1}, "question"),
        ("arithmetic", {"question": "How many?", "answer": "#### 4"}, "question"),
    ],
)
def test_no_row_is_read_as_the_word_none(task, row, column):
    """A null is no text to train on."""
    assert get_task(task).build(row)
    for nothing in (None, " "):
        with pytest.raises(ValueError, match=f"column '{column}' is empty"):
            get_task(task).build({**row, column: nothing})


def test_no_choice_is_read_as_the_word_none():
    """Nor is a null an option to choose, in a registered task or in one of columns."""
    row = {"question": "1+1?", "subject": "", "choices": ["1", None, "3", "4"], "answer": 0}
    with pytest.raises(ValueError, match="each must be text"):
        get_task("mmlu").build(row)
    columns = TaskColumns(choice=ChoiceColumns(prompt="{question}", choices="choices", label="answer"))
    with pytest.raises(ValueError, match="column 'choices' is empty or not text: None"):
        get_task("own", columns).build(row)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"sst3": TaskData(dataset="builtin", examples=5)}, r"corpus.tasks.sst3: unknown task"),
        ({"sst2": TaskData(dataset="builtin", examples=5)}, "no built-in rows"),
        ({"sst2": TaskData(dataset="/no/such/folder", examples=5)}, "'/no/such/folder' is not there; give a"),
    ],
)
def test_unknown_sources_are_named(tasks, message, tokenizers):
    """A task, or a data set, that is not there."""
    with pytest.raises(UserError, match=message):
        build_corpus(Corpus(tasks=tasks), tokenizers)


@pytest.mark.parametrize(
    "name",
    [
        "data.xlsx",
        "there.yaml",
        "there.txt",
        "there",
        "sub/data.feather",
        "/no/rows",
        "./rows",
        "../rows",
        "~/rows",
    ],
)
def test_a_file_that_is_not_read_is_never_looked_up(tmp_path, tokenizers, monkeypatch, name):
    """What can only be a file, or is one of another kind, is no name on the hub; the message says what is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)
    for there in ("there.yaml", "there.txt", "there"):
        (tmp_path / there).write_text("sentence,label")
    settings = Corpus(tasks={"sst2": TaskData(dataset=name, examples=5)})
    with pytest.raises(
        UserError, match=r"corpus.tasks.sst2.dataset: .* give a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`"
    ):
        build_corpus(settings, tokenizers)


def test_a_table_is_read_as_it_is_now(tmp_path, tokenizers, monkeypatch):
    """Rewritten with its old modification time (`cp -p`, `rsync -a`), in any folder, with any columns beside."""
    monkeypatch.setattr("datasets.load_dataset", None)  # whose cache goes by the time
    folder = tmp_path / "a [b] *?" / "x=1"
    folder.mkdir(parents=True)
    settings = local(folder, ROWS, 40)
    build_corpus(settings, tokenizers)
    file = folder / "sst2" / "train.parquet"
    before = file.stat()
    local(folder, [{**row, "sentence": f"play number {row['idx']}", "other.sentence": {"a": [1]}} for row in ROWS], 40)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert all(example.prompt.startswith("play number") for example in build_corpus(settings, tokenizers).all)


def test_rows_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    """What is read is what is digested: a corpus never bears the digest of other rows."""
    lines = [json.dumps({"sentence": f"film number {n}", "label": n % 2}) for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    tasks = json.dumps({"sst2": {"dataset": str(tmp_path / "rows.jsonl"), "examples": 10}})
    given = [
        f"paths.results={tmp_path / 'results'}",
        f"corpus.tasks={tasks}",
        "analysis={}",
        "evaluation.test_splits={}",
    ]

    def build(*arguments):
        built = build_corpus(*arguments)
        (tmp_path / "rows.jsonl").write_text("\n".join(lines[1:]))
        return built

    monkeypatch.setattr("stillroom.experiment.sources.build_corpus", build)
    with pytest.raises(UserError, match="changed while it was read"):
        _ = Sources(load_study("quickstart", given)).examples
    assert not (tmp_path / "results" / "corpus" / "corpus.json").exists()


@pytest.mark.parametrize(
    ("normaliser", "choices", "message"),
    [
        (
            normalizers.Replace(" nothing", ""),
            ["dog", "nothing", "fox"],
            "the choice ' nothing' has no token of its own",
        ),
        (normalizers.Lowercase(), ["dog", "fox", "Dog"], "the choice ' Dog' has the same tokens as ' dog'"),
    ],
    ids=["none", "same"],
)
def test_a_choice_without_tokens_of_its_own_is_refused(
    tmp_path, teacher_ref, student_ref, normaliser, choices, message
):
    """It would have the score 0, which is the highest, or that of another choice; under any tokenizer, by name."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"x": f"number {n}", "y": n % 2}) for n in range(8)))
    columns = ChoiceColumns(prompt="{x}:", choices=choices, label="y")
    settings = Corpus(tasks={"own": TaskData(dataset=str(file), examples=6, choice=columns)})
    plain, strange = load_tokenizer(teacher_ref), load_tokenizer(student_ref)
    assert build_corpus(settings, [plain, strange])
    before = strange.backend_tokenizer.normalizer
    normalisers = [normaliser] if before is None else [normaliser, before]
    strange.backend_tokenizer.normalizer = normalizers.Sequence(normalisers)
    name = re.escape(f"{message} under the tokenizer of {student_ref.model}")
    with pytest.raises(UserError, match=f"corpus.tasks.own: {name}"):
        build_corpus(settings, [plain, strange])
    test = {"own": settings.tasks["own"]}
    with pytest.raises(UserError, match=f"evaluation.test_splits.own: {name}"):
        with_test_splits(Examples([], [], {}), test, settings, [plain, strange], 256)


def test_a_missing_split_lists_those_there_are(tmp_path, tokenizers):
    """A local directory without the asked split."""
    settings = local(tmp_path, ROWS, 4)
    data = settings.tasks["sst2"].model_copy(update={"split": "test"})
    with pytest.raises(UserError, match=r"test.parquet is missing; splits there: train"):
        build_corpus(settings.model_copy(update={"tasks": {"sst2": data}}), tokenizers)


def with_validation(tmp_path, settings, rows, examples, tokenizers, max_length=256):
    """The corpus of `settings` with a test split of these rows, in the same folder."""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sst2" / "validation.parquet")
    split = BenchmarkSplit(split="validation", examples=examples).data(settings.tasks["sst2"])
    return with_test_splits(build_corpus(settings, tokenizers), {"sst2": split}, settings, tokenizers, max_length)


def test_the_test_examples_in_the_corpus_are_dropped_and_counted(tmp_path, tokenizers):
    """Whatever their white space and case; those too long for the models too; duplicates stay; the rest is all used."""
    settings = local(tmp_path, ROWS, 40)
    rows = [
        {"sentence": "Film   NUMBER 7", "label": 0},
        {"sentence": "film number 8", "label": 1},
        {"sentence": "long " * 300, "label": 0},
        *[{"sentence": f"a new film, number {n}", "label": n % 2} for n in range(20)],
        {"sentence": "a new film, number 3", "label": 1},
    ]
    built = with_validation(tmp_path, settings, rows, len(rows), tokenizers)
    counts = {"used": 21, "source_rows": 24, "unusable": 0, "in_corpus": 2, "too_long": 1}
    assert built.test_counts == {"sst2": counts}
    assert sorted(e.prompt.split("\n")[0] for e in built.test) == sorted(r["sentence"] for r in rows[3:])
    assert built.all == build_corpus(settings, tokenizers).all
    some = with_validation(tmp_path, settings, rows, 10, tokenizers).test
    assert some == built.test[:10]


def test_a_test_split_that_cannot_be_used_is_named(tmp_path, tokenizers):
    """Too few rows, nothing but the corpus again, no such file: by the field."""
    settings = local(tmp_path, ROWS, 40)
    with pytest.raises(UserError, match=r"evaluation.test_splits.sst2.examples: 9 asked for, but the split has 3 rows"):
        with_validation(tmp_path, settings, ROWS[:3], 9, tokenizers)
    with pytest.raises(UserError, match=r"evaluation.test_splits.sst2: no example .* can be used .*'in_corpus': 3"):
        with_validation(tmp_path, settings, ROWS[:3], 3, tokenizers)
    absent = BenchmarkSplit(examples=3).data(settings.tasks["sst2"])
    with pytest.raises(
        UserError, match=r"evaluation.test_splits.sst2: .*test.parquet is missing; splits there: train, v"
    ):
        with_test_splits(build_corpus(settings, tokenizers), {"sst2": absent}, settings, tokenizers, 256)


def test_built_in_test_examples_are_others_than_the_corpus(corpus_settings, examples, tokenizers):
    """They are drawn again, and those that fall together with the corpus are dropped."""
    splits = {name: BenchmarkSplit(examples=50).data(data) for name, data in corpus_settings.tasks.items()}
    built = with_test_splits(examples, splits, corpus_settings, tokenizers, 128)
    assert {name: count["used"] for name, count in built.test_counts.items()} == dict.fromkeys(splits, 50)
    assert not {folded(e.prompt) for e in built.test} & {folded(e.prompt) for e in built.all}
    assert all(count["in_corpus"] < corpus_settings.tasks[n].examples / 2 for n, count in built.test_counts.items())


def test_a_saved_corpus_is_the_same_corpus(tmp_path, examples):
    """What trials read is what was built."""
    counts = {"quiz": {"used": 3}}
    examples = replace(examples, test=examples.validation[:3], test_counts=counts)
    save_corpus(examples, tmp_path, "f")
    loaded, fingerprint = load_corpus(tmp_path)
    assert (loaded, fingerprint) == (examples, "f")


def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path):
    """U+2028 and U+0085 may stand within a JSON string; some languages' line ends are not JSON Lines'."""
    rows = [{"question": "one\u2028two\u0085three", "answer": "x"}, {"question": "plain", "answer": "y"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), newline="")
    assert list(read_lines(file)) == rows


@pytest.mark.slow
def test_processes_that_start_together_build_one_corpus(tmp_path, monkeypatch):
    """As the parts of a divided capture do: the models and the corpus are written by one, read by the other."""
    built = []

    def slowly(*arguments):
        built.append(1)
        time.sleep(0.5)
        return build_corpus(*arguments)

    monkeypatch.setattr("stillroom.experiment.sources.build_corpus", slowly)
    study = load_study("quickstart", [f"paths.results={tmp_path}"])
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda sources: sources.examples.all, [Sources(study), Sources(study)])
    assert first == second
    assert len(built) == 1


def test_a_limit_beyond_what_a_model_reads_is_refused(tmp_path):
    """A longer text would run past a model's positions, in silence or with a device's assertion."""
    from stillroom.experiment.workspace import Workspace
    from stillroom.studies import load_study

    study = load_study("quickstart", ["corpus.max_length=100000", f"paths.results={tmp_path}"])
    with pytest.raises(UserError, match=r"corpus.max_length=100000: a model reads \d+ tokens at most"):
        _ = Workspace(study).examples


@pytest.mark.slow
def test_prompts_leave_room_for_what_is_generated(tmp_path):
    """A model with learned positions would fail in mid-sweep, another go on in silence."""
    few = [f"corpus.tasks.{task}.examples=60" for task in ("sentiment", "quiz", "arithmetic")]
    fits = Sources(load_study("quickstart", [*few, f"paths.results={tmp_path}"]))
    context, longest = (
        fits._context,
        max(
            len(encoding)
            for tokenizer in fits.tokenizers
            for encoding in encode_many(tokenizer, [e.prompt for e in fits.examples.validation if e.choices is None])
        ),
    )
    for more, fine in ((0, True), (1, False)):
        limit = f"evaluation.max_new_tokens={context - longest + more}"
        changed = [*few, f"paths.results={tmp_path}", limit, "evaluation.test_splits={}"]
        sources = Sources(load_study("quickstart", changed))
        if fine:
            assert sources.examples.validation == fits.examples.validation
        else:
            with pytest.raises(UserError, match=f"{limit}: with a prompt of {longest} tokens that is more than the"):
                _ = sources.examples


def test_a_text_that_fits_only_without_its_eos_is_too_long(tmp_path, tokenizers):
    """What is counted is what is trained on."""
    built = build_corpus(local(tmp_path, ROWS, 40), tokenizers)
    longest = max(len(encode(t, example.text, add_eos=True)) for t in tokenizers for example in built.all)
    assert build_corpus(local(tmp_path, ROWS, 40, max_length=longest), tokenizers).counts["sst2"]["too_long"] == 0
    with pytest.raises(UserError, match="'too_long'"):
        build_corpus(local(tmp_path, ROWS, 40, max_length=longest - 1), tokenizers)


def test_another_sample_seed_draws_other_examples(tmp_path, tokenizers):
    """Which of the rows there are is the seed's choice, and no one else's."""
    ids = [
        {e.example_id for e in build_corpus(local(tmp_path, ROWS, 10, sample_seed=seed), tokenizers).all}
        for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_a_corpus_with_a_leak_is_not_built(tmp_path, tokenizers, monkeypatch):
    """The check is made of what was built, whatever the split did."""
    monkeypatch.setattr("stillroom.data.corpus.split", lambda chosen, share, seed: (chosen, chosen[:1]))
    with pytest.raises(UserError, match="is in training and held-out data"):
        build_corpus(local(tmp_path, ROWS, 10), tokenizers)


def test_a_damaged_corpus_is_refused(tmp_path, examples):
    """No flipped bit is read, in names of columns or anywhere: a prompt may not change between two trials."""
    save_corpus(examples, tmp_path, "f")
    path = tmp_path / "corpus.parquet"
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="cannot be read: its bytes are not those that were written; delete"):
            load_corpus(tmp_path)
    path.write_bytes(whole)
    assert load_corpus(tmp_path)[0].all == examples.all
