"""The shipped studies, and how any study is loaded: YAML, then `--set` overrides, then every check."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from stillroom.config import Study
from stillroom.config.section import Section
from stillroom.credentials import holds_credential, redact
from stillroom.errors import UserError
from stillroom.studies.reader import LONGEST_TEXT, UnreadableError, read_plain

_MOST_FAULTS, _LONGEST_SHOWN = 20, 200
"""Faults that a message lists, and characters that it shows of a value."""
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that no path can have, or no file in UTF-8."""
_MOST_PARTS = 16
"""Sections that `--set` may go down."""
_RENAMED = {"adapt": "fine_tune"}
"""Keys of earlier study files, and what they are called now: not read, but named in the message."""


def shipped_studies() -> list[str]:
    """Names of the studies in the package."""
    return sorted(p.name[:-5] for p in resources.files("stillroom.studies").iterdir() if p.name.endswith(".yaml"))


def load_study(name_or_path: str, overrides: Iterable[str] = ()) -> Study:
    """Load a study by a shipped name or a path, then apply `a.b=value` overrides.

    Raises `UserError` with one line a fault, each naming the field.
    """
    raw = _read_study(name_or_path)
    for override in overrides:
        _apply(raw, override)
    _check_texts(name_or_path, raw)
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(name_or_path, error)) from None


def _read_study(name_or_path: str) -> dict[str, Any]:
    try:
        raw = read_plain(_text_of(name_or_path))
    except UnreadableError as error:
        raise UserError(f"{name_or_path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{name_or_path}: a study is a mapping of sections, this is {type(raw).__name__}")
    return raw


def _text_of(name_or_path: str) -> str:
    if name_or_path in shipped_studies():
        return resources.files("stillroom.studies").joinpath(f"{name_or_path}.yaml").read_text("utf-8")
    path = Path(name_or_path)
    try:
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                return file.read(LONGEST_TEXT + 1)  # a longer one is refused by its length
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not text in UTF-8 that can be read: {error}") from None
    raise UserError(f"no study {name_or_path!r}: neither a file nor one of the shipped {', '.join(shipped_studies())}")


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in the raw mapping; the value is read as YAML."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {_shown(override)}: write it as section.field=value")
    *parents, leaf = key.split(".")
    if len(parents) > _MOST_PARTS:
        raise UserError(f"--set {_shown(override)}: no section is that deep; write it as section.field=value")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {_shown(override)}: {_shown(parent)} is not a section")
        node = child
    try:
        node[leaf] = read_plain(value)
    except UnreadableError as error:
        raise UserError(f"--set {_shown(override)}: not valid YAML: {error}") from None


def _check_texts(source: str, raw: dict[str, Any]) -> None:
    """Refuse what no text of a study may hold, wherever it is: a study is recorded in full, as UTF-8."""
    texts = list(_texts(raw))
    for field, text in texts:
        if _UNWRITABLE.search(text):
            raise UserError(
                f"{source}: {_shown(field)}: a NUL character or half of a surrogate pair is in it: {_shown(text)}"
            )
    if not holds_credential("\n".join(text for _, text in texts)):  # once: it goes over the whole environment
        return
    for field, text in texts:
        if holds_credential(text):
            raise UserError(
                f"{source}: {redact(field)}: there is a credential in it, and a study is recorded in full; "
                "give it by the environment (HF_TOKEN, `hf auth login`, MLFLOW_TRACKING_URI) instead"
            )


def _texts(node: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every text, keys included, with the field that it is in."""
    if isinstance(node, str):
        yield field, node
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            path = f"{field}.{key}" if field else str(key)
            yield path, str(key)
            yield from _texts(value, path)


def _explain(source: str, error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    lines = [f"{source}: {_explain_one(fault)}" for fault in faults[:_MOST_FAULTS]]
    more = [f"{source}: and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
    return "\n".join(lines + more)


def _explain_one(fault: Any) -> str:
    field = ".".join(_name(part) for part in fault["loc"]) or "study"
    given = f" (given {_shown(fault['input'])})" if isinstance(fault["input"], str | int | float | bool) else ""
    if fault["type"] == "extra_forbidden":
        return f"{field}: unknown key{_meant(fault['loc'])}{given}"
    return f"{field}: {fault['msg'].removeprefix('Value error, ')}{given}"


def _meant(loc: tuple[str | int, ...]) -> str:
    """The field of that section that is spelt much like the last part of `loc`, as a question."""
    section: type[Section] | None = Study
    above = iter(loc[:-1])
    for part in above:
        if section is None or part not in section.model_fields:
            return ""
        annotation = section.model_fields[str(part)].annotation
        if get_origin(annotation) in (dict, tuple):
            next(above, None)  # a key, or a number, of the user's
        section = next(_sections(annotation), None)
    meant = _RENAMED.get(str(loc[-1]), str(loc[-1]))
    near = get_close_matches(meant, section.model_fields, 1) if section is not None else []
    return f"; did you mean {near[0]}?" if near else ""


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _name(part: str | int) -> str:
    return _short(part) if isinstance(part, str) and part.isprintable() else _shown(part)


def _shown(value: object) -> str:
    """A value as a message shows it: on one line, without control characters, and not whole if it is long."""
    return _short(repr(value))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"
