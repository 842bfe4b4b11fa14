"""Figures of a report: colour-blind safe, legible in print; PNG for the page, PDF and SVG beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator, PercentFormatter

from stillroom.analysis.results import StudyResults
from stillroom.analysis.statistics import mean_interval
from stillroom.analysis.verdicts import Answer, Finding
from stillroom.config import TERMS, WEAK_SIGNAL
from stillroom.evaluation.metrics import by_key

# Okabe & Ito's palette, which every common kind of colour blindness can tell apart
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")
MARKERS = "osD^vPX*"
"""A second mark beside the colour, for prints without it."""

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "figure.dpi": 150,
    "svg.hashsalt": "stillroom",
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Figure:
    """A figure of the report: its file name, its caption, and what it shows, for those who cannot see it."""

    name: str
    caption: str
    alt: str
    draw: Callable[[], Any]


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A fixed colour for each group, in the study's order."""
    return {group: PALETTE[n % len(PALETTE)] for n, group in enumerate(groups)}


def study_figures(results: StudyResults, answers: Sequence[Answer], margin: float, alpha: float) -> list[Figure]:
    """Every figure there are data for, in the order of the report."""
    level = f"{100 * (1 - alpha):g} %"
    figures = [
        Figure(
            "accuracy",
            f"Validation accuracy after the last epoch. Every seed a mark, the mean a bar, its {level} interval "
            f"(Student's t over seeds) a line; horizontal lines are the {' and the '.join(results.labels.values())}.",
            "Validation accuracy of each group, over all examples and by task.",
            lambda: accuracy_figure(results, alpha),
        ),
        Figure(
            "learning",
            "Learning curves: the mean over seeds, every seed a thin line. The task loss compares groups; the total "
            "loss does not, since its terms differ.",
            "Validation accuracy and validation task loss of each group by epoch.",
            lambda: learning_figure(results),
        ),
    ]
    if _terms(results):
        figures.append(
            Figure(
                "losses",
                "The loss terms over training, unweighted, by epoch: mean over seeds, training part.",
                "Each loss term by epoch and group.",
                lambda: losses_figure(results),
            )
        )
    if any(finding.by_seed for answer in answers for finding in answer.findings):
        figures.append(
            Figure(
                "differences",
                f"Paired differences of accuracy. Every seed a mark, the mean a bar with its {level} interval; the "
                f"band is the margin of equivalence, ±{100 * margin:g} points. Right of the line the first group is "
                "better.",
                "Difference of each declared pair of groups at the same seed, overall and by task.",
                lambda: forest_figure(answers, results, margin),
            )
        )
    if len(results.gradients):
        figures.append(
            Figure(
                "gradients",
                "Each term's share of the gradient, weight included, over training: mean over seeds. "
                f"The dashed line is {WEAK_SIGNAL:.0%}.",
                "Share of the gradient of each loss term by optimizer step, one panel a group.",
                lambda: gradients_figure(results),
            )
        )
    if results.coverage:
        figures.append(
            Figure(
                "coverage",
                "Alignment: student tokens that end where a teacher token ends; supervised predictions made from such "
                "a token; and aligned tokens that stand at the same position in both sequences.",
                "Alignment coverage by task.",
                lambda: coverage_figure(results.coverage),
            )
        )
    figures.append(
        Figure(
            "cost",
            "What a trial costs: mean over seeds.",
            "Training and evaluation time, training tokens and disk space of a trial, by group.",
            lambda: cost_figure(results),
        )
    )
    return figures


