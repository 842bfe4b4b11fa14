"""Tasks that a study file makes of columns: `corpus.tasks.<name>.choice` or `.generation`."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from functools import lru_cache

from stillroom.config import ChoiceColumns, GenerationColumns, TaskColumns
from stillroom.config.columns import fields_of
from stillroom.tasks.example import Example, Row, Task


@lru_cache
def columns_task(name: str, definition: str) -> Task:
    """The task that `TaskColumns.definition` describes."""
    columns = TaskColumns.model_validate_json(definition)
    if columns.choice is not None:
        return _choice_task(name, definition, columns.choice)
    assert columns.generation is not None
    return _generation_task(name, definition, columns.generation)


def _choice_task(name: str, definition: str, columns: ChoiceColumns) -> Task:
    def build(row: Row) -> Example:
        own = row[columns.choices] if isinstance(columns.choices, str) else columns.choices
        if not isinstance(own, list | tuple) or len(set(own)) != len(own) or len(own) < 2 or None in own:
            raise ValueError(f"choices must be two or more different texts, not {own!r}")
        choices = tuple(f" {choice}" for choice in own)
        gold = _index(row[columns.label], choices)
        prompt = render(columns.prompt, row)
        return Example(name, prompt, choices[gold], choices, gold, definition)

    listed = [columns.choices] if isinstance(columns.choices, str) else []
    used = dict.fromkeys([*fields_of(columns.prompt), *listed, columns.label])
    return Task(name, "choice", tuple(used), build)


def _index(label: object, choices: tuple[str, ...]) -> int:
    if isinstance(label, int) and 0 <= label < len(choices):
        return int(label)
    if f" {label}" in choices:
        return choices.index(f" {label}")
    raise ValueError(f"label {label!r} is neither one of the choices nor an index from 0 to {len(choices) - 1}")


def _generation_task(name: str, definition: str, columns: GenerationColumns) -> Task:
    first, last = _reader(columns.pattern, 0), _reader(columns.pattern, -1)

    def build(row: Row) -> Example:
        answer = f" {render(columns.answer, row)}"
        if first(answer) is None:
            raise ValueError(f"the pattern {columns.pattern!r} finds nothing in the answer {answer!r}")
        return Example(name, render(columns.prompt, row), answer, definition=definition)

    used = dict.fromkeys([*fields_of(columns.prompt), *fields_of(columns.answer)])
    return Task(name, "generation", tuple(used), build, first, last)


def _reader(pattern: str, which: int) -> Callable[[str], str | None]:
    compiled = re.compile(pattern)

    def read(text: str) -> str | None:
        found: list[str] = compiled.findall(text)
        return found[which].strip() if found else None

    return read


def render(template: str, row: Row) -> str:
    """The template with each `{column}` replaced by the row's text; ValueError for a column that is empty."""
    parts = []
    for text, column, _, _ in string.Formatter().parse(template):
        parts.append(text)
        if column is not None:
            if row[column] is None or not str(row[column]).strip():
                raise ValueError(f"column {column!r} is empty")
            parts.append(str(row[column]))
    return "".join(parts)
