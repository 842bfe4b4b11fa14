"""Prepared examples and the store's signals, collated into one forward pass with explicit positions and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from stillroom.config import Objective, Term
from stillroom.data.alignment import Segments
from stillroom.data.vocabulary import map_vocabulary, same_vocabulary
from stillroom.offline_teacher_data.store import Signal, SignalStore, StoredExample
from stillroom.terms.losses import Outcomes
from stillroom.training.batches import Prepared

_SIGNAL_OF: dict[Term, Signal] = {"kd": "topk", "hidden": "hidden", "attention": "attention"}


@dataclass(frozen=True)
class Batch:
    """One forward pass; every index and mask explicit. What no term of the objective asks for is None.

    `head_rows` and `hidden_rows` count positions of (B, T) flattened.
    """

    ids: Int[Tensor, "B T"]
    mask: Int[Tensor, "B T"]
    """1 for a token, 0 for padding, which stands on the right."""
    head_rows: Int[Tensor, "N"]
    """Where the output head runs: supervised rows, and others that are distilled; increasing."""
    targets: Int[Tensor, "N"]
    """Next student token at each of them; −1 where it is not supervised."""
    outcomes: Outcomes | None
    hidden_rows: Int[Tensor, "P"] | None
    """Rows with an aligned teacher token."""
    teacher_hidden: Float[Tensor, "P D"] | None
    segment_rows: Int[Tensor, "B G"] | None
    """Position of the token that ends each segment; 0 beyond an example's own."""
    segment_of: Int[Tensor, "B T"] | None
    """Segment of each token; −1 for one in none, and for padding."""
    segments: Int[Tensor, "B"] | None
    """How many segments each example has."""
    teacher_attention: Float[Tensor, "B H G G"] | None
    """Over segments, lower triangle; one head, their mean, unless heads pair."""
    counts: dict[str, int]
    """Denominators: task and kd positions, hidden values, attention cells or rows (over heads)."""
    examples: tuple[str, ...]
    tokens: int
    """Real tokens, padding left out."""

    def pinned(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, without waiting for the copies; `outcomes.rows` stay where they are."""
        if device.type == "cpu":
            return self
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        if moved.outcomes is None or self.outcomes is None:
            return moved
        return replace(moved, outcomes=replace(moved.outcomes, rows=self.outcomes.rows))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{f.name: _changed(getattr(self, f.name), change) for f in fields(self)})


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Outcomes):
        return Outcomes(**{f.name: change(getattr(value, f.name)) for f in fields(value)})
    return change(value) if isinstance(value, Tensor) else value


class Collator:
    """Turns prepared examples into batches, reading from the store just the signals the objective uses."""

    def __init__(
        self,
        store: SignalStore | None,
        objective: Objective,
        vocabulary_map: ndarray | None = None,
        student_heads: int = 0,
    ) -> None:
        """`vocabulary_map`: from `teacher_to_student_ids`; `student_heads` decides how attention heads pair."""
        self.store, self.objective, self.map = store, objective, vocabulary_map
        self.on: set[Term] = {term for term, weight in objective.weights.items() if weight > 0}
        if store is None:
            self.on &= {"task"}
        self.wanted = [signal for term, signal in _SIGNAL_OF.items() if term in self.on]
        self.pair_heads = store is not None and store.layout.heads == student_heads

    def __call__(self, items: Sequence[Prepared]) -> Batch:
        """Collate on the CPU."""
        longest = max(len(item.encoding) for item in items)
        ids = np.zeros((len(items), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, item in enumerate(items):
            ids[row, : len(item.encoding)] = item.encoding.ids
            mask[row, : len(item.encoding)] = 1
        stored = [self.store.read(i.example.example_id, self.wanted) for i in items] if self.store else []
        head_rows, targets = self._head(items, longest)
        counts = {"task": int((targets >= 0).sum())}
        parts: dict[str, Any] = {
            "outcomes": self._outcomes(items, stored, head_rows, longest, counts) if "kd" in self.on else None,
            **(self._hidden(items, stored, longest, counts) if "hidden" in self.on else _NO_HIDDEN),
            **(self._attention(items, stored, longest, counts) if "attention" in self.on else _NO_ATTENTION),
        }
        return Batch(
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            head_rows=torch.from_numpy(head_rows),
            targets=torch.from_numpy(targets),
            counts=counts,
            examples=tuple(item.example.example_id for item in items),
            tokens=int(mask.sum()),
            **parts,
        )

    def _head(self, items: Sequence[Prepared], longest: int) -> tuple[ndarray, ndarray]:
        """Rows where the output head runs: supervised ones, and others that are distilled."""
        rows = np.concatenate([n * longest + item.positions.astype(np.int64) for n, item in enumerate(items)])
        targets = np.concatenate([item.targets.astype(np.int64) for item in items])
        if "kd" not in self.on:
            return rows, targets
        kd = self._kd_rows(items, longest)
        every = np.union1d(rows, kd)
        spread = np.full(len(every), -1, dtype=np.int64)
        spread[np.searchsorted(every, rows)] = targets
        return every, spread

    def _kd_rows(self, items: Sequence[Prepared], longest: int) -> ndarray:
        return np.concatenate(
            [
                n * longest + item.kd_pairs[:, 1].astype(np.int64)
                for n, item in enumerate(items)
                if item.kd_pairs is not None
            ]
        )

    def _outcomes(
        self,
        items: Sequence[Prepared],
        stored: Sequence[StoredExample],
        head_rows: ndarray,
        longest: int,
        counts: dict[str, int],
    ) -> Outcomes:
        assert self.map is not None
        at = [item.kd_pairs[:, 0] for item in items if item.kd_pairs is not None]
        topk = [
            np.concatenate([getattr(s, column)[j] for s, j in zip(stored, at, strict=True)])
            for column in ("topk_ids", "topk_logprobs", "tail_logprobs")
        ]
        rows = np.searchsorted(head_rows, self._kd_rows(items, longest))
        counts["kd"] = len(rows)
        ids, valid, probs, ghost = map_outcomes(topk[0], topk[1], topk[2], self.map)
        some = valid.any(1)  # with no entry at all the ghost is the only outcome: KL is 0, exactly
        return Outcomes(*(torch.from_numpy(a[some]) for a in (rows, ids, valid, probs, ghost)))

    def _hidden(
        self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int, counts: dict[str, int]
    ) -> dict[str, Any]:
        pairs = [item.alignment.pairs for item in items if item.alignment is not None]
        rows = np.concatenate([n * longest + pair[:, 1].astype(np.int64) for n, pair in enumerate(pairs)])
        teacher = np.concatenate(
            [s.hidden[p[:, 0]] for s, p in zip(stored, pairs, strict=True) if s.hidden is not None]
        )
        counts["hidden"] = teacher.size
        return {"hidden_rows": torch.from_numpy(rows), "teacher_hidden": torch.from_numpy(teacher)}

    def _attention(
        self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int, counts: dict[str, int]
    ) -> dict[str, Any]:
        alignments = [item.alignment for item in items if item.alignment is not None]
        assert self.store is not None
        sizes = np.array([len(a.student.rows) for a in alignments])
        size = int(sizes.max())
        heads = self.store.layout.heads if self.pair_heads else 1
        teacher = np.empty((len(items), heads, size, size), dtype=np.float32)
        rows = np.zeros((len(items), size), dtype=np.int64)
        segment_of = np.full((len(items), longest), -1, dtype=np.int64)
        for n, (example, alignment) in enumerate(zip(stored, alignments, strict=True)):
            segments = sizes[n]
            assert example.attention is not None
            segment_map(example.attention, alignment.teacher, self.pair_heads, teacher[n])
            rows[n, :segments] = alignment.student.rows
            lengths = alignment.student.rows - alignment.student.starts + 1
            segment_of[n, : lengths.sum()] = np.repeat(np.arange(segments), lengths)
        cells = sizes if self.objective.attention_scale == "row_sum" else sizes * (sizes + 1) // 2
        counts["attention"] = int(cells.sum()) * teacher.shape[1]
        return {
            "segment_rows": torch.from_numpy(rows),
            "segment_of": torch.from_numpy(segment_of),
            "segments": torch.from_numpy(sizes),
            "teacher_attention": torch.from_numpy(teacher),
        }


_NO_HIDDEN: dict[str, Any] = {"hidden_rows": None, "teacher_hidden": None}
_NO_ATTENTION: dict[str, Any] = dict.fromkeys(("segment_rows", "segment_of", "segments", "teacher_attention"))


def teacher_to_student_ids(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_size: int, student_size: int
) -> ndarray:
    """`map_vocabulary` for the output head's sizes: entries beyond the tokenizer map only where all is equal."""
    mapped = map_vocabulary(teacher_tokenizer, student_tokenizer)
    whole = np.full(max(teacher_size, len(mapped)), -1, dtype=np.int64)
    whole[: len(mapped)] = mapped
    if same_vocabulary(teacher_tokenizer, student_tokenizer):
        whole[len(mapped) :] = np.arange(len(mapped), len(whole))
    whole[whole >= student_size] = -1
    return whole


def map_outcomes(
    teacher_ids: ndarray, logprobs: ndarray, tail_logprobs: ndarray, vocabulary_map: ndarray
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Teacher top-k (M, K) and tail (M) in student ids: (ids, valid, probs, ghost), which sum to 1.

    Teacher ids that share a student id add up in one entry; unmapped ones and the tail go to the ghost. What storing
    has rounded is divided by its sum, so that a student that equals its teacher has a KL of 0.
    """
    ids = vocabulary_map[teacher_ids.astype(np.int64)]
    probs = np.exp(logprobs.astype(np.float32))
    valid = ids >= 0
    ghost = np.exp(tail_logprobs.astype(np.float64)) + np.where(valid, 0.0, probs).sum(1, dtype=np.float64)
    shared = np.bincount(vocabulary_map[vocabulary_map >= 0], minlength=1) > 1
    some = (shared[ids] & valid).sum(1) > 1  # the other rows need no sorting
    ids[some], valid[some], probs[some] = _merge_repeated(ids[some], valid[some], probs[some])
    probs = np.where(valid, probs, 0.0)
    whole = probs.sum(1, dtype=np.float64) + ghost
    probs, ghost = (probs / whole[:, None]).astype(np.float32), (ghost / whole).astype(np.float32)
    first = np.take_along_axis(ids, valid.argmax(1)[:, None], 1)
    return np.where(valid, ids, first), valid, probs, ghost


def _merge_repeated(ids: ndarray, valid: ndarray, probs: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    order = np.argsort(ids, axis=1, kind="stable")
    ids, valid, probs = (np.take_along_axis(a, order, 1) for a in (ids, valid, probs))
    repeated = np.zeros_like(valid)
    repeated[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & valid[:, 1:]
    if repeated.any():
        starts = np.flatnonzero(~repeated.ravel())
        sums = np.zeros(probs.size, dtype=probs.dtype)
        sums[starts] = np.add.reduceat(probs.ravel(), starts)
        probs, valid = sums.reshape(probs.shape), valid & ~repeated
    return ids, valid, probs


def segment_map(triangle: ndarray, segments: Segments, pair_heads: bool, out: ndarray | None = None) -> ndarray:
    """A packed map (H, T(T+1)/2) over segments: (H or 1, G, G) float32, zero above the diagonal.

    Row g is the query at rows[g]; column s the sum over tokens starts[s] … rows[s]. One head, their mean, unless
    heads pair. `out`: a contiguous array to be written into, which may have more rows and columns: they become zero.
    """
    rows, starts = segments.rows.astype(np.int64), segments.starts.astype(np.int64)
    count, offsets = len(rows), rows * (rows + 1) // 2
    values = from_dlpack(triangle)  # of read-only memory too; casts float16 ten times as fast as NumPy
    values = values if pair_heads else torch.from_numpy(values.float().numpy().mean(0, keepdims=True))
    heads, cells = values.shape
    square = np.empty((heads, count, count), np.float32) if out is None else out
    causal = np.tri(count, dtype=bool)
    several = np.flatnonzero(rows > starts)  # most segments are one token
    row, column = np.nonzero(causal[:, several])
    column = several[column]
    # the square is gathered from the triangle's cells, a zero, and the sums
    source = torch.empty(heads, cells + 1 + len(row))
    source[:, :cells], source[:, cells] = values, 0.0
    bounds = np.stack([offsets[row] + starts[column], offsets[row] + rows[column] + 1], 1).ravel()
    sums = np.add.reduceat(source.numpy()[:, : cells + 1], bounds, axis=1)[:, ::2]  # the rest lies between
    source[:, cells + 1 :] = torch.from_numpy(sums)
    index = np.full(square.shape[1:], cells)
    index[:count, :count][causal] = (offsets[:, None] + starts)[causal]
    index[row, column] = np.arange(cells + 1, source.shape[1])
    flat = torch.from_numpy(square.reshape(heads, -1))
    torch.index_select(source, 1, torch.from_numpy(index.ravel()), out=flat)
    return square
