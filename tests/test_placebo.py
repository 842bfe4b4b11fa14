"""Placebos: the same values, in the wrong places, the same for every group of a seed, and nothing else changed."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

import reference
from setups import EVALUATION, TRAINING, Setup, changed, dense
from small_things import STUDENT_SHAPE, make_store, write_model
from stillroom.config import GROUPS, Group, Objective
from stillroom.errors import UserError
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.studies import load_study
from stillroom.terms.placebo import Placebo, aligned_rows, without_fixed_point
from stillroom.training import collation, train_student
from stillroom.training.collation import Collator
from stillroom.training.train_student import Trial, train

TERMS = ("kd", "hidden", "attention", "values")
VALUES = {"weight": 0.1, "relation_heads": 4}


@pytest.fixture(scope="module")
def valued(tmp_path_factory, teacher_ref, examples):
    """A store of every signal."""
    return make_store(tmp_path_factory.mktemp("valued") / "data", teacher_ref, examples, value_layers=("last",))


@pytest.fixture(scope="module")
def same_tokenizer(tmp_path_factory, byte_level):
    """A student with the teacher's tokenizer."""
    return write_model(tmp_path_factory.mktemp("same"), byte_level, STUDENT_SHAPE, 9)


def sources(setup, some, places):
    """Of each example and place, the (example, teacher row) whose hidden state stands there, by its values."""
    items = setup.items(some)
    moved = Placebo(setup.store, items, 0).rows(items, ["hidden"], places)
    real = {e.example_id: setup.store.read(e.example_id, ["hidden"])["hidden"] for e in some}
    known = {row.tobytes(): (name, at) for name, rows in real.items() for at, row in enumerate(rows)}
    found = {}
    for item, example in zip(items, moved, strict=True):
        for at in places(item).tolist():
            found[item.example.example_id, at] = known[example["hidden"][at].tobytes()]
    return found


def test_values_are_moved_within_a_task_and_none_is_lost_or_stays(student_ref, store, some):
    """The same rows, each once, among the aligned tokens of the step's examples of one task; the rest untouched."""
    setup = Setup(student_ref, store)
    found = sources(setup, some, aligned_rows)
    task = {example.example_id: example.task for example in some}
    rows = {e.example_id: store.read(e.example_id, ["hidden"])["hidden"] for e in some}
    before, after = (Counter(rows[name][at].tobytes() for name, at in keys) for keys in (found, found.values()))
    assert before == after
    apart = [key for key, source in found.items() if key != source]
    assert len(apart) > 0.95 * len(found)  # two examples may begin alike: then the values are, too
    assert all(task[key[0]] == task[source[0]] for key, source in found.items())
    assert any(key[0] != source[0] for key, source in found.items())
    items = setup.items(some)
    (moved, *_) = Placebo(store, items, 0).rows(items, ["hidden"], aligned_rows)
    elsewhere = np.setdiff1d(np.arange(len(moved.encoding)), aligned_rows(items[0]))
    true = store.read(moved.example_id, ["hidden"])["hidden"]
    assert np.array_equal(moved["hidden"][elsewhere], true[elsewhere])


@pytest.mark.parametrize("pair", ["different", "same"])
def test_a_placebos_losses_equal_the_reference(pair, student_ref, same_tokenizer, teacher_ref, store, some):
    """By loops, the teacher's values taken from where they are found: hidden states and next-token distributions."""
    ref = student_ref if pair == "different" else same_tokenizer
    setup = Setup(ref, store, changed(hidden={"placebo": True}, kd={"placebo": True}))
    found = setup.step(some)[0]
    texts = {e.example_id: dense(teacher_ref, e.text) for e in some}
    projector = setup.student.trained["hidden"]
    weight, bias = (getattr(projector, name).detach().numpy() for name in ("weight", "bias"))
    moves = sources(setup, some, aligned_rows), sources(setup, some, lambda item: setup.head.compared(item)[:, 0])
    hidden, kd = [], []
    for example in some:
        student = dense(ref, example.text, add_eos=True)
        teachers = [dict(texts[example.example_id]) for _ in moves]
        for teacher, column, moved in zip(teachers, ("hidden", "logits"), moves, strict=True):
            values = teacher[column].copy()
            for (name, at), (other, row) in moved.items():
                if name == example.example_id:
                    values[at] = texts[other][column][row]
            teacher[column] = values
        hidden += reference.hidden_terms(teachers[0], student, weight, bias)
        kd += reference.kd_terms(teachers[1], student, len(example.prompt), setup.map, 32)
    assert found["hidden_loss"] == pytest.approx(np.mean(hidden), rel=5e-5)
    assert found["kd_loss"] == pytest.approx(np.mean(kd), rel=5e-5)


