"""What a loss term is: what it reads of the store, its part of a batch, its sum and its count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from stillroom.data.prepared import Prepared
from stillroom.models.forward import Forward, Taps
from stillroom.offline_teacher_data.store import StoredExample
from stillroom.terms.placebo import Placebo

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A term's part of a batch: its tensors, and what its sum is divided by once a whole step is added up."""

    count: int


@runtime_checkable
class Term(Protocol):
    """A white-box term: the only place that knows it by name."""

    name: str
    columns: tuple[str, ...]
    """What it reads of the store."""
    placebo: bool
    """Whether the teacher's values are put in the wrong places."""
    taps: Taps
    """What a forward pass of the student must leave behind for it."""

    def collate(self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int) -> Part:
        """Its part of a batch whose sequences are padded to `longest` tokens."""

    def misplaced(self, items: Sequence[Prepared], placebo: Placebo, longest: int) -> Part:
        """The same as a placebo."""

    def loss(self, forward: Forward, part: Any, trained: nn.Module | None) -> Float[Tensor, ""]:
        """The sum over the part, float32."""

    def trained(self, seed: int) -> nn.Module | None:
        """What is trained beside the student, if anything; the same for every group of a seed."""


def rows_taken(stored: Sequence[StoredExample], column: str, rows: Sequence[Int[ndarray, "_"]]) -> Tensor:
    """Chosen rows of a column, example after example, as stored: each value is copied once."""
    sources = [from_dlpack(example[column]) for example in stored]  # of read-only memory too
    lengths = [len(chosen) for chosen in rows]
    taken = torch.empty(sum(lengths), *sources[0].shape[1:], dtype=sources[0].dtype)
    for source, chosen, part in zip(sources, rows, taken.split(lengths), strict=True):
        torch.index_select(source, 0, torch.from_numpy(chosen.astype("int64")), out=part)
    return taken


def each_tensor(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """A dataclass with every tensor in it changed, at any depth; other values stay."""
    if isinstance(value, Tensor):
        return change(value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: each_tensor(getattr(value, f.name), change) for f in fields(value)})
    if isinstance(value, dict):
        return {key: each_tensor(inner, change) for key, inner in value.items()}  # type: ignore[return-value]
    return value
