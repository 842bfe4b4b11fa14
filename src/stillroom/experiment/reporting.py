"""The report of a study whose trials are planned: it needs no model, and waits for no library of models."""

from __future__ import annotations

from itertools import product, starmap
from pathlib import Path

from stillroom.analysis.reading import read_planned
from stillroom.config import Precision, Study
from stillroom.errors import UserError
from stillroom.experiment.tracker import Tracker
from stillroom.folders import snapshots_of

_AUTO: tuple[Precision, ...] = ("bfloat16", "float32")
"""What a dtype of `auto` can stand for (`resolve_precision`)."""


def as_planned(study: Study) -> Study | None:
    """The study, with the dtypes that `auto` stood for when its trials were planned.

    None where they were planned for another study, or for an archive that is not the newest any more.
    """
    try:
        planned = read_planned(study.paths.results)
    except UserError:
        return None
    if [planned["snapshot"]] != [path.name for path in snapshots_of(study.paths.store_path)[-1:]]:
        return None
    candidates = starmap(study.with_dtypes, product(_AUTO, repeat=2))
    return next((c for c in candidates if c.model_dump(mode="json") == planned["study"]), None)


def report_planned(study: Study) -> Path:
    """Write `report.html` of what was planned last, with its figures, and log it."""
    from stillroom.analysis.report import write_report

    path = write_report(study.paths.results)
    Tracker(study, study.paths.results).log_report(path)
    return path