@pytest.mark.parametrize("pair", ["different", "same"])
def test_an_attention_rows_columns_are_moved_within_its_causal_part(pair, student_ref, same_tokenizer, store, some):
    """Each row has the values that it had, and from the second row on none that stays in its column; nor one above."""
    ref = student_ref if pair == "different" else same_tokenizer
    real, moved = (Setup(ref, store, changed(attention={"placebo": on})) for on in (False, True))
    one, other = (s.collate(s.items(some)).parts["attention"] for s in (real, moved))
    assert torch.equal(one.rows, other.rows)
    assert one.count == other.count
    for n, size in enumerate(one.segments.tolist()):
        unmoved, found = one.teacher("attention")[n], other.teacher("attention")[n]
        assert torch.equal(unmoved.sort(-1).values, found.sort(-1).values)
        assert not found.triu(1).any()
        cells = torch.ones(size, size).tril().bool()
        cells[0, 0] = False
        stay = (unmoved[:, :size, :size] == found[:, :size, :size])[:, cells]
        assert float(stay.float().mean()) < 0.01
        source = Placebo(store, moved.items(some), 0).columns(moved.items(some)[n], size)
        assert all(sorted(source[row, : row + 1]) == [*range(row + 1)] for row in range(size))
        assert all((source[row, : row + 1] != np.arange(row + 1)).all() for row in range(1, size))


@pytest.mark.parametrize("term", TERMS)
def test_how_a_step_is_cut_or_ordered_changes_no_placebo(term, student_ref, valued, some):
    """Values are moved among the whole step's examples, whichever micro-batch each is in."""
    setup = Setup(student_ref, valued, changed(values=VALUES) if term == "values" else changed())
    objective = changed(setup.objective, **{term: {"placebo": True}})
    setup = Setup(student_ref, valued, objective)
    items = setup.items(some)
    real = Setup(student_ref, valued, changed(values=VALUES)).step(some)[0][f"{term}_loss"]

    def loss(order, size):
        batches = setup.collate.step([items[i] for i in order], size)
        sums, counts = setup.runner._backward(batches, setup.objective.weights, lambda total: total)
        return float(sums[term]) / counts[term]

    whole = loss(range(6), 6)
    assert loss(range(6), 1) == pytest.approx(whole, rel=1e-5)
    assert loss([3, 5, 0, 1, 4, 2], 4) == pytest.approx(whole, rel=1e-5)
    assert abs(whole - real) > 1e-3 * abs(real)


def test_one_seed_moves_values_alike_in_every_group_and_another_otherwise(student_ref, store, some):
    """Whatever else a group has on; a real term beside a placebo of the same column is left alone."""
    alone = Setup(student_ref, store, changed(hidden={"placebo": True}, attention={"weight": 0.0}))
    among = Setup(student_ref, store, changed(**{term: {"placebo": True} for term in TERMS[:3]}))
    real = Setup(student_ref, store)
    items = alone.items(some)
    first, second, unmoved = (s.collate(items).parts["hidden"].teacher["hidden"] for s in (alone, among, real))
    assert torch.equal(first, second)
    assert not torch.equal(first, unmoved)
    other = Collator(store, alone.head, alone.terms, seed=1)(items).parts["hidden"].teacher["hidden"]
    assert not torch.equal(first, other)
    assert torch.equal(alone.collate(items).head.outcomes.probs, real.collate(items).head.outcomes.probs)


