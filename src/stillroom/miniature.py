"""A small random model of an architecture, on which it can be tried before any weight is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stillroom.config import UserError

_LARGEST = 200_000_000
"""Weights that a miniature may have: 0.8 GB."""

PROBE = torch.arange(3, 23)[None]
"""A text (1, T) that every miniature has the vocabulary for."""


def miniature(config: Any) -> PreTrainedModel:
    """Two layers of the architecture, narrow where it can be, in float32; a plain forward pass of it works.

    Raises `UserError` where no small model of the architecture can be built.
    """
    reason = "it is no causal language model"
    for small in _smaller(config):
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(small)).parameters())
            if size > _LARGEST:
                raise ValueError(f"its smallest model has {size:,} weights")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            with torch.no_grad():
                model(input_ids=PROBE, use_cache=False)
        except Exception as error:  # any architecture's own constructor and forward pass
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        else:
            return model
    raise UserError(f"{config.model_type}: no small model of this architecture can be built ({reason})")


def try_miniature(config: Any) -> PreTrainedModel | None:
    """A miniature, or None where none can be built."""
    try:
        return miniature(config)
    except UserError:
        return None


def _smaller(config: Any) -> Iterator[Any]:
    """The configuration with smaller sizes: all of them; then all but those of a head; then layers and vocabulary."""
    heads = _int(config, "num_attention_heads") or 1
    groups = max(1, heads // (_int(config, "num_key_value_heads") or heads))
    few = {"num_hidden_layers": 2, "vocab_size": 64}
    inner = dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "ffn_hidden_size"), 32)
    narrow = {**few, **inner, "num_key_value_heads": 2, "num_attention_heads": 2 * groups, "hidden_size": 16 * groups}
    latent = dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"), 8)
    head = {**latent, "head_dim": 8, "rotary_dim": 4}
    wider = {**narrow, "hidden_size": 64 * groups}
    for sizes, forced in (
        ({**narrow, **head}, ()),
        ({**narrow, **head}, ("head_dim",)),
        (wider, ()),
        (few | inner, ()),
        (few, ()),
    ):
        small = copy.deepcopy(config)
        try:
            text = small.get_text_config()
            for name, value in sizes.items():
                if _int(small, name) or name in forced:
                    setattr(text, name, value)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id"):
                if _int(small, name) or name == "pad_token_id":
                    setattr(text, name, None if name == "pad_token_id" else 1)
            for name, value in list(text.to_dict().items()):
                if isinstance(value, list) and name.endswith(("layer_types", "layers_block_type")):
                    setattr(text, name, value[-2:])
        except Exception:  # a configuration may refuse any of them: the next has fewer
            continue
        yield small


def _int(config: Any, name: str) -> int:
    try:
        value = getattr(config.get_text_config(), name, None)
    except Exception:  # some configurations know it by layer alone, or have several texts
        return 0
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
