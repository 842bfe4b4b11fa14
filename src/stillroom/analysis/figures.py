"""Figures of a report: colour-blind safe, legible in print; panels on the page, the whole as PDF and SVG beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from stillroom.analysis.evidence import Evidence, Finding
from stillroom.analysis.results import StudyResults
from stillroom.analysis.statistics import mean_interval
from stillroom.config import TERMS, WEAK_SIGNAL
from stillroom.evaluation.metrics import by_key

INK, FAINT, MUTED = "#1d1d1b", "#e3e3dd", "#5c5c57"
"""Text and axes, bands and grids, what stands back: the page gives them its own colours, light or dark."""
# Okabe & Ito's palette, which every common kind of colour blindness can tell apart
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", INK)
MARKERS = "osD^vPX*"
"""A second mark beside the colour, for prints without it."""


def _marker(number: int) -> str:
    """That of the group of this number: where colours come again, another one."""
    return MARKERS[(number + number // len(PALETTE)) % len(MARKERS)]


_PAGE_COLOURS = {INK: "--fg", FAINT: "--line", MUTED: "--mute", PALETTE[0]: "--blue"}

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titley": 1.0,  # no ticks above, so no search for a free place, which takes as long as drawing
    "grid.color": FAINT,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "stillroom",
    "pdf.fonttype": 42,
}
_WIDTH = 3.7
"""Inches of a panel: on a phone it fills the screen, and its letters are as large as the page's notes."""

Panel = Callable[[Any], None]
"""Draws on the axes it is given."""


@dataclass(frozen=True)
class Figure:
    """A figure of the report: its file name, its caption, and what it shows, for those who cannot see it."""

    name: str
    caption: str
    alt: str
    panels: Sequence[Panel]
    height: float
    """Inches of a panel."""
    key: Mapping[str, tuple[str, str]]
    """What colours stand for, each with its mark: a marker, or a line's style."""
    names: Sequence[str] = ("00.00%",)
    """What stands left of the axis; the longest makes the margin."""


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A fixed colour for each group, in the study's order."""
    return {group: PALETTE[n % len(PALETTE)] for n, group in enumerate(groups)}


