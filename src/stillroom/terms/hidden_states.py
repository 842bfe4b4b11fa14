"""L_align_hidden: the student's hidden states, projected, against the teacher's at aligned tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillroom.config import Hidden
from stillroom.data.prepared import Prepared
from stillroom.models.forward import Forward, Taps
from stillroom.models.sizes import width
from stillroom.offline_teacher_data.store import SignalStore, StoredExample
from stillroom.signals.signal import column_of
from stillroom.terms.distances import DISTANCES
from stillroom.terms.placebo import Placebo, aligned_rows
from stillroom.terms.term import Part, rows_taken


@dataclass(frozen=True)
class HiddenPart(Part):
    """Where the student is compared, in (B, T) flattened, and with what; it counts what its distance is a mean of."""

    rows: Int[Tensor, "P"]
    lengths: tuple[int, ...]
    """How many of them each example has."""
    teacher: Mapping[str, Float[Tensor, "P D"]]
    """By column of the store."""


def projectors_of(settings: Hidden) -> int:
    """How many a trial trains: one for each pair of layers, where the distance needs them."""
    return len(settings.layers) if DISTANCES[settings.distance].projected else 0


class HiddenTerm:
    """Mean over layer pairs of a distance (`distances`) of the two models' states at aligned tokens."""

    name = "hidden"

    def __init__(self, settings: Hidden, store: SignalStore, student: object) -> None:
        """`student`: its configuration, which says how wide it is."""
        self._pairs = [(column_of("hidden", teacher), layer) for teacher, layer in settings.layers]
        self.placebo = settings.placebo
        self.columns = tuple(column for column, _ in self._pairs)
        self.taps = Taps(hidden=frozenset(layer for _, layer in self._pairs))
        self._widths = width(student), store.layout.width
        self._distance, self._projectors = DISTANCES[settings.distance], projectors_of(settings)
        scaled = settings.scale == "teacher_rms"
        self._scales = [store.mean_square(column) if scaled else 1.0 for column in self.columns]

    def collate(self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int) -> HiddenPart:
        """The aligned tokens of every example."""
        aligned = [item.alignment.pairs for item in items if item.alignment is not None]
        rows = np.concatenate([n * longest + pair[:, 1].astype(np.int64) for n, pair in enumerate(aligned)])
        places = [pair[:, 0] for pair in aligned]
        teacher = {column: rows_taken(stored, column, places) for column in self.columns}
        of_pair = {"values": len(rows) * self._widths[1], "tokens": len(rows), "examples": len(items)}
        count = of_pair[self._distance.counts] * len(self._pairs)
        return HiddenPart(count, torch.from_numpy(rows), tuple(map(len, aligned)), teacher)

    def misplaced(self, items: Sequence[Prepared], placebo: Placebo, longest: int) -> HiddenPart:
        """Vectors permuted among the aligned tokens of a step's examples of one task."""
        return self.collate(items, placebo.rows(items, self.columns, aligned_rows), longest)

    def loss(self, forward: Forward, part: HiddenPart, trained: nn.Module | None) -> Float[Tensor, ""]:
        """In float32, whatever autocast says."""
        projectors = trained if isinstance(trained, nn.ModuleList) else [trained] * len(self._pairs)
        losses: list[Tensor] = []
        for (column, layer), projector, scale in zip(self._pairs, projectors, self._scales, strict=True):
            hidden = forward.hidden[layer].flatten(0, 1)[part.rows]
            with torch.autocast(hidden.device.type, enabled=False):
                student = hidden.float() if projector is None else projector(hidden.float())
                losses.append(self._sum(student.float(), part.teacher[column].float(), part.lengths) / scale)
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _sum(self, student: Tensor, teacher: Tensor, lengths: Sequence[int]) -> Tensor:
        if self._distance.counts != "examples":
            return self._distance.of(student, teacher)
        examples = zip(student.split(list(lengths)), teacher.split(list(lengths)), strict=True)
        return torch.stack([self._distance.of(*pair) for pair in examples]).sum()

    def trained(self, seed: int) -> nn.Module | None:
        """A projector for each pair, from the student's width to the teacher's, where the distance needs one.

        It is there for equal widths, too.
        """
        if not self._projectors:
            return None
        with torch.random.fork_rng(devices=[]):  # GPUs' generators stay as they are
            torch.default_generator.manual_seed(seed)
            projectors = [nn.Linear(*self._widths) for _ in range(self._projectors)]
        return projectors[0] if len(projectors) == 1 else nn.ModuleList(projectors)