def accuracy_figure(results: StudyResults, alpha: float) -> Any:
    """Accuracy by task and group: every seed a mark, the mean a bar with its interval; baselines as lines."""
    keys = results.accuracy_keys
    baselines = {name: by_key(metrics) for name, metrics in results.baseline_metrics.items()}
    colours = group_colours(results.groups)
    figure, axes = plt.subplots(1, len(keys), figsize=(2.6 * len(keys), 3.6), sharey=True, squeeze=False)
    for axis, (task, key) in zip(axes[0], keys.items(), strict=True):
        for place, group in enumerate(results.groups):
            values = np.array([trial.values[key] for trial in results.measured if trial.group == group])
            if len(values):
                spread = place + np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [place]
                axis.scatter(spread, values, s=14, color=colours[group], marker=MARKERS[place % 8], alpha=0.7, zorder=3)
                axis.hlines(values.mean(), place - 0.32, place + 0.32, color=colours[group], lw=2.2, zorder=4)
                low, high = mean_interval(values, alpha)
                axis.vlines(place, low, high, color=colours[group], lw=1.2, zorder=4)
        for name, style in zip(results.labels.values(), ("-", ":"), strict=True):
            if key in baselines.get(name, {}):
                axis.axhline(baselines[name][key], color="0.35", ls=style, lw=1, label=name)
        axis.set_title(task)
        axis.set_xticks(range(len(results.groups)), results.groups, rotation=60, ha="right")
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    low, high = axes[0][0].get_ylim()
    axes[0][0].set_ylim(max(-0.02, low), min(1.02, high))
    axes[0][0].set_ylabel("validation accuracy")
    if axes[0][-1].get_legend_handles_labels()[1]:
        figure.legend(*axes[0][-1].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper right")
    return figure


def forest_figure(answers: Sequence[Answer], results: StudyResults, margin: float) -> Any:
    """Every contrast with its seeds, mean and interval, one panel a measure; in points."""
    findings: dict[str, dict[str, Finding]] = {}
    for answer in answers:
        for finding in answer.findings:
            row = finding.comparison
            findings.setdefault(row.measure, {})[f"{row.first} − {row.second}"] = finding
    names = list(dict.fromkeys(name for own in findings.values() for name in own))
    order = [measure for measure in results.accuracy_keys if measure in findings] or [results.overall]
    figure, axes = plt.subplots(
        1, len(order), figsize=(1.6 + 2.4 * len(order), 1.3 + 0.36 * len(names)), sharey=True, squeeze=False
    )
    for axis, measure in zip(axes[0], order, strict=True):
        axis.axvspan(-100 * margin, 100 * margin, color="0.9", zorder=0)
        axis.axvline(0, color="0.35", lw=1)
        for place, name in enumerate(names):
            found = findings.get(measure, {}).get(name)
            if found is None or not found.by_seed:
                continue
            row = found.comparison
            values = 100 * np.array(list(found.by_seed.values()))
            axis.scatter(values, [place] * len(values), s=12, color="0.45", alpha=0.7, zorder=3)
            axis.hlines(place, 100 * row.low, 100 * row.high, color=PALETTE[0], lw=1.6, zorder=4)
            axis.vlines(100 * row.difference, place - 0.25, place + 0.25, color=PALETTE[0], lw=2.4, zorder=5)
        axis.set_title(measure)
        axis.set_xlabel("points")
        axis.set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def learning_figure(results: StudyResults) -> Any:
    """Validation accuracy and task loss by epoch."""
    panels = {
        "accuracy": "validation accuracy",
        "task_loss": "validation task loss, nats a token",
    }
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), squeeze=False)
    for axis, (measure, label) in zip(axes[0], panels.items(), strict=True):
        _curves(axis, results.history("validation", measure), results.groups, seeds=True)
        axis.set_ylabel(label)
    axes[0][0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    return figure


def losses_figure(results: StudyResults) -> Any:
    """Every loss term by epoch."""
    terms = _terms(results)
    figure, axes = plt.subplots(1, len(terms), figsize=(1.4 + 2.5 * len(terms), 3.2), squeeze=False)
    for axis, term in zip(axes[0], terms, strict=True):
        _curves(axis, results.history("train", f"{term}_loss"), results.groups, seeds=False)
        axis.set_title(term)
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("loss")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right center")
    return figure


def _terms(results: StudyResults) -> list[str]:
    """The loss terms that some trial was trained with."""
    return [term for term in TERMS if len(results.history("train", f"{term}_loss"))]


def _curves(axis: Any, rows: pd.DataFrame, groups: Sequence[str], seeds: bool) -> None:
    colours = group_colours(groups)
    for number, group in enumerate(groups):
        own = rows[rows["group"] == group].pivot_table(index="epoch", columns="seed", values="value")
        if not len(own):
            continue
        if seeds:
            axis.plot(own.index, own.to_numpy(), color=colours[group], lw=0.6, alpha=0.35)
        axis.plot(own.index, own.mean(axis=1), color=colours[group], marker=MARKERS[number % 8], ms=4, label=group)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def gradients_figure(results: StudyResults) -> Any:
    """Share of the gradient by step, a panel a group, on a logarithmic axis so that a faint term is seen."""
    groups = [group for group in results.groups if (results.gradients["group"] == group).any()]
    figure, axes = plt.subplots(1, len(groups), figsize=(1.4 + 1.9 * len(groups), 3), sharey=True, squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        own = results.gradients[results.gradients["group"] == group]
        for number, term in enumerate(TERMS):
            means = own[own["term"] == term].groupby("step")["share"].mean()
            if len(means):
                axis.plot(means.index, means, color=PALETTE[number], marker=MARKERS[number], ms=3, lw=1.2, label=term)
        axis.axhline(WEAK_SIGNAL, color="0.35", ls="--", lw=0.8)
        axis.set_title(group, fontsize=8)
        axis.set_yscale("log")
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("share of the gradient")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), frameon=False, fontsize=8, loc="outside right center")
    return figure


