"""How the answer of a generated text is read: by a pattern, or as the whole text."""

from __future__ import annotations

import re
from collections.abc import Callable

Reader = Callable[[str], str | None]


def readers(pattern: str | None) -> tuple[Reader, Reader]:
    """The strict and the flexible reading.

    Of a pattern's matches, strict is the first and flexible the last. Without a pattern, strict is the whole text but
    for white space at its ends; flexible has no regard to case, to other white space, nor to punctuation at its ends.
    """
    if pattern is None:
        return _whole, _folded
    return _matches(pattern, 0), _matches(pattern, -1)


def _whole(text: str) -> str | None:
    return text.strip() or None


def _folded(text: str) -> str | None:
    folded = " ".join(text.casefold().split())
    return folded.strip(".,;:!?\"'`*()[]{} ") or folded or None


def _matches(pattern: str, which: int) -> Reader:
    compiled = re.compile(pattern)

    def read(text: str) -> str | None:
        found: list[str] = compiled.findall(text)
        return found[which].strip() if found else None

    return read
