"""The last layer's attention map, at the speed of sdpa in every other layer.

One attention function is registered under `ATTENTION`, with sdpa's mask. It calls sdpa; in the last layer, and
only inside `capture_attention`, it also keeps softmax(q·kᵀ·scale + mask). `check_capture` compares it and the
output head with the architecture's own eager path, so an architecture that differs is refused by name.
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

from stillroom.config import UserError

ATTENTION = "stillroom"

# what sdpa and eager layers may differ by after a whole forward pass; a wrong mask or scale is far beyond it
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


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
    """Keep the last layer's attention of the forward pass inside: `.map`, float32 (B, H, T, T)."""
    _Capture.layer, _Capture.map = model.config.get_text_config().num_hidden_layers - 1, None
    try:
        yield _Capture()
    finally:
        _Capture.layer, _Capture.map = None, None


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only, so that padding on the left shifts nothing."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def last_hidden_state(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """The final layer's hidden state after the final norm, (B, T, D)."""
    output = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False, **options
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


@torch.no_grad()
def check_head(model: PreTrainedModel, ids: Tensor, head: Any) -> None:
    """Compare `head` on the last hidden state of a text `ids` (1, T) with the model's own logits.

    Some architectures scale their logits. Raises `UserError` naming the architecture.
    """
    mask = torch.ones_like(ids)
    own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    _require_close(model, _HEAD, head(last_hidden_state(model, ids, mask)), own)


@torch.no_grad()
def check_capture(model: PreTrainedModel, ids: Tensor, head: Any) -> None:
    """Compare the captured attention, and `head` on the hidden state, with the model's own eager path.

    `ids` (1, T): any text long enough to show a difference. Raises `UserError` naming the architecture.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder; stillroom distils causal language models")
    mask = torch.ones_like(ids)
    with capture_attention(model) as capture:
        hidden = last_hidden_state(model, ids, mask)
        found = capture.map
    if not torch.isfinite(hidden).all():
        raise UserError(
            f"{name} gives NaN or infinite values: its weights are damaged, or too large for {model.dtype}; "
            "try another dtype"
        )
    if found is None:
        raise UserError(f"{name}: its last layer's attention cannot be captured; this architecture is not supported")
    try:
        model.set_attn_implementation("eager")
        own = model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(ATTENTION)
    attention = own.attentions[-1] if own.attentions else None
    if attention is None or attention.shape != found.shape:
        shape = None if attention is None else tuple(attention.shape)
        raise UserError(f"{name}: captured attention has shape {tuple(found.shape)}, its own {shape}; not supported")
    _require_close(model, "captured attention differs from its eager attention", found, attention)
    _require_close(model, _HEAD, head(hidden), own.logits)


_HEAD = "last hidden state × output head misses its logits"


def _require_close(model: PreTrainedModel, what: str, found: Tensor, expected: Tensor) -> None:
    if not (difference := relative_error(found, expected)) <= _TOLERANCE[model.dtype]:
        raise UserError(
            f"{type(model).__name__}: {what} by {difference:.2g} of their norm; this architecture is not supported"
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found = found.to(expected.device)  # a model spread over GPUs leaves its last layer's tensors on the last
    return float((found.float() - expected.float()).norm() / expected.float().norm())
