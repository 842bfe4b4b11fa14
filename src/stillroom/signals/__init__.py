"""What is kept of the teacher: a file a signal, one line each in the registry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

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
def run_teacher(model: PreTrainedModel, encodings: Sequence[Encoding], signals: Sequence[Signal]) -> Forward:
    """One forward pass that leaves behind what the signals ask for."""
    ids, _ = padded(encodings, device=model.device)
    taps = Taps()
    for signal in signals:
        taps |= signal.taps
    return forward(model, ids, taps)


@torch.no_grad()
def compute_signals(
    model: PreTrainedModel, encodings: Sequence[Encoding], layout: Layout, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Run one batch: each example's columns by name, on the CPU, floating-point values in `dtype`.

    Raises `UserError` on a non-finite value, with its place in the batch.
    """
    signals, lengths = signals_of(layout), [len(encoding) for encoding in encodings]
    passed = run_teacher(model, encodings, signals)
    examples: list[dict[str, Tensor]] = [{} for _ in encodings]
    for signal in signals:
        for example, columns in zip(examples, signal.extract(model, passed, lengths, dtype), strict=True):
            example.update(columns)
    checked = [column.name for signal in signals for column in signal.columns if column.finite]
    finite = {name: torch.stack([torch.isfinite(example[name]).all() for example in examples]) for name in checked}
    finite, *examples = _on_the_cpu([finite, *examples])
    for row, name in product(range(len(examples)), checked):
        if not finite[name][row]:
            raise UserError(
                f"the teacher's {name} has NaN or infinite values (row {row} of the batch); "
                "try teacher.dtype=bfloat16 or float32, or signals.dtype=float32"
            )
    return examples


def _on_the_cpu(named: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same there; from a GPU all of them travel to page-locked memory, and the host waits once, at the end."""
    moved = [{name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()} for tensors in named]
    for device in {tensor.device for tensors in named for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return moved


__all__ = ["SIGNALS", "Column", "Layout", "Signal", "compute_signals", "id_dtype", "run_teacher", "signals_of"]
