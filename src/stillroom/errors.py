"""The error that a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can fix; its message names the field, file or example and the remedy."""
