"""Built-in: the sentiment of a made-up review of one or two clauses; `not` turns a clause round."""

from __future__ import annotations

import random
from typing import Any

from stillroom.data.tasks.example import Example, Row, Task, index_of, text_of

CHOICES = (" negative", " positive")
_THINGS = ("plot", "film", "ending", "music", "cast", "script")
_GOOD = ("bright", "warm", "clever", "moving", "fresh", "funny", "superb", "tender", "lively", "graceful")
_BAD = ("dull", "cold", "stupid", "flat", "stale", "boring", "awful", "clumsy", "tired", "ugly")
_DEGREES = ("", "very ", "quite ", "truly ")


def generate_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Seeded reviews with labels; half of them have a second clause, of the same mood."""
    rng = random.Random(f"sentiment{seed}")
    return [_review(rng) for _ in range(count)]


def _clause(rng: random.Random, positive: bool) -> str:
    negated = rng.random() < 0.1
    adjective = rng.choice(_GOOD if positive != negated else _BAD)
    return f"the {rng.choice(_THINGS)} was {'not ' if negated else ''}{rng.choice(_DEGREES)}{adjective}"


def _review(rng: random.Random) -> dict[str, Any]:
    label = rng.randrange(2)
    text = _clause(rng, bool(label))
    if rng.random() < 0.5:
        text = f"{text} and {_clause(rng, bool(label))}"
    return {"sentence": text, "label": label}


def build(row: Row) -> Example:
    """`sentence`, `label` (0 negative, 1 positive)."""
    gold = index_of(row, "label", 2)
    return Example("sentiment", f"Review: {text_of(row, 'sentence')}\nMood:", CHOICES[gold], CHOICES, gold)


TASK = Task("sentiment", "choice", ("sentence", "label"), build, generate_rows=generate_rows)