def coverage_figure(coverage: dict[str, dict[str, float]]) -> Any:
    """Alignment coverage by task."""
    bars = {
        "tokens aligned": [own["token_coverage"] for own in coverage.values()],
        "predictions aligned": [own["prediction_coverage"] for own in coverage.values()],
        "at the same position": [own["same_position"] / max(own["aligned"], 1) for own in coverage.values()],
    }
    figure, axis = plt.subplots(figsize=(1.5 + 1.7 * len(coverage), 3))
    for number, (name, values) in enumerate(bars.items()):
        places = np.arange(len(coverage)) + 0.27 * (number - 1)
        drawn = axis.bar(places, values, 0.25, color=PALETTE[number], label=name, hatch=("", "//", "..")[number])
        axis.bar_label(drawn, [f"{100 * value:.1f}" for value in values], fontsize=7)
    axis.set_xticks(range(len(coverage)), list(coverage))
    axis.set_ylim(0, 1.08)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def cost_figure(results: StudyResults) -> Any:
    """Time, tokens and disk of a trial, by group."""
    means = results.costs.groupby("group", sort=False)[["train_seconds", "evaluation_seconds", "tokens", "disk_bytes"]]
    table = means.mean().reindex([group for group in results.groups if group in set(results.costs["group"])])
    places = np.arange(len(table))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4), squeeze=False)
    minutes = table[["train_seconds", "evaluation_seconds"]] / 60
    axes[0][0].bar(places, minutes["train_seconds"], color=PALETTE[0], label="training")
    axes[0][0].bar(
        places,
        minutes["evaluation_seconds"],
        bottom=minutes["train_seconds"],
        color=PALETTE[1],
        hatch="//",
        label="evaluation",
    )
    figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=2)
    axes[0][1].bar(places, table["tokens"] / 1000, color=PALETTE[2])
    axes[0][2].bar(places, table["disk_bytes"] / 1e6, color=PALETTE[3])
    for axis, label in zip(axes[0], ("minutes", "thousand training tokens", "MB on disk"), strict=True):
        axis.set_ylabel(label)
        axis.set_xticks(places, list(table.index), rotation=60, ha="right")
    return figure


def save_figure(figure: Figure, folder: Path) -> Path:
    """Draw it and write PNG, PDF and SVG without dates in them, so that the same data give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({**_STYLE, "figure.constrained_layout.use": True}):
        drawn = figure.draw()
        drawn.savefig(folder / f"{figure.name}.png", metadata={"Software": None})
        drawn.set_layout_engine("none")  # what was laid out for the first is kept for the others
        drawn.savefig(folder / f"{figure.name}.pdf", metadata={"CreationDate": None})
        drawn.savefig(folder / f"{figure.name}.svg", metadata={"Date": None})
        plt.close(drawn)
    return folder / f"{figure.name}.png"
