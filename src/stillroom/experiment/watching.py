"""A running sweep on the terminal: trials done, running and failed, the newest accuracy, the time left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom.experiment.jobs import TrialPlan, finished
from stillroom.progress import NamedProgress


class SweepWatch:
    """Keeps count of a sweep's events and shows them; the bar counts epochs, so that it moves within a trial."""

    def __init__(self, plans: Sequence[TrialPlan], progress: NamedProgress) -> None:
        """Trials that are finished already count as done."""
        self._progress = progress
        self._labels = {plan.trial.name: f"{plan.trial.group.name} seed {plan.trial.seed}" for plan in plans}
        self._length = {plan.trial.name: plan.training.epochs for plan in plans}
        self._epochs = {plan.trial.name: plan.training.epochs if finished(plan) else 0 for plan in plans}
        self._states = {plan.trial.name: "finished" if finished(plan) else "waiting" for plan in plans}
        self._newest = ""

    def tell(self, event: str, facts: dict[str, Any]) -> None:
        """Count an event (started, epoch, finished, failed) of the trial that `facts` names, and show all."""
        name = facts["trial"]
        self._states[name] = {"finished": "finished", "failed": "failed"}.get(event, "running")
        if event == "epoch":
            # the last one counts when the trial has ended: what follows it takes time too
            self._epochs[name] = min(int(facts["epoch"]), self._length[name] - 1)
            accuracy = 100 * float(facts["validation_accuracy"])
            self._newest = f"; {self._labels[name]}, epoch {facts['epoch']}: accuracy {accuracy:.1f} %"
        elif event == "finished":
            self._epochs[name] = self._length[name]
        self.show()

    def show(self) -> None:
        """Draw the bar and what stands beside it."""
        states = list(self._states.values())
        counts = [f"{states.count('finished')} of {len(states)} trials done"]
        counts += [f"{states.count(state)} {state}" for state in ("running", "failed") if state in states]
        done, total = sum(self._epochs.values()), sum(self._length.values())
        self._progress("training students, epochs", done, total, ", ".join(counts) + self._newest)
