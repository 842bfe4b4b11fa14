"""What is kept of the teacher: a file a signal, one line each in the registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
import transformers
from torch import Tensor

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
    model: transformers.PreTrainedModel, encodings: Sequence[Encoding], signals: Sequence[Signal]
) -> Forward:
    """One forward pass that leaves behind what the signals ask for."""
    ids, _ = padded(encodings, device=model.device)
    taps = Taps()
    for signal in signals:
        taps |= signal.taps
    return forward(model, ids, taps)


def compute_signals(
    model: transformers.PreTrainedModel, encodings: Sequence[Encoding], layout: Layout, dtype: torch.dtype
) -> list[dict[str, Tensor]]:
    """Run one batch: each example's columns by name, on the CPU, floating-point values in `dtype`.

    Raises `UserError` on a non-finite value, with its place in the batch.
    """
    return begin_signals(model, encodings, layout, dtype)()


@torch.no_grad()
def begin_signals(
    model: transformers.PreTrainedModel, encodings: Sequence[Encoding], layout: Layout, dtype: torch.dtype
) -> Callable[[], list[dict[str, Tensor]]]:
    """Start `compute_signals` without waiting for a GPU; what is returned waits, and gives or raises what it does."""
    signals, lengths = signals_of(layout), [len(encoding) for encoding in encodings]
    passed = run_teacher(model, encodings, signals)
    examples: list[dict[str, Tensor]] = [{} for _ in encodings]
    for signal in signals:
        for example, columns in zip(examples, signal.extract(model, passed, lengths, dtype), strict=True):
            example.update(columns)
    checked = [column.name for signal in signals for column in signal.columns if column.finite]
    finite = {name: torch.stack([torch.isfinite(example[name]).all() for example in examples]) for name in checked}
    arrive = _to_the_cpu([finite, *examples])

    def arrived() -> list[dict[str, Tensor]]:
        finite, *examples = arrive()
        for row, name in product(range(len(examples)), checked):
            if not finite[name][row]:
                raise UserError(
                    f"the teacher's {name} has NaN or infinite values (row {row} of the batch); "
                    "try teacher.dtype=bfloat16 or float32, or signals.dtype=float32"
                )
        return examples

    return arrived


def _to_the_cpu(named: Sequence[dict[str, Tensor]]) -> Callable[[], list[dict[str, Tensor]]]:
    """Start to copy them there; what is returned waits and gives them.

    From a GPU they travel to page-locked memory on a stream of their own, beside what the GPU computes next.
    """
    devices = {tensor.device for tensors in named for tensor in tensors.values() if tensor.is_cuda}
    streams = {device: torch.cuda.Stream(device) for device in devices}
    for device, stream in streams.items():
        stream.wait_stream(torch.cuda.current_stream(device))

    def copied(tensor: Tensor) -> Tensor:
        if tensor.device not in streams:
            return tensor.cpu()
        with torch.cuda.stream(streams[tensor.device]):
            tensor.record_stream(streams[tensor.device])  # its memory is not given away before it is copied
            return tensor.to("cpu", non_blocking=True)

    copies = [{name: copied(tensor) for name, tensor in tensors.items()} for tensors in named]

    def arrive() -> list[dict[str, Tensor]]:
        for stream in streams.values():
            stream.synchronize()
        return copies

    return arrive


__all__ = [
    "SIGNALS",
    "Column",
    "Layout",
    "Signal",
    "begin_signals",
    "compute_signals",
    "id_dtype",
    "run_teacher",
    "signals_of",
]
