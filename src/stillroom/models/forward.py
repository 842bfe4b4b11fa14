"""One pass of either model, leaving behind the inner values that were asked for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.data.encoding import Encoding
from stillroom.errors import UserError
from stillroom.models.attention_capture import CANNOT, attention_recorder

LAST = -1
"""The last layer, whatever its number."""


@dataclass(frozen=True)
class Taps:
    """Which inner values a forward pass leaves behind, by layer: from 0, or `LAST`."""

    attention: frozenset[int] = frozenset()

    def __or__(self, other: Taps) -> Taps:
        """What either asks for."""
        return Taps(self.attention | other.attention)


@dataclass(frozen=True)
class Forward:
    """What one forward pass has left."""

    last_hidden: Float[Tensor, "B T D"]
    """After the final norm: what the output head reads."""
    attention: Mapping[int, Float[Tensor, "B H T T"]] = field(default_factory=dict)
    """Post-softmax maps, float32, by the layers that were asked for."""


def forward(model: PreTrainedModel, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], taps: Taps = Taps()) -> Forward:
    """Run the model without its output head; `mask` is 1 for a token, 0 for padding on either side.

    Raises `UserError` where a layer's attention passes the attention function by.
    """
    if not taps.attention:
        return Forward(last_hidden_state(model, ids, mask))
    layers = {tap: _layer(model, tap) for tap in taps.attention}
    with attention_recorder(model, frozenset(layers.values())) as recorder:
        hidden = last_hidden_state(model, ids, mask)
    if missing := sorted(set(layers.values()) - set(recorder.maps)):
        raise UserError(f"{CANNOT.format(type(model).__name__)} in layer {missing[0]}; not supported")
    return Forward(hidden, {tap: recorder.maps[layer] for tap, layer in layers.items()})


def _layer(model: PreTrainedModel, tap: int) -> int:
    return int(model.config.get_text_config().num_hidden_layers) - 1 if tap == LAST else tap


def last_hidden_state(model: PreTrainedModel, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> Tensor:
    """The final layer's hidden state after the final norm, (B, T, D)."""
    base = model.base_model if model.base_model is not model else getattr(model, "model", model)
    positions = {"position_ids": position_ids(mask)} if _takes_positions(type(base)) else {}  # type: ignore[arg-type]
    output = base(input_ids=ids, attention_mask=mask, use_cache=False, **positions)
    hidden: Tensor = output.last_hidden_state
    return hidden


def position_ids(mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Positions that count real tokens only, so that padding on the left shifts nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@cache
def _takes_positions(base: Any) -> bool:
    """Whether an architecture is told positions; others count for themselves, or know none (ALiBi)."""
    return "position_ids" in inspect.signature(base.forward).parameters


def padded(
    encodings: Sequence[Encoding], side: str = "right", device: torch.device | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Ids and mask, padded with id 0 on one side; the mask alone says what is padding."""
    longest = max(len(e) for e in encodings)
    ids = torch.zeros(len(encodings), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        place = slice(0, len(encoding)) if side == "right" else slice(longest - len(encoding), longest)
        ids[row, place] = torch.from_numpy(encoding.ids.astype("int64"))
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
