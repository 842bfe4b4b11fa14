"""LoRA students: what peft reads of them is what was trained, and what cannot be adapted is refused by name."""

from __future__ import annotations

import sys

import pytest
import torch
from pydantic import ValidationError

from setups import numbers, run
from small_things import STUDENT_SHAPE, write_model
from stillroom.config import Lora, ModelRef, Student
from stillroom.errors import UserError
from stillroom.models.adapters import ADAPTER, lora_adapter, without_adapters, write_peft_folder
from stillroom.models.hub import load_model


def test_peft_reads_from_an_export_what_the_checkpoint_has_merged(tmp_path, student_ref, store, examples):
    """Both ways out of a trial are one model; only LoRA layers and the projector were trained."""
    few = type(examples)(examples.train[:16], examples.validation[:4], examples.counts)
    lora = Lora(rank=4, alpha=8, targets=("q_proj", "down_proj"))
    run(tmp_path / "trial", student_ref, store, few, "hidden", adapter=lora_adapter(lora), epochs=1)
    checkpoint = tmp_path / "trial" / "checkpoint_1"
    from peft import PeftModel

    write_peft_folder(checkpoint / ADAPTER, tmp_path / "adapter", student_ref.model, None)
    base, whole = load_model(student_ref), load_model(ModelRef(model=str(checkpoint)))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        alone, expected = base(ids).logits, whole(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(alone, expected, atol=1e-3)
    before, after = load_model(student_ref).state_dict(), whole.state_dict()
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"q_proj", "down_proj"}


@pytest.mark.slow
def test_a_stopped_lora_trial_ends_with_the_numbers_of_an_unstopped_one(tmp_path, student_ref, store, examples):
    """Its layers and their moments are in the checkpoint; gradients that are recomputed change nothing."""
    lora, stopped = lora_adapter(Lora(rank=4)), RuntimeError("stop")

    def stop(metrics):
        raise stopped

    whole = run(tmp_path / "whole", student_ref, store, examples, adapter=lora)
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", student_ref, store, examples, adapter=lora, report=stop)
    assert numbers(run(tmp_path / "cut", student_ref, store, examples, adapter=lora)) == numbers(whole)
    again = run(tmp_path / "again", student_ref, store, examples, adapter=lora, gradient_checkpointing=True)
    assert numbers(again) == numbers(whole)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_porj",), r"student.lora.targets: \['q_porj'\].*linear layers of LlamaForCausalLM: .*q_proj"),
        (("lm_head",), "the embeddings and the output head cannot have LoRA layers"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(tmp_path, tokenizer, targets, message):
    """A misspelt layer, and the head, whose loss is taken without its module."""
    ref = write_model(tmp_path / "model", tokenizer, STUDENT_SHAPE, 2)
    with pytest.raises(UserError, match=message):
        lora_adapter(Lora(targets=targets))(load_model(ref))


def test_a_student_without_lora_is_the_student_it_was():
    """Its section says of itself what it said before there was LoRA, so older studies keep their trials."""
    assert Student(model="x").model_dump() == {"model": "x", "revision": None, "trust_remote_code": False}
    assert Student(model="x", lora={}).model_dump()["lora"] == {"rank": 16, "alpha": 32, "targets": "all-linear"}
    with pytest.raises(ValidationError):
        Student(model="x", lora={"rank": 0})


def test_a_model_without_them_needs_no_peft(model, monkeypatch):
    """Importing it takes over a second where bitsandbytes is installed; every trial waited for that."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert without_adapters(model) is model
