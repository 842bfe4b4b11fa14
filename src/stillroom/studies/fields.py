"""What a study can say: every section, and in it every field with its type, default and meaning."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stillroom.config import Study
from stillroom.errors import UserError


def fields_of(path: str) -> dict[str, list[dict[str, str]]]:
    """By section, the fields at and under a path such as `training`, `corpus.tasks` or `training.epochs`; `""`: all.

    A field is its `name`, `type`, `default` and `meaning`. `UserError` if a study has no such section or field.
    """
    known = {name: [field_row(*item) for item in model.model_fields.items()] for name, model in sections()}
    wanted = ".".join(part for part in path.split(".") if part)
    found = {name: rows for name, rows in known.items() if not wanted or _under(name, wanted)}
    if found:
        return found
    above, _, leaf = wanted.rpartition(".")
    one = {n: [row for row in rows if row["name"] == leaf] for n, rows in known.items() if _plain(n) == _plain(above)}
    if any(one.values()):
        return one
    names = [
        *filter(None, map(_plain, known)),
        *(f"{_plain(n)}.{r['name']}".lstrip(".") for n in known for r in known[n]),
    ]
    near = get_close_matches(_plain(wanted), names, 1)
    raise UserError(f"no section or field {path!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _plain(name: str) -> str:
    """A section's path without what stands for a name of the user's."""
    return name.replace(".<name>", "")


def _under(name: str, wanted: str) -> bool:
    return any(path == wanted or path.startswith(f"{wanted}.") for path in (name, _plain(name)))


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a study with the path that a study file uses; its own is empty."""
    yield from _sections(Study, "")


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The model and every section below it, with the path that a study file uses."""
    yield path, model
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        if inner is not None:
            step = f".{'<name>'}" if typing.get_origin(field.annotation) is dict else ""
            yield from _sections(inner, f"{path}.{name}{step}".lstrip("."))


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation holds, alone or as the member of a list, a mapping or an option."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_model_of(argument) for argument in typing.get_args(annotation)]
    return next((model for model in found if model is not None), None)


def field_row(name: str, field: FieldInfo) -> dict[str, str]:
    """A field's name, type, default and meaning."""
    inner = _model_of(field.annotation)
    meaning = field.description or (inner.__doc__ or "").strip().splitlines()[0]
    return {"name": name, "type": _type(field), "default": _default(field), "meaning": meaning}


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "its own"
    return "none" if value is None or value in ((), {}) else f"`{_in_yaml(value)}`"


def _in_yaml(value: Any) -> str:
    """A default as a study file would have it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_in_yaml, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else f'"{value}"'
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(field: FieldInfo) -> str:
    inner = _model_of(field.annotation)
    if inner is not None:
        many: Any = typing.get_origin(field.annotation)
        return {dict: "section by name", tuple: "list of sections"}.get(many, "section")
    limits = [_limit(rule) for rule in field.metadata]
    return ", ".join([_spelt(field.annotation), *(limit for limit in limits if limit)])


def _limit(rule: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [f"{sign} {getattr(rule, name)}" for name, sign in signs.items() if getattr(rule, name, None) is not None]
    return ", ".join(found)


def _spelt(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _spelt(arguments[0])
    if origin is dict:
        return f"{_spelt(arguments[1])} by name"
    if origin is tuple:
        return (
            f"list of {_spelt(arguments[0])}" if arguments[-1] is Ellipsis else f"[{', '.join(map(_spelt, arguments))}]"
        )
    if arguments:
        return " or ".join(_spelt(argument) for argument in arguments if argument is not type(None))
    names = {"int": "integer", "float": "number", "str": "text", "bool": "true or false", "Path": "path"}
    return names.get(getattr(annotation, "__name__", str(annotation)), str(annotation))
