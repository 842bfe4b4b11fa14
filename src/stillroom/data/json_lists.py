"""Rows of a `.json` file, read a piece at a time: a list of objects, alone or as the one list in an object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from stillroom.errors import UserError

PIECE = 2**16
"""Characters of a file that are read at a time."""
_LONGEST_LITERAL = 16
"""Characters that the end of a piece can leave of a number, a name or an escape, with which no error is certain."""
_BLANK = re.compile(r"[ \t\n\r]*")
_ENDS = " \t\n\r,:]}"
"""What can follow a value."""
_DECODER = json.JSONDecoder()
_NO_LIST = "expected a list of objects; one object per line is a `.jsonl` file"


def json_rows(pieces: Iterator[str], path: Path) -> Iterator[dict[str, Any]]:
    """The list's objects; what is held is the longest of them, and a piece or two.

    Raises `UserError` with a row's number. Whether an object has a second list is known only after the first.
    """
    reader = _Reader(pieces, path)
    inside = reader.peek() == "{"
    for number, row in enumerate(reader.listed() if inside else reader.elements(), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: expected an object, not {str(row)[:60]!r}")
        yield row
    if reader.peek():
        reader.refuse(str(path), f"there is more after the {'object' if inside else 'list'}'s end")


class _Reader:
    """A JSON text, and how far it has been read."""

    def __init__(self, pieces: Iterator[str], path: Path) -> None:
        self._path, self._more = path, pieces
        self._text, self._place = "", 0

    def elements(self) -> Iterator[Any]:
        """Of the list that begins here."""
        if self.peek() != "[":
            self._value(str(self._path))
            raise UserError(f"{self._path}: {_NO_LIST}")
        self._place += 1
        number, mark = 0, ","
        if self.peek() == "]":
            self._place += 1
            return
        while mark == ",":
            number += 1
            where = f"{self._path}, row {number}"
            yield self._value(where)
            mark = self._take(",]", where)

    def listed(self) -> Iterator[Any]:
        """The elements of the one list in the object that begins here."""
        where, lists, mark = str(self._path), 0, self._take("{", str(self._path))
        if self.peek() == "}":
            mark = self._take("}", where)
        while mark != "}":
            if self.peek() != '"':
                self.refuse(where, "Expecting property name enclosed in double quotes")
            self._value(where)
            self._take(":", where)
            if self.peek() == "[":
                lists += 1
                if lists > 1:
                    break
                yield from self.elements()
            else:
                self._value(where)
            mark = self._take(",}", where)
        if lists != 1:
            raise UserError(f"{self._path}: {_NO_LIST}")

    def peek(self) -> str:
        """The next character that is not blank, which stays; "" at the end."""
        while True:
            self._place = _BLANK.match(self._text, self._place).end()  # type: ignore[union-attr]  # matches nothing, too
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read_more():
                return ""

    def refuse(self, where: str, why: str) -> NoReturn:
        """Raise the error of a text that is no JSON."""
        raise UserError(f"{where}: not valid JSON: {why}")

    def _take(self, marks: str, where: str) -> str:
        """The next character, which must be one of the marks."""
        mark = self.peek()
        if not mark or mark not in marks:
            self.refuse(where, f"Expecting '{marks[0]}' delimiter")
        self._place += 1
        return mark

    def _value(self, where: str) -> Any:
        """What begins here, whole: as much is read as it takes, and what shows its end."""
        while True:
            self.peek()
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                left = len(self._text) - end  # without a mark after it, `1` may be the beginning of `1.5e3`
                if left > _LONGEST_LITERAL or (left and self._text[end] in _ENDS) or not self._read_more():
                    self._place = end
                    return value
            except json.JSONDecodeError as error:
                certain = error.pos < len(self._text) - _LONGEST_LITERAL
                if (certain and not error.msg.startswith("Unterminated string")) or not self._read_more():
                    self.refuse(where, error.msg)
            except RecursionError:
                raise UserError(f"{where}: nested too deeply to be read; remove it") from None
            except ValueError:  # Python's limit, which is no fault of the JSON
                raise UserError(f"{where}: a number has too many digits; write it as text") from None

    def _read_more(self) -> bool:
        """Whether there was more; as much again as is held, so that a long value is not decoded too often."""
        rest = self._text[self._place :]
        added = "".join(islice(self._more, 1 + len(rest) // PIECE))
        if added:  # else a place in the text still counts
            self._text, self._place = rest + added, 0
        return bool(added)
