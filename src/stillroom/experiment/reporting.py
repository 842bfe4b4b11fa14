"""The report of a study whose trials are planned: it needs no model, and waits for no library of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.analysis.reading import read_planned
from stillroom.config import Study
from stillroom.errors import UserError
from stillroom.experiment.tracker import Tracker
from stillroom.folders import snapshots_of


def is_planned(study: Study) -> bool:
    """Whether the trials were planned for this study and its newest archive; a dtype of `auto` is what it was then."""
    try:
        planned = read_planned(study.paths.results)
    except UserError:
        return False
    newest = [path.name for path in snapshots_of(study.paths.store_path)[-1:]]
    return [planned["snapshot"]] == newest and _same(study.model_dump(mode="json"), planned["study"])


def _same(given: Any, planned: Any) -> bool:
    if isinstance(given, dict) and isinstance(planned, dict):
        return given.keys() == planned.keys() and all(_same(value, planned[name]) for name, value in given.items())
    if isinstance(given, list) and isinstance(planned, list):
        return len(given) == len(planned) and all(map(_same, given, planned))
    return given in ("auto", planned)


def report_planned(study: Study) -> Path:
    """Write `report.html` of what was planned last, with its figures, and log it."""
    from stillroom.analysis.report import write_report

    path = write_report(study.paths.results)
    Tracker(study, study.paths.results).log_report(path)
    return path
