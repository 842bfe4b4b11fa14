"""The report says what the rows say, all of it, the same each time, and trusts no text from data."""

from __future__ import annotations

import html
import itertools
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest

from recompute_report import check_report
from stillroom.analysis.escaping import latex_escaped
from stillroom.analysis.figures import Figure, inline_panels, study_figures
from stillroom.analysis.frame import write_summary
from stillroom.analysis.report import command_with, evidence_of, warnings_of, write_report
from stillroom.analysis.results import StudyResults
from stillroom.analysis.sameness import identical_groups
from stillroom.analysis.samples import samples_of
from stillroom.cli.printing import print_answers
from stillroom.data.corpus import folded
from stillroom.errors import UserError
from stillroom.files import read_json, write_json
from stillroom.folders import EXPERIMENT
from synthetic import make_identical, quick_reports, write_results

HOSTILE = '<script>document.title="owned"</script><img src=x onerror="document.title=1"></pre>{{ 7*7 }}'


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A whole study of seven seeds, reported; its pictures are drawn, not rendered."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    write_results(folder, seeds=range(7), seed=18)
    with quick_reports():
        write_report(folder)
    return folder


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A study with a failed trial whose data and error message try to run as code, reported likewise."""
    folder = tmp_path_factory.mktemp("hostile") / "results"
    write_results(folder, seeds=range(3), drop=[("hidden", 1)], rename=lambda text: text + HOSTILE)
    with quick_reports():
        write_report(folder)
    return folder


@pytest.fixture(scope="session")
def whole_pages(results, hostile, tmp_path_factory):
    """Both reports with all their pictures, by the name of the study; for slow tests alone."""
    pages = {}
    for name, folder in (("results", results), ("hostile", hostile)):
        pages[name] = tmp_path_factory.mktemp("drawn") / name
        shutil.copytree(folder, pages[name])
        write_report(pages[name])
    return pages


@pytest.fixture
def quick():
    """Reports without pictures and bootstrap: for tests of words."""
    with quick_reports(whole=False):
        yield


def test_every_figure_is_what_the_raw_rows_give(results, tmp_path):
    """All tables recomputed from predictions and results by independent code; a changed row is noticed."""
    assert check_report(results) > 250
    forged = tmp_path / "forged"
    shutil.copytree(results, forged)
    path = next((forged / "knowledge_distillation_experiment").glob("*_hidden_seed_3")) / "predictions.parquet"
    rows = pd.read_parquet(path)
    rows["prediction"] = rows["gold"]
    rows.to_parquet(path)
    with pytest.raises(AssertionError):
        check_report(forged)


def test_an_incomplete_study_says_so_and_shows_the_error(hostile, capsys):
    """First on the page, in every table for a paper, on the terminal; no verdict from what is left."""
    page = (hostile / "report.html").read_text()
    assert page.index("Incomplete: 1 of 15 trials is missing (hidden seed 1)") < page.index("The questions")
    assert "RuntimeError: it broke" in page
    assert "Incomplete: 1 trial is missing" in (hostile / "paper" / "accuracy.tex").read_text()
    assert check_report(hostile) > 30
    print_answers(hostile)
    assert "warning: Incomplete" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_needs_only_the_results_folder_and_gives_the_same_bytes(whole_pages, tmp_path, monkeypatch, capsys):
    """`stillroom report FOLDER` without study, models or store: page, figures and tables are those made before."""
    from stillroom.cli import app

    results, moved = whole_pages["results"], tmp_path / "moved"
    shutil.copytree(results, moved, ignore=shutil.ignore_patterns("report.html", "figures", "tables", "paper"))
    monkeypatch.chdir(tmp_path)
    app(["report", "moved"], standalone_mode=False)
    assert "beat black_box" in capsys.readouterr().out
    made = sorted(p.relative_to(moved) for p in moved.rglob("*") if p.is_file())
    assert made == sorted(p.relative_to(results) for p in results.rglob("*") if p.is_file())
    assert [p for p in made if (moved / p).read_bytes() != (results / p).read_bytes()] == []


def test_a_report_without_trials_is_refused(tmp_path):
    """A folder that is no results folder, and one with nothing finished."""
    with pytest.raises(UserError, match="not a results folder"):
        write_report(tmp_path)
    everything = [(g, s) for g in ("task_only", "black_box", "hidden", "attention", "combined") for s in range(2)]
    write_results(tmp_path / "empty", seeds=range(2), drop=everything)
    with pytest.raises(UserError, match="no trial is finished"):
        write_report(tmp_path / "empty")


def test_the_first_screen_answers_and_warns_after_it(results):
    """Sentences, then the table with what each group gains, then what it takes to know more; warnings come last."""
    page = html.unescape((results / "report.html").read_text())
    places = [
        page.index(text)
        for text in (
            '<dt>Does distilling help at all?</dt><dd>',
            '<dt>Do white-box signals improve over black-box distillation?</dt><dd>In part: hidden (',
            '<table id="answer-table"',
            "What it would take to know more",
            "<pre>stillroom run STUDY --set 'sweep.seeds=[0,1,2,3,4,5,6,7,",
            "The attention term contributed under 1 % of the gradient in attention and combined",
            "The questions",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert "undecided" not in page[: places[-1]]
    assert "The hidden term contributed" not in page


def warned(folder, **more):
    """The warnings of a results folder, with some of its evidence replaced."""
    found = StudyResults.read(folder)
    return warnings_of(found, replace(evidence_of(found, bootstrap=False), **more))


def test_a_task_at_its_floor_or_ceiling_is_remarked_upon(results):
    """What nobody learnt, and what everybody can do, makes groups alike without a word on their signals."""
    planned = StudyResults.read(results).accuracies
    (overall, values), *tasks = planned.items()
    for accuracy, says in ((0.01, "more than 2 points above 0 %"), (0.99, "more than 2 points below 100 %")):
        level = {overall: values, **dict(tasks), tasks[0][0]: dict.fromkeys(values, accuracy)}
        found = [said for said in warned(results, accuracies=level) if "whatever they learnt" in said]
        assert len(found) == 1
        assert found[0].startswith(f"On {tasks[0][0]} no group is {says}")
    level[tasks[0][0]][next(iter(values))] = 0.5  # one seed of one group
    assert not [said for said in warned(results, accuracies=level) if "whatever they learnt" in said]


def test_a_term_whose_loss_rises_is_remarked_upon(results, tmp_path, quick):
    """With the groups and both ends; one that falls is not."""
    copy = shutil.copytree(results, tmp_path / "copy")
    for path in (copy / EXPERIMENT).glob("*_hidden_seed_*/result.json"):
        result = read_json(path)
        for epoch in result["epochs"]:
            for row in epoch["metrics"]:
                if (row["split"], row["measure"]) == ("train", "hidden_loss"):
                    row["value"] = 0.001 * epoch["epoch"]
        write_json(path, result)
    found = [said for said in warned(copy) if "rose" in said]
    last = read_json(path)["epochs"][-1]["epoch"]
    assert found == [
        f"The hidden loss rose over training in hidden (0.001 to 0.00{last}): the student hardly learnt that signal."
    ]


def test_text_in_a_figure_is_text():
    """What stands on a panel is escaped, however it is written; colours and names of its parts are the page's."""
    figure = Figure("f", "", "", [lambda axis: axis.set_title(HOSTILE)], 2.0, {})
    (panel,) = inline_panels(figure)
    assert "<script" not in panel
    assert "<img" not in panel
    assert "&lt;script&gt;" in panel
    assert "var(--fg)" in panel
    assert " id=" not in re.sub(r'<(clipPath|path|g|defs)[^>]* id="[^"]*"', "", panel)


