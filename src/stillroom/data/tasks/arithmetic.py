"""Built-in: word problems of one or two steps with worked answers that end in `#### n`, as in GSM8K."""

from __future__ import annotations

import random
from typing import Any

from stillroom.data.tasks.example import Example, Row, Task, text_of
from stillroom.data.tasks.gsm8k import extract_flexible, extract_strict

_NAMES = ("Ada", "Ben", "Eve", "Ian", "Mia", "Tom", "Zoe", "Max")
_THINGS = ("apples", "books", "coins", "pens", "cards", "shells")


def generate_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Seeded problems: a number, then one or two gains or losses; nothing falls below zero."""
    rng = random.Random(f"arithmetic{seed}")
    return [_problem(rng) for _ in range(count)]


def _problem(rng: random.Random) -> dict[str, Any]:
    name, thing, total = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 9)
    question, lines = f"{name} has {total} {thing}", []
    for _ in range(rng.choice((1, 1, 2))):
        change = rng.randint(1, 9)
        gains = change > total or rng.random() < 0.5
        result = total + change if gains else total - change
        question += f", {'finds' if gains else 'loses'} {change}"
        sum_ = f"{total}{'+' if gains else '-'}{change}"
        lines.append(f"<<{sum_}={result}>>{result}")
        total = result
    return {"question": f"{question}. How many now?", "answer": "\n".join([*lines, f"#### {total}"])}


def build(row: Row) -> Example:
    """`question`, `answer` (worked, ending in `#### n`)."""
    return Example("arithmetic", f"Question: {text_of(row, 'question')}\nAnswer:", f" {text_of(row, 'answer')}")


TASK = Task("arithmetic", "generation", ("question", "answer"), build, extract_strict, extract_flexible, generate_rows)
