"""Groups that ought to differ and do not: trials of different objectives that are alike to the last bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

_LOSSES = ("train_task_loss", "validation_task_loss")
_TOTALS = ("train_loss", "validation_loss")
"""They have each term's value in them, though it may never have reached a weight of the model."""


def identical_groups(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[int]]:
    """Seeds at which two groups' trials are identical though their objectives differ, by pair of groups.

    `results`: `result.json` of finished trials. Identical: the same weights after every epoch, by their digests, and
    the same task losses. Without digests: every loss and accuracy that both trials have, after every epoch.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for first, second in combinations(results, 2):
        one, other = first["config"], second["config"]
        if one["seed"] != other["seed"] or one["distill_type"] == other["distill_type"]:
            continue
        if _effective(one["objective"]) != _effective(other["objective"]) and _identical(first, second):
            found.setdefault((one["distill_type"], other["distill_type"]), []).append(one["seed"])
    return found


def _effective(objective: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The terms that are on, each with its settings."""
    return {term: settings for term, settings in objective.items() if settings["weight"] > 0}


def _identical(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    pairs = list(zip(first["epochs"], second["epochs"], strict=False))
    return len(first["epochs"]) == len(second["epochs"]) and all(_same_epoch(*pair) for pair in pairs)


def _same_epoch(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if "weights" in one and "weights" in other:
        names = [name for name in _LOSSES if name in one or name in other]
        return one["weights"] == other["weights"] and all(_same(one.get(n), other.get(n)) for n in names)
    names = [name for name in one if name in other and _is_measured(name)]
    return bool(names) and all(_same(one[name], other[name]) for name in names)


def _is_measured(name: str) -> bool:
    return name.startswith(("train_", "validation_")) and not name.endswith("_seconds") and name not in _TOTALS


def _same(one: Any, other: Any) -> bool:
    """Whether two numbers are one; what is not finite says nothing."""
    return one is not None and other is not None and math.isfinite(one) and bool(one == other)
