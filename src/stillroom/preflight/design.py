"""What a study's design can find out, before anything is run: the smallest p it can reach, and the smallest effect.

Nothing is measured yet, so a difference in accuracy stands on an assumption: two students that answer half of the
validation examples right and err independently of each other. Seeds that vary more need more; students that err alike
need less.
"""

from __future__ import annotations

import math
from typing import Any

from stillroom.analysis.statistics import detectable_by_signs, equivalence_spread, fewest_seeds
from stillroom.config import BenchmarkSplit, Study, TaskData

FAMILIES = ("primary", "secondary")


def examine_design(study: Study) -> dict[str, Any]:
    """The design as nested figures; accuracies are shares.

    `seeds`, `alpha`, `power`; `families` with their number of contrasts, the seeds they need, the smallest p after
    Holm's adjustment and the smallest detectable |d_z| (None: no effect, however large); `measures` by what accuracy
    is taken over, with the number of validation examples, the spread that is assumed, and by family the smallest
    detectable difference; `margin` and the `margin_spread` up to which equal groups are found equivalent;
    `warnings`.
    """
    seeds, analysis = len(study.sweep.seeds), study.analysis
    families = {name: _family(contrasts, seeds, analysis.alpha) for name, contrasts in _contrasts(study).items()}
    spread_found = equivalence_spread(seeds, analysis.equivalence_margin, analysis.alpha)
    design = {
        "seeds": seeds,
        "alpha": analysis.alpha,
        "power": 0.8,
        "families": families,
        "measures": {name: _measure(count, families) for name, count in _validation(study).items()},
        "margin": analysis.equivalence_margin,
        "margin_spread": spread_found if math.isfinite(spread_found) else None,
    }
    return {**design, "warnings": _warnings(study, design)}


def _contrasts(study: Study) -> dict[str, int]:
    """Contrasts of each family whose groups the study has: those that p-values are adjusted over."""
    names = {group.name for group in study.groups}
    declared = {name: getattr(study.analysis, name) for name in FAMILIES}
    return {name: sum(set(pair) <= names for pair in pairs) for name, pairs in declared.items()}


def _family(contrasts: int, seeds: int, alpha: float) -> dict[str, Any]:
    if not contrasts:
        return {"contrasts": 0, "seeds_needed": None, "smallest_adjusted_p": None, "detectable": None}
    effect = detectable_by_signs(seeds, alpha, contrasts)
    return {
        "contrasts": contrasts,
        "seeds_needed": fewest_seeds(alpha, contrasts),
        "smallest_adjusted_p": min(1.0, contrasts * 2 / 2**seeds),
        "detectable": effect if math.isfinite(effect) else None,
    }


def _validation(study: Study) -> dict[str, int]:
    """Validation examples by what accuracy is taken over: all tasks together, then each."""
    share = study.corpus.validation_share
    tasks = {name: max(1, round(share * sized(data))) for name, data in study.scored_tasks.items()}
    return {"all tasks": sum(tasks.values()), **tasks}


def sized(data: TaskData | BenchmarkSplit) -> int:
    """Examples of a task, which `lengths.counted` has counted where the study says `all`."""
    if data.examples == "all":
        raise ValueError("examples: all, and they are not counted")
    return data.examples


def _measure(examples: int, families: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spread = math.sqrt(0.5 / examples)  # of the difference of two shares, each of variance 1/4 over the examples
    effects = {name: family["detectable"] for name, family in families.items()}
    differences = {name: None if d is None or d * spread > 1 else d * spread for name, d in effects.items()}
    return {"validation_examples": examples, "spread": spread, "detectable_difference": differences}


def _warnings(study: Study, design: dict[str, Any]) -> list[str]:
    found = []
    for name, family in design["families"].items():
        if not family["contrasts"]:
            if getattr(study.analysis, name):
                found.append(
                    f"analysis.{name}: none of its comparisons has both groups in this study; add the groups, or "
                    "change it"
                )
        elif design["seeds"] < family["seeds_needed"]:
            p = family["smallest_adjusted_p"]
            found.append(
                f"analysis.{name}: with {_count(design['seeds'], 'seed')} the smallest p over "
                f"{_count(family['contrasts'], 'contrast')} is {p:.2g}, so no difference can be "
                f"significant at {design['alpha']:g}; it takes {family['seeds_needed']} seeds (sweep.seeds) or fewer "
                f"contrasts (analysis.{name})"
            )
    return found + _margin_warnings(study, design)


def _margin_warnings(study: Study, design: dict[str, Any]) -> list[str]:
    """Tasks on which the hypothesis expects equality, where it cannot be shown."""
    margin, found = design["margin"], []
    for task in study.analysis.simple_tasks:
        examples = design["measures"][task]["validation_examples"]
        if examples * margin < 1:
            found.append(
                f"analysis.simple_tasks: {task} has {_count(examples, 'validation example')}, of which one is more "
                f"than the margin of {100 * margin:g} points; raise corpus.tasks.{task}.examples, "
                "corpus.validation_share or analysis.equivalence_margin"
            )
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
