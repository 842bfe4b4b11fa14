"""Tasks to examples: sampled, free of duplicates, fitting under both tokenizers, split once and for all."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.config import Corpus, TaskData
from stillroom.data.chat_templates import encode_examples, require_chat_template, settled
from stillroom.data.encoding import encode_many, ending_tokens, fits, in_answer
from stillroom.data.label_noise import is_mislabelled, with_label_noise
from stillroom.data.rows import CHANGED, Row, load_rows
from stillroom.data.tasks import Example, Task, get_task
from stillroom.data.tasks.example import Turn, shown
from stillroom.errors import UserError
from stillroom.files import atomic_path, file_sha256, read_json, write_json

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Examples:
    """The examples of a study and what was dropped on the way."""

    train: list[Example]
    validation: list[Example]
    counts: dict[str, dict[str, int]]
    """Per task: used, train, validation, source_rows, unusable, duplicates, too_long; mislabelled, with label noise."""
    test: list[Example] = field(default_factory=list)
    """Of the test splits; the teacher's data does not cover them."""
    test_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per task: used, source_rows, unusable, in_corpus, too_long."""
    faults: dict[str, str] = field(default_factory=dict)
    """Per task with unusable rows: the first of them, and what is wrong with it."""
    test_faults: dict[str, str] = field(default_factory=dict)
    """The same of the test splits."""
    harness: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the test splits that lm-evaluation-harness evaluates: what pins each."""

    @property
    def all(self) -> list[Example]:
        """Both splits: the teacher's data covers them."""
        return self.train + self.validation


def build_corpus(
    corpus: Corpus, tokenizers: Sequence[Any], lengths: dict[str, tuple[int, ...]] | None = None
) -> Examples:
    """Draw each task's examples and split them; `tokenizers` are those an example must fit under.

    `lengths` is filled with each drawn example's tokens under each tokenizer, EOS among them, by its id. Raises
    `UserError` where a task cannot supply as many examples as asked for.
    """
    train: list[Example] = []
    validation: list[Example] = []
    counts: dict[str, dict[str, int]] = {}
    faults: dict[str, str] = {}
    for name, data in corpus.tasks.items():
        if data.label_noise and get_task(name, data).kind != "choice":
            raise UserError(f"corpus.tasks.{name}.label_noise: {name} has no choices; leave it out")
        chosen, count = _draw(
            get_task(name, data), data, corpus, tokenizers, faults, {} if lengths is None else lengths
        )
        parts = split(chosen, corpus.validation_share, corpus.split_seed)
        counts[name] = {"used": len(chosen), "train": len(parts[0]), "validation": len(parts[1]), **count}
        train += parts[0]
        validation += parts[1]
    check_leaks(train, validation)
    train = _with_label_noise(train, corpus, tokenizers, counts)
    return Examples(train, validation, counts, faults=faults)


def _with_label_noise(
    train: Sequence[Example], corpus: Corpus, tokenizers: Sequence[Any], counts: Mapping[str, dict[str, int]]
) -> list[Example]:
    """The training split with each task's declared share of wrong answers, which `counts` then has."""
    noise = {name: data.label_noise for name, data in corpus.tasks.items() if data.label_noise}
    noisy = with_label_noise(train, noise)
    wrong = [example for example in noisy if example.task in noise and is_mislabelled(example)]
    for name in noise:
        counts[name]["mislabelled"] = sum(example.task == name for example in wrong)
    for tokenizer in tokenizers:
        for example, encoding in zip(wrong, encode_examples(tokenizer, wrong, add_eos=True), strict=True):
            if not fits(encoding, corpus.max_length):
                raise UserError(
                    f"corpus.tasks.{example.task}.label_noise: with the wrong answer {shown(example.answer)} the "
                    f"example that begins {example.prompt[:60]!r} has {len(encoding)} tokens; raise corpus.max_length"
                )
    return noisy


