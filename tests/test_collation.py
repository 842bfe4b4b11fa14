"""A batch on its way to a device."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from stillroom.batches import prepare
from stillroom.collation import Collator, teacher_to_student_ids
from stillroom.config import ModelRef, Objective
from stillroom.losses import Outcomes
from stillroom.models import load_tokenizer


def test_every_tensor_of_a_batch_moves_but_the_rows_that_the_host_cuts(student_ref, store, examples):
    """A tensor left behind would stop a GPU's first step; outcome rows on the GPU would stop every chunk of it."""
    tokenizer = load_tokenizer(student_ref)
    teacher_tokenizer = load_tokenizer(ModelRef(model=str(store.path / "tokenizer")))
    mapped = teacher_to_student_ids(teacher_tokenizer, tokenizer, store.manifest["vocabulary"], len(tokenizer))
    objective = Objective()
    batch = Collator(store, objective, mapped)(prepare(examples.train[:6], tokenizer, store, objective))
    moved = batch.to(torch.device("meta"))
    for field in fields(batch):
        value = getattr(moved, field.name)
        if isinstance(value, Tensor):
            assert value.device.type == "meta", field.name
        elif isinstance(value, Outcomes):
            assert {f.name: getattr(value, f.name).device.type for f in fields(value)} == {
                f.name: "cpu" if f.name == "rows" else "meta" for f in fields(value)
            }
        else:
            assert value == getattr(batch, field.name), field.name
    assert isinstance(moved.outcomes, Outcomes)
    assert batch.to(torch.device("cpu")) is batch
