"""Each token is of one kind of text, and the kinds together are the whole."""

from __future__ import annotations

import re

import pytest

from setups import ALL, Setup, changed
from stillroom.data.alignment import KINDS, coverage, kinds_of
from stillroom.data.encoding import encode
from stillroom.training.by_kind import count_kinds, losses_by_kind, only
from stillroom.training.collation import Collator


@pytest.fixture
def setup(student_ref, store):
    """A student with all terms, and the store that it is compared with."""
    return Setup(student_ref, store)


def test_a_token_is_of_the_kind_of_what_it_adds(tokenizers):
    """By the text between its end and the last one's, whatever the tokenizer cuts."""
    text = "Add 12 and 7,\n  then?!  é 3/4"
    for tokenizer in tokenizers:
        encoding, before = encode(tokenizer, text, add_eos=True), 0
        for end, special, kind in zip(encoding.ends, encoding.special, kinds_of(text, encoding), strict=True):
            piece = text[before:end] or text[end - 1 : end]
            if special:
                assert kind is None
                continue
            first = re.search(r"[^\W_]", piece)
            if first:
                assert kind == ("digits" if first.group().isnumeric() else "words"), piece
            else:
                assert kind == ("punctuation" if piece.strip() else "white space"), piece
            before = max(before, end)


def test_the_kinds_counts_add_up_to_the_coverage(setup, some):
    """No token is counted twice or left out, and each aligned one is where the plain count has it."""
    items = setup.items(some)
    by_kind = count_kinds(items)
    whole = [coverage(i.encoding, i.alignment, len(i.example.prompt)) for i in items]
    for name in ("tokens", "aligned", "predictions", "aligned_predictions"):
        assert sum(kind_counts[name] for kind_counts in by_kind.values()) == sum(counts[name] for counts in whole)
    assert {"words", "digits"} <= set(by_kind)


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_the_kinds_divergences_are_parts_of_the_whole(student_ref, store, some, positions):
    """Weighted by their counts they make the mean L_KD; however many examples a batch has."""
    setup = Setup(student_ref, store, changed(kd={"positions": positions}))
    items, heads = setup.items(some), Collator(setup.store, setup.head, ())
    found = losses_by_kind(setup.runner, items, heads, 3)
    counts = {
        kind: sum(len(setup.head.compared(kept)) for item in items if (kept := only(item, kind, positions == "all")))
        for kind in KINDS
    }
    assert set(found) == {kind for kind, count in counts.items() if count}
    batch = heads(items)
    alone = {**dict.fromkeys(ALL.weights, 0.0), "kd": 1.0}
    _, sums = setup.runner.losses(batch, alone, batch.counts)
    assert sum(counts.values()) == batch.counts["kd"]
    assert sum(found[kind] * counts[kind] for kind in found) == pytest.approx(float(sums["kd"]), rel=1e-4)
    assert losses_by_kind(setup.runner, items, heads, 1) == pytest.approx(found, rel=1e-4)


def test_a_group_without_the_teachers_predictions_has_none(student_ref, store, some):
    """Nor has one whose predictions are a placebo: what it is compared with is not what stands there."""
    for off in ({"weight": 0.0}, {"placebo": True}):
        setup = Setup(student_ref, store)
        setup.runner.objective = changed(kd=off)
        assert losses_by_kind(setup.runner, setup.items(some), Collator(setup.store, setup.head, ()), 4) == {}
