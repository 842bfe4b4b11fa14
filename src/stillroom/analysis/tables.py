"""The report's tables as text: what varies in columns, what does not said once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillroom.analysis.numbers import decimal, interval, p_value, points
from stillroom.analysis.verdicts import Finding


@dataclass(frozen=True)
class ContrastTable:
    """A question's contrasts."""

    constants: Mapping[str, str]
    """What every row has in common, by name."""
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_COLUMNS = {
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
_USUALLY_CONSTANT = {
    "seeds": lambda f: str(f.comparison.seeds),
    "contrasts in the family": lambda f: str(f.family),
    "smallest p": lambda f: p_value(f.comparison.smallest_p),
    "detectable d_z": lambda f: decimal(f.comparison.detectable),
}


def contrast_table(findings: Sequence[Finding]) -> ContrastTable:
    """A row a contrast and measure: first those over all tasks together, as the findings come."""
    columns = dict(_COLUMNS)
    if all(finding.family == 1 for finding in findings):
        del columns["adjusted p"]
    constants = {}
    for name, show in _USUALLY_CONSTANT.items():
        values = {show(finding) for finding in findings}
        if len(values) == 1:
            constants[name] = values.pop()
        else:
            columns[name] = show
    rows = tuple(tuple(show(finding) for show in columns.values()) for finding in findings)
    return ContrastTable(constants, tuple(columns), rows)
