"""The teacher's value vectors, of the layers that a study keeps: what value relations are made of."""

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
class Values:
    """`values` (T, W) of the last layer, `values_8` of layer 8: its key-value heads' vectors, head after head."""

    name: ClassVar[str] = "values"
    layout: Layout

    @property
    def taps(self) -> Taps:
        """The layers that are kept."""
        return Taps(values=frozenset(self.layout.value_layers))

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """One vector a token and layer; with Mistral-7B's 8 heads of 128, 2 kB in 16 bits."""
        width = self.layout.value_width
        names = [column_of("values", layer) for layer in self.layout.value_layers]
        return tuple(Column(name, self.layout.dtype, lambda tokens: (tokens, width)) for name in names)

    def extract(
        self, model: transformers.PreTrainedModel, forward: Forward, lengths: Sequence[int], dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        """Head after head, without padding."""
        return [
            {
                column_of("values", layer): forward.values[layer][row, :tokens].to(dtype)
                for layer in self.layout.value_layers
            }
            for row, tokens in enumerate(lengths)
        ]

    def faults(self, arrays: Arrays, tolerance: float) -> Iterator[str]:
        """Any finite value can be one."""
        yield from ()

    def error(self, model: transformers.PreTrainedModel, arrays: Arrays, forward: Forward) -> float:
        """Of the whole array, at the worst layer; 0 where none is kept."""
        errors = [
            relative_error(torch.tensor(arrays[column_of("values", layer)]), forward.values[layer][0].float().cpu())
            for layer in self.layout.value_layers
        ]
        return max(errors, default=0.0)

    def totals(self, arrays: Mapping[str, Tensor], is_text: Tensor) -> dict[str, float]:
        """None."""
        return {}
