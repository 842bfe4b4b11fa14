"""The teacher's whole next-token distribution in student ids, remade of its last hidden state and its output head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from stillroom.models.output_head import OutputHead


@dataclass(frozen=True)
class HiddenOutcomes:
    """What the distributions at M positions are remade of."""

    rows: Int[Tensor, "M"]
    """Which of the head's rows each position is; increasing. On the CPU, as in `output_head.Outcomes`."""
    hidden: Float[Tensor, "M D"]
    """The teacher's last hidden states, as stored."""


class FullSupport:
    """Remakes distributions over every student id that a teacher's id maps to, and the outcome of all others."""

    def __init__(self, head: OutputHead, vocabulary_map: ndarray, vocabulary: int) -> None:
        """`vocabulary_map`: from `teacher_to_student_ids`; `vocabulary`: entries of the student's output head."""
        bias = None if head.bias is None else head.bias.float()
        self._head = OutputHead(head.weight.float(), bias, head.scale, head.softcap)
        mapped = vocabulary_map[: len(head.weight)]
        teacher_ids = np.flatnonzero(mapped >= 0)
        ids, first, place = np.unique(mapped[teacher_ids], return_index=True, return_inverse=True)
        again = np.setdiff1d(np.arange(len(teacher_ids)), first)
        self.ids = torch.from_numpy(ids)
        """Student ids that are outcomes, increasing."""
        self.others = torch.from_numpy(np.setdiff1d(np.arange(vocabulary), ids))
        """All other student ids."""
        self.is_whole = len(ids) == vocabulary
        self._first = torch.from_numpy(teacher_ids[first])
        self._again, self._place = torch.from_numpy(teacher_ids[again]), torch.from_numpy(place[again])
        self._unmapped = torch.from_numpy(np.flatnonzero(mapped < 0))

    def to(self, device: torch.device) -> FullSupport:
        """Itself, with its tensors on a device: 4 bytes for each entry of the teacher's head."""
        if self.ids.device != device:
            bias = None if self._head.bias is None else self._head.bias.to(device)
            self._head = OutputHead(self._head.weight.to(device), bias, self._head.scale, self._head.softcap)
            for name, value in vars(self).items():
                if isinstance(value, Tensor):
                    setattr(self, name, value.to(device))
        return self

    def probs(self, hidden: Float[Tensor, "M D"]) -> tuple[Float[Tensor, "M U"], Float[Tensor, "M"]]:
        """The teacher's probabilities of `ids`, and of everything else: a sum, never 1 − sum; float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            whole = self._head.logits(hidden).softmax(-1)
        entries = whole.index_select(1, self._first)
        if len(self._again):  # teacher's ids that share a student id add up
            entries.index_add_(1, self._place, whole.index_select(1, self._again))
        return entries, whole.index_select(1, self._unmapped).sum(1)
