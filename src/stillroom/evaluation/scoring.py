"""A model's predictions: choices by the likelihood of their text, generation by greedy decoding; every one kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
import transformers

from stillroom.config import Evaluation
from stillroom.data.chat_templates import encode_examples
from stillroom.data.encoding import Encoding, in_answer
from stillroom.data.tasks import Example, task_of
from stillroom.errors import UserError
from stillroom.evaluation.generation import generate
from stillroom.models.forward import last_hidden_state, padded
from stillroom.models.output_head import output_logits
from stillroom.progress import Progress, silent


@dataclass(frozen=True)
class _Row:
    """One sequence to score: where its next-token distribution is read, and which target counts for which answer."""

    encoding: Encoding
    positions: tuple[int, ...]
    reads: tuple[tuple[int, int, int], ...]
    """(index into positions, target id, answer)"""
    example: int


def evaluate(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: Evaluation,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Predictions for every example but plain texts, one row each, in the order given.

    Columns: example_id, task, prediction, gold, correct, correct_flexible (generation only, else equal to correct),
    scores (log-likelihood of each choice, nats), generated, answer_nll (nats of the gold answer's text), answer_tokens.
    """
    examples = [example for example in examples if task_of(example).kind != "text"]
    scores, tokens = answer_scores(model, tokenizer, examples, settings.batch_tokens)
    generating = [n for n, example in enumerate(examples) if example.choices is None]
    progress(len(examples) - len(generating), len(examples))
    texts = dict(
        zip(
            generating,
            generate(model, tokenizer, [examples[n] for n in generating], settings, progress, len(examples)),
            strict=True,
        )
    )
    rows = [_prediction(example, scores[n], tokens[n], texts.get(n)) for n, example in enumerate(examples)]
    return pd.DataFrame(rows)


def _prediction(example: Example, scores: list[float], tokens: int, text: str | None) -> dict[str, Any]:
    if not all(map(math.isfinite, scores)):
        raise UserError(
            f"example {example.example_id} ({example.task}): its score is NaN or infinite; the model's weights are "
            "damaged, or too large for evaluation.dtype"
        )
    common = {"example_id": example.example_id, "task": example.task, "answer_tokens": tokens}
    if example.choices is not None and example.gold is not None:
        best = max(range(len(scores)), key=scores.__getitem__)
        right = best == example.gold
        return {
            **common,
            "prediction": example.choices[best].strip(),
            "gold": example.answer.strip(),
            "correct": right,
            "correct_flexible": right,
            "scores": scores,
            "generated": None,
            "answer_nll": -scores[example.gold],
        }
    task = task_of(example)
    assert text is not None
    assert task.extract_strict is not None
    assert task.extract_flexible is not None
    gold, strict = task.extract_strict(example.answer), task.extract_strict(text)
    return {
        **common,
        "prediction": strict,
        "gold": gold,
        "correct": strict == gold,
        "correct_flexible": task.extract_flexible(text) == task.extract_flexible(example.answer),
        "scores": None,
        "generated": text,
        "answer_nll": -scores[0],
    }


@torch.no_grad()
def answer_scores(
    model: transformers.PreTrainedModel, tokenizer: Any, examples: Sequence[Example], batch_tokens: int
) -> tuple[list[list[float]], list[int]]:
    """Log-likelihood (nats) of each choice, or of the gold answer alone, and the gold answer's token count.

    A choice is scored by its own text in `prompt + choice`, tokenised as one. Where choices differ in their last
    token only, one forward pass of what they share gives all of them.
    """
    rows, lengths = _scoring_rows(tokenizer, examples)
    scores = [[0.0] * len(example.choices or (1,)) for example in examples]
    order = sorted(rows, key=lambda row: -len(row.encoding))
    for batch in _within(order, batch_tokens):
        ids, _ = padded([row.encoding for row in batch], device=model.device)
        hidden = last_hidden_state(model, ids)
        where = [(n, p) for n, row in enumerate(batch) for p in row.positions]
        picked = hidden[[n for n, _ in where], [p for _, p in where]]
        _add_scores(model, picked, batch, scores)
    return scores, lengths


