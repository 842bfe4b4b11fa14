"""The unit every stage handles: one prompt with its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Example:
    """One prompt and the text that follows it.

    `answer` includes its leading space. A choice task gives the answer strings and the index of the right one;
    a generation task leaves both None.
    """

    task: str
    prompt: str
    answer: str
    choices: tuple[str, ...] | None = None
    gold: int | None = None
    definition: str = ""
    """The study file's own definition of the task (`TaskColumns.definition`); empty for a registered one."""

    @property
    def text(self) -> str:
        """What is tokenised: prompt and answer as one."""
        return self.prompt + self.answer

    @property
    def example_id(self) -> str:
        """Stable name of the example: 16 hex digits of a hash of task, prompt and answer.

        Of a task that the study file defines, the choices and the definition too.
        """
        defined = [self.choices, self.definition] if self.definition else []
        whole = json.dumps([self.task, self.prompt, self.answer, *defined], ensure_ascii=False)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


Row = Mapping[str, Any]


def text_of(row: Row, column: str) -> str:
    """The column's text; ValueError if it is empty or none, as a null is."""
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"column {column!r} is empty or no text: {value!r}")
    return value


def texts_of(row: Row, column: str) -> list[str]:
    """The column's texts, empty ones among them; ValueError if one is none."""
    values = list(row[column])
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"column {column!r}: every one must be a text: {values!r}")
    return values


@dataclass(frozen=True)
class Task:
    """A task: how a row becomes an example, and how an answer is scored."""

    name: str
    kind: Literal["choice", "generation"]
    columns: tuple[str, ...]
    build: Callable[[Row], Example]
    """Turns a row into an example; raises ValueError, saying what is wrong, if the row cannot be used."""
    extract_strict: Callable[[str], str | None] | None = None
    """The answer declared by a generated text, or None."""
    extract_flexible: Callable[[str], str | None] | None = None
    """The answer that a lenient reader would take from a generated text, or None."""
    generate_rows: Callable[[int, int], list[dict[str, Any]]] | None = None
    """(seed, count) to rows, for a built-in task."""
