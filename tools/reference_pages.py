"""Pages of the site that are made, not written: the README as its start, every command, every field. A MkDocs hook."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stillroom.cli import app
from stillroom.config import GROUPS, Study


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages; MkDocs calls this."""
    for path, content in (
        ("index.md", start_page()),
        ("reference/cli.md", cli_page()),
        ("reference/configuration.md", configuration_page()),
    ):
        files.append(File.generated(config, path, content=content))
    return files


def start_page() -> str:
    """The README, its links as seen from the site."""
    readme = Path(__file__).resolve().parents[1] / "README.md"
    return readme.read_text("utf-8").replace("](docs/", "](")


def cli_page() -> str:
    """Every command: what it does, its arguments and options, an example."""
    group: Any = typer.main.get_command(app)
    parts = ["# Commands", group.help, group.epilog]
    parts.append("`stillroom --install-completion` completes commands, options and studies in your shell.")
    for name, command in group.commands.items():
        says, _, example = command.help.partition("Example: ")
        parts += [f"## {name}", says.strip(), f"```text\n{example.strip()}\n```"]
        rows = [_parameter(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
        parts.append("\n".join(["| | Meaning | Default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _parameter(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    name = parameter.metavar if is_argument else ", ".join(parameter.opts)
    if parameter.metavar and not is_argument:
        name += f" {parameter.metavar}"
    default = parameter.default
    shown = (
        "required" if parameter.required else "" if default in (None, False) or callable(default) else f"`{default}`"
    )
    return f"| `{_cell(name)}` | {_cell(parameter.help or '')} | {shown} |"


def configuration_page() -> str:
    """Every section of a study, and in it every field with its type, default and meaning."""
    parts = [
        "# Configuration",
        "A study is a YAML file of these sections; any field can be set on the command line, as in "
        "`--set training.epochs=1`. An unknown key is an error. Sizes are in tokens, examples or steps as the field "
        "says, shares are of 1.",
    ]
    for path, model in _sections(Study, ""):
        rows = [_field(name, field) for name, field in model.model_fields.items()]
        heading = f"`{path}`" if path else "The study"
        table = "\n".join(["| Field | Type | Default | Meaning |", "|---|---|---|---|", *rows])
        parts += [f"## {heading}", (model.__doc__ or "").strip(), table]
    groups = [f"| `{name}` | {', '.join(f'`{term}`' for term in group.terms)} |" for name, group in GROUPS.items()]
    parts += ["## Shipped groups", "\n".join(["| Group | Terms |", "|---|---|", *groups])]
    return "\n\n".join(parts) + "\n"


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


def _field(name: str, field: FieldInfo) -> str:
    inner = _model_of(field.annotation)
    meaning = field.description or (inner.__doc__ or "").strip().splitlines()[0]
    return f"| `{name}` | {_cell(_type(field))} | {_cell(_default(field))} | {_cell(meaning)} |"


def _default(field: FieldInfo) -> str:
    value = field.default
    if field.is_required():
        return "required"
    if value is PydanticUndefined or isinstance(value, BaseModel):
        return "its own"
    return "none" if value is None or value in ((), {}) else f"`{value}`"


def _type(field: FieldInfo) -> str:
    inner = _model_of(field.annotation)
    if inner is not None:
        many = typing.get_origin(field.annotation)
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


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
