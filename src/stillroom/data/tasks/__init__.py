"""Tasks: one file each, one line each in the registry."""

from __future__ import annotations

from stillroom.config import TaskColumns
from stillroom.data.tasks import arithmetic, gsm8k, mmlu, quiz, sentiment, sst2
from stillroom.data.tasks.columns import columns_task
from stillroom.data.tasks.example import Example, Task
from stillroom.errors import UserError

TASKS: dict[str, Task] = {
    task.name: task for task in (sst2.TASK, mmlu.TASK, gsm8k.TASK, sentiment.TASK, quiz.TASK, arithmetic.TASK)
}


def get_task(name: str, columns: TaskColumns | None = None) -> Task:
    """The registered task, or the one that `columns` define; `UserError` if there is neither, or both."""
    if columns is not None and columns.definition:
        if name in TASKS:
            raise UserError(f"corpus.tasks.{name}: this is the name of a built-in task; choose another name for yours")
        return columns_task(name, columns.definition)
    if name not in TASKS:
        raise UserError(
            f"corpus.tasks.{name}: unknown task; registered: {', '.join(TASKS)}; or define it there with choice, "
            "generation, chat or text"
        )
    return TASKS[name]


def task_of(example: Example) -> Task:
    """The task an example belongs to, wherever it was defined."""
    return columns_task(example.task, example.definition) if example.definition else get_task(example.task)


__all__ = ["TASKS", "Example", "Task", "get_task", "task_of"]
