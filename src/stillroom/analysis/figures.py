"""Figures of a report: colour-blind safe, legible in print; PNG for the page, PDF and SVG beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from stillroom.analysis.frame import accuracy_columns

# Okabe & Ito's palette, which every common kind of colour blindness can tell apart
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#000000")

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 150,
    "svg.hashsalt": "stillroom",
    "pdf.fonttype": 42,
}


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A fixed colour for each group, in the study's order."""
    return {group: PALETTE[n % len(PALETTE)] for n, group in enumerate(groups)}


def accuracy_figure(frame: pd.DataFrame, groups: Sequence[str], untrained: dict[str, dict[str, float]]) -> Any:
    """Accuracy by task and group: every seed a dot, the mean a bar across; untrained models as lines."""
    columns = {"all": "validation_accuracy", **accuracy_columns(frame)}
    colours = group_colours(groups)
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(columns), figsize=(2.6 * len(columns), 3.4), sharey=True, squeeze=False)
        for axis, (task, column) in zip(axes[0], columns.items(), strict=True):
            for place, group in enumerate(groups):
                values = frame.loc[frame["config/distill_type"] == group, column].to_numpy()
                if len(values):
                    axis.scatter([place] * len(values), values, s=18, color=colours[group], alpha=0.75, zorder=3)
                    axis.hlines(values.mean(), place - 0.3, place + 0.3, color=colours[group], lw=2.5, zorder=4)
            for name, style in (("teacher", "-"), ("untouched student", ":")):
                if column in untrained.get(name, {}):
                    axis.axhline(untrained[name][column], color="0.35", ls=style, lw=1, label=name)
            axis.set_title(task)
            axis.set_xticks(range(len(groups)), groups, rotation=60, ha="right")
        axes[0][0].set_ylabel("validation accuracy")
        axes[0][-1].legend(frameon=False, fontsize=7, loc="best")
        figure.tight_layout()
    return figure


def save_figure(figure: Any, folder: Path, name: str) -> Path:
    """Write PNG, PDF and SVG without dates in them; returns the PNG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
    return folder / f"{name}.png"
