"""The teacher's last hidden state, after the final norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.models.architecture import relative_error
from stillroom.models.forward import Forward, Taps
from stillroom.signals.signal import Arrays, Column, Layout


@dataclass(frozen=True)
class HiddenStates:
    """`hidden` (T, D)."""

    name: ClassVar[str] = "hidden"
    taps: ClassVar[Taps] = Taps()
    layout: Layout

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """One vector a token."""
        width = self.layout.width
        return (Column("hidden", self.layout.dtype, lambda tokens: (tokens, width)),)

    def extract(
        self, model: PreTrainedModel, forward: Forward, mask: Int[Tensor, "B T"], dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        """As the model leaves it."""
        hidden = forward.last_hidden
        rows = hidden[mask.bool().to(hidden.device)].to(dtype).cpu()
        return [{"hidden": example} for example in rows.split(mask.sum(1).tolist())]

    def faults(self, arrays: Arrays, tolerance: float) -> Iterator[str]:
        """Any finite value can be one."""
        yield from ()

    def error(self, model: PreTrainedModel, arrays: Arrays, forward: Forward) -> float:
        """Of the whole array."""
        return relative_error(torch.tensor(arrays["hidden"]), forward.last_hidden[0].float().cpu())

    def totals(self, arrays: Mapping[str, Tensor], is_text: Tensor) -> dict[str, float]:
        """The squares' sum over tokens of text, and how many values they are: what a scaled loss divides by."""
        hidden = arrays["hidden"][is_text].float()
        squares = float(torch.linalg.vecdot(hidden, hidden).double().sum())
        return {"hidden_square_sum": squares, "hidden_values": hidden.numel()}
