"""Value relations: by loops in float64, on two tokenizers and one, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import reference
from setups import EVALUATION, TRAINING, Setup, changed, dense
from small_things import STUDENT_SHAPE, make_store, write_model
from stillroom.config import Group, Objective
from stillroom.errors import UserError
from stillroom.models.forward import Taps, forward
from stillroom.models.hub import load_model
from stillroom.models.sizes import value_width
from stillroom.offline_teacher_data import verify_saved_data
from stillroom.offline_teacher_data.recomputation import recompute
from stillroom.studies import load_study
from stillroom.training.train_student import Trial, train

ON = {"weight": 0.1, "relation_heads": 4}


@pytest.fixture(scope="module")
def some(examples):
    """Examples of all three tasks."""
    return [examples.train[n] for n in (0, 20, 40)]


@pytest.fixture(scope="module")
def valued(tmp_path_factory, teacher_ref, examples):
    """A store that keeps value vectors of two layers."""
    return make_store(tmp_path_factory.mktemp("valued") / "data", teacher_ref, examples, value_layers=(1, "last"))


def test_what_is_kept_is_what_the_value_projection_gives(valued, store, teacher_ref, examples):
    """A column a layer, of key-value heads times their width; the gate knows it; other stores are what they were."""
    example = examples.all[0]
    for layer, column in ((1, "values_1"), ("last", "values")):
        expected = dense(teacher_ref, example.text, layer=layer)["values"]
        assert np.allclose(valued.read(example.example_id)[column], expected, atol=2e-5)
    model = load_model(teacher_ref)
    assert valued.layout.value_width == value_width(model.config) == expected.shape[1]
    verify_saved_data(valued.path, 5)
    assert max(recompute(valued, model, list(valued.index)[:3]).values()) < 1e-4
    assert not any(column.startswith("values") for column in store.columns)
    assert "value_layers" not in store.manifest["made_from"]


@pytest.mark.parametrize("pair", ["different", "same"])
def test_value_relations_equal_the_reference(pair, tmp_path, student_ref, teacher_ref, byte_level, valued, some):
    """Pairs of layers, whatever the models' own head counts; and a step's cut changes nothing."""
    ref = student_ref if pair == "different" else write_model(tmp_path, byte_level, STUDENT_SHAPE, 9)
    layers = ((1, "last"), ("last", "last"))
    setup = Setup(ref, valued, changed(values={**ON, "layers": layers}))
    rows = []
    for teacher_layer, student_layer in layers:
        for example in some:
            teacher = dense(teacher_ref, example.text, layer=teacher_layer)
            student = dense(ref, example.text, add_eos=True, layer=student_layer)
            rows += reference.value_divergences(teacher, student, 4)
    for way in ((some, None), (some, [0, 1, 3]), (some[::-1], None)):
        assert setup.step(*way)[0]["values_loss"] == pytest.approx(np.mean(rows), rel=5e-5)


def test_a_teacher_as_its_own_student_has_the_same_relations(teacher_ref, valued, some):
    """0 of oneself, never less; and another student is moved by it."""
    found = Setup(teacher_ref, valued, changed(values=ON)).step(some)[0]
    assert found["values_loss"] == pytest.approx(0.0, abs=1e-7)


def test_value_relations_move_the_student_and_are_off_where_they_are_not_named(student_ref, valued, some):
    """The gradient reaches the value projection of the layer that is compared."""
    weight = "model.model.layers.1.self_attn.v_proj.weight"
    on = Setup(student_ref, valued, changed(values={**ON, "weight": 50.0})).step(some)[1][weight]
    off = Setup(student_ref, valued).step(some)[1][weight]
    assert float((on - off).norm() / off.norm()) > 1e-3


def test_a_pass_keeps_values_without_maps(student_ref):
    """Neither costs the other."""
    model, ids = load_model(student_ref), torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        found = forward(model, ids, Taps(values=frozenset({1})))
    assert found.values[1].shape == (2, 7, value_width(model.config))
    assert not found.attention


def test_a_trial_with_value_relations_trains(tmp_path, student_ref, valued, examples):
    """From a group's settings to its losses and its share of the gradient."""
    group = Group(name="values", terms=("task", "kd", "values"), values={"relation_heads": 4})
    few = examples.__class__(examples.train[:16], examples.validation[:3], examples.counts)
    training = TRAINING.model_copy(update={"epochs": 1})
    result = train(Trial("t", group, 0), student_ref, training, Objective(), EVALUATION, few, valued.path, tmp_path)
    assert result["gradient_shares"]["values"] > 0
    assert result["coverage"]


def test_what_cannot_be_split_or_is_not_kept_is_refused(student_ref, valued):
    """By the field: before a step is taken, or before the teacher runs."""
    with pytest.raises(UserError, match="relation_heads=7 does not divide the teacher's value vectors of 16"):
        Setup(student_ref, valued, changed(values={"weight": 0.1, "relation_heads": 7}))
    declared = "groups=[{name: v, terms: [task, values]}]"
    with pytest.raises(UserError, match=r"teacher's values layer last, which is not among signals.value_layers"):
        load_study("quickstart", [declared, "analysis.primary=[]", "analysis.secondary=[]"])


def test_value_vectors_of_latent_attention_have_their_own_width():
    """DeepSeek's v_head_dim: a store of another width could not be written."""
    config = transformers.DeepseekV3Config(num_attention_heads=4, num_key_value_heads=4, v_head_dim=12)
    assert value_width(config) == 48
