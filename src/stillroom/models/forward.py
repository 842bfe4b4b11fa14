"""One pass of a model: its last hidden state."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.data.encoding import Encoding


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only, so that padding on the left shifts nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@cache
def _takes_positions(base: Any) -> bool:
    """Whether an architecture is told positions; others count for themselves, or know none (ALiBi)."""
    return "position_ids" in inspect.signature(base.forward).parameters


def last_hidden_state(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The final layer's hidden state after the final norm, (B, T, D)."""
    base = model.base_model if model.base_model is not model else getattr(model, "model", model)
    positions = {"position_ids": position_ids(mask)} if _takes_positions(type(base)) else {}  # type: ignore[arg-type]
    output = base(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    hidden: Tensor = output.last_hidden_state
    return hidden


def padded(
    encodings: Sequence[Encoding], side: str = "right", device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T), padded with id 0 on one side; the mask alone says what is padding."""
    longest = max(len(e) for e in encodings)
    ids = torch.zeros(len(encodings), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        place = slice(0, len(encoding)) if side == "right" else slice(longest - len(encoding), longest)
        ids[row, place] = torch.from_numpy(encoding.ids.astype("int64"))
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
