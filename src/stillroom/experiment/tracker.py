"""The trackers that a study names: each gets what is in the results folder, and nothing is kept there alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from stillroom.config import Study
from stillroom.experiment.mlflow_runs import MLflowRuns
from stillroom.experiment.tensorboard_files import TensorBoardFiles
from stillroom.experiment.wandb_runs import WandbRuns


class Kept(Protocol):
    """One tracker. Whatever is logged twice is there once."""

    @property
    def where(self) -> str:
        """Which tracker it is, and where it writes."""

    def check(self) -> None:
        """Raise `UserError` if it cannot be written: better before a sweep than after it."""

    def check_beforehand(self) -> None:
        """The same for the doctor, who leaves no file behind."""

    def log_snapshot(self, path: Path, fingerprint: str) -> None:
        """The archived store's name and fingerprint."""

    def log_trial(self, folder: Path) -> None:
        """A finished trial: its settings, the metrics of each epoch and of the test splits, its gradients."""

    def log_report(self, path: Path) -> None:
        """The report."""


class Tracker:
    """All of a study's trackers."""

    def __init__(self, study: Study, results: Path) -> None:
        """Each is opened when something is first logged."""
        known: dict[str, Callable[[Study, Path], Kept]] = {
            "mlflow": MLflowRuns,
            "wandb": WandbRuns,
            "tensorboard": TensorBoardFiles,
        }
        self.kept: list[Kept] = [known[name](study, results) for name in dict.fromkeys(study.trackers)]

    def check(self) -> None:
        """Raise `UserError` if one of them cannot be written."""
        for kept in self.kept:
            kept.check()

    def log_snapshot(self, path: Path, fingerprint: str) -> None:
        """The archived store's name and fingerprint."""
        for kept in self.kept:
            kept.log_snapshot(path, fingerprint)

    def log_trial(self, folder: Path) -> None:
        """A finished trial, once."""
        for kept in self.kept:
            kept.log_trial(folder)

    def log_report(self, path: Path) -> None:
        """The report, as it is now."""
        for kept in self.kept:
            kept.log_report(path)
