"""L_align_hidden: the student's last hidden state, projected, against the teacher's at aligned tokens."""

from __future__ import annotations

from collections.abc import Sequence
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
from stillroom.terms.term import Part


@dataclass(frozen=True)
class HiddenPart(Part):
    """Where the student is compared, in (B, T) flattened, and with what; the count is of values."""

    rows: Int[Tensor, "P"]
    teacher: Float[Tensor, "P D"]


class HiddenStates:
    """Mean over aligned tokens and dimensions of the squared difference; `teacher_rms`: over the teacher's own."""

    name = "hidden"
    columns = ("hidden",)
    taps = Taps()

    def __init__(self, settings: Hidden, store: SignalStore, student: object) -> None:
        """`student`: its configuration, which says how wide it is."""
        self._widths = width(student), store.layout.width
        self._scale = store.hidden_mean_square if settings.scale == "teacher_rms" else 1.0

    def collate(self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int) -> HiddenPart:
        """The aligned tokens of every example."""
        pairs = [item.alignment.pairs for item in items if item.alignment is not None]
        rows = np.concatenate([n * longest + pair[:, 1].astype(np.int64) for n, pair in enumerate(pairs)])
        teacher = np.concatenate([s["hidden"][p[:, 0]] for s, p in zip(stored, pairs, strict=True)])
        return HiddenPart(teacher.size, torch.from_numpy(rows), torch.from_numpy(teacher))

    def loss(self, forward: Forward, part: HiddenPart, trained: nn.Module | None) -> Float[Tensor, ""]:
        """Projected and compared in float32, whatever autocast says."""
        assert trained is not None
        hidden = forward.last_hidden.flatten(0, 1)[part.rows]
        with torch.autocast(hidden.device.type, enabled=False):
            projected = trained(hidden.float())
        total: Tensor = (projected.float() - part.teacher.float()).square().sum() / self._scale
        return total

    def trained(self, seed: int) -> nn.Linear:
        """The projector from the student's width to the teacher's; it is there for equal widths, too."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Linear(*self._widths)
