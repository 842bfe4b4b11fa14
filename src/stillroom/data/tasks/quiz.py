"""Built-in: which of four words is of a kind; answered by a letter, as in MMLU."""

from __future__ import annotations

import random
from typing import Any

from stillroom.data.tasks.example import Example, Row, Task, index_of, text_of, texts_of

CHOICES = (" A", " B", " C", " D")
_KINDS = {
    "fruit": ("apple", "pear", "plum", "fig"),
    "animal": ("dog", "cat", "horse", "wolf"),
    "tool": ("hammer", "saw", "drill", "axe"),
    "metal": ("iron", "copper", "tin", "zinc"),
}


def generate_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Seeded questions: one word of the asked kind among three of other kinds."""
    rng = random.Random(f"quiz{seed}")
    return [_question(rng) for _ in range(count)]


def _question(rng: random.Random) -> dict[str, Any]:
    kind, *others = rng.sample(sorted(_KINDS), 4)
    answer = rng.randrange(4)
    choices = [rng.choice(_KINDS[other]) for other in others]
    choices.insert(answer, rng.choice(_KINDS[kind]))
    return {"question": f"Which is a {kind}?", "choices": choices, "answer": answer}


def build(row: Row) -> Example:
    """`question`, `choices` (four), `answer` (index)."""
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", texts_of(row, "choices"), strict=True))
    gold = index_of(row, "answer", 4)
    return Example("quiz", f"{text_of(row, 'question')}{options}\nAnswer:", CHOICES[gold], CHOICES, gold)


TASK = Task("quiz", "choice", ("question", "choices", "answer"), build, generate_rows=generate_rows)
