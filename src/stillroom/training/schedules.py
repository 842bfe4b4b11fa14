"""The learning rate of each step."""

from __future__ import annotations

import math

from stillroom.config import Training
from stillroom.errors import UserError


def learning_rate(training: Training, step: int, steps: int) -> float:
    """The rate of one step, from 0, of a trial of `steps`.

    It rises linearly over the warm-up, whose last step has the full rate. From there a linear or cosine schedule falls
    to the floor, which the step after the last would have.
    """
    warm = training.warmup_steps
    if step < warm:
        return training.learning_rate * min(1.0, (step + 1) / warm)
    if training.schedule == "constant":
        return training.learning_rate
    passed = (step - warm) / (steps - warm)
    left = 1 - passed if training.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
    return training.learning_rate * (training.schedule_floor + (1 - training.schedule_floor) * left)


def require_room_to_fall(training: Training, steps: int) -> None:
    """`UserError` where the warm-up leaves no step for the schedule."""
    if training.schedule != "constant" and training.warmup_steps >= steps:
        raise UserError(
            f"training.warmup_steps={training.warmup_steps}: a trial has {steps} steps, so none is left for the "
            f"{training.schedule} schedule; lower it, or raise training.epochs"
        )
