"""Pages of the site that are made, not written: the README as its start, every command, every field. A MkDocs hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from stillroom.cli import app
from stillroom.config import GROUPS
from stillroom.studies.fields import field_row, sections


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
    for path, model in sections():
        rows = [_field(field_row(*item)) for item in model.model_fields.items()]
        heading = f"`{path}`" if path else "The study"
        table = "\n".join(["| Field | Type | Default | Meaning |", "|---|---|---|---|", *rows])
        parts += [f"## {heading}", (model.__doc__ or "").strip(), table]
    groups = [f"| `{name}` | {', '.join(f'`{term}`' for term in group.terms)} |" for name, group in GROUPS.items()]
    parts += ["## Shipped groups", "\n".join(["| Group | Terms |", "|---|---|", *groups])]
    return "\n\n".join(parts) + "\n"


def _field(row: dict[str, str]) -> str:
    return f"| `{row['name']}` | {_cell(row['type'])} | {_cell(row['default'])} | {_cell(row['meaning'])} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
