"""L_align_attn: the two models' attention maps, over the segments that both have read, compared cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from stillroom.config import Attention
from stillroom.data.alignment import Segments
from stillroom.data.prepared import Prepared
from stillroom.models.forward import Forward, Taps
from stillroom.models.sizes import heads
from stillroom.offline_teacher_data.store import SignalStore, StoredExample
from stillroom.signals.signal import column_of
from stillroom.terms.placebo import Placebo
from stillroom.terms.term import Part


@dataclass(frozen=True)
class AttentionPart(Part):
    """The teacher's maps over segments, and how the student's become such; it counts cells, or rows, over heads."""

    rows: Int[Tensor, "B G"]
    """Position of the token that ends each segment; 0 beyond an example's own."""
    segment_of: Int[Tensor, "B T"]
    """Segment of each token; −1 for one in none, and for padding."""
    segments: Int[Tensor, "B"]
    """How many segments each example has."""
    teacher: Mapping[str, Float[Tensor, "B H G G"]]
    """Lower triangle, by column of the store; one head, their mean, unless heads pair."""


class AttentionMaps:
    """Mean over layer pairs, heads and rows of a distance of two rows: squared difference over columns, or KL."""

    name = "attention"

    def __init__(self, settings: Attention, store: SignalStore, student: Any) -> None:
        """`student`: its configuration; heads pair by index where both models have as many."""
        self._pairs = [(column_of("attention", teacher), layer) for teacher, layer in settings.layers]
        self.placebo = settings.placebo
        self.columns = tuple(column for column, _ in self._pairs)
        self.taps = Taps(attention=frozenset(layer for _, layer in self._pairs))
        self._distance = squared_difference if settings.distance == "mse" else row_divergence
        self._by_row = settings.scale == "row_sum" or settings.distance == "kl"
        self._pair_heads = store.layout.heads == heads(student)
        self._heads = store.layout.heads if self._pair_heads else 1

    def collate(self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int) -> AttentionPart:
        """Every example's map over segments, padded to the most segments."""
        alignments = [item.alignment for item in items if item.alignment is not None]
        sizes = np.array([len(a.student.rows) for a in alignments])
        size = int(sizes.max())
        shape = (len(items), self._heads, size, size)
        teacher = {column: np.empty(shape, dtype=np.float32) for column in self.columns}
        rows = np.zeros((len(items), size), dtype=np.int64)
        segment_of = np.full((len(items), longest), -1, dtype=np.int64)
        for n, (example, alignment) in enumerate(zip(stored, alignments, strict=True)):
            segments = sizes[n]
            for column, maps in teacher.items():
                segment_map(example[column], alignment.teacher, self._pair_heads, maps[n])
            rows[n, :segments] = alignment.student.rows
            lengths = alignment.student.rows - alignment.student.starts + 1
            segment_of[n, : lengths.sum()] = np.repeat(np.arange(segments), lengths)
        cells = sizes if self._by_row else sizes * (sizes + 1) // 2
        return AttentionPart(
            int(cells.sum()) * self._heads * len(self._pairs),
            torch.from_numpy(rows),
            torch.from_numpy(segment_of),
            torch.from_numpy(sizes),
            {column: torch.from_numpy(maps) for column, maps in teacher.items()},
        )

    def misplaced(self, items: Sequence[Prepared], placebo: Placebo, longest: int) -> AttentionPart:
        """The causal columns of each row permuted, in all heads and layers alike."""
        stored = [placebo.store.read(item.example.example_id, self.columns) for item in items]
        part = self.collate(items, stored, longest)
        for n, item in enumerate(items):
            size = int(part.segments[n])
            source = torch.from_numpy(placebo.columns(item, size)).expand(self._heads, -1, -1)
            for maps in part.teacher.values():
                maps[n, :, :size, :size] = maps[n, :, :size, :size].gather(-1, source)
        return part

    def loss(self, forward: Forward, part: AttentionPart, trained: nn.Module | None) -> Float[Tensor, ""]:
        """Of the student's map over the same segments."""
        losses = []
        for column, layer in self._pairs:
            attention = forward.attention[layer]
            if not self._pair_heads:
                attention = attention.mean(1, keepdim=True)
            aligned = aligned_attention(attention.float(), part.rows, part.segment_of)
            losses.append(self._distance(aligned, part.teacher[column], part.segments))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def trained(self, seed: int) -> None:
        """Nothing."""


def aligned_attention(
    attention: Float[Tensor, "B H T T"], rows: Int[Tensor, "B G"], segment_of: Int[Tensor, "B T"]
) -> Float[Tensor, "B H G G"]:
    """A model's map over segments: queries at each segment's last token, keys summed over each segment.

    `segment_of` is −1 for tokens of no segment. Padded segments give rows that the caller's mask leaves out.
    """
    heads, tokens, segments = attention.shape[1], attention.shape[-1], rows.shape[1]
    index = rows[:, None, :, None].expand(-1, heads, -1, tokens)
    queries = attention.gather(2, index)
    member = F.one_hot(segment_of + 1, segments + 1)[..., 1:].to(queries.dtype)
    return torch.matmul(queries, member[:, None])


def squared_difference(
    student: Float[Tensor, "B H G G"], teacher: Float[Tensor, "B H G G"], segments: Int[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Sum over heads, rows and causal columns of the squared difference; `segments` is each example's G.

    Above the diagonal both maps are 0, so the sum over all columns is the sum over the causal ones.
    """
    real = torch.arange(student.shape[-1], device=student.device) < segments[:, None]
    difference = (student.float() - teacher.float()).masked_fill(~real[:, None, :, None], 0.0)
    return difference.square().sum()


FLOOR = 1e-10
"""What the student's share of a segment is at least: a window may hide one that the teacher attends to."""


def row_divergence(
    student: Float[Tensor, "B H G G"], teacher: Float[Tensor, "B H G G"], segments: Int[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Sum over heads and rows of KL(teacher's row ‖ student's row) over segments, nats.

    Each teacher's row is divided by its sum, which storing has rounded.
    """
    teacher = teacher.float()
    teacher = teacher / teacher.sum(-1, keepdim=True).clamp(min=FLOOR)
    values = torch.xlogy(teacher, teacher) - teacher * student.float().clamp(min=FLOOR).log()
    real = torch.arange(student.shape[-1], device=student.device) < segments[:, None]
    return values.sum(-1).masked_fill(~real[:, None], 0.0).sum()


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