def _draw(
    task: Task,
    data: TaskData,
    corpus: Corpus,
    tokenizers: Sequence[Any],
    faults: dict[str, str],
    lengths: dict[str, tuple[int, ...]],
) -> tuple[list[Example], dict[str, int]]:
    place = f"corpus.tasks.{task.name}"
    rows = load_rows(task, data, corpus.sample_seed, place)
    dropped = Counter({"source_rows": len(rows), "unusable": 0, "duplicates": 0, "too_long": 0})
    ranked = _ranked(_usable(task, data, rows, dropped, faults, place), f"sample{corpus.sample_seed}")
    ordered = _read(task, data, rows, ranked.without_duplicates(dropped))
    settled_ = _settled(ordered, tokenizers, dropped, faults) if data.chat else ordered
    wanted = None if data.examples == "all" else data.examples
    chosen = list(islice(_fitting(settled_, corpus.max_length, tokenizers, dropped, lengths), wanted))
    if len(chosen) < (wanted or 2):
        raise UserError(
            f"{place}.examples: {wanted or '2 at least'} asked for, but only {len(chosen)} can be used "
            f"({dict(dropped)}); ask for fewer, or raise corpus.max_length{_first(task, faults)}"
        )
    _require_choices(chosen, tokenizers, place)
    return chosen, dict(dropped)


def with_test_splits(
    examples: Examples, splits: Mapping[str, TaskData], corpus: Corpus, tokenizers: Sequence[Any], max_length: int
) -> Examples:
    """`examples` with those of the test splits: none that the corpus has or that exceeds `max_length` tokens.

    Duplicates within a split stay, as they count in its published figures. Raises `UserError` where a split has
    fewer rows than asked for, or none that can be used.
    """
    known = {asked(example) for example in examples.all}
    test: list[Example] = []
    counts: dict[str, dict[str, int]] = {}
    faults: dict[str, str] = {}
    for name, data in splits.items():
        task, place = get_task(name, data), f"evaluation.test_splits.{name}"
        rows = load_rows(task, data, corpus.sample_seed + 1, place)  # built-in rows: others than the corpus's
        wanted = None if data.examples == "all" else data.examples
        if wanted and len(rows) < wanted:
            raise UserError(f"{place}.examples: {data.examples} asked for, but the split has {len(rows)} rows")
        dropped = Counter({"source_rows": len(rows), "unusable": 0, "in_corpus": 0, "too_long": 0})
        unseen = _unseen(_usable(task, data, rows, dropped, faults, place), known, dropped)
        # the word is part of the draw: another one would choose other examples
        ordered = _read(task, data, rows, _ranked(unseen, f"official{corpus.sample_seed}").numbers)
        settled_ = _settled(ordered, tokenizers, dropped, faults) if data.chat else ordered
        chosen = list(islice(_fitting(settled_, max_length, tokenizers, dropped, {}), wanted))
        if not chosen:
            source = f"{data.dataset}/{data.split}"
            raise UserError(f"{place}: no example of {source} can be used ({dict(dropped)}){_first(task, faults)}")
        _require_choices(chosen, tokenizers, place)
        counts[name] = {"used": len(chosen), **dropped}
        test += chosen
    return replace(examples, test=test, test_counts=counts, test_faults=faults)


def _usable(
    task: Task,
    data: TaskData,
    rows: Iterable[Row],
    dropped: Counter[str],
    faults: dict[str, str],
    place: str,
) -> Iterator[tuple[int, Example]]:
    """The rows' numbers and examples; rows that give none are counted in `dropped`, the first kept in `faults`."""
    for number, row in enumerate(rows):
        try:
            yield number, task.build(row)
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            dropped["unusable"] += 1
            faults.setdefault(task.name, f"row {number} of {data.dataset}/{data.split}: {error}")
    if dropped["unusable"] == dropped["source_rows"]:
        raise UserError(f"{place}: no row can be used{_first(task, faults)}")


def _first(task: Task, faults: Mapping[str, str]) -> str:
    return f"; the first that is unusable: {faults[task.name]}" if task.name in faults else ""