def test_a_kind_of_text_that_is_hardly_aligned_is_remarked_upon(results, tmp_path):
    """A pair whose digits the teacher never reaches is seen at once; old results without kinds still have a page."""
    copy = shutil.copytree(results, tmp_path / "copy")
    assert not [said for said in warned(copy) if "predictions of" in said]
    for path in (copy / EXPERIMENT).glob("*/result.json"):
        result = read_json(path)
        if result["kinds"]:
            result["kinds"]["digits"]["aligned_predictions"] = 3
        write_json(path, result)
    found = [said for said in warned(copy) if "predictions of" in said]
    assert len(found) == 1
    assert found[0].replace("\u00a0", " ").startswith("Only 15.0 % of the predictions of digits are made where")


def test_the_command_that_adds_seeds_is_the_one_that_was_run(results, tmp_path):
    """With its own settings, but for the seeds; where no run is recorded, STUDY stands for it."""
    copy = shutil.copytree(results, tmp_path / "copy")
    log = read_json(copy / "run.json")
    for recorded, expected in (
        ("stillroom run my.yaml --set 'sweep.seeds=[0, 1]' --set a.b=2", "run my.yaml --set a.b=2"),
        ("stillroom sweep my.yaml --set=sweep.seeds=[0]", "sweep my.yaml"),
        ("stillroom -q tests", "run STUDY"),
    ):  # fmt: skip
        log["stages"]["sweep"]["command"] = recorded
        write_json(copy / "run.json", log)
        assert command_with(StudyResults.read(copy), (0, 1, 2)) == f"stillroom {expected} --set 'sweep.seeds=[0,1,2]'"