def study_figures(results: StudyResults, evidence: Evidence, findings: Sequence[Finding]) -> list[Figure]:
    """Every figure there are data for, in the order of the report."""
    alpha, margin = evidence.analysis.alpha, evidence.analysis.equivalence_margin
    level, groups = f"{100 * (1 - alpha):g} %", results.groups
    rows = 0.6 + 0.3 * len(groups)
    marks = {group: (colour, _marker(n)) for n, (group, colour) in enumerate(group_colours(groups).items())}
    terms = [term for term in TERMS if len(results.history("train", f"{term}_loss"))]
    shown = [f for f in findings if f.by_seed and f.comparison.second != evidence.student]
    pairs = list(dict.fromkeys(_pair(f) for f in shown))
    across = 0.6 + 0.3 * len(pairs)
    of_measure = {
        measure: {_pair(f): f for f in shown if f.comparison.measure == measure} for measure in results.accuracy_keys
    }
    says = (
        f"Paired differences of accuracy, in percentage points. Points: seeds; bar: mean; line: its {level} interval; "
        f"band: the margin of equivalence, ±{100 * margin:g} points. Right of zero the first group is better."
    )
    lines = dict(zip(results.baseline_metrics, ((INK, "-"), (INK, ":")), strict=False))
    figures = [
        Figure(
            "differences",
            says,
            "Difference of each pair of groups at the same seed, overall and by task.",
            [partial(forest_panel, findings, pairs, margin, name) for name, findings in of_measure.items()]
            if pairs
            else [],
            across,
            {},
            pairs,
        ),
        Figure(
            "accuracy",
            f"Validation accuracy after the last epoch. Points: seeds; bar: mean; line: its {level} interval "
            f"(Student's t over seeds); vertical lines: the {' and the '.join(results.labels.values())}.",
            "Validation accuracy of each group, over all examples and by task.",
            [partial(accuracy_panel, results, alpha, measure) for measure in results.accuracy_keys],
            rows,
            lines,
            groups,
        ),
        Figure(
            "learning",
            "Learning curves: the mean over seeds, every seed a thin line. The task loss compares groups; the total "
            "loss does not, since its terms differ.",
            "Validation accuracy and validation task loss of each group by epoch.",
            [
                partial(curves_panel, results, "validation", "accuracy", "accuracy", True),
                partial(curves_panel, results, "validation", "task_loss", "task loss, nats per token", True),
            ],
            2.4,
            marks,
        ),
        Figure(
            "losses",
            "The loss terms over training, unweighted, by epoch: mean over seeds, training split.",
            "Each loss term by epoch and group.",
            [partial(curves_panel, results, "train", f"{term}_loss", term, False) for term in terms],
            2.2,
            marks,
        ),
        Figure(
            "gradients",
            "Each term's share of the gradient, weight included, over training: mean over seeds. "
            f"The dashed line is {WEAK_SIGNAL:.0%}.",
            "Share of the gradient of each loss term by optimizer step, one panel per group.",
            [
                partial(gradients_panel, results, group)
                for group in groups
                if (results.gradients["group"] == group).any()
            ],
            2.0,
            {term: (PALETTE[n], MARKERS[n]) for n, term in enumerate(TERMS) if term in terms},
        ),
        Figure(
            "coverage",
            "Alignment: student tokens that end where a teacher token ends; supervised predictions made from such "
            "a token; and aligned tokens that stand at the same position in both sequences.",
            "Alignment coverage by task.",
            [partial(coverage_panel, results.coverage)] if results.coverage else [],
            0.6 + 0.6 * len(results.coverage),
            dict(zip(_COVERAGE, ((colour, "s") for colour in PALETTE), strict=False)),
            list(results.coverage),
        ),
        Figure(
            "cost",
            "Time of an optimizer step in the fastest epoch of each trial, so that other work on the machine counts "
            "little. Points: seeds; bar: median.",
            "Milliseconds of an optimizer step by group.",
            [partial(cost_panel, results)],
            rows,
            {},
            groups,
        ),
    ]
    return [figure for figure in figures if figure.panels]


def _pair(finding: Finding) -> str:
    return f"{finding.comparison.first} − {finding.comparison.second}"


def accuracy_panel(results: StudyResults, alpha: float, measure: str, axis: Any) -> None:
    """Accuracy by group on one measure: every seed a mark, the mean a bar with its interval; baselines as lines."""
    key = results.accuracy_keys[measure]
    for name, style in zip(results.baseline_metrics, ("-", ":"), strict=False):
        measured = by_key(results.baseline_metrics[name])
        if key in measured:
            axis.axvline(measured[key], color=INK, ls=style, lw=1)
    for place, (group, colour) in enumerate(group_colours(results.groups).items()):
        values = np.array([trial.values[key] for trial in results.measured if trial.group == group])
        low, high = mean_interval(values, alpha) if len(values) else (np.nan, np.nan)
        _seeds(axis, values, place, colour, _marker(place), values.mean() if len(values) else np.nan, low, high)
    axis.set_title(measure)
    axis.set_yticks(range(len(results.groups)), results.groups)
    axis.set_ylim(len(results.groups) - 0.4, -0.6)
    low, high = axis.get_xlim()
    axis.set_xlim(max(-0.02, low), min(1.02, high))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.xaxis.set_major_locator(MaxNLocator(4))


def _seeds(
    axis: Any, values: np.ndarray, place: int, colour: str, marker: str, middle: float, low: float, high: float
) -> None:
    spread = place + (np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(len(values)))
    axis.scatter(values, spread, s=10, color=colour, marker=marker, alpha=0.6, zorder=3, linewidths=0)
    axis.vlines(middle, place - 0.33, place + 0.33, color=colour, lw=2.2, zorder=4)
    axis.hlines(place, low, high, color=colour, lw=1.2, zorder=4)


