"""Whether what is computed of a model is what its own code computes: refused by name where it is not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from stillroom.errors import UserError, first_line
from stillroom.models.forward import Taps, forward, last_hidden_state
from stillroom.models.output_head import output_logits

# what sdpa and eager layers may differ by after a whole forward pass; a wrong mask or scale is far beyond it
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


# what a text's beginning may differ by when its end is another: the same kernels on the same values, so less
_OWN_ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


@torch.no_grad()
def check_model(model: transformers.PreTrainedModel, ids: Tensor) -> Tensor:
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
        model_logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        hidden = last_hidden_state(model, ids)
        shorter = mask.clone()
        shorter[:, half:] = 0
        both = last_hidden_state(model, torch.cat([ids, ids * shorter]))
        logits = output_logits(model, hidden)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture's own code raises, the user is to read it as a line
        raise UserError(
            f"{name}: a plain forward pass fails ({type(error).__name__}: {first_line(error)[:200]}); "
            "this architecture is not supported"
        ) from error
    if not torch.isfinite(hidden).all():
        raise UserError(
            f"{name} gives NaN or infinite values: its weights are damaged, or too large for {model.dtype}; "
            "try another dtype"
        )
    if logits.shape != model_logits.shape:
        raise UserError(f"{name}: its output head does not read its last hidden state; not supported")
    _require_close(model, "last hidden state × output head misses its logits", logits, model_logits)
    told = "what follows a text, or padding, changes what it says of the text (it is not causal)"
    _require_close(model, told, both[1, :half], both[0, :half], _OWN_ROUNDING)
    _require_close(model, "its hidden state depends on the batch", both[:1], hidden, _OWN_ROUNDING)
    return hidden


_COMPARED = 256
"""Tokens on which maps are compared, at most: of 4,096, the eager path of 32 layers would keep 34 GB."""


@torch.no_grad()
def check_capture(model: transformers.PreTrainedModel, ids: Tensor) -> None:
    """`check_model`, and compare the captured attention with the model's own eager path.

    `ids` (1, T): any text long enough to show a difference; of a long one, maps are compared on its beginning alone,
    since the eager path keeps those of all layers. Raises `UserError` naming the architecture.
    """
    from stillroom.models.attention_capture import CANNOT

    name = type(model).__name__
    expected = check_model(model, ids)
    native = model.config._attn_implementation
    try:
        captured = Taps(attention=frozenset({"last"}))
        hidden = forward(model, ids, captured).last_hidden
        short = ids[:, :_COMPARED]
        found = forward(model, short, captured).attention["last"]
        model.set_attn_implementation("eager")
        with _without_new_hooks(model):
            eager_maps = model(
                input_ids=short, attention_mask=torch.ones_like(short), output_attentions=True, use_cache=False
            ).attentions
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as in check_model
        said = first_line(error)[:200]
        raise UserError(
            f"{CANNOT.format(name)} ({type(error).__name__}: {said}); this architecture is not supported"
        ) from error
    finally:
        model.set_attn_implementation(native)
    attention = eager_maps[-1] if eager_maps else None
    if attention is None or attention.shape != found.shape:
        shape = None if attention is None else tuple(attention.shape)
        raise UserError(f"{name}: captured attention has shape {tuple(found.shape)}, its own {shape}; not supported")
    _require_close(model, "capturing its attention changes its hidden state", hidden, expected)
    _require_close(model, "captured attention differs from its eager attention", found, attention)


@contextmanager
def _without_new_hooks(model: transformers.PreTrainedModel) -> Iterator[None]:
    """Take away again the hooks by which Transformers collects maps: they would stay, and stop `torch.compile`."""
    before = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, hooks in before.items():
            for number in set(module._forward_hooks) - hooks:
                del module._forward_hooks[number]
            vars(module).pop("_output_capturing_hooks_installed", None)


def _require_close(
    model: transformers.PreTrainedModel,
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


_LARGEST = 200_000_000
"""Weights that a miniature may have: 0.8 GB."""


PROBE = torch.arange(3, 23)[None]
"""A text (1, T) that every miniature has the vocabulary for."""


def miniature(config: Any) -> transformers.PreTrainedModel:
    """Two layers of the architecture, narrow where it can be, in float32; a plain forward pass of it works.

    Raises `UserError` where no small model of the architecture can be built.
    """
    reason = "it is not a causal language model"
    for small in _smaller(config):
        try:
            with torch.device("meta"):
                size = sum(
                    p.numel() for p in transformers.AutoModelForCausalLM.from_config(copy.deepcopy(small)).parameters()
                )
            if size > _LARGEST:
                raise ValueError(f"its smallest model has {size:,} weights")
            with torch.random.fork_rng(devices=[]):  # GPUs' generators stay as they are
                torch.default_generator.manual_seed(0)
                model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
                    small, dtype=torch.float32
                ).eval()
            with torch.no_grad():
                model(input_ids=PROBE, use_cache=False)
        except Exception as error:  # any architecture's own constructor and forward pass
            reason = first_line(error)[:200]
        else:
            return model
    raise UserError(f"{config.model_type}: no small model of this architecture can be built ({reason})")


def try_miniature(config: Any) -> transformers.PreTrainedModel | None:
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
