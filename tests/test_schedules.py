"""Learning rates: the field's own schedules, and a warm-up that leaves room for one."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from stillroom.config import Training
from stillroom.errors import UserError
from stillroom.training.schedules import learning_rate, require_room_to_fall

STEPS, WARM = 40, 8
NAMES = {"constant": "constant", "linear": "linear", "cosine": "cosine_with_min_lr"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_each_schedule_is_the_one_of_transformers(name, floor):
    """After the warm-up, step by step; a floor raises what lies between it and the full rate in proportion."""
    if name == "constant" and floor:
        pytest.skip("has no floor")
    training = Training(learning_rate=2e-3, warmup_steps=WARM, schedule=name, schedule_floor=floor)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    options = {"min_lr_rate": floor} if name == "cosine" else {}
    theirs = get_scheduler(NAMES[name], optimizer, WARM, STEPS, scheduler_specific_kwargs=options)
    for step in range(STEPS):
        expected = theirs.get_last_lr()[0]
        if name == "linear":  # which has no floor there
            expected = 2e-3 * floor + (1 - floor) * expected
        if step >= WARM:
            assert learning_rate(training, step, STEPS) == pytest.approx(expected, rel=1e-12), step
        optimizer.step()
        theirs.step()


def test_the_warm_up_rises_to_the_full_rate_and_no_step_has_none():
    """The first step trains too: the rate is that of the step's number from 1."""
    constant = [
        learning_rate(Training(learning_rate=0.5, warmup_steps=warm), step, 6) for warm in (4, 0) for step in range(6)
    ]
    assert constant == [0.125, 0.25, 0.375, *[0.5] * 9]
    training = Training(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    assert [learning_rate(training, step, 9) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(training, 8, 9) > 0


def test_a_warm_up_that_never_ends_is_refused_where_a_schedule_waits_for_it():
    """It would train at another rate than the one that was asked for."""
    require_room_to_fall(Training(warmup_steps=40), 40)
    with pytest.raises(UserError, match=r"training.warmup_steps=40: a trial has 40 steps"):
        require_room_to_fall(Training(warmup_steps=40, schedule="linear"), 40)