def _require_choices(examples: Sequence[Example], tokenizers: Sequence[Any], place: str) -> None:
    """`UserError` unless every choice has tokens of its own, of each list of choices under each tokenizer.

    A choice without one has nothing to be scored by, and two of the same tokens are one.
    """
    first = list({example.choices: example for example in examples if example.choices is not None}.values())
    options = [(example, choice) for example in first for choice in example.choices or ()]
    for tokenizer in tokenizers:
        encodings = encode_many(tokenizer, [example.prompt + choice for example, choice in options])
        seen: dict[tuple[Example, bytes], str] = {}
        for (example, choice), encoding in zip(options, encodings, strict=True):
            tokens = np.flatnonzero(in_answer(encoding, len(example.prompt)))
            same = seen.setdefault((example, encoding.ids.tobytes()), choice)
            if not len(tokens) or same != choice:
                what = f"has the same tokens as {same!r}" if len(tokens) else "has no token of its own"
                raise UserError(
                    f"{place}: the choice {choice!r} {what} under the tokenizer of {tokenizer.name_or_path}, as after "
                    f"{example.prompt[-60:]!r}; reword the choices or leave such rows out"
                )


def folded(prompt: str) -> str:
    """The prompt without regard to white space and case: what makes two examples duplicates."""
    return " ".join(prompt.split()).casefold()


def asked(example: Example) -> str:
    """The folded prompt; of a plain text, which has none, the text."""
    return folded(example.prompt or example.answer)


def _unseen(
    examples: Iterable[tuple[int, Example]], known: Collection[str], dropped: Counter[str]
) -> Iterator[tuple[int, Example]]:
    for number, example in examples:
        if asked(example) in known:
            dropped["in_corpus"] += 1
        else:
            yield number, example


@dataclass(frozen=True)
class _Ranked:
    """A source's usable rows in the order of the draw: 32 bytes of each, and nothing of what is in it."""

    numbers: np.ndarray
    """(N) of the rows in their source."""
    keys: np.ndarray
    """(N, 2) digest of what is asked."""

    def without_duplicates(self, dropped: Counter[str]) -> np.ndarray:
        """The numbers of the rows that are their question's first in the source."""
        order = np.lexsort((self.numbers, self.keys[:, 1], self.keys[:, 0]))
        again = (self.keys[order[1:]] == self.keys[order[:-1]]).all(1)
        first = np.ones(len(order), bool)
        first[order[1:][again]] = False
        dropped["duplicates"] = int(again.sum())
        kept: np.ndarray = self.numbers[first]
        return kept


def _ranked(examples: Iterable[tuple[int, Example]], salt: str) -> _Ranked:
    numbers, ranks, keys = array("Q"), array("Q"), bytearray()
    for number, example in examples:
        numbers.append(number)
        ranks.append(int(_rank(example.example_id, salt)[:16], 16))
        keys += hashlib.blake2b(asked(example).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    order = np.argsort(np.frombuffer(ranks, np.uint64), kind="stable")
    return _Ranked(np.frombuffer(numbers, np.uint64)[order], np.frombuffer(keys, np.uint64).reshape(-1, 2)[order])


def _read(task: Task, data: TaskData, rows: Collection[Row], numbers: np.ndarray) -> Iterator[Example]:
    """The examples of the rows of these numbers, in their order; a source is gone through once, seldom more often.

    What is held is little more than what is asked for: some are too long.
    """
    wanted = len(numbers) if data.examples == "all" else data.examples
    size, first = wanted + wanted // 4 + 256, 0
    while first < len(numbers):
        part = numbers[first : first + size].tolist()
        found = _found(task, rows, set(part))
        if len(found) < len(part):
            raise UserError(f"{data.dataset}: {CHANGED}")
        yield from (found[number] for number in part)
        first, size = first + size, 2 * size


def _found(task: Task, rows: Iterable[Row], numbers: set[int]) -> dict[int, Example]:
    """By number, the examples of these rows that are still there."""
    found = {}
    for number, row in enumerate(islice(rows, max(numbers) + 1)):
        if number in numbers:
            with suppress(ValueError, TypeError, IndexError, AttributeError):
                found[number] = task.build(row)
    return found


def _settled(
    examples: Iterable[Example], tokenizers: Sequence[Any], dropped: Counter[str], faults: dict[str, str]
) -> Iterator[Example]:
    """Chats that every template writes as they are, without white space that one of them trims."""
    for tokenizer in tokenizers:
        require_chat_template(tokenizer)
    dropped["trimmed"] = 0
    for example in examples:
        try:
            trimmed = settled(example, tokenizers)
        except ValueError as error:
            dropped["unusable"] += 1
            faults.setdefault(example.task, f"the chat that begins {example.text[:60]!r}: {error}")
            continue
        dropped["trimmed"] += trimmed != example
        yield trimmed


def _fitting(
    examples: Iterable[Example],
    max_length: int,
    tokenizers: Sequence[Any],
    dropped: Counter[str],
    lengths: dict[str, tuple[int, ...]],
) -> Iterator[Example]:
    waiting = iter(examples)
    while part := list(islice(waiting, 256)):
        encodings = [encode_examples(tokenizer, part, add_eos=True) for tokenizer in tokenizers]
        for example, *encoded in zip(part, *encodings, strict=True):
            if not all(len(ending_tokens(encoding)) for encoding in encoded):
                name = f"example {example.example_id} ({example.task}), {example.text[:60]!r}"
                raise UserError(f"{name}: a tokenizer has no token for any of its text; leave the row out")
            if all(fits(encoding, max_length) for encoding in encoded):
                lengths[example.example_id] = tuple(map(len, encoded))
                yield example
            else:
                dropped["too_long"] += 1


def _rank(example_id: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}:{example_id}".encode()).hexdigest()


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation split, by `example_id` and seed alone; at least one example in each."""
    ordered = sorted(examples, key=lambda example: _rank(example.example_id, f"split{seed}"))
    size = min(max(1, round(share * len(ordered))), len(ordered) - 1)
    return ordered[size:], ordered[:size]


def check_leaks(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Raise `UserError` naming an example whose prompt is in both splits."""
    known = {asked(example) for example in train}
    for example in held_out:
        if asked(example) in known:
            raise UserError(f"example {example.example_id} ({example.task}) is in training and held-out data")


_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("gold", pa.int32()),
        ("definition", pa.string()),
        ("turns", pa.string()),
    ]
)


