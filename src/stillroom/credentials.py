"""Tokens and passwords: known by the variables that hold them and by their form; refused in a study, hidden in output.

A study is recorded in full, in run.json, in the tracker and in the report, so none may be in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import quote

_SECRET_WORD = re.compile(
    r"PASS|PWD|PAT|KEYS?|AUTH|BEARER|COOKIE|JWT"
    r"|\w*(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|APIKEY|ACCESSKEY|CREDENTIAL)S?"
)
"""A word of a variable's name, between underscores, that says that its value is a secret."""
_PLACE = {"PATH", "FILE", "DIR", "FOLDER", "SOCK"}
"""Last words of names of variables that say where a secret lies."""
_CONNECTION = re.compile(r"(DATABASE|DB|REDIS|AMQP|MONGO\w*|POSTGRES\w*|MYSQL)_UR[IL]$|DSN$|CONN(ECTION)?_STR(ING)?$")
_SHORTEST = 8
"""Characters under which a variable's value is taken for a setting: hiding `true` everywhere would hide the message."""

_FORMS = re.compile(
    r"""
    \bhf_[A-Za-z0-9]{16,}                          # the Hugging Face hub
    | \bgh[pousr]_[A-Za-z0-9]{16,}                 # GitHub
    | \bgithub_pat_[A-Za-z0-9_]{16,}
    | \bgl(?:pat|ptt|dt|rt|ft|cbt|soat|agent|imt)-[A-Za-z0-9_\-.]{16,}  # GitLab
    | \b(?:npm|dop_v1|shpat|[rs]k_live|r8)_[A-Za-z0-9]{16,}  # npm, DigitalOcean, Shopify, Stripe, Replicate
    | \bpypi-AgE[A-Za-z0-9_\-]{16,}                # the Python package index
    | \bx(?:ox[a-z]|app)-[A-Za-z0-9\-]{10,}        # Slack
    | \bsk-[A-Za-z0-9_\-]{20,}                     # several providers of models
    | \bA(?:KIA|SIA)[A-Z0-9]{16}\b                 # Amazon
    | \bAIza[A-Za-z0-9_\-]{30,}                    # Google
    | \beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]+  # a signed JSON token
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ A-Z]*-----|\Z)
    | (?<=://)[^/\s@'"]+(?=@)                       # a name, or name:password, before a host
    | (?P<name>(?i:
        [?&;][\w.\-]*(?:token|secret|password|passwd|pwd|key|auth|credential|signature|sig)=
        | \b(?:password|passwd|pwd)=
        | \bauthorization['"]?:[ ]?['"]?(?:bearer|basic|token)[ ]
      ))[^\s&;'"\#,)]{6,}                          # a field of an address, a connection or a header
    """,
    re.VERBOSE | re.DOTALL,
)


def _is_secret(name: str) -> bool:
    words = name.upper().split("_")
    return name.upper() != "PWD" and words[-1] not in _PLACE and any(_SECRET_WORD.fullmatch(word) for word in words)


def _parts(name: str, value: str) -> Iterator[str]:
    """What of a variable's value must be seen nowhere."""
    if _is_secret(name) or ("://" not in value and _CONNECTION.search(name.upper())):
        yield value
    for found in _FORMS.finditer(value):  # as the password alone of a database's address
        secret = found[0][len(found["name"] or "") :]
        if value[: found.start()].endswith("://"):
            secret = secret.partition(":")[2]  # a name alone is no secret, and may be a part of every path
        yield secret


def _known(environ: Mapping[str, str]) -> list[str]:
    values = {part for name, value in environ.items() for part in _parts(name, value)}
    values |= {quote(value, safe="", errors="replace") for value in values}
    return sorted((value for value in values if len(value) >= _SHORTEST), key=len, reverse=True)


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with every credential in it replaced by `***`."""
    for value in _known(environ):
        text = text.replace(value, "***")
    return _FORMS.sub(lambda found: f"{found['name'] or ''}***", text)


def holds_credential(text: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a text has a credential in it."""
    return redact(text, environ) != text