def forest_panel(findings: Mapping[str, Finding], pairs: Sequence[str], margin: float, title: str, axis: Any) -> None:
    """Every contrast on one measure with its seeds, mean and interval; in points."""
    axis.axvspan(-100 * margin, 100 * margin, color=FAINT, zorder=0, lw=0)
    axis.axvline(0, color=MUTED, lw=1)
    for place, name in enumerate(pairs):
        if name in findings:
            row = findings[name].comparison
            values = 100 * np.array(list(findings[name].by_seed.values()))
            figures = (100 * row.difference, 100 * row.low, 100 * row.high)
            _seeds(axis, values, place, PALETTE[0], "o", *figures)
    axis.set_title(title)
    axis.set_xlabel("percentage points")
    axis.set_yticks(range(len(pairs)), pairs)
    axis.set_ylim(len(pairs) - 0.4, -0.6)


def curves_panel(results: StudyResults, split: str, measure: str, title: str, seeds: bool, axis: Any) -> None:
    """One number of all tasks together by epoch and group, with every seed's own line if `seeds`."""
    rows: pd.DataFrame = results.history(split, measure)
    for number, (group, colour) in enumerate(group_colours(results.groups).items()):
        curves = rows[rows["group"] == group].pivot_table(index="epoch", columns="seed", values="value")
        if len(curves):
            if seeds:
                axis.plot(curves.index, curves.to_numpy(), color=colour, lw=0.6, alpha=0.35)
            axis.plot(curves.index, curves.mean(axis=1), color=colour, marker=_marker(number), ms=4)
    axis.set_title(title)
    axis.set_xlabel("epoch")
    if rows["epoch"].nunique() == 1:
        axis.set_xticks([int(rows["epoch"].iloc[0])])
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if measure == "accuracy":
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    elif split == "train":
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])


def gradients_panel(results: StudyResults, group: str, axis: Any) -> None:
    """A group's shares of the gradient by step, on a logarithmic axis so that a faint term is seen."""
    gradients = results.gradients[results.gradients["group"] == group]
    for number, term in enumerate(TERMS):
        means = gradients[gradients["term"] == term].groupby("step")["share"].mean()
        if len(means):
            axis.plot(means.index, means, color=PALETTE[number], marker=MARKERS[number], ms=3, lw=1.2)
    axis.axhline(WEAK_SIGNAL, color=MUTED, ls="--", lw=0.8)
    axis.set_title(group)
    axis.set_yscale("log")
    axis.set_ylim(top=1.5)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))


_COVERAGE = ("tokens aligned", "predictions aligned", "at the same position")


def coverage_panel(coverage: Mapping[str, Mapping[str, float]], axis: Any) -> None:
    """Alignment coverage by task."""
    for number, name in enumerate(_COVERAGE):
        values = [
            (
                task_coverage["token_coverage"],
                task_coverage["prediction_coverage"],
                task_coverage["same_position"] / max(task_coverage["aligned"], 1),
            )[number]
            for task_coverage in coverage.values()
        ]
        places = np.arange(len(coverage)) + 0.27 * (number - 1)
        drawn = axis.barh(places, values, 0.25, color=PALETTE[number], label=name)
        axis.bar_label(drawn, [f"{100 * value:.1f}" for value in values], fontsize=7, padding=2)
    axis.set_yticks(range(len(coverage)), list(coverage))
    axis.set_ylim(len(coverage) - 0.5, -0.5)
    axis.set_xlim(0, 1.12)
    axis.xaxis.set_major_formatter(PercentFormatter(1))


def cost_panel(results: StudyResults, axis: Any) -> None:
    """Milliseconds of a step in each trial's fastest epoch, by group."""
    for place, (group, colour) in enumerate(group_colours(results.groups).items()):
        milliseconds = 1000 * results.costs.loc[results.costs["group"] == group, "fastest_step_seconds"].to_numpy()
        middle = float(np.median(milliseconds)) if len(milliseconds) else np.nan
        _seeds(axis, milliseconds, place, colour, _marker(place), middle, np.nan, np.nan)
    axis.set_xlabel("milliseconds")
    axis.set_xlim(left=0)
    axis.set_yticks(range(len(results.groups)), results.groups)
    axis.set_ylim(len(results.groups) - 0.4, -0.6)


