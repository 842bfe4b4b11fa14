"""Groups that ought to differ and do not: trials of different objectives that are alike to the last bit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from stillroom.evaluation.metrics import Key, by_key

_TASK_LOSSES: tuple[Key, ...] = (("train", None, "task_loss"), ("validation", None, "task_loss"))
_TOTAL = "loss"
"""It has each term's value in it, though it may never have reached a weight of the model."""


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
    first, second = by_key(one["metrics"]), by_key(other["metrics"])
    if "weights" in one and "weights" in other:
        losses = [key for key in _TASK_LOSSES if key in first or key in second]
        return one["weights"] == other["weights"] and all(_same(first.get(k), second.get(k)) for k in losses)
    keys = [key for key in first if key in second and key[2] != _TOTAL]
    return bool(keys) and all(_same(first[key], second[key]) for key in keys)


def _same(one: Any, other: Any) -> bool:
    """Whether two numbers are one; what is not finite says nothing."""
    return one is not None and other is not None and math.isfinite(one) and bool(one == other)
