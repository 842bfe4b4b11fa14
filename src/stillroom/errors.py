"""The error that a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can fix; its message names the field, file or example and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error of any library says, as a line for a message; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
