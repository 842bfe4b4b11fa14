"""Tasks of chats: `corpus.tasks.<name>.chat`. A row's turns become an example whose last turn is the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.config import ChatColumns
from stillroom.data.tasks.example import Example, Row, Task, Turn, shown, whole_text
from stillroom.data.tasks.reading import readers

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""What other data sets call the roles that templates know."""
_KNOWN = ("system", "user", "assistant")


def chat_task(name: str, definition: str, columns: ChatColumns) -> Task:
    """The task that a study's `chat` section describes."""
    first, last = readers(columns.pattern)

    def build(row: Row) -> Example:
        messages = _messages(row[columns.messages], columns.messages)
        if columns.system == "first_user":
            messages = _system_in_first_user(messages)
        if messages[-1][0] != "assistant":
            raise ValueError(f"the last turn is the {messages[-1][0]}'s; an answer by the assistant must end the chat")
        final = len(messages) - 1
        learnt = [
            role == "assistant" and (columns.learn == "assistant" or number == final)
            for number, (role, _) in enumerate(messages)
        ]
        example = chat(name, messages, learnt, definition)
        if first(example.answer) is None:
            raise ValueError(f"the pattern {columns.pattern!r} finds nothing in the answer {shown(example.answer)}")
        return example

    return Task(name, "generation", (columns.messages,), build, first, last, stop=columns.stop)


def _messages(value: object, column: str) -> list[tuple[str, str]]:
    """(role, content) of each turn; a column of a text file has them as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"column {column!r} is text, but not JSON: {error}") from None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"column {column!r} must list turns, as in [{{role: user, content: …}}], not {shown(value)}")
    return [_message(number, turn) for number, turn in enumerate(value, 1)]


def _message(number: int, turn: object) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number} must have a role and a content, not {shown(turn)}")
    role = turn.get("role", turn.get("from"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN:
        raise ValueError(f"turn {number}: the role {shown(role)} is none of {', '.join(_KNOWN)}; leave the row out")
    if turn.get("tool_calls"):
        raise ValueError(f"turn {number}: tool calls are not read; leave the row out")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list | tuple) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"turn {number} ({role}): its content is not text: {shown(content)}")
    return role, whole_text(content, f"turn {number}")


def _system_in_first_user(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if messages[0][0] != "system":
        return messages
    if len(messages) < 2 or messages[1][0] != "user":
        raise ValueError("no user turn follows the system turn, to take its text")
    return [("user", f"{messages[0][1]}\n\n{messages[1][1]}"), *messages[2:]]


def chat(task: str, messages: Sequence[tuple[str, str]], learnt: Sequence[bool], definition: str = "") -> Example:
    """An example of (role, content) turns, the last of which is its answer; ValueError if that is empty.

    `learnt`: whether the student learns to write each turn.
    """
    text, turns = "", []
    for (role, content), is_learnt in zip(messages, learnt, strict=True):
        text += f"{role}: "
        turns.append(Turn(role, len(text), len(text) + len(content), is_learnt))
        text += f"{content}\n"
    last = turns[-1]
    if not text[last.start : last.stop].strip():
        raise ValueError(f"turn {len(turns)} ({last.role}), the last, is empty; there is nothing to learn in it")
    return Example(task, text[: last.start], text[last.start : last.stop], definition=definition, turns=tuple(turns))


def with_contents(example: Example, contents: Sequence[str]) -> Example:
    """The chat with other contents in its turns."""
    messages: list[tuple[str, Any]] = [
        (turn.role, content) for turn, content in zip(example.turns, contents, strict=True)
    ]
    return chat(example.task, messages, [turn.learnt for turn in example.turns], example.definition)
