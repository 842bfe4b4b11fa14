"""Memory does not grow with the corpus: six times the examples take little more."""

from __future__ import annotations

import sys

import pytest

from processes import start
from ratios import PeakMemory
from small_things import make_store
from stillroom.config import GROUPS, Corpus, Evaluation, Objective, TaskData, Training
from stillroom.data.corpus import build_corpus
from stillroom.files import read_json, write_json
from stillroom.models.hub import load_tokenizer
from stillroom.training.train_student import Trial, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="a process's own memory as Linux accounts for it"),
]

SIGNALS = {"top_k": 390, "shard_examples": 32, "batch_tokens": 512}


def work(folder, teacher, student, count):
    """In a process of its own: capture so many examples, train on them, and write down what either took."""
    corpus = Corpus(tasks={"arithmetic": TaskData(dataset="builtin", examples=count)}, max_length=64)
    examples = build_corpus(corpus, [load_tokenizer(teacher), load_tokenizer(student)])
    with PeakMemory() as captured:
        store = make_store(folder / "store", teacher, examples, **SIGNALS)
    settings = Training(epochs=1, precision="float32"), Objective(), Evaluation(max_new_tokens=4, batch_tokens=1024)
    with PeakMemory() as trained:
        train(Trial("0", GROUPS["combined"], 0), student, *settings, examples, store.path, folder / "trial")
    stored = sum(shard["bytes"] for shard in store.manifest["shards"])
    write_json(folder / "peaks.json", {"capture": captured.bytes, "train": trained.bytes, "store": stored})


def test_six_times_the_examples_take_little_more_memory(tmp_path, teacher_ref, student_ref):
    """Capturing and training hold a bounded number of batches, and 13 kB an example: tokens, and Parquet's footers."""
    found = {}
    for count in (100, 600):
        (tmp_path / str(count)).mkdir()
        running = start(tmp_path / f"log{count}", work, tmp_path / str(count), teacher_ref, student_ref, count)
        assert running.end() == 0, running.output
        found[count] = read_json(tmp_path / str(count) / "peaks.json")
    grown = {name: found[600][name] - found[100][name] for name in found[100]}
    assert grown["store"] > 30e6
    assert grown["capture"] < grown["store"] / 3, found
    assert grown["train"] < grown["store"] / 3, found
