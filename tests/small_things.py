"""Small real things that the tests share: two tokenizers, two models, a store; made once a run."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import typer
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import shapes  # noqa: F401  # before the package
from stillroom.config import Corpus, ModelRef, Signals, TaskData
from stillroom.data.corpus import Examples, build_corpus
from stillroom.data.tasks import TASKS
from stillroom.models.builtin_pair import byte_level_tokenizer, sentencepiece_tokenizer
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.offline_teacher_data import capture, made_from, verify_saved_data

# a hundred tests call the command line, and to build it takes longer than most of them
typer.main.get_command = functools.cache(typer.main.get_command)

SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL_MODELS = Path(__file__).resolve().parents[1] / ".cache" / "models"

TEACHER_SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
STUDENT_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def texts(count=300):
    """Text of the built-in tasks, with a few characters that need byte fallback."""
    rows = [
        TASKS[name].build(r).text
        for name in ("sentiment", "quiz", "arithmetic")
        for r in TASKS[name].generate_rows(5, count)
    ]
    return [*rows, "naïve café – 漢字 👩‍👩‍👧"]


def write_model(folder, tokenizer, shape, seed):
    """A small random Llama with weights large enough for its attention to differ from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)  # so that hidden states' mean square is not just 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelRef(model=str(folder))


@pytest.fixture(scope="session")
def byte_level():
    """A small byte-level BPE tokenizer (GPT-2's family), no BOS."""
    return byte_level_tokenizer(texts(), 400)


@pytest.fixture(scope="session")
def sentencepiece():
    """A small SentencePiece-style tokenizer (Llama's family), BOS and byte fallback."""
    return sentencepiece_tokenizer(texts(), 420)


@pytest.fixture(scope="session")
def teacher_ref(tmp_path_factory, byte_level):
    """A teacher on disk."""
    return write_model(tmp_path_factory.mktemp("teacher"), byte_level, TEACHER_SHAPE, 1)


@pytest.fixture(scope="session")
def student_ref(tmp_path_factory, sentencepiece):
    """A student on disk: another tokenizer, width, depth and head count."""
    return write_model(tmp_path_factory.mktemp("student"), sentencepiece, STUDENT_SHAPE, 2)


@pytest.fixture(scope="session")
def same_tokenizer(tmp_path_factory, byte_level):
    """A student with the teacher's tokenizer, of another width."""
    return write_model(tmp_path_factory.mktemp("same"), byte_level, STUDENT_SHAPE, 9)


@pytest.fixture(scope="session")
def model(student_ref):
    """The student before training; tests that change a model load their own."""
    return load_model(student_ref)


@pytest.fixture(scope="session")
def tokenizer(student_ref):
    """The student's tokenizer."""
    return load_tokenizer(student_ref)


@pytest.fixture(scope="session")
def corpus_settings():
    """Three built-in tasks, a few examples each."""
    return Corpus(
        tasks={name: TaskData(dataset="builtin", examples=20) for name in ("sentiment", "quiz", "arithmetic")},
        max_length=128,
    )


@pytest.fixture(scope="session")
def examples(corpus_settings, teacher_ref, student_ref) -> Examples:
    """The examples of those tasks."""
    return build_corpus(corpus_settings, [load_tokenizer(teacher_ref), load_tokenizer(student_ref)])


def make_store(folder, ref, examples, **settings):
    """Capture and verify a store of the given model."""
    tokenizer, model = load_tokenizer(ref), load_model(ref)
    signals = Signals(**{"top_k": 32, "dtype": "float32", "shard_examples": 16, "batch_tokens": 512, **settings})
    origin = made_from(ref.model, "float32", tokenizer, signals, examples.all)
    store = capture(model, tokenizer, examples.all, signals, folder, origin)
    verify_saved_data(folder)
    return store


@pytest.fixture(scope="session")
def store(tmp_path_factory, teacher_ref, examples):
    """The teacher's store, float32, verified."""
    return make_store(tmp_path_factory.mktemp("store") / "data", teacher_ref, examples)


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory, teacher_ref, student_ref):
    """A study of two groups, one seed, trained without Ray to a report; for looking at, not for changing."""
    from studies import reported

    folder = tmp_path_factory.mktemp("study")
    tasks = {name: {"dataset": "builtin", "examples": 30} for name in ("sentiment", "quiz", "arithmetic")}
    study = {
        "name": "tiny",
        "teacher": {"model": teacher_ref.model, "dtype": "float32"},
        "student": {"model": student_ref.model},
        "corpus": {"tasks": tasks, "max_length": 128},
        "signals": {"top_k": 32, "dtype": "float32", "minimum_coverage": 0.0},
        "groups": ["task_only", "combined"],
        "training": {"epochs": 2, "precision": "float32", "gradient_interval": 4, "learning_rate": 3e-3},
        "evaluation": {"max_new_tokens": 8},
        "sweep": {"seeds": [0], "cpus_per_trial": 1},
        "paths": {"store": str(folder / "offline_teacher_data"), "results": str(folder / "results")},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(study))
    return reported(str(folder / "tiny.yaml"), "task_only", "combined")


@pytest.fixture
def quick_sweeps(monkeypatch):
    """Sweeps on this machine start without eight seconds of imports; `test_local_sweep.py` starts them as they are."""
    import warm_start
    from stillroom.experiment import local_worker

    monkeypatch.setattr(local_worker, "subprocess", warm_start.subprocesses(warm_start.address()))


@pytest.fixture
def quick_pictures():
    """Reports whose figures are drawn, but not rendered to files, which takes ten seconds a report."""
    from synthetic import quick_reports

    with quick_reports():
        yield


def real_tokenizer(name):
    """A real tokenizer by folder name, or a skip that says where it was looked for."""
    for folder in (SHARED / "models" / name, REAL_MODELS / name):
        if (folder / "tokenizer.json").is_file():
            return load_tokenizer(ModelRef(model=str(folder)))
    return pytest.skip(f"needs the tokenizer of {name} in .cache/models: docs/how-to/offline.md downloads it")


def real_data():
    """The folder of SST-2, MMLU and GSM8K, or a skip that says where they were looked for."""
    for folder in (SHARED / "data", Path(__file__).resolve().parents[1] / "data"):
        if all((folder / task).is_dir() for task in ("sst2", "mmlu", "gsm8k")):
            return folder
    return pytest.skip("needs SST-2, MMLU and GSM8K in data: docs/how-to/offline.md downloads them")


@pytest.fixture(scope="session")
def tokenizers(teacher_ref, student_ref):
    """The test pair's."""
    return [load_tokenizer(teacher_ref), load_tokenizer(student_ref)]


@pytest.fixture(scope="session")
def some(examples):
    """Two of each built-in task."""
    return [examples.train[n] for n in (0, 1, 20, 21, 40, 41)]
