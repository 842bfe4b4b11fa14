"""What is kept of the teacher: a file a signal, one line each in the registry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.data.encoding import Encoding
from stillroom.errors import UserError
from stillroom.models.forward import Forward, Taps, forward, padded
from stillroom.signals.attention_maps import AttentionMaps
from stillroom.signals.hidden_states import HiddenStates
from stillroom.signals.next_token import NextToken
from stillroom.signals.signal import Column, Layout, Signal, id_dtype
from stillroom.signals.values import Values

SIGNALS = (NextToken, HiddenStates, AttentionMaps, Values)
"""In the order of the store's columns."""


def signals_of(layout: Layout) -> tuple[Signal, ...]:
    """The signals of a store."""
    return tuple(signal(layout) for signal in SIGNALS)


@torch.no_grad()
def run_teacher(
    model: PreTrainedModel, encodings: Sequence[Encoding], signals: Sequence[Signal]
) -> tuple[Forward, Tensor]:
    """One forward pass that leaves behind what the signals ask for, and the batch's mask (B, T)."""
    ids, mask = padded(encodings, device=model.device)
    taps = Taps()
    for signal in signals:
        taps |= signal.taps
    return forward(model, ids, taps), mask


@torch.no_grad()
def compute_signals(
    model: PreTrainedModel, encodings: Sequence[Encoding], layout: Layout, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Run one batch: each example's columns by name, on the CPU, floating-point values in `dtype`.

    Raises `UserError` on a non-finite value, with its place in the batch.
    """
    signals = signals_of(layout)
    passed, mask = run_teacher(model, encodings, signals)
    examples: list[dict[str, Tensor]] = [{} for _ in encodings]
    for signal in signals:
        for example, columns in zip(examples, signal.extract(model, passed, mask, dtype), strict=True):
            example.update(columns)
    for row, example in enumerate(examples):
        for column in (column for signal in signals for column in signal.columns):
            if column.finite and not torch.isfinite(example[column.name]).all():
                raise UserError(
                    f"the teacher's {column.name} has NaN or infinite values (row {row} of the batch); "
                    "try teacher.dtype=bfloat16 or float32, or signals.dtype=float32"
                )
    return examples


__all__ = ["SIGNALS", "Column", "Layout", "Signal", "compute_signals", "id_dtype", "run_teacher", "signals_of"]
