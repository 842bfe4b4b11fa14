"""Tokens and passwords: known by the variables that hold them and by their form; refused in a study, hidden in output.

A study is recorded in full, in run.json, in the tracker and in the report, so none may stand in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY|APIKEY)($|_(?!PATH|FILE|DIR))")
_SHORTEST = 8
"""Characters under which a variable's value is taken for a setting: hiding `true` everywhere would hide the message."""

_FORMS = re.compile(
    r"""
    \bhf_[A-Za-z0-9]{16,}            # the Hugging Face hub
    | \bgh[pousr]_[A-Za-z0-9]{16,}   # GitHub
    | \bsk-[A-Za-z0-9_\-]{20,}       # several providers of models
    | \bAKIA[A-Z0-9]{16}\b           # Amazon
    | (?<=://)[^/\s@'"]+(?=@)        # a name, or name:password, before a host
    """,
    re.VERBOSE,
)


def _known(environ: Mapping[str, str]) -> list[str]:
    values = {value for name, value in environ.items() if _SECRET_NAME.search(name.upper())}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with every credential in it replaced by `***`."""
    for value in _known(environ):
        text = text.replace(value, "***")
    return _FORMS.sub("***", text)


def holds_credential(text: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a text has a credential in it."""
    return redact(text, environ) != text
