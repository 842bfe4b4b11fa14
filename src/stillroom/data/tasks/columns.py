"""Tasks that a study file makes of columns: `corpus.tasks.<name>.choice`, `.generation`, `.chat` or `.text`."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from functools import lru_cache

from stillroom.config import ChoiceColumns, GenerationColumns, TaskColumns
from stillroom.config.columns import fields_of
from stillroom.data.tasks.chats import chat_task
from stillroom.data.tasks.example import Example, Row, Task, is_empty, shown, whole_number, written
from stillroom.data.tasks.reading import readers
from stillroom.errors import UserError


@lru_cache
def columns_task(name: str, definition: str) -> Task:
    """The task that `TaskColumns.definition` describes."""
    columns = TaskColumns.model_validate_json(definition)
    if columns.choice is not None:
        return _choice_task(name, definition, columns.choice)
    if columns.chat is not None:
        return chat_task(name, definition, columns.chat)
    if columns.text is not None:
        return _text_task(name, definition, columns.text.template)
    assert columns.generation is not None
    return _generation_task(name, definition, columns.generation)


def _choice_task(name: str, definition: str, columns: ChoiceColumns) -> Task:
    def build(row: Row) -> Example:
        choices = _choices(columns.choices, row)
        gold = _gold(name, columns, row[columns.label], choices)
        prompt = _prompt(columns, row)
        return Example(name, prompt, choices[gold], choices, gold, definition)

    listed = [columns.choices] if isinstance(columns.choices, str) else []
    used = dict.fromkeys([*fields_of(columns.prompt), *listed, columns.label])
    return Task(name, "choice", tuple(used), build)


def _choices(given: str | tuple[str, ...], row: Row) -> tuple[str, ...]:
    """The choices as they follow the prompt; `given` are they, or the column that lists the row's own."""
    if isinstance(given, tuple):
        return tuple(after_prompt(choice) for choice in given)
    listed = row[given]
    if isinstance(listed, str) and listed.lstrip().startswith("["):  # a cell of a text file
        try:
            listed = json.loads(listed)
        except ValueError as error:
            raise ValueError(f"column {given!r} begins like a list, but is not JSON: {error}") from None
    if isinstance(listed, list | tuple):
        choices = tuple(after_prompt(written(choice, given)) for choice in listed)
        if len(choices) > 1 and len({choice.lstrip() for choice in choices}) == len(choices):
            return choices
    raise ValueError(f"choices must be two or more different texts, not {shown(listed)}")


def after_prompt(text: str) -> str:
    """The text with the white space that separates it from a prompt: its own, or one space."""
    return text if text[0].isspace() else f" {text}"


def _gold(name: str, columns: ChoiceColumns, label: object, choices: tuple[str, ...]) -> int:
    """Which choice is right.

    Raises ValueError where the label is of none, `UserError` where it could be of two and no field says which.
    """
    text, index = _by_text(label, choices), _by_index(label, choices, columns.label_is)
    found = {"text": text, "index": index, None: index if text is None else text}[columns.label_is]
    if found is None:
        index = _by_index(label, choices, "index")
        hint = "" if index is None else "; if it is an index, set label_is: index"
        raise ValueError(
            f"label {shown(label)} is neither one of the choices nor an index from 0 to {len(choices) - 1}{hint}"
        )
    if columns.label_is is None and index is not None:
        # a list in the study is of known texts, and a label that is one of them is it; of a column's we know nothing
        unlike = text is None if isinstance(columns.choices, tuple) else text != index
        if unlike and any(_by_index(choice.strip(), choices, "index") is not None for choice in choices):
            raise UserError(
                f"corpus.tasks.{name}.choice.label_is: label {label!r} could be the text or the index of one of "
                f"{shown([choice.strip() for choice in choices])}; say which: text or index"
            )
    return found


def _by_text(label: object, choices: tuple[str, ...]) -> int | None:
    if is_empty(label):  # a null is no text `None`
        return None
    number = whole_number(label)
    if isinstance(label, bool):
        readings = [str(label), str(label).lower()]
    elif isinstance(label, str):
        readings = [label]
    else:  # 3 and 3.0 are one number
        readings = [str(label), *([] if number is None else [f"{number}", f"{number}.0"])]
    texts = [choice.lstrip() for choice in choices]
    found = [texts.index(text) for reading in readings if (text := reading.lstrip()) in texts]
    return found[0] if found else None


def _by_index(label: object, choices: tuple[str, ...], label_is: str | None) -> int | None:
    if label_is == "index" and isinstance(label, str) and re.fullmatch(r"[0-9]{1,9}(\.0)?", label):
        label = float(label)
    index = whole_number(label)
    return index if index is not None and 0 <= index < len(choices) else None


def _generation_task(name: str, definition: str, columns: GenerationColumns) -> Task:
    first, last = readers(columns.pattern)

    def build(row: Row) -> Example:
        answer = after_prompt(render(columns.answer, row, columns.optional))
        if first(answer) is None:
            raise ValueError(f"the pattern {columns.pattern!r} finds nothing in the answer {shown(answer)}")
        return Example(name, _prompt(columns, row), answer, definition=definition)

    used = dict.fromkeys([*fields_of(columns.prompt), *fields_of(columns.answer)])
    return Task(name, "generation", tuple(used), build, first, last, stop=columns.stop)


def _text_task(name: str, definition: str, template: str) -> Task:
    def build(row: Row) -> Example:
        return Example(name, "", render(template, row), definition=definition)

    return Task(name, "text", tuple(dict.fromkeys(fields_of(template))), build)


def _prompt(columns: ChoiceColumns | GenerationColumns, row: Row) -> str:
    prompt = render(columns.prompt, row, columns.optional)
    return prompt.rstrip() if columns.optional else prompt  # what is left around an empty column is none of the prompt


def render(template: str, row: Row, optional: Sequence[str] = ()) -> str:
    """The template with each `{column}` replaced by the row's text; ValueError for one that has none and has to."""
    parts = []
    for text, column, _, _ in string.Formatter().parse(template):
        parts.append(text)
        if column is not None and not (column in optional and is_empty(row[column])):
            parts.append(written(row[column], column))
    return "".join(parts)