def test_a_sample_is_shown_as_the_models_answered_it(results):
    """Where groups differ, where all are right, where none is: as their predictions say."""
    read = StudyResults.read(results)
    found = samples_of(read)
    assert list(found) == read.tasks
    texts = read.examples.set_index("prompt")["example_id"].to_dict()
    for task, samples in found.items():
        for sample in samples:
            given = {name: right for name, _, right in sample.answers if name in read.groups}
            expected = {
                "The groups differ": {True, False},
                "Every group is right": {True},
                "No group is right": {False},
            }
            assert set(given.values()) == expected[sample.kind]
            for name, said, right in sample.answers:
                rows = read.predictions[name, 0] if name in read.groups else read.baseline_predictions[name]
                row = rows.set_index("example_id").loc[texts[sample.prompt]]
                assert row["task"] == task
                assert (said == row["gold"].strip() or f"#### {row['gold']}" in said) == right == row["correct"]


def test_a_row_that_could_not_be_used_is_shown(results, tmp_path, quick):
    """The first of each task, with the reason, as text; a corpus without any says nothing."""
    copy = shutil.copytree(results, tmp_path / "copy")
    assert 'id="faults"' not in (results / "report.html").read_text()
    described = copy / "corpus" / "corpus.json"
    said = {"faults": {"quiz": "row 3: <b>label</b> 7"}, "test_faults": {"quiz": "row 9: no answer"}}
    write_json(described, {**read_json(described), **said})
    page = write_report(copy).read_text()
    assert "<li>quiz: row 3: &lt;b&gt;label&lt;/b&gt; 7</li>" in page
    assert "<li>quiz, test split: row 9: no answer</li>" in page


def test_labels_that_were_made_wrong_are_counted(results, tmp_path, quick):
    """Who reads accuracies on noisy labels has to know; a study without label noise has no such column."""
    copy = shutil.copytree(results, tmp_path / "copy")
    assert "made wrong" not in (results / "report.html").read_text()
    described = copy / "corpus" / "corpus.json"
    corpus = read_json(described)
    corpus["counts"]["quiz"]["mislabelled"] = 17
    write_json(described, corpus)
    table = write_report(copy).read_text().split('id="corpus-table"')[1].split("</table>")[0]
    assert "training labels made wrong" in table
    assert [row.rsplit("<td>", 1)[1].split("<")[0] for row in table.split('scope="row"')[1:]] == ["0", "17", "0"]


