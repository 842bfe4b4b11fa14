"""Several studies side by side: the same groups on another pair of models, other tasks or other seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillroom.analysis.report import evidence_of, settings_rows
from stillroom.analysis.results import StudyResults
from stillroom.analysis.tables import Summary, summaries
from stillroom.analysis.verdicts import Answer, answer_questions
from stillroom.errors import UserError


def side_by_side(folders: list[Path]) -> dict[str, Any]:
    """By group and by question what each study found, and the settings in which they differ.

    `UserError` if a folder is named twice, or no group is in two of them.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a results folder is named twice: name each study once")
    if len(folders) < 2:
        raise UserError("name at least two results folders: stillroom compare FIRST SECOND")
    studies = {str(folder): StudyResults.read(folder) for folder in folders}
    groups: dict[str, dict[str, Summary]] = {}
    questions: dict[str, dict[str, str]] = {}
    for name, results in studies.items():
        evidence = evidence_of(results, bootstrap=False)
        answers: list[Answer] = answer_questions(evidence)
        for row in summaries(results, evidence, answers):
            groups.setdefault(row.group, {})[name] = row
        for answer in answers:
            questions.setdefault(answer.question, {})[name] = answer.short
    declared = [name for results in studies.values() for name in results.groups]
    if len(set(declared)) == len(declared):
        raise UserError(f"no group is in two of {', '.join(studies)}: there is nothing to compare")
    return {
        "studies": {
            name: {"study": results.study["name"], "finished": len(results.finished), "planned": len(results.trials)}
            for name, results in studies.items()
        },
        "differ": differing_settings({name: results.study for name, results in studies.items()}),
        "groups": groups,
        "questions": questions,
    }


def differing_settings(studies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Fields that are not the same everywhere, by their dotted name; `–` where a study has none of that name."""
    ignored = {"name", "paths"}
    fields = {
        name: dict(settings_rows({key: value for key, value in study.items() if key not in ignored}))
        for name, study in studies.items()
    }
    names = dict.fromkeys(field for settings in fields.values() for field in settings)
    values = {field: {name: settings.get(field, "–") for name, settings in fields.items()} for field in names}
    return {field: by_study for field, by_study in values.items() if len(set(by_study.values())) > 1}
