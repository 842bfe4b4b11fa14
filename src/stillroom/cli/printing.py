"""How facts are shown on a terminal; the rest of the package returns them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillroom.analysis.tables import Summary
    from stillroom.preflight.doctor import Finding


def print_plan(plan: dict[str, Any], as_json: bool = False) -> None:
    """The plan as a table, or as JSON."""
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console

    console = Console()
    sizes = ("width", "heads", "layers", "vocabulary", "parameters")
    models = [(f"{role} {shape['model']}", *(f"{shape[k]:,}" for k in sizes)) for role, shape in plan["models"].items()]
    console.print(_table("Models", ("model", *sizes), models))
    console.print(_table("Corpus", ("task", "examples", "teacher tokens", "student tokens"), _corpus_rows(plan)))
    _print_design(console, plan["design"])
    _print_compared(console, plan["groups"])
    kept = [
        (name.replace("_", " "), _layers(plan["store_layers"].get(name, ())), _bytes(size))
        for name, size in plan["store_bytes"].items()
    ]
    console.print(_table("Teacher data", ("signal", "layers", "size"), kept))
    console.print(_table("Training", ("what", "count"), _rows(plan["training"], "{:,}".format)))
    console.print(_table("Disk for students", ("what", "size"), _rows(plan["disk_bytes"], _bytes)))
    console.print(_table("Memory at the peak, estimated", ("stage", "size"), _rows(plan["memory_bytes"], _bytes)))
    console.print(_table("GPU hours, estimated", ("stage", "hours"), _rows(plan["hours"], "{:.2f}".format)))
    if plan["cpu_hours"]:
        hours = _rows(plan["cpu_hours"], "{:.2f}".format)
        console.print(_table("Hours of this CPU, estimated", ("stage", "hours"), hours))
    if plan["measured"]:
        found = plan["measured"]["hours"].items()
        times: list[tuple[str, ...]] = [
            (name.replace("_", " "), _time(measured["hours"]), _time(measured["error"])) for name, measured in found
        ]
        console.print(_table("Time on this machine, measured", ("stage", "time", "±"), times))
        console.print("Measured")
        for how in plan["measured"]["how"]:
            console.print(f"  - {how}", markup=False, highlight=False)
    console.print("Assumptions")
    for assumption in plan["assumptions"]:
        console.print(f"  - {assumption}", markup=False, highlight=False)


def print_fields(found: dict[str, list[dict[str, str]]]) -> None:
    """Sections of a study: a line for each field, its meaning below it."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    for section, rows in found.items():
        if not rows:
            continue
        console.print(Text(section or "the study", style="bold"))
        for row in rows:
            default = "" if row["default"] == "required" else f", default {row['default'].strip('`')}"
            required = ", required" if row["default"] == "required" else ""
            console.print(
                Padding(Text(f"{row['name']}: {row['type'].replace('`', '')}{required}{default}"), (0, 0, 0, 2))
            )
            console.print(Padding(Text(row["meaning"].replace("`", ""), style="dim"), (0, 0, 0, 6)))


def _print_compared(console: Any, groups: dict[str, dict[str, Any]]) -> None:
    """Each group's terms, and the pairs of layers that they compare."""
    rows = []
    for name, group in groups.items():
        plain = ", ".join(term for term in group["terms"] if term not in group["layers"])
        rows.append((name, plain, "", ""))
        for term, pairs in group["layers"].items():
            projectors = str(group["projectors"] or "") if term == "hidden" else ""
            rows.append(("", term, _pairs(pairs), projectors))
    headings = ("group", "terms", "layers", "projectors")
    console.print(_table("What groups compare (layers: the teacher's → the student's)", headings, rows, left=3))


