"""Placebos: a term's own teacher's values, in the wrong places.

What a placebo gains over its baseline is not the signal's: only that of more gradient. Permutations have no fixed
point where there is more than one place. They follow from the seed and the step's examples alone: the same for every
group of a seed, however a step is cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from stillroom.data.prepared import Prepared
from stillroom.offline_teacher_data.store import SignalStore, StoredExample


@dataclass(frozen=True)
class Placebo:
    """Where the teacher's values of one optimizer step are taken from instead."""

    store: SignalStore
    step: Sequence[Prepared]
    """Every example of the step, in any order."""
    seed: int
    _moved: dict[Any, dict[str, StoredExample]] = field(default_factory=dict, repr=False)
    """What `rows` has made: a step is read once, however it is cut."""

    def rows(
        self, items: Sequence[Prepared], columns: Sequence[str], places: Callable[[Prepared], Int[ndarray, "n"]]
    ) -> list[StoredExample]:
        """What the store has of some of the step's examples, with rows permuted among the places of their task.

        `places`: the teacher's positions of an example that count. Rows elsewhere stay.
        """
        asked = (tuple(columns), places)
        if asked not in self._moved:
            self._moved[asked] = self._permuted(columns, places)
        return [self._moved[asked][item.example.example_id] for item in items]

    def _permuted(
        self, columns: Sequence[str], places: Callable[[Prepared], Int[ndarray, "n"]]
    ) -> dict[str, StoredExample]:
        """Every example of the step by its id."""
        moved: dict[str, StoredExample] = {}
        for task in sorted({item.example.task for item in self.step}):
            task_items = sorted(
                (i for i in self.step if i.example.task == task), key=lambda item: item.example.example_id
            )
            stored = [self.store.read(item.example.example_id, columns) for item in task_items]
            rows = [places(item) for item in task_items]
            source = without_fixed_point(sum(map(len, rows)), self._generator(task))
            pools = {c: np.concatenate([s[c][at] for s, at in zip(stored, rows, strict=True)]) for c in columns}
            ends = np.cumsum([len(at) for at in rows])
            for example, at, end in zip(stored, rows, ends, strict=True):
                arrays = {column: example[column].copy() for column in columns}
                for column, values in arrays.items():
                    values[at] = pools[column][source[end - len(at) : end]]
                known = (example.example_id, example.task, example.encoding)
                moved[example.example_id] = StoredExample(*known, arrays)
        return moved

    def columns(self, item: Prepared, size: int) -> Int[ndarray, "G G"]:
        """Of each row of an example's causal map, the column that each cell is taken from; cells above stay."""
        row, place = np.indices((size, size))
        keys = self._generator(item.example.example_id).random((size, size))
        order = np.where(place <= row, keys, 1 + place).argsort(1)  # a random order of the causal ones, then the others
        following = np.where(place <= row, (place + 1) % (row + 1), place)
        source: Int[ndarray, "G G"] = np.empty_like(order)
        np.put_along_axis(source, order, np.take_along_axis(order, following, 1), 1)
        return source

    def _generator(self, of: str) -> Any:
        ids = sorted(item.example.example_id for item in self.step)
        digest = hashlib.sha256("\n".join([*ids, of]).encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "little")])


def aligned_rows(item: Prepared) -> Int[ndarray, "n"]:
    """The teacher's tokens that a student token is aligned with."""
    assert item.alignment is not None
    rows: Int[ndarray, "n"] = item.alignment.pairs[:, 0]
    return rows


def without_fixed_point(size: int, rng: Any) -> Int[ndarray, "n"]:
    """A random cyclic permutation of `size` places; the identity of one."""
    order = rng.permutation(size)
    source: Int[ndarray, "n"] = np.empty_like(order)
    source[order] = np.roll(order, -1)
    return source