@pytest.mark.parametrize("method", ["none", "lora"])
def test_a_fine_tuned_teacher_is_called_so(results, tmp_path, capsys, quick, method):
    """In tables, captions, LaTeX and on the terminal: a model that the study trained is not said to be untrained."""
    copy = shutil.copytree(results, tmp_path / "copy")
    planned = read_json(copy / "planned.json")
    planned["study"]["teacher"]["fine_tune"]["method"] = method
    write_json(copy / "planned.json", planned)
    page = write_report(copy).read_text()
    print_answers(copy)
    read = StudyResults.read(copy)
    captions = " ".join(figure.caption for figure in study_figures(read, evidence_of(read, bootstrap=False), []))
    texts = [page, captions, (copy / "paper" / "accuracy.tex").read_text(), capsys.readouterr().out]
    for text in texts:
        assert "untrained" not in text
        assert "not trained" not in text
        assert ("fine-tuned" in text) == (method != "none")
    label = "teacher (fine-tuned)" if method != "none" else "teacher"
    assert f'<th scope="row">{label}</th><td>baseline</td>' in page
    assert f"vertical lines: the {label} and the student before training" in captions
    assert list(read.baselines) == [label, "student before training"]


def test_a_group_without_a_finished_trial_is_no_baseline(tmp_path, quick):
    """It has no seeds; only the teacher and the student before training are baselines."""
    write_results(tmp_path, seeds=(0,), drop=[("hidden", 0)])
    page = write_report(tmp_path).read_text()
    assert '<th scope="row">hidden</th><td>0</td>' in page
    assert page.count("<td>baseline</td>") == 2 * 2  # validation split and test splits
    assert "hidden & 0 & --" in (tmp_path / "paper" / "accuracy.tex").read_text()


def test_a_leak_is_counted_from_the_examples_themselves(results, tmp_path):
    """The report's line on leaks is a count, not a promise: one more shared prompt is one more in it."""
    before = StudyResults.read(results).shared_prompts
    leaking = tmp_path / "leaking"
    shutil.copytree(results, leaking)
    rows = pd.read_parquet(leaking / "corpus" / "corpus.parquet")
    trained = rows.loc[rows["split"] == "train", "prompt"]
    fresh = rows[(rows["split"] == "validation") & ~rows["prompt"].map(folded).isin(trained.map(folded))].index[0]
    known = next(p for p in trained if not rows.loc[rows["split"] != "train", "prompt"].map(folded).eq(folded(p)).any())
    rows.loc[fresh, "prompt"] = known.upper()
    rows.to_parquet(leaking / "corpus" / "corpus.parquet")
    assert StudyResults.read(leaking).shared_prompts == before + 1


def test_what_was_measured_for_another_study_is_left_out(results, tmp_path, quick):
    """A teacher of an earlier run is not this one's: its row goes, and the page says which and what to run."""
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    assert "belongs to another study" not in (results / "report.html").read_text()
    path = copy / "baselines" / "teacher.json"
    write_json(path, {**read_json(path), "fingerprint": "another"})
    log = read_json(copy / "run.json")
    log["stages"]["verify"]["fingerprint"] = "another"
    write_json(copy / "run.json", log)
    page = write_report(copy).read_text()
    assert (
        "What was measured of the teacher (fine-tuned) belongs to another study and is left out: `stillroom run STUDY`"
        in page
    )
    test = copy / "baselines" / "student_test.json"
    write_json(test, {**read_json(test), "fingerprint": "another"})
    described = copy / "corpus" / "corpus.json"
    other = {**read_json(described), "fingerprint": "another"}
    other["counts"] = {f"other_{task}": counts for task, counts in other["counts"].items()}
    rows = pd.read_parquet(described.with_suffix(".parquet"))
    rows.assign(task="other_" + rows["task"]).to_parquet(described.with_suffix(".parquet"))
    write_json(described, other)
    page = write_report(copy).read_text()
    assert (
        "What was measured of the teacher (fine-tuned) and the student before training on test splits belongs" in page
    )
    assert "The examples in this folder belong to another study" in page
    read = StudyResults.read(copy)
    assert list(read.baselines) == list(read.baseline_predictions) == ["student before training"]
    assert not any(key[2] == "agreement" for trial in read.measured_with_agreement for key in trial.values)
    assert "the latest record is for other data" not in (results / "report.html").read_text()
    assert "the latest record is for other data" in page
    write_json(copy / "planned.json", {k: v for k, v in read_json(copy / "planned.json").items() if k != "baselines"})
    with pytest.raises(UserError, match="of another version: baselines: Field required; `stillroom run STUDY` brings"):
        write_report(copy)


