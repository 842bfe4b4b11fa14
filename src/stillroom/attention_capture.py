"""The last layer's attention map, at the speed of sdpa in every other layer.

A model runs as Transformers loads it. Inside `capture_attention` alone, one attention function of ours stands in:
it calls sdpa and, in the last layer, also keeps softmax(q·kᵀ·scale + mask). `check_model` and `check_capture` compare
what we compute with the architecture's own path on a real text, so that one that differs is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stillroom.config import UserError
from stillroom.models import output_logits

ATTENTION = "stillroom"

# what sdpa and eager layers may differ by after a whole forward pass; a wrong mask or scale is far beyond it
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
# what a text's beginning may differ by when its end is another: the same kernels on the same values, so less
_OWN_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


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
        raise UserError(f"{_CANNOT.format(type(model).__name__)}: it does not let its attention function be exchanged")
    model.set_attn_implementation(ATTENTION)
    _Capture.layer, _Capture.map = model.config.get_text_config().num_hidden_layers - 1, None
    try:
        yield _Capture()
    finally:
        _Capture.layer, _Capture.map = None, None
        model.set_attn_implementation(native)


_CANNOT = "{}: its last layer's attention cannot be captured"


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


@torch.no_grad()
def check_model(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compare what every stage computes of a model with its own path, on a text `ids` (1, T); its hidden state.

    The output head on the last hidden state must give the model's logits, and neither what follows a text nor
    padding may change what the model says of it. Raises `UserError` naming the architecture.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder; stillroom distils causal language models")
    mask = torch.ones_like(ids)
    half = (ids.shape[1] + 1) // 2
    try:
        own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        hidden = last_hidden_state(model, ids, mask)
        shorter = mask.clone()
        shorter[:, half:] = 0
        both = last_hidden_state(model, torch.cat([ids, ids * shorter]), torch.cat([mask, shorter]))
        logits = output_logits(model, hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture's own code raises, the user is to read it as a line
        raise UserError(
            f"{name}: a plain forward pass fails ({type(error).__name__}: {_first_line(error)}); "
            "this architecture is not supported"
        ) from error
    if not torch.isfinite(hidden).all():
        raise UserError(
            f"{name} gives NaN or infinite values: its weights are damaged, or too large for {model.dtype}; "
            "try another dtype"
        )
    if logits.shape != own.shape:
        raise UserError(f"{name}: its output head does not read its last hidden state; not supported")
    _require_close(model, "last hidden state × output head misses its logits", logits, own)
    told = "what follows a text, or padding, changes what it says of the text (it is not causal)"
    _require_close(model, told, both[1, :half], both[0, :half], _OWN_ROUNDING)
    _require_close(model, "its hidden state depends on the batch", both[:1], hidden, _OWN_ROUNDING)
    return hidden


@torch.no_grad()
def check_capture(model: PreTrainedModel, ids: Tensor) -> None:
    """`check_model`, and compare the captured attention with the model's own eager path.

    `ids` (1, T): any text long enough to show a difference. Raises `UserError` naming the architecture.
    """
    name = type(model).__name__
    expected = check_model(model, ids)
    mask = torch.ones_like(ids)
    native = model.config._attn_implementation
    try:
        with capture_attention(model) as capture:
            hidden = last_hidden_state(model, ids, mask)
            found = capture.map
        model.set_attn_implementation("eager")
        own = model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as in check_model
        raise UserError(
            f"{_CANNOT.format(name)} ({type(error).__name__}: {_first_line(error)}); this architecture is not supported"
        ) from error
    finally:
        model.set_attn_implementation(native)
    if found is None:
        raise UserError(f"{_CANNOT.format(name)}; this architecture is not supported")
    attention = own[-1] if own else None
    if attention is None or attention.shape != found.shape:
        shape = None if attention is None else tuple(attention.shape)
        raise UserError(f"{name}: captured attention has shape {tuple(found.shape)}, its own {shape}; not supported")
    _require_close(model, "capturing its attention changes its hidden state", hidden, expected)
    _require_close(model, "captured attention differs from its eager attention", found, attention)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _require_close(
    model: PreTrainedModel,
    what: str,
    found: Tensor,
    expected: Tensor,
    tolerance: dict[torch.dtype, float] = _TOLERANCE,
) -> None:
    if not (difference := relative_error(found, expected)) <= tolerance[model.dtype]:
        raise UserError(
            f"{type(model).__name__}: {what} by {difference:.2g} of their norm; this architecture is not supported"
        )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found = found.to(expected.device)  # a model spread over GPUs leaves its last layer's tensors on the last
    return float((found.float() - expected.float()).norm() / expected.float().norm())
