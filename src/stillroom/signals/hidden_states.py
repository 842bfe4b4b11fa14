"""The teacher's hidden states, of the layers that a study keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import transformers
from torch import Tensor

from stillroom.models.architecture import relative_error
from stillroom.models.forward import Forward, Taps
from stillroom.signals.signal import Arrays, Column, Layout, column_of


@dataclass(frozen=True)
class HiddenStates:
    """`hidden` (T, D) of the last layer, after the final norm; `hidden_8` of layer 8, the residual stream after it."""

    name: ClassVar[str] = "hidden"
    layout: Layout

    @property
    def taps(self) -> Taps:
        """The layers that are kept."""
        return Taps(hidden=frozenset(self.layout.hidden_layers))

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """One vector a token and layer."""
        width = self.layout.width
        names = [column_of("hidden", layer) for layer in self.layout.hidden_layers]
        return tuple(Column(name, self.layout.dtype, lambda tokens: (tokens, width)) for name in names)

    def extract(
        self, model: transformers.PreTrainedModel, forward: Forward, lengths: Sequence[int], dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        """As the model leaves it."""
        return [
            {
                column_of("hidden", layer): forward.hidden[layer][row, :tokens].to(dtype)
                for layer in self.layout.hidden_layers
            }
            for row, tokens in enumerate(lengths)
        ]

    def faults(self, arrays: Arrays, tolerance: float) -> Iterator[str]:
        """Any finite value can be one."""
        yield from ()

    def error(self, model: transformers.PreTrainedModel, arrays: Arrays, forward: Forward) -> float:
        """Of the whole array, at the worst layer."""
        return max(
            relative_error(torch.tensor(arrays[column_of("hidden", layer)]), forward.hidden[layer][0].float().cpu())
            for layer in self.layout.hidden_layers
        )

    def totals(self, arrays: Mapping[str, Tensor], is_text: Tensor) -> dict[str, float]:
        """The squares' sum over tokens of text, and how many values they are: what a scaled loss divides by."""
        found: dict[str, float] = {}
        for column in self.columns:
            hidden = arrays[column.name][is_text].float()
            found[f"{column.name}_square_sum"] = float(torch.linalg.vecdot(hidden, hidden).double().sum())
            found[f"{column.name}_values"] = hidden.numel()
        return found
