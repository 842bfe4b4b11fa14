"""Layers that are computed again in the backward pass: the same gradients, dropout, maps and all."""

from __future__ import annotations

import pytest
import torch

from setups import ALL, Setup, changed
from small_things import make_store
from stillroom.config import ModelRef
from stillroom.errors import UserError
from stillroom.models.attention_capture import recompute_layers
from stillroom.models.hub import load_model
from stillroom.training.train_student import seed_step

LAYERS = {"hidden_layers": (1, "last"), "attention_layers": (1, "last"), "value_layers": (2,)}
EVERY = changed(
    ALL,
    hidden={"layers": ((1, 1), ("last", "last"))},
    attention={"layers": ((1, 1), ("last", "last"))},
    values={"weight": 1.0, "layers": ((2, 2),)},
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory, teacher_ref, examples):
    """A store with everything that a group can ask for."""
    return make_store(tmp_path_factory.mktemp("deep"), teacher_ref, examples, **LAYERS)


def gradients(student_ref, store, some, recompute, precision, terms):
    """Of one training step with dropout in two micro-batches, and how often the first block's MLP ran."""
    setup = Setup(student_ref, store, terms, precision=precision)
    model, ran = setup.student.model, []
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    mlp = model.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Dropout(0.2))
    mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    if recompute:
        recompute_layers(model)
    setup.student.train()
    seed_step(3, 7)
    losses, gradient = setup.step(some, [0, 3, 6])
    return losses, gradient, len(ran)


@pytest.mark.parametrize(
    ("precision", "terms"),
    [("float32", EVERY), ("bfloat16", EVERY), ("float32", changed(ALL, attention={"weight": 0.0}))],
)
def test_layers_computed_again_give_the_same_gradients(student_ref, deep, some, precision, terms):
    """To the bit, with dropout on, maps, values and inner layers among what is compared; and each is run twice."""
    kept = gradients(student_ref, deep, some, False, precision, terms)
    again = gradients(student_ref, deep, some, True, precision, terms)
    assert (kept[2], again[2]) == (2, 4)
    assert kept[0] == again[0]
    assert kept[1].keys() == again[1].keys()
    for name, maps in kept[1].items():
        assert torch.equal(maps, again[1][name]), name


def test_the_models_attention_is_its_own_again_afterwards(student_ref, deep, some):
    """What the backward pass exchanges, it puts back."""
    setup = Setup(student_ref, deep, EVERY)
    before = setup.student.model.config._attn_implementation
    recompute_layers(setup.student.model)
    setup.student.train()
    setup.step(some)
    assert setup.student.model.config._attn_implementation == before


def test_an_architecture_that_cannot_is_refused_by_name(student_ref):
    """Better than a trial that takes the memory it was to spare."""
    model = load_model(ModelRef(model=student_ref.model))
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match=r"LlamaForCausalLM: .* leave out training.gradient_checkpointing"):
        recompute_layers(model)
