"""L_align_values: how each model's value vectors relate its tokens to each other (Wang et al. 2021, MiniLMv2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillroom.config import Values
from stillroom.data.prepared import Prepared
from stillroom.errors import UserError
from stillroom.models.forward import Forward, Taps
from stillroom.models.sizes import value_width
from stillroom.offline_teacher_data.store import SignalStore, StoredExample
from stillroom.signals.signal import column_of
from stillroom.terms.placebo import Placebo, aligned_rows
from stillroom.terms.term import Part, rows_taken


@dataclass(frozen=True)
class ValuePart(Part):
    """Where the student is compared, in (B, T) flattened, and with what; it counts rows over relation heads."""

    rows: Int[Tensor, "P"]
    lengths: tuple[int, ...]
    """How many of them each example has."""
    teacher: Mapping[str, Float[Tensor, "P W"]]
    """By column of the store."""


class ValueRelations:
    """Mean over layer pairs, rows and relation heads of KL(teacher's row ‖ student's row).

    At aligned tokens alone, a row is softmax(v·Vᵀ/√d) over the tokens up to it, with the vectors split into as many
    relation heads on both sides, whatever the models' own heads are.
    """

    name = "values"

    def __init__(self, settings: Values, store: SignalStore, student: Any) -> None:
        """`student`: its configuration, which says how wide its value vectors are."""
        self._pairs = [(column_of("values", teacher), layer) for teacher, layer in settings.layers]
        self._heads = settings.relation_heads
        self.placebo = settings.placebo
        self.columns = tuple(column for column, _ in self._pairs)
        self.taps = Taps(values=frozenset(layer for _, layer in self._pairs))
        for whose, wide in (("teacher", store.layout.value_width), ("student", value_width(student))):
            if wide % self._heads:
                raise UserError(
                    f"values.relation_heads={self._heads} does not divide the {whose}'s value vectors of {wide}"
                )

    def collate(self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int) -> ValuePart:
        """The aligned tokens of every example."""
        aligned = [item.alignment.pairs for item in items if item.alignment is not None]
        rows = np.concatenate([n * longest + pair[:, 1].astype(np.int64) for n, pair in enumerate(aligned)])
        places = [pair[:, 0] for pair in aligned]
        teacher = {column: rows_taken(stored, column, places) for column in self.columns}
        count = len(rows) * self._heads * len(self._pairs)
        return ValuePart(count, torch.from_numpy(rows), tuple(map(len, aligned)), teacher)

    def misplaced(self, items: Sequence[Prepared], placebo: Placebo, longest: int) -> ValuePart:
        """Vectors permuted among the aligned tokens of a step's examples of one task."""
        return self.collate(items, placebo.rows(items, self.columns, aligned_rows), longest)

    def loss(self, forward: Forward, part: ValuePart, trained: nn.Module | None) -> Float[Tensor, ""]:
        """In float32, whatever autocast says, one example after the other."""
        losses: list[Tensor] = []
        for column, layer in self._pairs:
            values = forward.values[layer].flatten(0, 1)[part.rows]
            with torch.autocast(values.device.type, enabled=False):
                lengths = list(part.lengths)
                examples = zip(values.float().split(lengths), part.teacher[column].float().split(lengths), strict=True)
                losses += [self._divergence(*pair) for pair in examples]
        return torch.stack(losses).sum()

    def _divergence(self, student: Float[Tensor, "n w"], teacher: Float[Tensor, "n W"]) -> Float[Tensor, ""]:
        ours, theirs = (relations(values, self._heads) for values in (student, teacher))
        causal = torch.ones(ours.shape[-2:], dtype=torch.bool, device=ours.device).tril()
        total: Tensor = torch.where(causal, theirs.exp() * (theirs - ours), 0.0).sum()
        return total

    def trained(self, seed: int) -> None:
        """Nothing."""


def relations(values: Float[Tensor, "n w"], heads: int) -> Float[Tensor, "R n n"]:
    """Log-probabilities of each row of softmax(V Vᵀ/√d) over the causal columns, by relation head; −1e4 beyond them."""
    split = values.unflatten(-1, (heads, -1)).transpose(0, 1)
    scores = split @ split.transpose(1, 2) * split.shape[-1] ** -0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    logprobs: Tensor = scores.masked_fill(~causal, -1e4).log_softmax(-1)
    return logprobs
