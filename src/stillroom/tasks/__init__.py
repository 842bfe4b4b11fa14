"""Tasks: one file each, one line each in the registry."""

from __future__ import annotations

from stillroom.config import UserError
from stillroom.tasks import arithmetic, gsm8k, mmlu, quiz, sentiment, sst2
from stillroom.tasks.example import Example, Task

TASKS: dict[str, Task] = {
    task.name: task for task in (sst2.TASK, mmlu.TASK, gsm8k.TASK, sentiment.TASK, quiz.TASK, arithmetic.TASK)
}


def get_task(name: str) -> Task:
    """The registered task; `UserError` lists those there are."""
    if name not in TASKS:
        raise UserError(f"corpus.tasks.{name}: unknown task; registered: {', '.join(TASKS)}")
    return TASKS[name]


__all__ = ["TASKS", "Example", "Task", "get_task"]
