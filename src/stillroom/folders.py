"""What a study writes and where: the results folder and a trial's own, each file named once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

EXPERIMENT = "knowledge_distillation_experiment"
"""Folder of the trials, in the results folder."""
PLANNED = "planned.json"
RESULT, ERROR = "result.json", "error.json"
"""What a trial leaves in its own folder: all its numbers, or what stopped it."""


@dataclass(frozen=True)
class ResultsFolder:
    """A results folder; nothing of it need be there."""

    path: Path

    @property
    def planned(self) -> Path:
        """The study as it was planned, its trials, and what they are made from."""
        return self.path / PLANNED

    @property
    def run_record(self) -> Path:
        """Each stage's commit, versions, hardware and time."""
        return self.path / "run.json"

    @property
    def corpus(self) -> Path:
        """Folder of the examples."""
        return self.path / "corpus"

    @property
    def corpus_facts(self) -> Path:
        """What the examples are, and what was dropped on the way."""
        return self.corpus / "corpus.json"

    @property
    def corpus_rows(self) -> Path:
        """Every example."""
        return self.corpus / "corpus.parquet"

    @property
    def models(self) -> Path:
        """Folder of built-in models, written to disk."""
        return self.path / "models"

    @property
    def teacher(self) -> Path:
        """Folder of the fine-tuned teacher."""
        return self.path / "teacher"

    @property
    def baselines(self) -> Path:
        """Folder of what was measured of the baselines."""
        return self.path / "baselines"

    def baseline(self, role: str, suffix: str = "") -> Path:
        """A baseline's metrics; `suffix`: "" for the validation split, `_test` for the test splits."""
        return self.baselines / f"{role}{suffix}.json"

    def baseline_predictions(self, role: str) -> Path:
        """A baseline's predictions on the validation split."""
        return self.baselines / f"{role}.parquet"

    @property
    def trials(self) -> Path:
        """Folder of the trials' folders."""
        return self.path / EXPERIMENT

    def trial(self, name: str) -> TrialFolder:
        """The folder of a trial by its name."""
        return TrialFolder(self.trials / name)

    @property
    def summary(self) -> Path:
        """A row per trial."""
        return self.path / "results_summary.csv"

    @property
    def report(self) -> Path:
        """The report, whole in one file."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """Folder of the report's figures."""
        return self.path / "figures"

    @property
    def tables(self) -> Path:
        """Folder of the report's tables, CSV."""
        return self.path / "tables"

    @property
    def paper(self) -> Path:
        """Folder of LaTeX tables and a checklist."""
        return self.path / "paper"

    @property
    def ray(self) -> Path:
        """Folder of Ray's own files, unless the study says where."""
        return self.path / "ray"


@dataclass(frozen=True)
class TrialFolder:
    """The folder of one trial, in the trials' folder of a results folder."""

    path: Path

    @property
    def results(self) -> ResultsFolder:
        """The results folder that it lies in."""
        return ResultsFolder(self.path.parents[1])

    @property
    def result(self) -> Path:
        """All its numbers, once it is finished."""
        return self.path / RESULT

    @property
    def error(self) -> Path:
        """What stopped it."""
        return self.path / ERROR

    @property
    def predictions(self) -> Path:
        """The last epoch's predictions on the validation split."""
        return self.path / "predictions.parquet"

    def predictions_of(self, epoch: int) -> Path:
        """An epoch's, until the trial is finished."""
        return self.path / f"predictions_{epoch}.parquet"

    @property
    def test_predictions(self) -> Path:
        """Predictions on the test splits."""
        return self.path / "predictions_test.parquet"

    def checkpoint(self, epoch: int) -> Path:
        """Folder of an epoch's checkpoint."""
        return self.path / f"checkpoint_{epoch}"


def snapshots_of(store: Path) -> list[Path]:
    """What stands beside a store under its name and a date, oldest first."""
    store = store.resolve()  # no pattern: the name is the user's
    found = store.parent.iterdir() if store.parent.is_dir() else ()
    name = re.compile(re.escape(store.name) + r"_\d{4}-\d\d-\d\dT\d{6}Z")
    return sorted(p for p in found if p.is_dir() and name.fullmatch(p.name))
