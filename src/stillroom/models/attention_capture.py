"""The last layer's attention map, at the speed of sdpa in every other layer.

A model runs as Transformers loads it. Inside `capture_attention` alone, one attention function of ours stands in:
it calls sdpa and, in the last layer, also keeps softmax(q·kᵀ·scale + mask). `check_model` and `check_capture` compare
what we compute with the architecture's own path on a real text, so that one that differs is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stillroom.errors import UserError

ATTENTION = "stillroom"


class _Capture:
    """Where the attention function leaves the map; one per process, off unless a `capture_attention` is open."""

    layer: int | None = None
    map: Tensor | None = None


def attention_probabilities(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B KV T d"],
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
) -> Float[Tensor, "B H T T"]:
    """Post-softmax attention in float32; `mask` is sdpa's: boolean (True: may look), or None for plain causal."""
    key = repeat_kv(key, query.shape[1] // key.shape[1])
    scores = torch.matmul(query, key.transpose(2, 3)).float() * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return torch.softmax(scores, dim=-1)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    wanted = _Capture.layer is not None and getattr(module, "layer_idx", None) == _Capture.layer
    if softcap is None:
        if wanted:
            _Capture.map = attention_probabilities(query, key, attention_mask, scaling)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    return _softcapped(module, query, key, value, attention_mask, dropout, scaling, softcap, wanted), None


def _softcapped(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
    wanted: bool,
) -> Tensor:
    """Attention with capped scores, which sdpa has not: written out, in every layer."""
    if mask is None and query.shape[2] < key.shape[2]:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    probabilities = attention_probabilities(query, key, mask, scaling, softcap)
    if wanted:
        _Capture.map = probabilities
    dropped = torch.nn.functional.dropout(probabilities.to(value.dtype), dropout, module.training)
    return torch.matmul(dropped, repeat_kv(value, query.shape[1] // value.shape[1])).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def capture_attention(model: PreTrainedModel) -> Iterator[_Capture]:
    """Keep the last layer's attention of the forward pass inside: `.map`, float32 (B, H, T, T).

    Raises `UserError` for an architecture whose attention function cannot be exchanged.
    """
    native = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        raise UserError(f"{CANNOT.format(type(model).__name__)}: it does not let its attention function be exchanged")
    model.set_attn_implementation(ATTENTION)
    _Capture.layer, _Capture.map = model.config.get_text_config().num_hidden_layers - 1, None
    try:
        yield _Capture()
    finally:
        _Capture.layer, _Capture.map = None, None
        model.set_attn_implementation(native)


CANNOT = "{}: its last layer's attention cannot be captured"
