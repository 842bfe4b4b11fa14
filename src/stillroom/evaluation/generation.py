"""Greedy continuations of prompts, in batches, cut where their task says: by default, as lm-evaluation-harness does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor

from stillroom.config import Evaluation
from stillroom.data.chat_templates import encode_prompts, turn_ends
from stillroom.data.tasks import Example, task_of
from stillroom.evaluation.decoding import Decoder, Fixed, Growing
from stillroom.models.forward import padded
from stillroom.progress import Progress, silent

_NEXT_LINE = "\n"
_STRETCH = 16
"""Tokens made before texts that have ended leave the batch: nobody looks at a text more often.

A complete answer is no end: what follows it can change the flexible reading, the last number. Another question is.
"""

_ON_A_GPU = 256
"""Prompts at once there, unless the study says otherwise: launching a decoding step takes as long for 256 as for 32."""


def prompts_at_once(settings: Evaluation, device: str) -> int:
    """How many prompts are continued together on a kind of device; texts do not depend on it."""
    if device == "cuda" and "generation_batch_size" not in settings.model_fields_set:
        return _ON_A_GPU
    return settings.generation_batch_size


def generate(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: Evaluation,
    progress: Progress = silent,
    total: int = 0,
) -> list[str]:
    """Greedy answers, cut where each example's task says; batched by length with a KV cache."""
    texts, done = [""] * len(examples), total - len(examples)
    for stop, chosen in _by_stop(examples).items():
        asked = [examples[n] for n in chosen]
        found = continuations(model, tokenizer, asked, settings, stop, progress, total, done)
        for n, (text, _) in zip(chosen, found, strict=True):
            texts[n] = text
        done += len(chosen)
    return texts


def _by_stop(examples: Sequence[Example]) -> dict[tuple[str, ...], list[int]]:
    """Which examples have which texts that end an answer; of a chat, its template says what does."""
    found: dict[tuple[str, ...], list[int]] = {}
    for n, example in enumerate(examples):
        found.setdefault(task_of(example).stop, []).append(n)
    return found


def _begins(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of some texts begins in another."""
    return min((place for sequence in stop if (place := text.find(sequence)) >= 0), default=None)


@torch.no_grad()
def continuations(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: Evaluation,
    stop: Sequence[str],
    progress: Progress = silent,
    total: int = 0,
    done: int = 0,
) -> list[tuple[str, bool]]:
    """Greedy continuations cut where one of `stop` begins, and whether each has ended: by it, or by an end of text.

    Progress is told of `done` others, of `total`.
    """
    encodings = encode_prompts(tokenizer, examples)
    order = sorted(range(len(examples)), key=lambda n: len(encodings[n]))
    texts = [("", False)] * len(examples)
    size = prompts_at_once(settings, model.device.type)
    before = model.generation_config
    stops = [*_stops(model, tokenizer), *turn_ends(tokenizer, examples), *_special_ids(tokenizer, stop)]
    stops = list(dict.fromkeys(stops))
    try:
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            ids, mask = padded([encodings[n] for n in batch], "left", model.device)
            limit = settings.max_new_tokens
            fixed = settings.static_cache
            decoder = Fixed(model, ids, mask, limit) if fixed else Growing(model, tokenizer, ids, mask, stops)
            rows = _continued(decoder, tokenizer, len(batch), limit, stops, stop)
            for n, row, last in zip(batch, rows, ids[:, -1:].cpu(), strict=True):
                ended = torch.isin(row, torch.tensor(stops)).nonzero()
                row = row[: ended[0, 0]] if len(ended) else row
                # after the prompt's last token: at a text's beginning, some decoders leave a space out
                read = tokenizer.decode(last, skip_special_tokens=True)
                text = tokenizer.decode(torch.cat([last, row]), skip_special_tokens=True).removeprefix(read)
                place = _begins(text, stop)
                texts[n] = text[:place], place is not None or len(ended) > 0
            progress(done + first + len(batch), total)
    finally:
        model.generation_config = before
    return texts


def _stops(model: transformers.PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends a text: the tokenizer's EOS, and those that the model's generation config names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    several = named if isinstance(named, list) else [named]
    return list(dict.fromkeys([tokenizer.eos_token_id, *(i for i in several if i is not None)]))


def _special_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Ids of those texts that are special tokens: a decoded answer leaves them out, so it cannot be cut there."""
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [special[text] for text in texts if text in special]


def _continued(
    decoder: Decoder, tokenizer: Any, count: int, limit: int, stops: list[int], texts: Sequence[str]
) -> list[Int[Tensor, "_"]]:
    """What follows each of `count` prompts, at most `limit` tokens, or whatever came after its end."""
    found, rows = [torch.empty(0, dtype=torch.int64)] * count, torch.arange(count)
    stretch = _STRETCH if decoder.resumes else limit
    for made in range(0, limit, stretch):
        ids = decoder.more(min(stretch, limit - made)).cpu()  # much is asked of them: wait for a GPU once
        for n, row in zip(rows.tolist(), ids, strict=True):
            found[n] = row
        ended = torch.isin(ids, torch.tensor(stops)).any(1)
        ended |= torch.tensor([_begins(made_text, texts) is not None for made_text in tokenizer.batch_decode(ids)])
        if ended.all():
            break
        if ended.any() and decoder.keep(~ended):
            rows = rows[~ended]
    return found


def teacher_answers(
    teacher: transformers.PreTrainedModel, tokenizer: Any, examples: Sequence[Example], settings: Evaluation
) -> list[str | None]:
    """The teacher's greedy answers, without white space at their end; None for one that did not end.

    One to a choice task is a line, as its choices are.
    """
    found: list[str | None] = [None] * len(examples)
    lines = [n for n, e in enumerate(examples) if e.choices and not any(_NEXT_LINE in choice for choice in e.choices)]
    others = sorted({*range(len(examples))} - {*lines})
    by_stop = [(stop, [others[n] for n in chosen]) for stop, chosen in _by_stop([examples[n] for n in others]).items()]
    for stop, chosen in [((_NEXT_LINE,), lines), *by_stop]:
        asked = [examples[n] for n in chosen]
        for n, (text, ended) in zip(chosen, continuations(teacher, tokenizer, asked, settings, stop), strict=True):
            found[n] = text.rstrip() if ended else None
    return found
