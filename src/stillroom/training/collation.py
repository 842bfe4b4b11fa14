"""Prepared examples and the store's columns, collated into one forward pass with explicit positions and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from stillroom.data.prepared import Prepared
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.terms import NextTokenTerms, Part, Term
from stillroom.terms.next_token import HeadPart
from stillroom.terms.placebo import Placebo
from stillroom.terms.term import each_tensor
from stillroom.training.sharding import ALONE, Ranks


@dataclass(frozen=True)
class Batch:
    """One forward pass; every index and mask explicit."""

    ids: Int[Tensor, "B T"]
    mask: Int[Tensor, "B T"]
    """1 for a token, 0 for padding, which stands on the right; no forward pass here needs it."""
    head: HeadPart
    """What the output head is compared with."""
    parts: Mapping[str, Part]
    """Each white-box term's part, by its name."""
    examples: tuple[str, ...]
    tokens: int
    """Real tokens, padding left out."""
    idle: bool = False
    """Nothing of the step's: it only computes along with the other processes that train the student."""

    @property
    def counts(self) -> dict[str, int]:
        """Denominators by term."""
        counts = {**self.head.counts, **{name: part.count for name, part in self.parts.items()}}
        return dict.fromkeys(counts, 0) if self.idle else counts

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies while it computes."""
        return each_tensor(self, Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, without waiting for the copies; the outcomes' rows are cut on the CPU: they stay."""
        if device.type == "cpu":
            return self
        moved = each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))
        if moved.head.outcomes is None or self.head.outcomes is None:
            return moved
        outcomes = replace(moved.head.outcomes, rows=self.head.outcomes.rows)
        return replace(moved, head=replace(moved.head, outcomes=outcomes))


class Collator:
    """Turns prepared examples into batches, reading from the store just the columns that the terms use."""

    def __init__(
        self, store: SignalStore | None, head: NextTokenTerms, terms: Sequence[Term], seed: int = 0, rounded: int = 1
    ) -> None:
        """Without a store, for the task loss alone; `seed` is that of placebos.

        Batches are padded to a multiple of `rounded` tokens.
        """
        self._seed, self._rounded = seed, rounded
        self._store, self._head, self._terms = store, head, terms
        everything: tuple[NextTokenTerms | Term, ...] = (head, *terms)
        as_they_are = [term for term in everything if not term.placebo]
        self._columns = list(dict.fromkeys(column for term in as_they_are for column in term.columns))

    def __call__(self, items: Sequence[Prepared]) -> Batch:
        """Collate a step of one batch, on the CPU."""
        (batch,) = self.step(items, len(items))
        return batch

    def step(self, items: Sequence[Prepared], size: int, ranks: Ranks = ALONE) -> list[Batch]:
        """Collate this process's part of an optimizer step in batches of so many examples, on the CPU.

        Every process gets as many batches: one that has too few examples gets idle ones.
        """
        placebo = Placebo(self._store, items, self._seed) if self._store else None
        part = ranks.part(items)
        cut = [part[n : n + size] for n in range(0, ranks.largest_part(len(items)), size)]
        return [self._batch(chunk or items[:1], placebo, idle=not chunk) for chunk in cut]

    def _batch(self, items: Sequence[Prepared], placebo: Placebo | None, idle: bool = False) -> Batch:
        longest = -(-max(len(item.encoding) for item in items) // self._rounded) * self._rounded
        ids = np.zeros((len(items), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, : len(item.encoding)] = item.encoding.ids
            mask[row, : len(item.encoding)] = 1
        stored = [self._store.read(i.example.example_id, self._columns) for i in items] if self._store else []

        def part(term: Any) -> Any:
            if term.placebo and placebo:
                return term.misplaced(items, placebo, longest)
            return term.collate(items, stored, longest)

        return Batch(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            head=part(self._head),
            parts={term.name: part(term) for term in self._terms},
            examples=() if idle else tuple(item.example.example_id for item in items),
            tokens=0 if idle else int(mask.sum()),
            idle=idle,
        )