def save_figure(figure: Figure, folder: Path) -> Path:
    """Write PDF and SVG, all panels side by side, without dates so that the same data give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(figure)
    # by the formats' own methods: `savefig` draws once more before each, to lay out what is laid out
    with mpl.rc_context(_STYLE):
        FigureCanvasPdf(drawn).print_pdf(folder / f"{figure.name}.pdf", metadata={"CreationDate": None})
        FigureCanvasSVG(drawn).print_svg(folder / f"{figure.name}.svg", metadata={"Date": None})
    return folder / f"{figure.name}.pdf"


def draw(figure: Figure) -> Any:
    """All panels side by side, four in a row, what colours stand for above them."""
    across = min(4, len(figure.panels))
    down, wide = -(-len(figure.panels) // across), max(0.8 * _WIDTH, _left(figure) + 1.8)
    columns = max(1, min(len(figure.key), int(wide * across / (_text_width(figure.key) + 0.6))))
    key = 0.1 + 0.2 * -(-len(figure.key) // columns) if figure.key else 0
    with mpl.rc_context(_STYLE):
        canvas = Canvas(figsize=(wide * across, figure.height * down + key))
        for number, panel in enumerate(figure.panels):
            _draw(
                canvas, figure, panel, (wide * (number % across), figure.height * (down - 1 - number // across)), wide
            )
        if figure.key:
            canvas.legend(
                [_handle(*look) for look in figure.key.values()],
                list(figure.key),
                frameon=False,
                loc="upper left",
                borderpad=0.2,
                ncols=columns,
            )
    return canvas


def _text_width(names: Iterable[str]) -> float:
    """Inches that the longest of the names takes, about: to measure text takes as long as drawing it."""
    return 5.6 * max(map(len, names), default=0) / 72


def _left(figure: Figure) -> float:
    """Inches beside a panel, for the names of what it shows."""
    return 12 / 72 + _text_width(figure.names)


def _draw(canvas: Any, figure: Figure, panel: Panel, corner: tuple[float, float], wide: float) -> Any:
    """One panel in its own part of the canvas, from its lower left corner, in inches."""
    whole = canvas.get_size_inches()
    axis = canvas.add_axes((0, 0, 1, 1))
    panel(axis)
    left, below = min(wide - 1.4, _left(figure)), (32 if axis.get_xlabel() else 18) / 72
    above = (16 if axis.get_title() else 5) / 72
    size = (0.97 * wide - left, figure.height - below - above)
    axis.set_position((*((corner[0] + left, corner[1] + below) / whole), *(size / whole)))
    return axis


def _handle(colour: str, mark: str) -> Any:
    if mark in ("-", ":"):
        return Line2D([], [], color=colour, ls=mark)
    return Line2D([], [], color=colour, ls="", marker=mark)


def inline_panels(figure: Figure) -> list[Markup]:
    """Each panel as SVG for the page: its letters are text, escaped, and its greys are the page's own."""
    found = []
    for panel in figure.panels:
        with mpl.rc_context({**_STYLE, "svg.fonttype": "none"}):
            canvas = Canvas(figsize=(_WIDTH, figure.height))
            axis = _draw(canvas, figure, panel, (0, 0), _WIDTH)
            canvas.patch.set_visible(False)
            axis.patch.set_visible(False)
            written = io.StringIO()
            FigureCanvasSVG(canvas).print_svg(written, metadata={"Date": None})
        found.append(Markup(_embedded(written.getvalue())))
    return found


def _embedded(svg: str) -> str:
    """An SVG file as part of a page: no header, no names that two of them share, colours that follow the page."""
    body = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S
    )
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]+\")[^>]*>", r"<svg \1 aria-hidden='true'>", body, count=1)
    body = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px var(--sans)", body)
    body = re.sub(r"font: (\w+) ([\d.]+)px [^;\"]+", r"font: \1 \2px var(--sans)", body)
    for colour in _PAGE_COLOURS:
        body = body.replace(colour.lower(), page_colour(colour))
    return body.strip()


def page_colour(colour: str) -> str:
    """A figure's colour as the page has it, light or dark."""
    return f"var({_PAGE_COLOURS[colour]})" if colour in _PAGE_COLOURS else colour