_DROPPED = ("counts", "test_counts", "faults", "test_faults")
"""What `corpus.json` says of how the examples were drawn."""


def save_corpus(examples: Examples, folder: Path, fingerprint: str) -> None:
    """Write `corpus.parquet` and `corpus.json` into `folder`."""
    rows = [
        {
            "example_id": e.example_id,
            "task": e.task,
            "split": part,
            "prompt": e.prompt,
            "answer": e.answer,
            "choices": e.choices,
            "gold": e.gold,
            "definition": e.definition,
            "turns": json.dumps(e.turns) if e.turns else None,
        }
        for part in ("train", "validation", "test")
        for e in getattr(examples, part)
    ]
    with atomic_path(folder / "corpus.parquet") as path:
        (folder / "corpus.json").unlink(missing_ok=True)  # it says what the other file is: it goes first, comes last
        pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), path)
    dropped = {name: getattr(examples, name) for name in _DROPPED}
    described = {"fingerprint": fingerprint, "sha256": file_sha256(folder / "corpus.parquet"), **dropped}
    if examples.harness:
        described["harness"] = examples.harness
    write_json(folder / "corpus.json", described)


def load_corpus(folder: Path) -> tuple[Examples, str]:
    """Read what `save_corpus` wrote: the examples and their fingerprint."""
    path = folder / "corpus.parquet"
    described = read_json(folder / "corpus.json", "fingerprint", "sha256", *_DROPPED)
    parts: dict[str, Any] = {"train": [], "validation": [], "test": []}
    try:
        if file_sha256(path) != described["sha256"]:
            raise OSError("its bytes are not those that were written")
        rows = pq.read_table(path, schema=_SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}; delete {folder} and it is built again") from None
    for row in rows:
        choices = tuple(row["choices"]) if row["choices"] is not None else None
        turns = tuple(Turn(*turn) for turn in json.loads(row["turns"] or "[]"))
        example = Example(row["task"], row["prompt"], row["answer"], choices, row["gold"], row["definition"], turns)
        parts[row["split"]].append(example)
    dropped = {name: described[name] for name in _DROPPED}
    examples = Examples(**parts, **dropped, harness=described.get("harness", {}))
    return examples, described["fingerprint"]


def examples_digest(examples: Iterable[Example]) -> str:
    """Digest of which examples there are, in order."""
    return hashlib.sha256("".join(e.example_id for e in examples).encode()).hexdigest()[:16]
