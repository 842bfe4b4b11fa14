"""A model's layers compiled by `torch.compile`, but for those whose inner values are kept."""

from __future__ import annotations

import torch
import transformers

from stillroom.errors import UserError
from stillroom.models.forward import Taps, blocks_of, layer_number

ROUNDED = 64
"""Batches are padded to a multiple of this many tokens, so that layers are compiled for only a few lengths."""

BACKEND = "inductor"
"""PyTorch's own compiler."""


def compile_layers(model: transformers.PreTrainedModel, taps: Taps, device: torch.device) -> None:
    """Compile each layer that leaves nothing behind; compiling happens when it first runs, and again for a new shape.

    Identical layers share the compiled code. `UserError` where this machine cannot compile for the device, which
    the model may not have been moved to yet.
    """
    try:
        torch.compile(lambda x: 2 * x + 1, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # a compiler that is missing shows itself in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"training.compile: this machine cannot compile: {reason}; leave it out") from error
    tapped = {tap for kind in (taps.attention, taps.values) for tap in kind} | {t for t in taps.hidden if t != "last"}
    kept = {layer_number(model, tap) for tap in tapped}
    for number, block in enumerate(blocks_of(model), 1):
        if number not in kept:
            block.compile(backend=BACKEND)