def _pairs(layers: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{teacher} → {student}" for teacher, student in layers)


def _layers(layers: Sequence[Any]) -> str:
    return ", ".join(map(str, layers))


def _print_design(console: Any, design: dict[str, Any]) -> None:
    """What the design can find out: families of contrasts, then the smallest difference by task."""
    families = {name: family for name, family in design["families"].items() if family["contrasts"]}
    rows = [
        (n, *map(_figure, (family["contrasts"], family["smallest_adjusted_p"], family["seeds_needed"])))
        for n, family in families.items()
    ]
    headings = ("contrasts", "number", "smallest p", "seeds needed")
    console.print(_table(f"What {design['seeds']} seeds can find out", headings, rows))
    measures = [
        (name, str(measure["validation_examples"]), *(_points(measure["detectable_difference"][n]) for n in families))
        for name, measure in design["measures"].items()
    ]
    headings = ("accuracy on", "validation examples", *families)
    console.print(_table("Smallest difference it detects, in points", headings, measures))


def _figure(value: float) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _points(difference: float | None) -> str:
    return "none" if difference is None else f"{100 * difference:.1f}"


def _corpus_rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    corpus = plan["corpus"]
    rows = {**corpus["by_task"], "total": corpus}
    return [
        (n, *(f"{counts[k]:,}" for k in ("examples", "teacher_tokens", "student_tokens"))) for n, counts in rows.items()
    ]


def _rows(values: dict[str, Any], show: Callable[[Any], str]) -> list[tuple[str, ...]]:
    return [(name.replace("_", " "), show(value)) for name, value in values.items()]


def _table(title: str, headings: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int = 1) -> Any:
    """Its first `left` columns are words, the others figures."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", min_width=len(title))  # a title wraps at its table's width
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _time(hours: float) -> str:
    for unit, size in (("h", 1), ("min", 1 / 60)):
        if hours >= size:
            return f"{hours / size:.1f} {unit}"
    return f"{3600 * hours:.1f} s"


def _bytes(value: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value} B"


def print_findings(findings: list[Finding]) -> None:
    """Print a line each."""
    from rich.console import Console

    console = Console()
    for finding in findings:
        mark = "todo" if not finding.fine else "warn" if finding.warning else "ok  "
        line = f"{mark} {finding.subject}: {finding.says}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_store(facts: dict[str, Any]) -> None:
    """The summary on the terminal."""
    from rich.console import Console

    from stillroom.analysis.escaping import control_free

    console = Console()
    layout = facts["layout"]
    lines = [
        f"{facts['store']}: {facts['examples']:,} examples, {facts['tokens']:,} teacher tokens, "
        f"{facts['bytes'] / 1e6:.1f} MB in {facts['shards']} shards, "
        f"{'verified' if facts['verified'] else 'not verified'}, made {facts['created']}",
        f"a token: top {layout['top_k']} next tokens, imported, in {layout['dtype']}"
        if "hidden_mean_square" not in facts
        else f"a token: top {layout['top_k']} next tokens, hidden state of {layout['width']}, {layout['heads']} heads' "
        f"attention, in {layout['dtype']}; hidden mean square {facts['hidden_mean_square']:.4g}",
        *(
            f"{task}: {counts['examples']:,} examples, {counts['tokens']:,} tokens"
            for task, counts in facts["tasks"].items()
        ),
        *_layers_line(facts["layers"]),
        *_answers_line(facts),
        *(f"made from {key}: {value}" for key, value in facts["made_from"].items()),
    ]
    for line in lines:
        console.print(control_free(line), markup=False, highlight=False, soft_wrap=True)
    if "groups" in facts:
        _print_compared(console, facts["groups"])


def _layers_line(layers: dict[str, Sequence[Any]]) -> list[str]:
    kept = "; ".join(f"{signal} {_layers(of_signal)}" for signal, of_signal in layers.items())
    return [f"layers: {kept}"] if kept else []


def _norm(token: dict[str, Any]) -> str:
    return f"{token['hidden_norm']:.3g}" if "hidden_norm" in token else "–"


def _answers_line(facts: dict[str, Any]) -> list[str]:
    if "teacher_answers" not in facts:
        return []
    counts = facts["teacher_answers"]
    return [
        f"{counts['answers']:,} answers of the teacher's own: {counts['empty']:,} empty, "
        f"{counts['unended']:,} without an end"
    ]


def print_example(facts: dict[str, Any]) -> None:
    """The text cut into tokens, then a line per teacher token."""
    from rich.console import Console
    from rich.table import Table

    from stillroom.afterwards.inspection import visible

    console = Console()
    sides = [side for side in ("teacher", "student") if side in facts]
    for side in sides:
        cut = "".join(f"{visible(token['token'])}{'│' if token['shared'] else '·'}" for token in facts[side])
        console.print(f"{side} ({len(facts[side])} tokens): {cut}", markup=False, highlight=False, soft_wrap=True)
    if "pairs" in facts:
        says = "│ aligned token boundary, · boundary of this tokenizer alone; "
        says += f"{facts['covered']:.0%} of the student's tokens of text are aligned"
        console.print(says, markup=False, highlight=False, soft_wrap=True)
    if "teacher_answer" in facts:
        answer = facts["teacher_answer"]
        says = "its answer did not end" if answer is None else f"its answer: {visible(answer)}"
        console.print(f"teacher, asked itself, {says}", markup=False, highlight=False, soft_wrap=True)
    partner = dict(facts.get("pairs", []))
    table = Table(title="The teacher's tokens, and what it expects after each")
    for heading in ("#", "token", "end", "student #", "expects next", "tail", "other", "norm"):
        table.add_column(heading, justify="left" if heading in ("token", "expects next") else "right")
    for token in facts["teacher"]:
        expected = ", ".join(f"‘{visible(p['token'])}’ {p['probability']:.0%}" for p in token["predictions"])
        other = f"{token['other']:.1%}" if "other" in token else "–"
        cells = (
            token["position"],
            f"‘{visible(token['token'])}’",
            token["end"],
            partner.get(token["position"], "–"),
            expected,
        )
        table.add_row(*map(_plain, cells), f"{token['tail']:.1%}", other, _norm(token))
    console.print(table)


def _plain(cell: Any) -> str:
    from rich.markup import escape

    return escape(str(cell))


def print_answers(folder: Path) -> None:
    """A table of the groups, a line per question, and what makes numbers doubtful or worthless."""
    from rich.console import Console
    from rich.text import Text

    from stillroom.analysis.numbers import percent
    from stillroom.analysis.report import errors_of, evidence_of, warnings_of
    from stillroom.analysis.results import StudyResults
    from stillroom.analysis.tables import summaries
    from stillroom.analysis.verdicts import answer_questions

    results = StudyResults.read(folder)
    evidence = evidence_of(results, bootstrap=False)
    answers = answer_questions(evidence)
    level = f"{100 * (1 - results.analysis.alpha):g} %"
    title = f"{results.study['name']}: validation accuracy, and its difference in points with {level} interval"
    table = _summary_table(title, ("group",), "gap closed")
    for row in summaries(results, evidence, answers):
        cells = (percent(row.accuracy.mean), _gain(row), row.against, row.seeds, percent(row.closed))
        table.add_row(row.group, *cells, style="bold" if row.best else None)
    console = Console()
    console.print(table)
    for answer in answers:
        line = Text.assemble((answer.question, "bold"), " ", answer.short)
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)  # at words, where a person reads
    for error in errors_of(results):
        console.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True, style="bold red")
    warnings = warnings_of(results, evidence)
    for warning in warnings[:1] if results.missing else ():
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    if more := len(warnings) - bool(results.missing):
        console.print(f"{more} warning{'s' if more > 1 else ''} in the report.", markup=False, highlight=False)


def print_side_by_side(facts: dict[str, Any]) -> None:
    """What the studies differ in, a row per group and study, and each study's answer to each question."""
    from rich.console import Console
    from rich.text import Text

    from stillroom.analysis.numbers import percent

    console = Console()
    for field, values in facts["differ"].items():
        shown = "; ".join(f"{name}: {value}" for name, value in values.items())
        console.print(f"{field}: {shown}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
    table = _summary_table("Validation accuracy, and its difference in points", ("group", "study"))
    for group, rows in facts["groups"].items():
        for place, (name, row) in enumerate(rows.items()):
            accuracy, gain = percent(row.accuracy.mean), _gain(row)
            table.add_row("" if place else group, name, accuracy, gain, row.against, row.seeds)
    console.print(table)
    for question, answers in facts["questions"].items():
        console.print(Text(question, "bold"))
        for name, answer in answers.items():
            console.print(Text(f"  {name}: {answer}"), highlight=False, soft_wrap=not console.is_terminal)


def _summary_table(title: str, names: tuple[str, ...], *last: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    look: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0), "min_width": len(title)}
    table = Table(title=title, title_justify="left", **look)
    for name in names:
        table.add_column(name, min_width=12)
    for heading in ("accuracy", "gain (interval)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("over", min_width=9)
    for heading in ("seeds", *last):
        table.add_column(heading, justify="right")
    return table


def _gain(row: Summary) -> str:
    return f"{row.difference} ({row.interval})" if row.against else "–"
