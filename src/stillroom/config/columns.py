"""A task made of a data set's columns, without code: what is asked, and which answer is right."""

from __future__ import annotations

import re
import string
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from stillroom.config.section import Section, later


def fields_of(template: str) -> list[str]:
    """Names of the columns that a template shows; ValueError where it is more than text and `{column}`."""
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if spec or conversion or not name.strip() or set(name) & set(".[]"):
            raise ValueError(f"{{{name}…}} is not the name of a column; write {{column}}, and {{{{ for a brace")
        names.append(name)
    return names


def _template(value: str) -> str:
    if not fields_of(value):
        raise ValueError("contains no column; write {column} where a row's text belongs")
    return value


Template = Annotated[str, AfterValidator(_template)]


def _one_group(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        groups = re.compile(value).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"has {groups} groups; put the answer, and nothing else, in ( )")
    return value


Pattern = Annotated[
    Annotated[str, Field(max_length=1000)] | None,
    AfterValidator(_one_group),
    Field(
        description="regular expression; its one group is the answer. Strict extraction takes the first match, "
        "flexible extraction the last. Default: the whole answer, strictly but for white space at its ends, flexibly "
        "without regard to case, white space and punctuation at its ends"
    ),
]


Stop = tuple[Annotated[str, Field(min_length=1)], ...]


class _Columns(Section):
    prompt: Template = Field(description="what comes before the answer: text, with `{column}` where a row's text goes")
    optional: tuple[str, ...] = later(
        (), description="columns that may be empty, and then leave nothing in their place"
    )

    @field_validator("prompt")
    @classmethod
    def _ends_in_text(cls, value: str) -> str:
        if value != value.rstrip():
            raise ValueError("ends in white space; the space before the answer is added for you (in YAML, use `|-`)")
        return value


class ChoiceColumns(_Columns):
    """A choice task: the model's answer is the choice of highest likelihood."""

    choices: str | Annotated[tuple[str, ...], Field(min_length=2)] = Field(
        description="the answers, or the name of a column that lists the choices of each row"
    )
    label: str = Field(min_length=1, description="column with the correct choice: its text, or its index, from 0")
    label_is: Literal["text", "index"] | None = Field(
        None,
        description="whether a label is a choice's text or its index; default: its text, else its index if no choice "
        "looks like an index",
    )

    @field_validator("choices")
    @classmethod
    def _different(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        if any(not choice.strip() for choice in texts) or len({choice.lstrip() for choice in texts}) < len(texts):
            raise ValueError("must be different texts, none of them empty")
        return value


class GenerationColumns(_Columns):
    """A generation task: the model writes, and its answer is read."""

    answer: Template = Field(description="what the student learns to write: text, with `{column}`")
    pattern: Pattern = None
    stop: Stop = later(("Question:",), description="texts before which a generated answer is cut, in addition to EOS")


class ChatColumns(Section):
    """A task of chats: each model reads them under its own template, the student learns the assistant's turns."""

    messages: str = Field(
        "messages", min_length=1, description="column that lists the turns: role and content, or from and value"
    )
    learn: Literal["assistant", "last"] = Field(
        "assistant", description="turns that the student learns: all of the assistant's, or the last"
    )
    system: Literal["keep", "first_user"] = Field(
        "keep", description="`first_user`: a system turn's text goes before the first user's, for both models"
    )
    pattern: Pattern = None
    stop: Stop = Field((), description="texts before which a generated answer is cut, in addition to the turn's end")


class TextColumns(Section):
    """A task of plain texts: the student learns every token, and nothing is asked or scored."""

    template: Template = Field("{text}", description="what the student learns to write: text, with `{column}`")


KINDS = ("choice", "generation", "chat", "text")
"""A task has at most one of these fields."""


class TaskColumns(Section):
    """How rows become examples where no registered task of that name does it."""

    choice: ChoiceColumns | None = Field(None, description="defines a multiple-choice task from the data set's columns")
    generation: GenerationColumns | None = Field(
        None, description="defines a free-form task from the data set's columns"
    )
    chat: ChatColumns | None = later(None, description="defines a task of chats from the data set's columns")

    text: TextColumns | None = later(None, description="defines a task of plain texts from the data set's columns")

    @model_validator(mode="after")
    def _one_kind(self) -> TaskColumns:
        if len(given := [name for name in KINDS if getattr(self, name)]) > 1:
            raise ValueError(f"has both {given[0]} and {given[1]}; give one of them")
        return self

    @property
    def definition(self) -> str:
        """The definition as JSON, empty for a registered task: part of the identity of every example."""
        if not any(getattr(self, name) for name in KINDS):
            return ""
        return self.model_dump_json(include={*KINDS}, exclude_none=True)
