"""What a plan needs to know of a model: its sizes, from its configuration or as published."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import transformers

from stillroom.config import ModelRef
from stillroom.errors import UserError
from stillroom.models.builtin_pair import builtin_config
from stillroom.models.hub import load_config

_SHAPES: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 22,
        "intermediate_size": 5632,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": {
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
"""Published shapes of the shipped studies' models, for a machine that reaches neither hub nor cache."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    parameters: int
    value_width: int
    """Of a token's value vectors, of all key-value heads together."""


def shape_of(ref: ModelRef, assumptions: list[str]) -> Shape:
    """The sizes of a model; where its configuration is not available, published ones, and `assumptions` says so.

    `UserError` if neither is known.
    """
    if (built_in := builtin_config(ref.model)) is not None:
        return _of(built_in)
    try:
        return _of_config(load_config(ref))
    except UserError:
        if ref.model not in _SHAPES:
            raise
        assumptions.append(f"{ref.model}: published shape; its config.json could not be read here")
        return _of(_SHAPES[ref.model])


def _of_config(config: Any) -> Shape:
    """By the names that every configuration answers to, whatever it calls them itself."""
    text = config.get_text_config()
    names = ("head_dim", "num_key_value_heads", "intermediate_size", "vocab_size", "tie_word_embeddings")
    given = {name: getattr(text, name, None) for name in names}
    layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(layers, int) or not isinstance(given["vocab_size"], int):
        raise UserError(f"{config.model_type}: its configuration names no layers or vocabulary; it cannot be planned")
    return _of(
        {**given, "hidden_size": width(config), "num_attention_heads": heads(config), "num_hidden_layers": layers}
    )


def _of(config: dict[str, Any]) -> Shape:
    width, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    head_width = config.get("head_dim") or width // config["num_attention_heads"]
    queries = head_width * config["num_attention_heads"]
    keys = head_width * (config.get("num_key_value_heads") or config["num_attention_heads"])
    inner = config.get("intermediate_size") or 4 * width
    per_layer = width * (2 * queries + 2 * keys) + 3 * width * inner + 2 * width
    embeddings = vocabulary * width * (1 if config.get("tie_word_embeddings") else 2)
    parameters = embeddings + layers * per_layer + width
    return Shape(width, config["num_attention_heads"], layers, vocabulary, parameters, keys)


def vocabulary_size(model: transformers.PreTrainedModel) -> int:
    """Entries of the output head, which may exceed the tokenizer's."""
    return int(model.get_output_embeddings().weight.shape[0])


def width(config: Any) -> int:
    """Dimensions of the last hidden state, which the output head reads; OPT may project it to others."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or _required(text, "hidden_size"))


def heads(config: Any) -> int:
    """Attention heads of a layer."""
    return int(_required(config.get_text_config(), "num_attention_heads"))


def _required(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise UserError(f"{config.model_type}: its configuration has no {name}; this architecture is not supported")
    return value


def value_width(config: Any) -> int:
    """Dimensions of a token's value vectors: of all key-value heads together."""
    text = config.get_text_config()
    count = int(getattr(text, "num_key_value_heads", None) or heads(config))
    # v_head_dim: of multi-head latent attention
    width = getattr(text, "v_head_dim", None) or getattr(text, "head_dim", None)
    return count * int(width or _required(text, "hidden_size") // heads(config))


def context_length(config: Any) -> int:
    """Tokens the model was made to read at once; where its configuration does not say, no bound is known."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)
