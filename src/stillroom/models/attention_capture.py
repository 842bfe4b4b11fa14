"""Attention maps of chosen layers, with every layer at the speed of sdpa.

Inside `attention_recorder` one attention function of ours replaces the model's: it calls sdpa and, in a layer
that was asked for, also keeps softmax(q·kᵀ·scale + mask). Outside, a model runs as Transformers loads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from stillroom.errors import UserError

ATTENTION = "stillroom"
CANNOT = "{}: its attention maps cannot be captured"


class Recorder:
    """What one forward pass leaves behind of its attention, by layer from 0."""

    def __init__(self, layers: frozenset[int], value_layers: frozenset[int] = frozenset()) -> None:
        """Those whose maps, and those whose value vectors are to be kept."""
        self.layers, self.value_layers = layers, value_layers
        self.maps: dict[int, Tensor] = {}
        """Post-softmax, float32 (B, H, T, T)."""
        self.values: dict[int, Tensor] = {}
        """Of the key-value heads, one after the other: (B, T, W)."""


_RECORDER = "stillroom_recorder"
"""Attribute of a model that is recorded, and of its layers' modules, for as long as it is.

A layer that is not recorded has none, so nothing in it stops `torch.compile`.
"""


@contextmanager
def attention_recorder(
    model: PreTrainedModel, layers: frozenset[int], value_layers: frozenset[int] = frozenset()
) -> Iterator[Recorder]:
    """Keep the attention maps and value vectors of the forward pass inside.

    Raises `UserError` for an architecture whose attention function cannot be exchanged.
    """
    if not model._can_set_attn_implementation():
        raise UserError(f"{CANNOT.format(type(model).__name__)}: its attention function cannot be replaced")
    native = model.config._attn_implementation
    recorder, wanted = Recorder(layers, value_layers), layers | value_layers
    watched = [model, *(module for module in model.modules() if getattr(module, "layer_idx", None) in wanted)]
    before = [vars(module).get(_RECORDER) for module in watched]
    model.set_attn_implementation(ATTENTION)
    for module in watched:
        setattr(module, _RECORDER, recorder)
    try:
        yield recorder
    finally:
        for module, other in zip(watched, before, strict=True):
            setattr(module, _RECORDER, other)
        model.set_attn_implementation(native)


def recompute_layers(model: PreTrainedModel) -> None:
    """Checkpoint gradients: keep each layer's input alone, and compute the layer again in the backward pass.

    It is computed as it was: with the dropout it had, and with its attention map where that was kept, which by then
    nothing else would make. `UserError` for an architecture that cannot.
    """

    def contexts() -> tuple[Any, Any]:
        recorder: Recorder | None = vars(model).get(_RECORDER)
        if recorder is None:
            return nullcontext(), nullcontext()
        return nullcontext(), attention_recorder(model, recorder.layers, recorder.value_layers)

    try:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    except ValueError:
        raise UserError(
            f"{type(model).__name__}: its layers cannot be recomputed; leave out training.gradient_checkpointing"
        ) from None


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
    recorder: Recorder | None = getattr(module, _RECORDER, None)
    layer: Any = getattr(module, "layer_idx", None)
    wanted = recorder is not None and layer in recorder.layers
    if recorder is not None and layer in recorder.value_layers:
        recorder.values[int(layer)] = value.transpose(1, 2).flatten(2)
    if not wanted and softcap is None:
        return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options), None
    mask = attention_mask
    if mask is None and query.shape[2] < key.shape[2]:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])
    probabilities = attention_probabilities(query, key, mask, scaling, softcap)
    if recorder is not None and wanted:
        recorder.maps[int(layer)] = probabilities
    if softcap is None:
        return _sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options), None
    # sdpa caps no scores: written out, in every layer
    dropped = torch.nn.functional.dropout(probabilities.to(value.dtype), dropout, module.training)
    return torch.matmul(dropped, repeat_kv(value, query.shape[1] // value.shape[1])).transpose(1, 2).contiguous(), None


def _sdpa(*arguments: Any, **options: Any) -> Tensor:
    output: Tensor = sdpa_attention_forward(*arguments, **options)[0]
    return output


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
