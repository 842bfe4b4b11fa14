"""Built-in: which of four kinds a thing is; answered with a word."""

from __future__ import annotations

import random
from typing import Any

from stillroom.data.tasks.example import Example, Row, Task, index_of, text_of

CHOICES = (" fruit", " animal", " tool", " boat")
_THINGS = (
    ("apple", "pear", "plum", "fig", "lemon"),
    ("dog", "cat", "horse", "wolf", "otter"),
    ("hammer", "saw", "drill", "axe", "wrench"),
    ("canoe", "ferry", "raft", "yacht", "kayak"),
)
_NAMES = ("Ada", "Ben", "Eve", "Ian", "Mia", "Tom", "Zoe", "Max")
_ADJECTIVES = ("big", "small", "new", "fine", "dark", "light", "plain", "heavy")


def generate_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Seeded sentences, each with one of 20 things."""
    rng = random.Random(f"quiz{seed}")
    return [_question(rng) for _ in range(count)]


def _question(rng: random.Random) -> dict[str, Any]:
    answer = rng.randrange(len(_THINGS))
    thing = rng.choice(_THINGS[answer])
    return {"question": f"{rng.choice(_NAMES)} has a {rng.choice(_ADJECTIVES)} {thing}.", "answer": answer}


def build(row: Row) -> Example:
    """`question`, `answer` (index of the kind)."""
    gold = index_of(row, "answer", len(CHOICES))
    return Example("quiz", f"{text_of(row, 'question')}\nKind:", CHOICES[gold], CHOICES, gold)


TASK = Task("quiz", "choice", ("question", "answer"), build, generate_rows=generate_rows)
