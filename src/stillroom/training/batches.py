"""Examples as the student reads them, their order, and making batches ahead of the training step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np

from stillroom.data.alignment import align_encodings, coverage
from stillroom.data.chat_templates import encode_examples
from stillroom.data.encoding import Encoding, encode_many, supervised_predictions
from stillroom.data.prepared import Prepared
from stillroom.data.tasks import Example, task_of
from stillroom.errors import UserError
from stillroom.offline_teacher_data.store import SignalStore

T = TypeVar("T")


def prepare(examples: Sequence[Example], tokenizer: Any, store: SignalStore | None) -> list[Prepared]:
    """Tokenise for the student and align with the store; without a store, for the task loss alone."""
    encodings = encode_examples(tokenizer, examples, add_eos=True)
    return [_prepare(*row, store) for row in zip(examples, encodings, strict=True)]


def _prepare(example: Example, encoding: Encoding, store: SignalStore | None) -> Prepared:
    positions, targets = supervised_predictions(encoding, len(example.prompt))
    if store is None:
        return Prepared(example, encoding, positions, targets)
    alignment = align_encodings(_as_teacher_read(example, store), encoding)
    if not len(alignment.pairs):
        raise UserError(
            f"example {example.example_id} ({example.task}): no teacher token ends where a student token does; "
            "leave the row out"
        )
    return Prepared(example, encoding, positions, targets, alignment)


def with_teacher_answers(
    prepared: Sequence[Prepared], tokenizer: Any, store: SignalStore | None, max_length: int | None
) -> tuple[list[Prepared], dict[str, dict[str, int]]]:
    """The same examples with the teacher's own answers to learn, and per task how many there are of each kind.

    `empty` answers and those `too_long` (not ended, or beyond `max_length` student tokens) supervise nothing: their
    examples stay in their batches, which are those of every group. `right`: of the others, those the task counts so.
    """
    if store is None:
        raise ValueError("the teacher's answers need the teacher's data")
    known = [store.answers[item.example.example_id] for item in prepared]
    texts = [item.example.prompt + (answer or "") for item, answer in zip(prepared, known, strict=True)]
    result, counts = [], dict[str, dict[str, int]]()
    encodings = encode_many(tokenizer, texts, add_eos=True)
    for item, answer, encoding in zip(prepared, known, encodings, strict=True):
        task_counts = counts.setdefault(item.example.task, dict.fromkeys(("answers", "empty", "too_long", "right"), 0))
        too_long = answer is None or (max_length is not None and len(encoding) > max_length)
        task_counts["answers"] += 1
        task_counts["too_long"] += too_long
        task_counts["empty"] += answer is not None and not answer.strip()
        if too_long or answer is None or not answer.strip():
            result.append(replace(item, positions=item.positions[:0], targets=item.targets[:0]))
            continue
        task_counts["right"] += _is_right(item.example, answer)
        positions, targets = supervised_predictions(encoding, len(item.example.prompt))
        result.append(Prepared(item.example, encoding, positions, targets))
    return result, counts


def _is_right(example: Example, answer: str) -> bool:
    strict = task_of(example).extract_strict
    if example.choices is not None and example.gold is not None:  # its answer may carry label noise
        return answer.strip() == example.choices[example.gold].strip()
    if strict is None:
        return answer.strip() == example.answer.strip()
    return strict(answer) is not None and strict(answer) == strict(example.answer)


def _as_teacher_read(example: Example, store: SignalStore) -> Encoding:
    """The teacher's encoding; of a chat made again, since which tokens ask for a turn is not stored."""
    stored = store.read(example.example_id, ()).encoding
    if not example.turns:
        return stored
    (again,) = encode_examples(store.tokenizer, [example])
    if not np.array_equal(again.ids, stored.ids):
        raise UserError(
            f"example {example.example_id} ({example.task}): the store's tokenizer and chat template read it "
            "differently now than when it was captured; capture again"
        )
    return again


def measure_coverage(prepared: Iterable[Prepared]) -> dict[str, dict[str, float]]:
    """`coverage_by_task` of prepared examples."""
    return coverage_by_task(_counted(prepared))


def coverage_between(examples: Sequence[Example], teacher: Any, student: Any) -> dict[str, dict[str, float]]:
    """`measure_coverage` of examples as two tokenizers read them, without a store."""
    pairs = zip(encode_examples(teacher, examples), encode_examples(student, examples, add_eos=True), strict=True)
    return coverage_by_task(
        (example.task, coverage(pair[1], align_encodings(*pair), len(example.prompt)))
        for example, pair in zip(examples, pairs, strict=True)
    )


def _counted(prepared: Iterable[Prepared]) -> Iterator[tuple[str, dict[str, int]]]:
    for item in prepared:
        assert item.alignment is not None
        yield item.example.task, coverage(item.encoding, item.alignment, len(item.example.prompt))


def coverage_by_task(counted: Iterable[tuple[str, dict[str, int]]]) -> dict[str, dict[str, float]]:
    """Per task: sums of counts from `alignment.coverage`, and the shares of tokens and predictions that are aligned."""
    totals: dict[str, dict[str, float]] = {}
    for task, counts in counted:
        task_counts = totals.setdefault(task, dict.fromkeys(counts, 0))
        for key, value in counts.items():
            task_counts[key] += value
    for task_counts in totals.values():
        task_counts["token_coverage"] = task_counts["aligned"] / task_counts["tokens"]
        task_counts["prediction_coverage"] = task_counts["aligned_predictions"] / max(task_counts["predictions"], 1)
    return totals


def require_coverage(measured: dict[str, dict[str, float]], minimum: float) -> None:
    """Raise `UserError` with the figures if a task's token coverage is under the declared floor."""
    low = {task: counts for task, counts in measured.items() if counts["token_coverage"] < minimum}
    if low:
        figures = "; ".join(
            f"{task}: {counts['token_coverage']:.1%} of student tokens, "
            f"{counts['prediction_coverage']:.1%} of predictions"
            for task, counts in measured.items()
        )
        raise UserError(
            f"the two tokenizers share too few token boundaries (signals.minimum_coverage={minimum:.0%}): {figures}; "
            "choose another pair, or lower the floor if that is what you want to study"
        )


def epoch_order(lengths: Sequence[int], batch_size: int, bucket_batches: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as indices: a function of seed and epoch alone, the same for every group.

    A seeded shuffle is cut into pools of `bucket_batches` batches; each pool is sorted by length and cut into
    batches, so that little is padded; then all batches are shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(lengths))
    size = batch_size * bucket_batches
    batches = []
    for first in range(0, len(shuffled), size):
        pool = sorted(shuffled[first : first + size], key=lambda i: lengths[i])
        batches += [[int(i) for i in pool[n : n + batch_size]] for n in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class Prefetched(Generic[T]):
    """Iterates over `make(item)` for each item, in order, made ahead by threads; `waited` is seconds spent waiting."""

    def __init__(self, items: Iterable[Any], make: Callable[[Any], T], workers: int = 1, depth: int = 4) -> None:
        """`depth` results at most are held or being made; what `make` raises is raised where its result is due."""
        self.waited = 0.0
        self._items, self._make, self._workers, self._depth = items, make, workers, depth

    def __iter__(self) -> Iterator[T]:
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="batches")
        upcoming = (pool.submit(self._make, item) for item in self._items)
        ahead = deque(islice(upcoming, self._depth))
        try:
            while ahead:
                started = time.perf_counter()
                result = ahead.popleft().result()
                self.waited += time.perf_counter() - started
                ahead.extend(islice(upcoming, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
