"""What a signal is: the columns it keeps of each example, and how they come from a forward pass of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import transformers
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from stillroom.models.forward import Forward, Tap, Taps

Arrays = Mapping[str, ndarray]
"""Columns of one stored example by name."""


@dataclass(frozen=True)
class Layout:
    """What a store's shapes and dtypes follow from."""

    top_k: int
    width: int
    heads: int
    dtype: str
    """numpy name of the dtype of log-probabilities, hidden states and attention."""
    id_dtype: str
    """uint16 where the vocabulary allows, else int32."""
    attention_dtype: Literal["uint8_sqrt"] | None = None
    """`uint8_sqrt`: attention p is stored as round(255·√p); None: in `dtype`."""
    hidden_layers: tuple[Tap, ...] = ("last",)
    attention_layers: tuple[Tap, ...] = ("last",)
    value_layers: tuple[Tap, ...] = ()
    value_width: int = 0

    @property
    def layers(self) -> dict[str, tuple[Tap, ...]]:
        """What is kept of which layers of the teacher: `hidden`, `attention` and `values`, where there are any."""
        kept = {"hidden": self.hidden_layers, "attention": self.attention_layers, "values": self.value_layers}
        return {signal: layers for signal, layers in kept.items() if layers}

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> Layout:
        """From JSON, which has lists for tuples."""
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in described.items()}
        return cls(**fields)


def column_of(signal: str, layer: Tap) -> str:
    """Name of a signal's column of a layer: the last layer's has none."""
    return signal if layer == "last" else f"{signal}_{layer}"


def id_dtype(vocabulary: int) -> str:
    """The smallest dtype a store uses that holds every id."""
    return "uint16" if vocabulary <= 2**16 else "int32"


def as_it_is(value: Any) -> Any:
    """Stored and read unchanged."""
    return value


@dataclass(frozen=True)
class Column:
    """One array of a stored example: its dtype on disk, and its shape by the number of the teacher's tokens."""

    name: str
    dtype: str
    shape: Callable[[int], tuple[int, ...]]
    finite: bool = True
    """Whether NaN or an infinite value in it is a fault."""
    pack: Callable[[Tensor], Tensor] = as_it_is
    """From values to what is stored."""
    unpack: Callable[[ndarray], ndarray] = as_it_is
    """From what is stored to values; uncopied where they are the same."""

    def bytes(self, tokens: int) -> int:
        """Bytes of its cell in a row of so many tokens."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape(tokens))


class Signal(Protocol):
    """One kind of inner value of the teacher: the only place that knows it by name."""

    name: ClassVar[str]
    """What messages call it."""

    @property
    def taps(self) -> Taps:
        """What a forward pass must leave behind for it, beside the last hidden state."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """What is kept of it."""

    def extract(
        self, model: transformers.PreTrainedModel, forward: Forward, lengths: Sequence[int], dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        """Its columns of each example of a batch, padded on the right to the longest; floating-point values in `dtype`.

        On the device that made them; nothing here may wait for it.
        """

    def faults(self, arrays: Arrays, tolerance: float) -> Iterator[str]:
        """What cannot have come from a forward pass; `tolerance` is that of a sum of stored values."""

    def error(self, model: transformers.PreTrainedModel, arrays: Arrays, forward: Forward) -> float:
        """How far stored values are from those of a forward pass of one example alone, relative."""

    def totals(self, arrays: Mapping[str, Tensor], is_text: Tensor) -> dict[str, float]:
        """What a shard adds up of it over its examples; `is_text` (T,) tells tokens of text from special ones."""


def without_padding(values: Float[Tensor, "B T D"], lengths: Sequence[int]) -> Float[Tensor, "N D"]:
    """The tokens of every example, one after the other."""
    return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])
