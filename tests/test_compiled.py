"""Compiled layers: the losses of a trial without them, one graph for layers alike, and what is kept left as it is."""

from __future__ import annotations

import pytest
import torch

from setups import run
from stillroom.errors import UserError
from stillroom.models import compiled

pytestmark = pytest.mark.slow


@pytest.fixture
def counters(monkeypatch):
    """What was compiled so far: every graph, but no machine code, which takes a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_a_compiled_trial_has_the_numbers_of_one_that_is_not(tmp_path, student_ref, store, examples, counters):
    """Padding and the order of additions are all that differs; nothing in a layer stops the compiler."""
    plain = run(tmp_path / "plain", student_ref, store, examples)
    assert not counters["stats"]
    found = run(tmp_path / "compiled", student_ref, store, examples, compile=True)
    assert counters["stats"]["unique_graphs"] >= 2  # training and validation, at few lengths
    assert not counters["graph_break"]
    for epoch, other in zip(found["epochs"], plain["epochs"], strict=True):
        for a, b in zip(epoch["metrics"], other["metrics"], strict=True):
            assert a == {**b, "value": pytest.approx(b["value"], rel=1e-3)}
    for a, b in zip(found["gradients"], plain["gradients"], strict=True):
        assert a["norms"] == pytest.approx(b["norms"], rel=1e-3)


def test_a_machine_that_cannot_compile_says_so_before_the_first_step(
    tmp_path, student_ref, store, examples, monkeypatch
):
    """No traceback of the compiler's from the middle of a step."""
    monkeypatch.setattr(compiled, "BACKEND", "no_such_compiler")
    with pytest.raises(UserError, match=r"training\.compile: this machine cannot compile: .*; leave it out"):
        run(tmp_path, student_ref, store, examples, compile=True)
