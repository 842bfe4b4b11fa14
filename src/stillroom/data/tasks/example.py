"""The unit every stage handles: one prompt with its answer."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Turn(NamedTuple):
    """One turn of a chat: where its content is in the example's text."""

    role: str
    start: int
    stop: int
    learnt: bool


@dataclass(frozen=True)
class Example:
    """One prompt and the text that follows it.

    `answer` includes its leading space. A choice task gives the answer strings and the index of the right one, which
    is the answer unless label noise put another in its place; a generation task leaves both None.
    """

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None
    gold: int | None = None
    definition: str = ""
    """The study file's own definition of the task (`TaskColumns.definition`); empty for a registered one."""
    turns: tuple[Turn, ...] = ()
    """Of a chat: its turns, whose contents alone are the text; roles stand between them for who reads it."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Of a chat: each turn's content."""
        return tuple(self.text[turn.start : turn.stop] for turn in self.turns)

    @property
    def text(self) -> str:
        """What is tokenised: prompt and answer as one. Of a chat, each model's template stands around the contents."""
        return self.prompt + self.answer

    @property
    def example_id(self) -> str:
        """Stable name of the example: 16 hex digits of a hash of task, prompt and answer.

        Of a task that the study file defines, the choices and the definition too; of a chat, its turns.
        """
        defined: list[Any] = [self.choices, self.definition] if self.definition else []
        defined += [self.turns] if self.turns else []
        whole = _JSON.encode([self.task, self.prompt, self.answer, *defined])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


Row = Mapping[str, Any]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_JSON = json.JSONEncoder(ensure_ascii=False)
"""Made once, because `json.dumps` builds a new encoder on every call that sets an option."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and shortened if it is long or deep."""
    return _SHORT.repr(value)


def text_of(row: Row, column: str) -> str:
    """The column's text; ValueError if it is empty or none, as a null is."""
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} is empty or not text: {shown(value)}")
    return whole_text(value, f"column {column!r}")


def texts_of(row: Row, column: str) -> list[str]:
    """The column's texts, empty ones among them; ValueError if one is none."""
    values = row[column]
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"column {column!r}: each must be text: {shown(values)}")
    return [whole_text(value, f"column {column!r}") for value in values]


def is_empty(value: object) -> bool:
    """Whether a cell has nothing in it: a null, a NaN or white space."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def written(value: object, column: str) -> str:
    """A text or finite number as text; ValueError for what is neither, which only Python would write so."""
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        text = value if isinstance(value, str) else str(value)
        if text.strip() and (isinstance(value, str | int) or math.isfinite(value)):
            return whole_text(text, f"column {column!r}")
    raise ValueError(f"column {column!r} is empty or not text: {shown(value)}")


def whole_text(text: str, place: str) -> str:
    """The text; ValueError where it holds half of a surrogate pair."""
    if _SURROGATE.search(text):  # no tokenizer and no file can take it
        raise ValueError(f"{place} holds half of a surrogate pair: {shown(text)}")
    return text


def whole_number(value: object) -> int | None:
    """The integer that a label is, as an integral float is one too; None for all else, truth values among it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def index_of(row: Row, column: str, count: int) -> int:
    """The column's index of one of `count` choices; ValueError for anything else."""
    index = whole_number(row[column])
    if index is None or not 0 <= index < count:
        raise ValueError(f"column {column!r} must be a whole number from 0 to {count - 1}, not {shown(row[column])}")
    return index


@dataclass(frozen=True)
class Task:
    """A task: how a row becomes an example, and how an answer is scored."""

    name: str
    kind: Literal["choice", "generation", "text"]
    columns: tuple[str, ...]
    build: Callable[[Row], Example]
    """Turns a row into an example; raises ValueError, saying what is wrong, if the row cannot be used."""
    extract_strict: Callable[[str], str | None] | None = None
    """The answer declared by a generated text, or None."""
    extract_flexible: Callable[[str], str | None] | None = None
    """The answer that a lenient reader would take from a generated text, or None."""
    generate_rows: Callable[[int, int], list[dict[str, Any]]] | None = None
    """(seed, count) to rows, for a built-in task."""
    stop: tuple[str, ...] = ("Question:",)
    """Texts before which a generated answer is cut; the default is lm-evaluation-harness' for GSM8K."""
