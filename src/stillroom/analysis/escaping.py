"""Text that others wrote, made plain for where it is shown: a terminal, Markdown, LaTeX."""

from __future__ import annotations

import re
import unicodedata

_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories of what steers a terminal or breaks its lines: controls, lone surrogates, separators."""
_TURNS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that turn the direction of writing, and so can show a line in another order than it has."""


def control_free(text: str, keep: str = "") -> str:
    """The text with every control character as Python escapes it, such as `\\x1b`; `keep` stay as they are."""
    return "".join(
        letter.encode("unicode_escape").decode()
        if letter not in keep and (unicodedata.category(letter) in _UNSEEN or letter in _TURNS)
        else letter
        for letter in text
    )


def fence(text: str) -> str:
    """A run of backticks longer than any in the text, at least three: opens and closes a block that it cannot leave."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def markdown_plain(text: object) -> str:
    """The text as Markdown shows it letter by letter, in a paragraph or in a table's cell: no markup, link or tag."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&])", r"\\\1", control_free(str(text)))


def latex_escaped(text: str) -> str:
    """Text with LaTeX's special characters made plain."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in control_free(text))
