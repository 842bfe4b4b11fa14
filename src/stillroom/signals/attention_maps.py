"""The post-softmax attention of every head, of the layers that a study keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import transformers
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from stillroom.models.architecture import relative_error
from stillroom.models.forward import Forward, Taps
from stillroom.signals.signal import Arrays, Column, Layout, column_of

# what a row's sum may be off by in 8 bits: the rounding of a row has a standard deviation of 2/(255·√12) = 0.0023, and
# this is nine of them
_COMPANDED = 0.02
_SQUARES = ((np.arange(256) / 255) ** 2).astype(np.float32)


@dataclass(frozen=True)
class AttentionMaps:
    """`attention` (H, N) of the last layer, `attention_8` of layer 8: row after row of the causal triangle."""

    name: ClassVar[str] = "attention"
    layout: Layout

    @property
    def taps(self) -> Taps:
        """The layers that are kept."""
        return Taps(attention=frozenset(self.layout.attention_layers))

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The triangle of every head, N = T(T+1)/2; in 8 bits, companded by a square root."""
        heads, names = self.layout.heads, [column_of("attention", layer) for layer in self.layout.attention_layers]

        def shape(tokens: int) -> tuple[int, ...]:
            return heads, tokens * (tokens + 1) // 2

        if self.layout.attention_dtype is None:
            return tuple(Column(name, self.layout.dtype, shape) for name in names)
        return tuple(Column(name, "uint8", shape, pack=_companded, unpack=_SQUARES.__getitem__) for name in names)

    def extract(
        self, model: transformers.PreTrainedModel, forward: Forward, lengths: Sequence[int], dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        """The causal triangle of each example's square, without padding."""
        maps = {column_of("attention", tap): forward.attention[tap].to(dtype) for tap in self.layout.attention_layers}
        return [
            {name: triangle(squares[row, :, :tokens, :tokens]) for name, squares in maps.items()}
            for row, tokens in enumerate(lengths)
        ]

    def faults(self, arrays: Arrays, tolerance: float) -> Iterator[str]:
        """Each row is a distribution."""
        for column in self.columns:
            attention: ndarray = arrays[column.name]
            tokens = round((np.sqrt(8 * attention.shape[1] + 1) - 1) / 2)
            starts = np.arange(tokens) * (np.arange(tokens) + 1) // 2
            sums = np.add.reduceat(attention.astype(np.float64), starts, axis=1)
            if not (np.abs(sums - 1) <= (_COMPANDED if self.layout.attention_dtype else tolerance)).all():
                yield f"{column.name} rows sum to {sums.min():.4f}…{sums.max():.4f}, not 1"
            if not (attention >= 0).all():
                yield f"{column.name} has negative values"

    def error(self, model: transformers.PreTrainedModel, arrays: Arrays, forward: Forward) -> float:
        """Of the whole array, at the worst layer."""
        again = {column_of("attention", tap): forward.attention[tap][0] for tap in self.layout.attention_layers}
        return max(
            relative_error(torch.tensor(arrays[name]), triangle(square).float().cpu()) for name, square in again.items()
        )

    def totals(self, arrays: Mapping[str, Tensor], is_text: Tensor) -> dict[str, float]:
        """None."""
        return {}


def triangle(square: Float[Tensor, "H T T"]) -> Float[Tensor, "H N"]:
    """The causal triangle, row after row."""
    row, column = torch.tril_indices(square.shape[-1], square.shape[-1], device=square.device)
    return square[:, row, column]


def _companded(values: Tensor) -> Tensor:
    return (values.float().sqrt() * 255).round().to(torch.uint8)
