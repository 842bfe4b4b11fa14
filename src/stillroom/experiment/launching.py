"""What every launcher of a sweep does alike: which trials it runs, whom it tells, what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stillroom.experiment.jobs import TrialPlan, error_of, failures, finished

Watch = Callable[[str, dict[str, Any]], None]
"""Called with an event (started, epoch, finished, failed, lost) and its facts, the trial's name among them."""

ORPHAN_SECONDS = 300.0
"""How long a trial waits for a process that still has its folder, such as one of a sweep that was killed."""


def unfinished(plans: Sequence[TrialPlan]) -> dict[str, TrialPlan]:
    """The trials that have no result, by name."""
    return {plan.trial.name: plan for plan in plans if not finished(plan)}


def forget_errors(plans: Mapping[str, TrialPlan]) -> None:
    """Let every trial start with all its tries."""
    for plan in plans.values():
        plan.files.error.unlink(missing_ok=True)


def may_be_tried(plan: TrialPlan, retries: int) -> bool:
    """Whether a trial that has failed is tried again."""
    return not finished(plan) and failures(plan) <= retries


def errors_of(plans: Mapping[str, TrialPlan]) -> dict[str, str]:
    """Why each trial that has no result has none, by name."""
    return {name: error_of(plan) for name, plan in plans.items() if not finished(plan)}
