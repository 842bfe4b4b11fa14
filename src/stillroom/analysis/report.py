"""The report: an HTML page and a terminal table, from the results folder alone."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from stillroom.analysis.figures import accuracy_figure, save_figure
from stillroom.analysis.frame import PLANNED, accuracy_columns, group_table, read_results, summary_frame, worse_or_equal
from stillroom.analysis.verdicts import answer_questions
from stillroom.config import EXPERIMENT, Analysis, UserError
from stillroom.provenance import read_json, write_text


def gather(results: Path) -> dict[str, Any]:
    """All that a report says, from the files of a results folder. `UserError` if there is nothing to report."""
    planned = read_json(results / PLANNED)
    folders = [results / EXPERIMENT / trial["name"] for trial in planned["trials"]]
    finished = read_results(folders)
    if not finished:
        raise UserError(f"{results}: no trial is finished yet; run `stillroom sweep`")
    done = {result["trial"] for result in finished}
    frame = summary_frame(finished)
    untrained = {}
    for name, label in (("teacher", "teacher"), ("student", "untouched student")):
        path = results / "baselines" / f"{name}.json"
        if path.is_file():
            untrained[label] = read_json(path)
    groups = [group["name"] for group in planned["study"]["groups"]]
    coverage: dict[str, Any] = next((r["coverage"] for r in finished if r["coverage"]), {})
    study = planned["study"]
    return {
        "answers": answer_questions(frame, Analysis.model_validate(study["analysis"]), study["sweep"]["seeds"]),
        "study": study,
        "snapshot": planned["snapshot"],
        "groups": groups,
        "frame": frame,
        "table": group_table(frame, groups, {k: v["metrics"] for k, v in untrained.items()}),
        "tasks": list(accuracy_columns(frame)),
        "untrained": untrained,
        "teacher_no_better": worse_or_equal(*(m["metrics"] for m in untrained.values())) if len(untrained) == 2 else [],
        "missing": [t for t in planned["trials"] if t["name"] not in done],
        "trials": planned["trials"],
        "coverage": coverage,
        "gradients": _gradient_rows(frame, groups),
        "corpus": read_json(results / "corpus" / "corpus.json")["counts"],
        "run": read_json(results / "run.json"),
    }


WEAK_SIGNAL = 0.01
"""A term under this share of the gradient is flagged: the group may be its baseline in all but name."""


def _gradient_rows(frame: pd.DataFrame, groups: list[str]) -> list[dict[str, Any]]:
    rows = []
    for group in groups:
        own = frame[frame["config/distill_type"] == group]
        shares = {
            column.removeprefix("gradient_share_"): float(own[column].mean())
            for column in frame.columns
            if column.startswith("gradient_share_") and own[column].notna().any()
        }
        weak = [term for term, share in shares.items() if term != "task" and share < WEAK_SIGNAL]
        rows.append({"group": group, "shares": shares, "weak": weak})
    return rows


def write_report(results: Path) -> Path:
    """Write `report.html` and `figures/`; returns the page's path."""
    facts = gather(results)
    metrics = {label: value["metrics"] for label, value in facts["untrained"].items()}
    png = save_figure(accuracy_figure(facts["frame"], facts["groups"], metrics), results / "figures", "accuracy")
    environment = Environment(
        loader=PackageLoader("stillroom.analysis", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["percent"] = lambda value: "–" if pd.isna(value) else f"{100 * value:.1f} %"
    environment.filters["points"] = lambda value: "" if pd.isna(value) else f"± {100 * value:.1f}"
    environment.filters["signed"] = lambda value: "–" if pd.isna(value) else f"{100 * value:+.1f}"
    environment.filters["number"] = lambda value: "–" if pd.isna(value) else f"{value:.3g}"
    data = base64.b64encode(png.read_bytes()).decode()
    write_text(results / "report.html", environment.get_template("report.html.j2").render(**facts, accuracy_png=data))
    return results / "report.html"


def print_table(results: Path) -> None:
    """The groups' accuracies on the terminal."""
    from rich.console import Console
    from rich.table import Table

    facts = gather(results)
    table = Table(title=f"{facts['study']['name']}: validation accuracy, mean ± standard deviation over seeds")
    for heading in ("group", "seeds", "all", *facts["tasks"]):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for name, row in facts["table"].iterrows():
        cells = [_cell(row, key) for key in ("accuracy", *facts["tasks"])]
        table.add_row(str(name), str(int(row["seeds"])) if row["seeds"] else "untrained", *cells)
    console = Console()
    console.print(table)
    for answer in facts["answers"]:
        console.print(f"{answer.question} {answer.answer}", markup=False, highlight=False, soft_wrap=True)
    if facts["missing"]:
        console.print(f"incomplete: {len(facts['missing'])} of {len(facts['trials'])} trials are missing")
    for row in facts["gradients"]:
        if row["weak"]:
            console.print(f"{row['group']}: {', '.join(row['weak'])} stayed under {WEAK_SIGNAL:.0%} of the gradient")


def _cell(row: pd.Series, key: str) -> str:
    mean, std = row.get(f"{key}_mean"), row.get(f"{key}_std")
    if mean is None or pd.isna(mean):
        return "–"
    return f"{100 * mean:.1f}" + ("" if std is None or pd.isna(std) else f" ± {100 * std:.1f}")
