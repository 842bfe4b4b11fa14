"""Wrong answers put into a choice task's training split on purpose, for studies whose truth is known beforehand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from stillroom.data.tasks import Example


def with_label_noise(examples: Sequence[Example], shares: Mapping[str, float]) -> list[Example]:
    """The examples, a share of each named task's with a wrong choice as the answer; `gold` stays the right choice.

    Which ones, and which choice, follows from task and prompt alone.
    """
    return [
        _mislabelled(example) if _draw(example) < shares.get(example.task, 0.0) else example for example in examples
    ]


def without_label_noise(examples: Sequence[Example]) -> list[Example]:
    """The examples with their right answers."""
    return [
        example if example.choices is None or example.gold is None else _answered(example, example.gold)
        for example in examples
    ]


def is_mislabelled(example: Example) -> bool:
    """Whether its answer is a wrong choice."""
    return without_label_noise([example]) != [example]


def _mislabelled(example: Example) -> Example:
    assert example.choices is not None
    assert example.gold is not None
    others = [index for index in range(len(example.choices)) if index != example.gold]
    return _answered(example, others[int(_draw(example, "which") * len(others))])


def _answered(example: Example, choice: int) -> Example:
    assert example.choices is not None
    return replace(example, answer=example.choices[choice])


def _draw(example: Example, salt: str = "") -> float:
    """A number from 0 to 1 that is the example's own."""
    digest = hashlib.sha256(f"label noise{salt}:{example.task}:{example.prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
