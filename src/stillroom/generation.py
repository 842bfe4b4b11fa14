"""Greedy continuations of prompts, in batches, as lm-evaluation-harness cuts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from stillroom.config import Evaluation
from stillroom.encoding import encode_many
from stillroom.teacher_signals import padded

_NEXT_QUESTION = "Question:"


class _NextQuestion(StoppingCriteria):  # type: ignore[misc]
    """Stops each sequence once it begins another question.

    A complete answer is no reason to stop: what follows it can change the flexible reading, the last number.
    """

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        latest = self.tokenizer.batch_decode(input_ids[:, -1:])
        done = [
            ":" in last and _NEXT_QUESTION in self.tokenizer.decode(row[self.start :])
            for last, row in zip(latest, input_ids, strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Evaluation,
    progress: Callable[[int, int], None] = lambda done, total: None,
    total: int = 0,
) -> list[str]:
    """Greedy continuations, cut where another question would begin; batched by length with a KV cache."""
    encodings = encode_many(tokenizer, prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(encodings[n]))
    texts = [""] * len(prompts)
    size = settings.generation_batch_size
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    own, model.generation_config = model.generation_config, greedy  # a model's own penalties must not count
    try:
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            ids, mask = padded([encodings[n] for n in batch], "left", model.device)
            stop = StoppingCriteriaList([_NextQuestion(tokenizer, ids.shape[1])])
            output = model.generate(ids, attention_mask=mask, generation_config=greedy, stopping_criteria=stop)
            for n, row in zip(batch, output, strict=True):
                text = tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)
                texts[n] = text.split(_NEXT_QUESTION)[0]
            progress(total - len(order) + first + len(batch), total)
    finally:
        model.generation_config = own
    return texts