@pytest.mark.parametrize("weights", [None, pytest.param(("a1", "a1"), marks=pytest.mark.slow)])
def test_groups_that_were_to_differ_and_do_not_are_an_error(results, tmp_path, capsys, quick, weights):
    """A term that never reached the student: first on the page and on the terminal, and no verdict between the two."""
    folder = shutil.copytree(results, tmp_path / "results")
    make_identical(folder, "attention", "combined", 2, weights)
    page = write_report(folder).read_text()
    says = "The trials of attention and combined are identical at every epoch (seed 2), though their objectives differ"
    assert 0 < page.index(f"Error: {says}") < page.index("The attention term contributed")
    assert page.count("Error: ") == 1
    print_answers(folder)
    assert f"Error: {says}" in capsys.readouterr().out
    verdicts = pd.read_csv(folder / "tables" / "comparisons.csv").groupby(["first", "second"])["verdict"].agg(set)
    assert verdicts["combined", "attention"] == {"undecided"}
    assert verdicts["combined", "hidden"] != {"undecided"}
    assert "their trials are identical at seed 2, so the term that tells them apart never took effect" in page
    assert weights is None or check_report(folder, bootstrap=False) > 250


@pytest.mark.parametrize("weights", [("a1", "b2"), ("a1", "")])
def test_groups_of_other_weights_or_of_one_objective_are_no_error(tmp_path, weights):
    """Equal losses with other weights differ, as do groups that one epoch tells apart; equal objectives may agree."""
    folder = tmp_path / "results"
    write_results(folder, seeds=(0,))
    make_identical(folder, "attention", "combined", 0, weights)
    found = StudyResults.read(folder)
    assert found.identical == ({} if all(weights) else {("attention", "combined"): [0]})
    results = [read_json(p) for p in sorted((folder / EXPERIMENT).glob("*/result.json"))]
    one = next(r for r in results if r["config"]["distill_type"] == "attention")
    other = next(r for r in results if r["config"]["distill_type"] == "combined")
    losses = {(row["split"], row["measure"]): row for row in one["epochs"][0]["metrics"]}
    losses["validation", "task_loss"]["value"] += 1e-12
    assert identical_groups([one, other]) == {}
    same = {**one, "config": {**one["config"], "distill_type": "again"}}
    assert identical_groups([one, same]) == {}
    objective = {
        **one["config"]["objective"],
        "attention": {**one["config"]["objective"]["attention"], "scale": "none"},
    }
    scaled = {**one, "config": {**one["config"], "distill_type": "scaled", "objective": objective}}
    assert identical_groups([one, scaled]) == {("attention", "scaled"): [0]}
    objective = {
        **one["config"]["objective"],
        "hidden": {**one["config"]["objective"]["hidden"], "scale": "teacher_rms"},
    }  # of a term that is off
    scaled = {**one, "config": {**one["config"], "distill_type": "scaled", "objective": objective}}
    assert identical_groups([one, scaled]) == {}


def well_formed(text):
    """Whether braces, environments and dollars of LaTeX are balanced and no special character is bare."""
    text = re.sub(r"\\[\\&%$#_{}]", "", text)
    depth = list(itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text))
    opened = []
    for kind, name in re.findall(r"\\(begin|end){(\w+)}", text):
        if kind == "begin":
            opened.append(name)
        elif not opened or opened.pop() != name:
            return False
    plain = re.sub(r"\$[^$]*\$|\\(label|begin|end){[^}]*}", "", text)
    return not opened and depth[-1] == 0 and min(depth) == 0 and not re.search(r"[$#_^~%]|[^\x00-\x7f]", plain)


