"""How numbers, and lists of names, are written: one style for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percent(share: float) -> str:
    """A share of 1 in percent: `90.9 %`, with a space that no line is broken at."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}\u00a0%"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign: `+5.1`, `−0.3`."""
    return "–" if math.isnan(difference) else f"{100 * difference:+z.1f}".replace("-", "−")


def interval(low: float, high: float) -> str:
    """Both ends in points: `+3.0 … +7.2`."""
    return "–" if math.isnan(low) else f"{points(low)} … {points(high)}"


def p_value(p: float) -> str:
    """Three decimals: `0.016`, `<0.001`."""
    if math.isnan(p):
        return "–"
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def decimal(value: float, digits: int = 2) -> str:
    """A plain number: `−0.31`."""
    return "–" if math.isnan(value) else f"{value:z.{digits}f}".replace("-", "−")


def equals(p: float) -> str:
    """What stands after a p's name in a sentence: `= 0.016`, `< 0.001`."""
    shown = p_value(p)
    return f"< {shown[1:]}" if shown.startswith("<") else f"= {shown}"


def duration(seconds: float) -> str:
    """Seconds as minutes, or hours from two on."""
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: `a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
