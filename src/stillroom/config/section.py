"""What every section of a study has in common, and the error that a user can fix."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]*$", max_length=64)]
"""Names of studies, tasks and groups: they become parts of names of folders."""

TextOrPath = TypeVar("TextOrPath", str, Path)
_LONGEST_PATH, _LONGEST_PART, _LONGEST_LAST = 1000, 255, 180
"""Bytes: what every system can have of a path and of a part of it; the last part gets a date or a suffix added."""


def _possible_path(path: TextOrPath) -> TextOrPath:
    parts = str(path).encode("utf-8", "replace").replace(b"\\", b"/").split(b"/")
    if "\0" in str(path):
        raise ValueError("a path cannot have a NUL character")
    if len(b"/".join(parts)) > _LONGEST_PATH:
        raise ValueError(f"a path of more than {_LONGEST_PATH} bytes; choose a shorter one")
    if max(map(len, parts)) > _LONGEST_PART or len(parts[-1]) > _LONGEST_LAST:
        raise ValueError(f"a path with a part of more than {_LONGEST_LAST} bytes; choose a shorter name")
    return path


PossiblePath = AfterValidator(_possible_path)
"""Marks a text or path that a file or folder of that name can stand at."""


def _number_or_all(value: object) -> object:
    digits = isinstance(value, str) and value.strip().isdecimal()
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if value == "all" or ((whole or digits) and int(value) >= 2):  # type: ignore[call-overload]
        return value
    raise ValueError("must be a whole number, 2 at least, or all")


Examples = Annotated[int | Literal["all"], BeforeValidator(_number_or_all)]
"""How many of a data set's rows are used."""


Layer = Annotated[int, Field(ge=1)] | Literal["last"]
"""A layer of a model: its number, from 1, or the last one, whatever that is."""


def later(default: Any, **options: Any) -> Any:
    """A field that came after studies had been run: at its default it is left out of what a section says of itself.

    So a study that does not use it keeps its fingerprints, and with them its store and its trials.
    """
    return Field(default, exclude_if=lambda value: value == default, **options)


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: object, info: ValidationInfo) -> object:
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = {*(get_args(annotation) or (annotation,))}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("a number is expected, not true or false")  # Python takes them for 1 and 0
        return value