@pytest.mark.parametrize("bad", ["{", "a_b", "5 % of", r"\begin{table}", "}{", "$x", "−1"])
def test_what_is_no_latex_is_told_from_what_is(bad):
    """The check of the tables can fail."""
    assert well_formed(r"\begin{table}{a\_b $p_{x}$} 5\,\%\end{table}")
    assert not well_formed(bad)


@pytest.mark.slow
def test_tables_for_a_paper_compile(results, tmp_path):
    """With a TeX, if this machine has one: no error, and no letter that its fonts lack."""
    tex = next(
        (found for name in ("tectonic", "pdflatex", "lualatex", "xelatex") if (found := shutil.which(name))), None
    )
    if tex is None:
        pytest.skip("no TeX on this machine; test_tables_for_a_paper_are_tidy_and_escaped looks at the structure")
    tables = [str(results / "paper" / f"{name}.tex") for name in ("accuracy", "contrasts")]
    body = "\n".join(rf"\input{{{path}}}" for path in tables)
    text = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "paper.tex").write_text(text)
    options = [] if tex.endswith("tectonic") else ["-interaction=nonstopmode", "-halt-on-error"]
    done = subprocess.run([tex, *options, "paper.tex"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "paper.pdf").stat().st_size > 1000
    assert "Missing character" not in done.stdout


def test_tables_for_a_paper_are_tidy_and_escaped(results):
    """Tidy CSVs a reader can aggregate; LaTeX whose special characters are plain and whose rows are of one width."""
    accuracy = pd.read_csv(results / "tables" / "accuracy.csv")
    whole = accuracy[accuracy["task"] == "all"].groupby("group")["accuracy"].mean()
    summary = pd.read_csv(results / "results_summary.csv").groupby("config/distill_type")["validation_accuracy"].mean()
    assert whole[summary.index].to_numpy() == pytest.approx(summary.to_numpy())
    assert len(pd.read_csv(results / "tables" / "comparisons.csv")) == (6 + 1 + 5) * 4
    for name in ("accuracy", "contrasts"):
        text = (results / "paper" / f"{name}.tex").read_text()
        tables = text.count(r"\begin{table}")
        assert tables == (1 if name == "accuracy" else 4)
        assert r"black\_box" in text
        for table in re.findall(r"\\begin{table}.*?\\end{table}", text, re.DOTALL):
            rows = re.search(r"\\toprule(.*)\\bottomrule", table, re.DOTALL)[1].replace(r"\midrule", "").strip()
            widths = {len(re.split(r"(?<!\\)&", row)) for row in rows.split("\\\\") if row.strip()}
            assert widths == {len(re.search(r"tabular}{(\w+)}", table)[1])}
            assert well_formed(table)
    assert latex_escaped("50% of a_b & {c}\\") == r"50\% of a\_b \& \{c\}\textbackslash{}"
    facts = (results / "paper" / "checklist.md").read_text()
    assert "35 of 35 planned trials are finished" in facts
    assert "training.learning_rate" in facts


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, headless; where it is absent the tests skip, but in CI they must not."""
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium")
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail("CI has no chromium")
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (1280, "dark")])
@pytest.mark.parametrize("folder", ["results", "hostile"])
def test_the_page_stands_alone_in_a_browser(browser, whole_pages, folder, width, scheme):
    """No error, nothing from outside, every picture drawn, no sideways scrolling, hostile text inert."""
    path = whole_pages[folder] / "report.html"
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(path.as_uri())
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert requests.count(path.as_uri()) == len([url for url in requests if url.startswith("file:")]) == 1
    assert page.title() == "stillroom report: quickstart"
    panels = page.evaluate("[...document.querySelectorAll('.panels svg')].map(s => s.getBoundingClientRect().toJSON())")
    assert len(panels) >= 15
    assert all(panel["width"] > 200 and panel["right"] <= width and panel["height"] > 60 for panel in panels)
    assert page.evaluate("[...document.querySelectorAll('[role=img]')].every(f => f.ariaLabel.length > 10)")
    assert page.evaluate(
        "(ids => new Set(ids).size == ids.length)([...document.querySelectorAll(':not(svg *)[id]')].map(e => e.id))"
    )
    first = page.locator("#answer-table").bounding_box()
    assert first["x"] + first["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.evaluate("[...document.scripts].length") == 1
    if folder == "hostile":
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert "<script>document.title" in page.inner_text("main")
        assert "{{ 7*7 }}" in page.inner_text("main")
    colours = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    ink = page.evaluate("getComputedStyle(document.querySelector('.panels svg text')).fill")
    assert ink == colours[0]
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours]
    assert (dark[0] > dark[1]) == (scheme == "dark")
    page.close()


@pytest.mark.slow
def test_trials_are_sorted_by_a_click_and_nothing_is_folded_in_print(browser, whole_pages):
    """Numbers as numbers, up and then down; printed, every setting, sample and file name is there."""
    page = browser.new_page()
    page.goto((whole_pages["results"] / "report.html").as_uri())
    heading = page.locator("#trials-table th", has_text="task loss")
    for direction, expected in (("ascending", False), ("descending", True)):
        heading.locator("button").click()
        column = page.evaluate("[...document.querySelectorAll('#trials-table thead th')].findIndex(h => h.ariaSort)")
        cells = page.locator(f"#trials-table tbody tr > :nth-child({column + 1})").all_inner_texts()
        assert heading.get_attribute("aria-sort") == direction
        assert [float(cell) for cell in cells] == sorted(map(float, cells), reverse=expected)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    shown = page.inner_text("main")
    for text in ("corpus.validation_share", "comparisons.csv", "Review: ", "checklist.md"):
        assert text in shown
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 1
    page.close()


@pytest.mark.slow
def test_downloads_are_the_files_beside_the_page(browser, whole_pages):
    """A data URI's content is the file of that name, byte for byte."""
    results = whole_pages["results"]
    page = browser.new_page()
    page.goto((results / "report.html").as_uri())
    links = page.locator("a[download]")
    assert links.count() >= 8
    for index in range(links.count()):
        with page.expect_download() as caught:
            links.nth(index).click()
        name = caught.value.suggested_filename
        folder = "tables" if name.endswith(".csv") else "paper"
        assert caught.value.path().read_bytes() == (results / folder / name).read_bytes()
    page.close()


def test_a_failed_trial_is_told_from_one_that_never_ran(tmp_path):
    """`status` in the summary: a trial with an error message failed, one without any file is missing."""
    write_results(tmp_path, seeds=(0, 1), drop=[("hidden", 1), ("combined", 0)])
    shutil.rmtree(next((tmp_path / EXPERIMENT).glob("*_combined_seed_0")))
    write_summary(tmp_path)
    table = pd.read_csv(tmp_path / "results_summary.csv").set_index(["config/distill_type", "config/seed"])["status"]
    assert (table["hidden", 1], table["combined", 0]) == ("failed", "missing")
    assert (table == "finished").sum() == 8


def test_a_trials_cost_has_its_test_evaluation_in_it(results, tmp_path):
    """Hours that were spent are not left out of the report's table of costs."""
    copy = shutil.copytree(results, tmp_path / "copy")
    path = next((copy / EXPERIMENT).glob("*_hidden_seed_1")) / "result.json"
    write_json(path, {**read_json(path), "test_evaluation_seconds": 1000.0})
    before, after = (
        StudyResults.read(folder).costs.set_index("trial")["evaluation_seconds"] for folder in (results, copy)
    )
    assert (after - before)[lambda difference: difference != 0].to_dict() == {path.parent.name: 1000.0}
