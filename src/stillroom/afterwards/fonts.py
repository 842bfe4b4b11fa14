"""Letters in pictures: installed fonts that have them; what none has is written as its escape, not drawn as a box."""

from __future__ import annotations

_FIRST = "DejaVu Sans"
"""Comes with Matplotlib."""


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Font families that between them have the text's letters, Matplotlib's own first; and the letters none has."""
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    listed = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name != _FIRST, font.name))
    families: list[str] = []
    missing = set(text)
    for font in listed:
        if not missing:
            break
        upright = font.style == "normal" and font.weight in (400, "normal", "regular")  # the face that is drawn
        if not upright or font.name in families or font.name.startswith("Last Resort"):  # the last draws boxes
            continue
        face = FT2Font(font.fname)
        if found := {letter for letter in missing if face.get_char_index(ord(letter))}:
            families.append(font.name)
            missing -= found
    return families or [_FIRST], missing


def escaped(text: str, letters: set[str]) -> str:
    """The text with these letters as Python escapes them, such as `\\u4e2d`."""
    return "".join(letter.encode("unicode_escape").decode() if letter in letters else letter for letter in text)
