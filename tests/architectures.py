"""What the checks say of every architecture, and whether they are right; prints the table of docs/limits.md.

Run it from the project's folder: `python tests/architectures.py`.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM

from stillroom.errors import UserError
from stillroom.models.architecture import PROBE, check_capture, check_model, miniature
from stillroom.models.attention_capture import attention_recorder
from stillroom.models.forward import last_hidden_state
from stillroom.models.output_head import output_logits


@dataclass(frozen=True)
class Verdict:
    """Of one architecture: what the table says, and whether something accepted is wrong."""

    words: str
    wrong: bool = False


@torch.no_grad()
def logits_before_the_last(model, last, captured=False):
    """Our logits (T − 1, V) of a text whose last token is `last`; `captured`: with the attention function of ours."""
    ids = PROBE.clone()
    ids[0, -1] = last
    with attention_recorder(model, frozenset()) if captured else contextlib.nullcontext():
        hidden = last_hidden_state(model, ids)
    return output_logits(model, hidden)[0, :-1]


@torch.no_grad()
def is_right(model, captured):
    """Independent of the checks: plain Transformers' logits, and the future changes nothing."""
    ids = PROBE.clone()
    ids[0, -1] = 5
    theirs = model(input_ids=ids, use_cache=False).logits[0, :-1]
    ours, other = (logits_before_the_last(model, last, captured) for last in (5, 1))
    scale = float(theirs.abs().max())
    return float((ours - theirs).abs().max()) < 1e-3 * scale and float((ours - other).abs().max()) < 1e-3 * scale


SMALLER = {"mamba_chunk_size": 16, "linear_num_heads": 2, "linear_head_dim": 16}
"""Sizes that a miniature leaves as they are, where a pass would take seconds."""


def verdict_of(config_class):
    """Build it small, ask both checks, and look whether what they accept is right."""
    try:
        config = config_class()
        for name, size in SMALLER.items():
            if hasattr(config, name):
                setattr(config, name, size)
        model = miniature(config)
    except Exception:  # a default configuration may be no model at all; checkpoints have their own
        return Verdict("")
    try:
        check_model(model, PROBE)
    except UserError:
        return Verdict("refused")
    if not is_right(model, captured=False):
        return Verdict("logits, hidden states", wrong=True)
    try:
        check_capture(model, PROBE)
    except UserError:
        return Verdict("logits, hidden states")
    return Verdict("all signals", wrong=not is_right(model, captured=True))


def verdicts():
    """By model type, in the alphabet's order."""
    found = {}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for config_class in AutoModelForCausalLM._model_mapping:
            found[config_class.model_type] = verdict_of(config_class)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, verdict in verdicts().items():
        if verdict.words:
            print(f"| `{name}` | {verdict.words} |{' WRONG' if verdict.wrong else ''}")