def _add_scores(
    model: transformers.PreTrainedModel, picked: torch.Tensor, batch: Sequence[_Row], scores: list[list[float]]
) -> None:
    reads, first = [], 0
    for row in batch:
        reads += [(first + at, target, row.example, answer) for at, target, answer in row.reads]
        first += len(row.positions)
    chunk, done = 512, 0
    for part in picked.split(chunk):
        logprobs = torch.log_softmax(output_logits(model, part).float(), -1)
        chunk_reads = [read for read in reads if done <= read[0] < done + chunk]
        values = logprobs[[r[0] - done for r in chunk_reads], [r[1] for r in chunk_reads]].tolist()
        for (_, _, example, answer), value in zip(chunk_reads, values, strict=True):
            scores[example][answer] += value
        done += chunk


def _scoring_rows(tokenizer: Any, examples: Sequence[Example]) -> tuple[list[_Row], list[int]]:
    answered = [replace(e, answer=answer) for e in examples for answer in e.choices or (e.answer,)]
    encodings = iter(encode_examples(tokenizer, answered))
    rows, lengths = [], []
    for number, example in enumerate(examples):
        answers = [next(encodings) for _ in example.choices or (1,)]
        _require_tokens(example, answers)
        lengths.append(int(in_answer(answers[example.gold or 0], len(example.prompt)).sum()))
        rows += _rows_of_example(number, answers, len(example.prompt))
    return rows, lengths


def _require_tokens(example: Example, encodings: Sequence[Encoding]) -> None:
    """`UserError` where an answer has no token: its likelihood would be 1, and no other could win."""
    for answer, encoding in zip(example.choices or (example.answer,), encodings, strict=True):
        if not (in_answer(encoding, len(example.prompt)).nonzero()[0] > 0).any():
            raise UserError(
                f"example {example.example_id} ({example.task}): the tokenizer has no token of its own for the answer "
                f"{answer!r}, so it cannot be scored; leave the row out or reword the answer"
            )


def _rows_of_example(number: int, encodings: Sequence[Encoding], prompt_length: int) -> list[_Row]:
    targets = [[int(t) for t in in_answer(e, prompt_length).nonzero()[0] if t > 0] for e in encodings]
    shared = _shared_prefix(encodings)
    if len(encodings) > 1 and all(len(e) == shared + 1 for e in encodings):
        positions = sorted({t - 1 for answer_targets in targets for t in answer_targets})
        at = {p: n for n, p in enumerate(positions)}
        reads = tuple(
            (at[t - 1], int(e.ids[t]), answer)
            for answer, (e, answer_targets) in enumerate(zip(encodings, targets, strict=True))
            for t in answer_targets
        )
        prefix = encodings[0]
        prefix = Encoding(prefix.ids[:shared], prefix.ends[:shared], prefix.special[:shared])
        return [_Row(prefix, tuple(positions), reads, number)]
    return [
        _Row(
            e,
            tuple(t - 1 for t in answer_targets),
            tuple((n, int(e.ids[t]), answer) for n, t in enumerate(answer_targets)),
            number,
        )
        for answer, (e, answer_targets) in enumerate(zip(encodings, targets, strict=True))
    ]


def _shared_prefix(encodings: Sequence[Encoding]) -> int:
    shortest = min(len(e) for e in encodings)
    for t in range(shortest):
        if len({int(e.ids[t]) for e in encodings}) > 1:
            return t
    return shortest


def _within(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Batches of rows that come longest first: within the budget, and no row under 4/5 of its batch's longest."""
    batch: list[_Row] = []
    for row in rows:
        longest = len(batch[0].encoding) if batch else 0
        if batch and (longest * (len(batch) + 1) > batch_tokens or 5 * len(row.encoding) < 4 * longest):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
