"""A teacher whose weights are in 8 or 4 bits: a teacher of its own, captured as it is, with the real library."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from small_things import write_model
from stillroom.config import ModelRef, Signals
from stillroom.errors import UserError
from stillroom.experiment.sources import Sources
from stillroom.models.architecture import check_model
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.offline_teacher_data import capture, made_from, verify_saved_data
from stillroom.offline_teacher_data.recomputation import recompute
from stillroom.preflight import doctor
from stillroom.preflight.planning import plan_study
from stillroom.studies import load_study

FEW = ["corpus.tasks={quiz: {dataset: builtin, examples: 20}}", "evaluation.test_splits={}", "analysis={}"]
FEW += ["teacher.fine_tune.method=none"]
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def wide(tmp_path, byte_level):
    """A teacher whose layers are as wide as 4-bit kernels need."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    return write_model(tmp_path / "wide", byte_level, SHAPE, 1)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_teacher_is_captured_as_it_is(wide, examples, tmp_path, quantization):
    """Its store passes the gate, a new pass gives it back, and it is not the whole teacher's, but near it."""
    model, tokenizer = load_model(wide, "float32", "auto", quantization), load_tokenizer(wide)
    assert "Linear" in type(model.model.layers[0].mlp.up_proj).__name__
    assert type(model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    signals = Signals(top_k=32, dtype="float32", shard_examples=16, batch_tokens=512)
    origin = made_from("wide", "float32", tokenizer, signals, examples.all)
    store = capture(model, tokenizer, examples.all, signals, tmp_path / "store", origin)
    verify_saved_data(store.path)
    ids = list(store.index)[:4]
    recompute(store, load_model(wide, "float32", "auto", quantization), ids)
    with pytest.raises(UserError, match="the store is not this teacher's"):
        recompute(store, load_model(wide), ids)


@pytest.mark.slow
def test_later_text_changes_no_signal_in_8_bits(wide):
    """The library's default chooses whole columns by all tokens of a batch; the check would refuse such a teacher."""
    ids = torch.arange(3, 40)[None]
    check_model(load_model(wide, "float32", "auto", "8bit"), ids)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    default = AutoModelForCausalLM.from_pretrained(wide.model, dtype=torch.float32, quantization_config=settings)
    with pytest.raises(UserError, match="is not supported"):
        check_model(default.eval(), ids)


def test_it_is_part_of_the_teachers_identity_and_of_the_plan(teacher_ref, student_ref):
    """Another teacher, another store, less memory; a student is never quantised."""
    pair = [f"teacher.model={teacher_ref.model}", f"student.model={student_ref.model}", *FEW]
    whole, eight, four = (
        load_study("quickstart", [*pair, *more])
        for more in ([], ["teacher.quantization=8bit"], ["teacher.quantization=4bit"])
    )
    names = {Sources(study).teacher_identity for study in (whole, eight, four)}
    assert len(names) == 3
    assert whole.teacher.model_dump() == load_study("quickstart", pair).teacher.model_dump()
    sizes = [plan_study(study)["memory_bytes"]["capture"] for study in (four, eight, whole)]
    assert sizes == sorted(sizes)
    with pytest.raises(UserError, match=r"student.quantization: unknown key"):
        load_study("quickstart", ["student.quantization=4bit"])


def test_without_the_library_it_is_refused_beforehand(monkeypatch, teacher_ref):
    """By the doctor and before a model is loaded, with the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    study = load_study("quickstart", [f"teacher.model={teacher_ref.model}", "teacher.quantization=4bit"])
    found = next(line for line in doctor._models(study) if line.subject == "quantization")
    assert not found.fine
    assert "pip install bitsandbytes" in found.says
    with pytest.raises(UserError, match="pip install bitsandbytes, or leave the field out"):
        load_model(ModelRef(model=teacher_ref.model), "float32", None, "4bit")
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        Sources(study).require_supported()
