"""The report's tables as text: what varies in columns, what does not said once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillroom.analysis.evidence import Evidence, Finding
from stillroom.analysis.frame import Spread, group_table
from stillroom.analysis.numbers import decimal, duration, interval, p_value, percent, points
from stillroom.analysis.results import StudyResults
from stillroom.analysis.verdicts import Answer


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    constants: Mapping[str, str]
    """What every row has in common, by name."""
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_COLUMNS: dict[str, Callable[[Finding], str]] = {
    "contrast": lambda f: f"{f.comparison.first} − {f.comparison.second}",
    "on": lambda f: f.comparison.measure,
    "verdict": lambda f: f.verdict,
    "difference": lambda f: points(f.comparison.difference),
    "interval": lambda f: interval(f.comparison.low, f.comparison.high),
    "with examples": lambda f: interval(*f.bootstrap),
    "p": lambda f: p_value(f.comparison.p),
    "adjusted p": lambda f: p_value(f.comparison.adjusted_p),
    "d_z": lambda f: decimal(f.comparison.effect_size),
    "TOST p": lambda f: p_value(f.equivalence),
}
_OFTEN_CONSTANT: dict[str, Callable[[Finding], str]] = {
    "seeds": lambda f: str(f.comparison.seeds),
    "contrasts in the family": lambda f: str(f.family),
    "smallest p": lambda f: p_value(f.comparison.smallest_p),
    "detectable d_z": lambda f: decimal(f.comparison.detectable),
}


def contrast_table(findings: Sequence[Finding]) -> Table:
    """A row a contrast and measure: first those over all tasks together, as the findings come."""
    shown = {k: v for k, v in _COLUMNS.items() if k != "adjusted p" or any(f.family > 1 for f in findings)}
    rows = [{name: show(f) for name, show in (shown | _OFTEN_CONSTANT).items()} for f in findings]
    return _table(rows, _OFTEN_CONSTANT)


def _table(rows: Sequence[Mapping[str, str]], said_once: Iterable[str]) -> Table:
    """A table of these rows; a column of `said_once` that has one value throughout becomes a constant."""
    values = {name: dict.fromkeys(row[name] for row in rows) for name in said_once}
    constants = {name: next(iter(distinct)) for name, distinct in values.items() if len(distinct) == 1}
    headings = tuple(name for name in rows[0] if name not in constants)
    return Table(constants, headings, tuple(tuple(row[name] for name in headings) for row in rows))


@dataclass(frozen=True)
class Summary:
    """A group's row of the first table."""

    group: str
    accuracy: Spread
    """Over all tasks together."""
    best: bool
    """No group's mean is higher."""
    against: str
    """What it is compared with; empty if with nothing."""
    difference: str
    interval: str
    verdict: str
    seeds: str
    closed: float
    """Share of the gap between the student before training and the teacher that it closes; NaN without a gap."""

    @property
    def plain(self) -> dict[str, Any]:
        """All of it for JSON, which has no NaN."""
        numbers = {"accuracy": self.accuracy.mean, "accuracy_std": self.accuracy.std, "gap_closed": self.closed}
        texts = {name: getattr(self, name) for name in ("against", "difference", "interval", "verdict", "seeds")}
        return {name: None if math.isnan(value) else value for name, value in numbers.items()} | texts


def summaries(results: StudyResults, evidence: Evidence, answers: Sequence[Answer]) -> list[Summary]:
    """The teacher and the student before training, then each group: accuracy, what it gains, the gap closed."""
    keys = {results.overall: results.accuracy_keys[results.overall]}
    table = group_table(results.measured, results.groups, results.baseline_metrics, keys)
    accuracy = {row.name: row.cells[results.overall] for row in table}
    teacher, student = (accuracy.get(label) for label in results.labels.values())
    gap = teacher.mean - student.mean if teacher and student else math.nan
    best = max((accuracy[group].mean for group in results.groups if not math.isnan(accuracy[group].mean)), default=1.0)
    found = {
        (f.comparison.first, f.comparison.second): f
        for answer in answers
        for f in answer.findings
        if f.comparison.measure == results.overall
    }
    rows = []
    for row in table:
        spread, is_group = accuracy[row.name], row.name in results.groups
        pair = evidence.baseline_of(row.name) if is_group else None
        finding = found.get(pair) if pair else None
        rows.append(
            Summary(
                group=row.name,
                accuracy=spread,
                best=is_group and spread.mean == best,
                against=finding.comparison.second if finding else "",
                difference=points(finding.comparison.difference) if finding else "–",
                interval=interval(finding.comparison.low, finding.comparison.high) if finding else "–",
                verdict=finding.verdict if finding else "",
                seeds=_seeds(row.seeds, finding) if is_group else "–",
                closed=(spread.mean - student.mean) / gap if student and gap > 0 else math.nan,
            )
        )
    return rows


