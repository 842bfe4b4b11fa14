"""What a trial's alignment and its L_KD are for each kind of text: words, digits, punctuation, white space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int32
from numpy import ndarray

from stillroom.config import TermName
from stillroom.data.alignment import KINDS, coverage_by_kind, kinds_of
from stillroom.data.encoding import in_answer, in_text
from stillroom.data.prepared import Prepared
from stillroom.training.collation import Collator
from stillroom.training.step import StepRunner


def count_kinds(prepared: Sequence[Prepared]) -> dict[str, dict[str, int]]:
    """Sums of `coverage_by_kind` over aligned examples; kinds without a token are left out."""
    totals = {kind: dict[str, int]() for kind in KINDS}
    for item in prepared:
        assert item.alignment is not None
        kinds = kinds_of(item.example.text, item.encoding, item.example.turns)
        for kind, counts in coverage_by_kind(item.encoding, item.alignment, kinds, len(item.example.prompt)).items():
            for name, count in counts.items():
                totals[kind][name] = totals[kind].get(name, 0) + count
    return {kind: total for kind, total in totals.items() if total.get("tokens")}


@torch.no_grad()
def losses_by_kind(
    runner: StepRunner, items: Sequence[Prepared], collate: Collator, batch_size: int
) -> dict[str, float]:
    """Mean L_KD over the compared positions whose next token is of a kind, by kind; empty for a group without it.

    `collate` need not collate white-box terms. A kind without a compared position is left out.
    """
    weights = runner.objective.weights
    if not weights["kd"] or runner.objective.kd.placebo:
        return {}
    alone: dict[TermName, float] = {**dict.fromkeys(weights, 0.0), "kd": 1.0}
    runner.student.eval()
    whole = runner.objective.kd.positions == "all"
    found = {}
    for kind in KINDS:
        parts = [part for item in items if (part := only(item, kind, whole)) is not None]
        parts.sort(key=lambda item: len(item.encoding))
        total, count = 0.0, 0
        for first in range(0, len(parts), batch_size):
            batch = collate(parts[first : first + batch_size])
            _, sums = runner.losses(batch.to(runner.device), alone, batch.counts)
            total, count = total + float(sums["kd"]), count + batch.counts["kd"]
        if count:
            found[kind] = total / count
    return found


def only(item: Prepared, kind: str, whole: bool = False) -> Prepared | None:
    """The example with those of its aligned pairs alone whose next student token is of a kind; None without any.

    Of the tokens in the answer, or of the `whole` text.
    """
    assert item.alignment is not None
    kinds = [*kinds_of(item.example.text, item.encoding, item.example.turns), None]
    compared = in_text(item.encoding) if whole else in_answer(item.encoding, len(item.example.prompt))

    def kept(pairs: Int32[ndarray, "N 2"]) -> Int32[ndarray, "K 2"]:
        chosen = [kinds[i + 1] == kind and compared[i + 1] for i in pairs[:, 1].tolist()]
        return np.compress(chosen, pairs, axis=0)

    alignment = replace(item.alignment, pairs=kept(item.alignment.pairs), replies=kept(item.alignment.replies))
    return replace(item, alignment=alignment) if len(alignment.predictors) else None


def merged(counts: Mapping[str, Mapping[str, int]], losses: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Both by kind, as in `result.json`."""
    return {
        kind: {**kind_counts, **({"kd_loss": losses[kind]} if kind in losses else {})}
        for kind, kind_counts in counts.items()
    }
