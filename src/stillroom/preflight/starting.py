"""A first study for a file of rows: columns are guessed by their names and what is in them, and each guess is said."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stillroom.config import TaskColumns, TaskData
from stillroom.data.corpus import folded
from stillroom.data.rows import all_rows
from stillroom.data.tasks import TASKS, get_task
from stillroom.data.tasks.example import is_empty
from stillroom.errors import UserError
from stillroom.files import atomic_path

_MOST_CHOICES = 10
_CHATS = ("messages", "conversations", "conversation", "chat")
_ASKED = ("prompt", "question", "instruction", "input", "query", "source", "text", "sentence")
_SAID = ("completion", "answer", "response", "output", "target", "label", "chosen", "summary")
_LISTED = ("choices", "options", "candidates")
_LABELS = ("label", "answer", "answer_idx", "target", "gold", "class")


@dataclass(frozen=True)
class Start:
    """A study that `stillroom init` has written."""

    path: Path
    rows: int
    usable: int
    guesses: tuple[str, ...]


def write_study(data: Path, teacher: str, student: str, target: Path) -> Start:
    """Write a study of one task, of the rows in `data`, into the new file `target`.

    `UserError` if the file cannot be read, if no columns look like a question and its answer, or if `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists; name another file with --study")
    rows = all_rows(data)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", data.name.partition(".")[0]).strip("-_")[:40] or "task"
    if name in TASKS:
        name += "-rows"
    task, guesses = _guess(rows)
    used, fault = _usable(name, data, task, rows)
    if used < 4:
        raise UserError(
            f"{data}: {used} of {len(rows)} rows can be used as {json.dumps(task)}{fault}; write the study by hand"
        )
    text = _study(name, data, teacher, student, task, guesses, len(rows), used)
    with atomic_path(target) as path:
        path.write_text(text, "utf-8")
    return Start(target, len(rows), used, (*guesses, f"{used} of {len(rows)} rows can be used{fault}"))


def _guess(rows: Collection[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The task's section of the study, and what it rests on."""
    columns = list(dict.fromkeys(name for row in islice(rows, 1000) for name in row))
    named = {name.casefold().strip(): name for name in columns}

    def first(names: Sequence[str], *taken: str | None) -> str | None:
        return next((named[name] for name in names if name in named and named[name] not in taken), None)

    if (chats := first(_CHATS)) is not None:
        return {"chat": {"messages": chats}}, [f"{chats!r} lists the turns of chats; every assistant's turn is learnt"]
    asked = first(_ASKED)
    listed, label = first(_LISTED, asked), first(_LABELS, asked)
    if asked and listed and label:
        chosen: dict[str, Any] = {"prompt": f"{{{asked}}}", "choices": listed, "label": label}
        return {"choice": chosen}, [
            f"{asked!r} is the question, {listed!r} lists its choices, {label!r} is the right one"
        ]
    if asked and label and (texts := _few(rows, label)):
        chosen = {"prompt": f"{{{asked}}}", "choices": texts, "label": label, "label_is": "text"}
        return {"choice": chosen}, [f"{label!r} has {len(texts)} different values: they are the choices for {asked!r}"]
    said = first(_SAID, asked)
    if asked and said:
        return _question(rows, asked, said, first(("input", "context"), asked, said))
    if len(columns) == 2:
        return _question(rows, columns[0], columns[1], None)
    known = f"{', '.join(_ASKED[:4])}, …; {', '.join(_SAID[:4])}, …"
    raise UserError(
        f"columns {columns}: none looks like a question and an answer ({known}), "
        "or like chats (messages); rename two, or write the study by hand (`stillroom fields corpus.tasks`); "
        "for plain texts, too: beside them it needs a task to compare students on"
    )


def _question(
    rows: Collection[dict[str, Any]], asked: str, said: str, more: str | None
) -> tuple[dict[str, Any], list[str]]:
    guesses = [f"{asked!r} is the question, {said!r} its answer, which counts as a whole"]
    if more is None:
        return {"generation": {"prompt": f"{{{asked}}}", "answer": f"{{{said}}}"}}, guesses
    guesses.append(f"{more!r} follows {asked!r} on a line of its own, and may be empty")
    prompt = f"{{{asked}}}\n{{{more}}}"
    return {"generation": {"prompt": prompt, "optional": [more], "answer": f"{{{said}}}"}}, guesses


def _few(rows: Collection[dict[str, Any]], column: str) -> list[str]:
    """The values of a column, as texts, if they are few and each comes again; else none."""
    found: set[str] = set()
    for row in rows:
        if is_empty(row.get(column)):
            continue
        found.add(str(row.get(column)).strip())
        if len(found) > _MOST_CHOICES:
            return []
    texts = sorted(found)
    few = len(texts) >= 2 and 3 * len(texts) <= len(rows) and all(texts)
    return texts if few and max(map(len, texts)) <= 40 else []


def _usable(name: str, data: Path, columns: dict[str, Any], rows: Collection[dict[str, Any]]) -> tuple[int, str]:
    """How many different examples the rows give, and what is wrong with the first that gives none."""
    try:
        TaskColumns(**columns)
    except ValidationError as error:  # a name with a brace, a dot or a bracket in it
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{data}: its columns cannot be used in a template: {said}; rename them") from None
    task = get_task(
        name, TaskData(dataset=str(data), examples=2, **TaskColumns(**columns).model_dump(exclude_none=True))
    )
    prompts, fault = set(), ""
    for number, row in enumerate(rows):
        try:
            prompts.add(hash(folded(task.build({column: row.get(column) for column in task.columns}).prompt)))
        except ValueError as error:
            fault = fault or f"; the first that cannot is row {number}: {error}"
    return len(prompts), fault


def _study(
    name: str,
    data: Path,
    teacher: str,
    student: str,
    task: dict[str, Any],
    guesses: Sequence[str],
    rows: int,
    usable: int,
) -> str:
    ((kind, columns),) = task.items()
    described = "\n".join(
        f"        {field}: {json.dumps(value, ensure_ascii=False)}" for field, value in columns.items()
    )
    guessed = "\n".join(f"      # guessed: {guess}" for guess in guesses)
    return f"""\
# Written by `stillroom init`. `stillroom fields` lists everything that can be set.
name: {json.dumps(name)}
teacher:
  model: {json.dumps(teacher, ensure_ascii=False)}
  # fine_tune: {{method: lora}}  # fine-tune it on the task first, if it doesn't know it yet
student:
  model: {json.dumps(student, ensure_ascii=False)}
  # lora: {{rank: 16}}          # train LoRA layers instead of all weights
corpus:
  max_length: 512             # tokens; longer examples are left out and counted
  validation_share: 0.1       # of the examples, held out of training
  tasks:
    {json.dumps(name)}:
      dataset: {json.dumps(str(data), ensure_ascii=False)}
      examples: {max(2, 9 * usable // 10)}           # of {usable} different usable ones in {rows} rows
{guessed}
      {kind}:
{described}
groups: [task_only, black_box, hidden, attention, combined]   # what is compared; `stillroom fields groups`
training: {{learning_rate: 1.0e-4, batch_size: 8, epochs: 3}}
evaluation: {{max_new_tokens: 64}}
sweep: {{seeds: [0, 1, 2]}}     # one trial per group and seed; 7 seeds can give a verdict at 0.05
paths:
  store: {name}/offline_teacher_data
  results: {name}/results
"""
