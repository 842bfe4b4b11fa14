"""Built-in: word problems of one step with worked answers that end in `#### n`, as in GSM8K."""

from __future__ import annotations

import random
from typing import Any

from stillroom.data.tasks.example import Example, Row, Task, text_of
from stillroom.data.tasks.gsm8k import extract_flexible, extract_strict

_NAMES = ("Ada", "Ben", "Eve", "Ian", "Mia", "Tom", "Zoe", "Max")
_THINGS = ("apples", "books", "coins", "pens", "cards", "shells")


def generate_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Seeded problems: a number, then a gain or a loss; nothing falls below zero."""
    rng = random.Random(f"arithmetic{seed}")
    return [_problem(rng) for _ in range(count)]


def _problem(rng: random.Random) -> dict[str, Any]:
    name, thing, before, change = rng.choice(_NAMES), rng.choice(_THINGS), rng.randint(2, 6), rng.randint(1, 3)
    gains = change > before or rng.random() < 0.5
    after = before + change if gains else before - change
    return {
        "question": f"{name} has {before} {thing}, {'finds' if gains else 'loses'} {change}. How many now?",
        "answer": f"<<{before}{'+' if gains else '-'}{change}={after}>>{after}\n#### {after}",
    }


def build(row: Row) -> Example:
    """`question`, `answer` (worked, ending in `#### n`)."""
    return Example("arithmetic", f"Question: {text_of(row, 'question')}\nAnswer:", f" {text_of(row, 'answer')}")


TASK = Task("arithmetic", "generation", ("question", "answer"), build, extract_strict, extract_flexible, generate_rows)
