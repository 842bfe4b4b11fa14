"""Distances of hidden states and of attention maps: by loops in float64, and everything they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from setups import ALL, Setup, changed, dense
from small_things import make_store
from stillroom.config import Group
from stillroom.errors import UserError
from stillroom.studies import load_study
from stillroom.terms.attention_maps import row_divergence
from stillroom.terms.distances import DISTANCES

NAMES = [name for name in DISTANCES if name != "mse"]


@pytest.fixture(scope="module")
def some(examples):
    """Examples of all three tasks, of different lengths."""
    return [examples.train[n] for n in (0, 1, 20, 21, 40, 41)]


def expected_hidden(setup, student_ref, teacher_ref, some, name):
    """The mean of a distance by `reference`."""
    weight = bias = None
    if "hidden" in setup.student.trained:
        projector = setup.student.trained["hidden"]
        weight, bias = projector.weight.detach().double().numpy(), projector.bias.detach().double().numpy()
    total = count = 0
    for example in some:
        teacher, student = dense(teacher_ref, example.text), dense(student_ref, example.text, add_eos=True)
        added, counted = reference.hidden_distance(teacher, student, name, weight, bias)
        total, count = total + added, count + counted
    return total / count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pair", ["different", "same"])
def test_every_hidden_distance_equals_the_reference(pair, name, student_ref, same_tokenizer, teacher_ref, store, some):
    """On a pair with different tokenizers, and on one with the same."""
    ref = student_ref if pair == "different" else same_tokenizer
    setup = Setup(ref, store, changed(hidden={"distance": name}))
    assert ("hidden" in setup.student.trained) == (name == "cosine")
    expected = expected_hidden(setup, ref, teacher_ref, some, name)
    assert setup.step(some)[0]["hidden_loss"] == pytest.approx(expected, rel=5e-5, abs=1e-6)


@pytest.mark.parametrize("pair", ["different", "same"])
def test_attentions_divergence_equals_the_reference(pair, student_ref, same_tokenizer, teacher_ref, store, some):
    """KL of each row over segments, mean over rows and heads."""
    ref = student_ref if pair == "different" else same_tokenizer
    rows = [
        value
        for example in some
        for value in reference.attention_divergences(
            dense(teacher_ref, example.text), dense(ref, example.text, add_eos=True)
        )
    ]
    found = Setup(ref, store, changed(attention={"distance": "kl"})).step(some)[0]
    assert found["attention_loss"] == pytest.approx(np.mean(rows), rel=5e-5)


@pytest.mark.parametrize(("term", "name"), [*(("hidden", name) for name in NAMES), ("attention", "kl")])
def test_how_a_step_is_cut_or_ordered_changes_no_distance(term, name, student_ref, store, some):
    """Micro-batches, order and padding: the sum over examples is divided once."""
    setup = Setup(student_ref, store, changed(**{term: {"distance": name}}))
    whole, gradient = setup.step(some)
    for way in ((some, [0, 1, 4, 6]), (some[::-1], None)):
        losses, moved = setup.step(*way)
        assert losses[f"{term}_loss"] == pytest.approx(whole[f"{term}_loss"], rel=1e-5)
        for parameter, g in gradient.items():
            assert torch.allclose(moved[parameter], g, rtol=1e-3, atol=1e-6), parameter


@pytest.mark.parametrize(("term", "name"), [*(("hidden", name) for name in NAMES), ("attention", "kl")])
def test_every_distance_moves_the_student(term, name, student_ref, store, some):
    """A term that moved nothing would be a group in name only."""
    weight = "model.model.layers.0.self_attn.q_proj.weight"
    on = Setup(student_ref, store, changed(**{term: {"distance": name, "weight": 10.0}})).step(some)[1][weight]
    off = Setup(student_ref, store, changed(**{term: {"weight": 0.0}})).step(some)[1][weight]
    assert float((on - off).norm() / off.norm()) > 1e-3


@pytest.mark.parametrize(("term", "name"), [*(("hidden", n) for n in ("gram", "cka")), ("attention", "kl")])
def test_a_teacher_as_its_own_student_is_at_no_distance(term, name, tmp_path, teacher_ref, examples, some):
    """Whatever needs no projector is 0 of oneself."""
    store = make_store(tmp_path / "s", teacher_ref, examples)
    found = Setup(teacher_ref, store, changed(**{term: {"distance": name}})).step(some)[0]
    assert found[f"{term}_loss"] == pytest.approx(0.0, abs=2e-6)


@pytest.mark.parametrize("name", ["gram", "cka"])
def test_distances_of_relations_know_no_rotation_and_no_scale(name):
    """They compare how tokens relate, so a rotated or scaled space is the same one; another relation is not."""
    torch.manual_seed(0)
    states, noise = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    distance = DISTANCES[name].of
    assert float(distance(3 * states @ rotation, states)) == pytest.approx(0, abs=1e-12)
    assert float(distance(states + noise, states)) > 0.01
    assert float(distance(states[:1], noise[:1])) == pytest.approx(0, abs=1e-12)


def test_a_row_that_the_student_rules_out_is_far_and_finite():
    """A window may hide what the teacher attends to: its row costs 23 nats, not infinity; padding costs nothing."""
    teacher, student = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    teacher[..., 0, 0], teacher[..., 1, 0], student[..., 0, 0], student[..., 1, 1] = 1, 1, 1, 1
    assert float(row_divergence(student, teacher, torch.tensor([2]))) == pytest.approx(-np.log(1e-10), rel=1e-5)


def test_a_scale_of_another_distance_is_refused_wherever_it_is_set():
    """`teacher_rms` divides a squared difference; a group that changes the distance alone must say so."""
    group = Group(name="x", terms=("task", "hidden"), hidden={"distance": "cosine"})
    assert group.objective(ALL).hidden.distance == "cosine"
    declared = "groups=[{name: x, terms: [task, hidden], hidden: {distance: cka}}]"
    none = ["analysis.primary=[]", "analysis.secondary=[]"]
    with pytest.raises(UserError, match=r"group 'x': hidden: .*scale teacher_rms belongs to mse, and distance is cka"):
        load_study("quickstart", [declared, *none, "objective.hidden.scale=teacher_rms"])
