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
from stillroom.terms.divergences import FLOOR
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
    index: Int[Tensor, "B G G"]
    """Where each cell of the teacher's map over segments is, in a row of `cells` followed by that of `sums`."""
    cells: Mapping[str, Float[Tensor, "H C"]]
    """Triangles as they are stored, example after example, then a 0, by column of the store; see `packed_maps`."""
    sums: Mapping[str, Float[Tensor, "H S"]]
    """What the cells of segments of several tokens add up to, float32."""

    def teacher(self, column: str) -> Float[Tensor, "B H G G"]:
        """The teacher's maps, lower triangles; one head, their mean, unless heads pair."""
        return square_maps(self.cells[column], self.sums[column], self.index)


class AttentionTerm:
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
        rows = np.zeros((len(items), int(sizes.max())), dtype=np.int64)
        segment_of = np.full((len(items), longest), -1, dtype=np.int64)
        for n, alignment in enumerate(alignments):
            rows[n, : sizes[n]] = alignment.student.rows
            lengths = alignment.student.rows - alignment.student.starts + 1
            segment_of[n, : lengths.sum()] = np.repeat(np.arange(sizes[n]), lengths)
        compared = sizes if self._by_row else sizes * (sizes + 1) // 2
        triangles = {column: [example[column] for example in stored] for column in self.columns}
        return AttentionPart(
            int(compared.sum()) * self._heads * len(self._pairs),
            torch.from_numpy(rows),
            torch.from_numpy(segment_of),
            torch.from_numpy(sizes),
            *packed_maps(triangles, [alignment.teacher for alignment in alignments], self._pair_heads),
        )

    def misplaced(self, items: Sequence[Prepared], placebo: Placebo, longest: int) -> AttentionPart:
        """The causal columns of each row permuted, in all heads and layers alike."""
        stored = [placebo.store.read(item.example.example_id, self.columns) for item in items]
        part = self.collate(items, stored, longest)
        for n, item in enumerate(items):
            size = int(part.segments[n])
            cells = part.index[n, :size, :size]
            cells[:] = cells.gather(-1, torch.from_numpy(placebo.columns(item, size)))
        return part

    def loss(self, forward: Forward, part: AttentionPart, trained: nn.Module | None) -> Float[Tensor, ""]:
        """Of the student's map over the same segments."""
        losses = []
        for column, layer in self._pairs:
            attention = forward.attention[layer]
            if not self._pair_heads:
                attention = attention.mean(1, keepdim=True)
            aligned = aligned_attention(attention.float(), part.rows, part.segment_of)
            losses.append(self._distance(aligned, part.teacher(column), part.segments))
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


def row_divergence(
    student: Float[Tensor, "B H G G"], teacher: Float[Tensor, "B H G G"], segments: Int[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Sum over heads and rows of KL(teacher's row ‖ student's row) over segments, nats.

    Each teacher's row is divided by its sum, which storing has rounded. A student's window may hide a segment that the
    teacher attends to: its probability counts as `FLOOR`.
    """
    teacher = teacher.float()
    teacher = teacher / teacher.sum(-1, keepdim=True).clamp(min=FLOOR)
    values = torch.xlogy(teacher, teacher) - teacher * student.float().clamp(min=FLOOR).log()
    real = torch.arange(student.shape[-1], device=student.device) < segments[:, None]
    return values.sum(-1).masked_fill(~real[:, None], 0.0).sum()


def packed_maps(
    triangles: Mapping[str, Sequence[ndarray]], segments: Sequence[Segments], pair_heads: bool
) -> tuple[Int[Tensor, "B G G"], dict[str, Float[Tensor, "H C"]], dict[str, Float[Tensor, "H S"]]]:
    """What `square_maps` makes maps over segments of: an index, and by column the cells and the sums that it points at.

    `triangles`: of each column, every example's packed map (H, T(T+1)/2). A batch travels to a GPU as these bytes: the
    float32 squares have four times as many. Sums are taken here, in one order on every machine; most segments are one
    token. Unless heads pair, the cells are the heads' mean in float32: one row.
    """
    cells = {column: _in_a_row(maps, pair_heads) for column, maps in triangles.items()}
    examples = next(iter(triangles.values()))
    ends = np.cumsum([triangle.shape[1] for triangle in examples])
    size, zero = max(len(spans.rows) for spans in segments), int(ends[-1])
    causal, index = np.tri(size, dtype=bool), np.full((len(examples), size, size), zero, dtype=np.int32)
    firsts, lengths, summed = [], [], zero + 1
    for spans, square, triangle, end in zip(segments, index, examples, ends, strict=True):
        rows, starts, count = spans.rows, spans.starts, len(spans.rows)
        places = (rows * (rows + 1) // 2 + np.int32(end - triangle.shape[1]))[:, None] + starts
        np.copyto(square[:count, :count], places, where=causal[:count, :count])
        several = np.flatnonzero(rows > starts)
        row, column = np.nonzero(causal[:count, several])
        column = several[column]
        square[row, column] = np.arange(summed, summed + len(row))
        summed += len(row)
        firsts.append(places[row, column])
        lengths.append((rows - starts + 1)[column])
    first, length = np.concatenate(firsts), np.concatenate(lengths)
    begins = np.cumsum(length) - length
    added = torch.from_numpy(np.repeat(first - begins, length) + np.arange(length.sum()))
    sums = {column: _sums(packed.index_select(1, added).float(), begins) for column, packed in cells.items()}
    return torch.from_numpy(index), cells, sums


def _in_a_row(triangles: Sequence[ndarray], pair_heads: bool) -> Float[Tensor, "H C"]:
    """Packed maps one after the other, then a 0; the heads' mean unless they pair."""
    if not pair_heads:  # from_dlpack: of read-only memory too; it casts float16 ten times as fast as NumPy
        triangles = [from_dlpack(triangle).float().numpy().mean(0, keepdims=True) for triangle in triangles]
    zero = np.zeros((len(triangles[0]), 1), triangles[0].dtype)
    return torch.from_numpy(np.concatenate([*triangles, zero], axis=1))


def _sums(values: Float[Tensor, "H N"], begins: Int[ndarray, "S"]) -> Float[Tensor, "H S"]:
    if not len(begins):
        return values
    return torch.from_numpy(np.add.reduceat(values.numpy(), begins, axis=1))


def square_maps(
    cells: Float[Tensor, "H C"], sums: Float[Tensor, "H S"], index: Int[Tensor, "B G G"]
) -> Float[Tensor, "B H G G"]:
    """Maps over segments, zero above the diagonal, from what `packed_maps` gives; float32, the same on every device.

    Row g is the query at a segment's last token; column s the sum over the tokens of a segment.
    """
    source = sums.new_empty(len(cells), cells.shape[1] + sums.shape[1])
    source[:, : cells.shape[1]], source[:, cells.shape[1] :] = cells, sums
    maps = source.new_empty(len(index), len(cells), *index.shape[1:])
    for places, square in zip(index.flatten(1), maps.flatten(2), strict=True):
        torch.index_select(source, 1, places, out=square)
    return maps