def test_a_cyclic_permutation_has_no_fixed_point():
    """One place cannot be another; two change places."""
    for size in (0, 1, 2, 3, 50):
        source = without_fixed_point(size, np.random.default_rng(size))
        assert sorted(source) == [*range(size)]
        assert size < 2 or (source != np.arange(size)).all()


def test_a_trial_of_placebos_trains_and_says_so(tmp_path, student_ref, valued, examples):
    """From the group's list to the losses: other than the signal's own, on the same batches."""
    few = examples.__class__(examples.train[:16], examples.validation[:6], examples.counts)
    training, losses = TRAINING.model_copy(update={"epochs": 1, "micro_batch_size": 4}), {}
    for name, placebo in (("real", ()), ("placebo", TERMS)):
        group = Group(name=name, terms=("task", *TERMS), placebo=placebo, values={"relation_heads": 4})
        trial = Trial("t", group, 0)
        result = train(trial, student_ref, training, Objective(), EVALUATION, few, valued.path, tmp_path / name)
        losses[name] = {(row["split"], row["measure"]): row["value"] for row in result["metrics"]}
    assert all(result["config"]["objective"][term]["placebo"] for term in TERMS)
    for split, term in itertools.product(("train", "validation"), TERMS):
        assert losses["real"][split, f"{term}_loss"] != losses["placebo"][split, f"{term}_loss"]


def test_a_placebo_is_a_groups_and_of_a_term_that_is_on():
    """By the field; and it is in the fingerprint of those that have one alone."""
    with pytest.raises(ValueError, match="has placebo of hidden, which is not among its terms"):
        Group(name="x", terms=("task", "kd"), placebo=("hidden",))
    with pytest.raises(ValueError, match=r"write placebo: \[hidden\] beside terms"):
        Group(name="x", terms=("task", "hidden"), hidden={"placebo": True})
    with pytest.raises(UserError, match=r"objective.hidden.placebo: only a group can have it"):
        load_study("quickstart", ["objective.hidden.placebo=true"])
    group = Group(name="x", terms=("task", "kd", "hidden"), placebo=("hidden",))
    assert group.objective(Objective()).model_dump()["hidden"]["placebo"] is True
    assert "placebo" not in GROUPS["hidden"].objective(Objective()).model_dump()["hidden"]
    assert Group.model_validate(group.model_dump(mode="json")) == group


def test_training_hands_the_whole_step_to_each_micro_batch(student_ref, valued, some, monkeypatch):
    """Else values would be moved within a micro-batch alone; and the step is read once, not for each of them again."""
    setup = Setup(
        student_ref, valued, changed(**{term: {"placebo": True} for term in TERMS[:2]}, attention={"weight": 0})
    )
    items, read, steps = setup.items(some), Counter(), []
    reading, placebo = SignalStore.read, collation.Placebo

    def counted(store, example_id, columns=None):
        read.update((example_id, column) for column in columns)
        return reading(store, example_id, columns)

    monkeypatch.setattr(SignalStore, "read", counted)
    monkeypatch.setattr(
        collation, "Placebo", lambda store, step, seed: steps.append(step) or placebo(store, step, seed)
    )
    training = TRAINING.model_copy(update={"micro_batch_size": 2})
    batches = train_student._micro_batches(items, [4, 0, 2, 1], training, setup.collate)
    chosen = [items[i] for i in (4, 0, 2, 1)]
    assert steps == [chosen]
    assert [batch.examples for batch in batches] == [
        tuple(item.example.example_id for item in chosen[n : n + 2]) for n in (0, 2)
    ]
    assert set(read.values()) == {1}
    assert {column for _, column in read} == {"hidden", "topk_ids", "topk_logprobs", "tail_logprobs"}