def _seeds(trained: int, finding: Finding | None) -> str:
    """Those of the accuracy, and of the difference where it has others."""
    compared = finding.comparison.seeds if finding else 0
    return f"{trained} ({compared} compared)" if compared not in (0, trained) else str(trained)


def trial_table(results: StudyResults) -> Table:
    """A row a finished trial, in the study's order."""
    costs = {(row["group"], row["seed"]): row for row in results.costs.to_dict("records")}
    rows = []
    for result, trial in zip(results.finished, results.measured, strict=True):
        cost = costs[trial.group, trial.seed]
        loss = trial.values.get(("validation", None, "task_loss"), math.nan)
        rows.append(
            {
                "group": trial.group,
                "seed": str(trial.seed),
                **{name: percent(trial.values.get(key, math.nan)) for name, key in results.accuracy_keys.items()},
                "task loss": decimal(loss, 3),
                "ms per step": decimal(1000 * cost["fastest_step_seconds"], 1),
                "steps": str(result["step"]),
                "skipped steps": str(result.get("skipped_steps", 0)),
                "training tokens": str(int(cost["tokens"])),
                "MB on disk": decimal(cost["disk_bytes"] / 1e6, 1),
            }
        )
    return _table(rows, ("steps", "skipped steps", "training tokens"))


def harness_table(results: StudyResults) -> Table:
    """The baselines and each group: what lm-evaluation-harness says of them, in its own numbers."""
    keys = results.harness_keys
    rows = []
    for row in group_table(results.measured, results.groups, results.test_metrics, keys):
        cells = {name: _mean_and_spread(cell) for name, cell in row.cells.items()}
        rows.append({"group": row.name, "seeds": str(row.seeds) if row.name in results.groups else "baseline", **cells})
    return _table(rows, ())


def _mean_and_spread(cell: Spread) -> str:
    return decimal(cell.mean, 4) + ("" if math.isnan(cell.std) else f" ± {decimal(cell.std, 4)}")


def cost_table(results: StudyResults) -> Table:
    """A row a group: what a trial takes."""
    rows = []
    for group in results.groups:
        costs = results.costs[results.costs["group"] == group]
        if len(costs):
            pace = 1000 * costs["fastest_step_seconds"]
            rows.append(
                {
                    "group": group,
                    "ms per step, median": decimal(pace.median(), 1),
                    "fastest … slowest trial": f"{decimal(pace.min(), 1)} … {decimal(pace.max(), 1)}",
                    "training tokens": f"{costs['tokens'].mean():.0f}",
                    "MB on disk": decimal(costs["disk_bytes"].mean() / 1e6, 1),
                }
            )
    return _table(rows, ("training tokens", "MB on disk"))


def stage_table(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row a stage of `run.json`; what all have in common, packages above all, is said once."""
    energy = any(facts.get("gpu_joules") for facts in stages.values())
    rows = []
    for stage, facts in stages.items():
        machine, joules = facts["hardware"], facts.get("gpu_joules")
        gpus = ", ".join(machine["gpus"])
        rows.append(
            {
                "stage": stage,
                "finished": str(facts["finished"]),
                "last run took": duration(facts["seconds"]) if "seconds" in facts else "–",
                **({"GPU energy": f"{joules / 1000:.1f} kJ" if joules else "–"} if energy else {}),
                "commit": str(facts["commit"] or "not a checkout"),
                "hardware": "; ".join((machine["platform"], f"{machine['cores']} cores", gpus or "no GPU")),
                "packages": ", ".join(f"{name} {number}" for name, number in facts["versions"].items()),
            }
        )
    return _table(rows, ("commit", "hardware", "packages"))


def kind_table(results: StudyResults) -> Table:
    """A row a kind of text: how much of it is aligned, and the L_KD that each group is left with."""
    rows = [
        {
            "kind of text": kind,
            "student tokens": str(counts["tokens"]),
            "tokens aligned": percent(counts["aligned"] / counts["tokens"]),
            "predictions": str(counts["predictions"]),
            "predictions aligned": percent(
                counts["aligned_predictions"] / counts["predictions"] if counts["predictions"] else math.nan
            ),
            **{
                f"KD loss, {group}": decimal(losses.get(kind, math.nan), 3)
                for group, losses in results.kind_losses.items()
            },
        }
        for kind, counts in results.kinds.items()
    ]
    return _table(rows, ())
