"""Several studies side by side show what each one's own report does, and in what they differ."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from stillroom.analysis.report import answers_of
from stillroom.analysis.results import StudyResults
from stillroom.analysis.side_by_side import side_by_side
from stillroom.cli import app
from stillroom.errors import UserError
from synthetic import write_results


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two studies: seven seeds of the quickstart; three of it without attention, with another weight of kd."""
    folder = tmp_path_factory.mktemp("studies")
    write_results(folder / "seven", seeds=range(7))
    changed = ["groups=[task_only, black_box, hidden]", "objective.kd.weight=0.25"]
    contrasts = ["analysis.primary=[[hidden, black_box]]", "analysis.secondary=[]"]
    write_results(folder / "three", seeds=range(3), overrides=[*changed, *contrasts], seed=1)
    return [folder / "seven", folder / "three"]


def test_each_study_says_what_its_own_report_does(studies):
    """Accuracies are the means of its own trials, answers those of its own page; a group it has not is left out."""
    facts = side_by_side(studies)
    for folder in studies:
        results = StudyResults.read(folder)
        for answer in answers_of(results, bootstrap=False):
            assert facts["questions"][answer.question][str(folder)] == answer.short
        for group in results.groups:
            accuracies = results.frame[results.frame["config/distill_type"] == group]["validation_accuracy"]
            assert facts["groups"][group][str(folder)].accuracy.mean == pytest.approx(accuracies.mean())
    assert list(facts["groups"]["attention"]) == [str(studies[0])]
    assert list(facts["groups"]["hidden"]) == [str(folder) for folder in studies]


def test_what_studies_differ_in_is_said_and_nothing_else(studies):
    """By the field's dotted name, with the value of each."""
    differ = side_by_side(studies)["differ"]
    seven, three = map(str, studies)
    assert differ["sweep.seeds"] == {seven: "[0, 1, 2, 3, 4, 5, 6]", three: "[0, 1, 2]"}
    assert differ["objective.kd.weight"] == {seven: "0.5", three: "0.25"}
    allowed = ("sweep.seeds", "objective.kd.weight", "groups.", "analysis.")
    assert [field for field in differ if not field.startswith(allowed)] == []


def test_studies_that_cannot_be_compared_are_refused(studies, tmp_path):
    """One alone, one twice, two without a group in common, a folder that is none."""
    write_results(tmp_path / "other", seeds=(0,), overrides=["groups=[attention]", "analysis={}"])
    write_results(tmp_path / "more", seeds=(0,), overrides=["groups=[combined]", "analysis={}"])
    for folders, message in (
        (studies[:1], "at least two"),
        ([studies[0], studies[0] / "." / ""], "named twice"),
        ([tmp_path / "other", tmp_path / "more"], "no group is in two"),
        ([studies[0], tmp_path], "not a results folder"),
    ):
        with pytest.raises(UserError, match=message):
            side_by_side(folders)


def test_the_command_prints_a_row_a_group_and_study_or_json(studies):
    """The table for a person; for a machine JSON that any reader takes, with all figures."""
    folders = [str(folder) for folder in studies]
    shown = CliRunner().invoke(app, ["compare", *folders], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.stdout.splitlines()]
    assert sum("black_box" in row and ("7" in row or "3" in row) for row in rows) >= 4
    assert "sweep.seeds" in shown.stdout
    told = CliRunner().invoke(app, ["compare", *folders, "--json"])
    facts = json.loads(told.stdout, parse_constant=pytest.fail)
    assert facts["groups"]["hidden"][folders[1]]["seeds"] == "3"
    assert set(facts["questions"]) >= {"Does distilling help at all?"}
