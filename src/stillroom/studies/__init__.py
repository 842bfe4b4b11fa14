"""The shipped studies, and how any study is loaded: YAML, then `--set` overrides, then every check."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stillroom.config import Study, UserError
from stillroom.credentials import holds_credential


def shipped_studies() -> list[str]:
    """Names of the studies in the package."""
    return sorted(p.name[:-5] for p in resources.files("stillroom.studies").iterdir() if p.name.endswith(".yaml"))


def load_study(name_or_path: str, overrides: Iterable[str] = ()) -> Study:
    """Load a study by a shipped name or a path, then apply `a.b=value` overrides.

    Raises `UserError` with one line a fault, each naming the field.
    """
    raw = _read_yaml(name_or_path)
    for override in overrides:
        _apply(raw, override)
    _refuse_credentials(name_or_path, raw)
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(name_or_path, error)) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which would let a key that stands twice quietly replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of different keys."""
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if name_or_path in shipped_studies():
        text = resources.files("stillroom.studies").joinpath(f"{name_or_path}.yaml").read_text("utf-8")
    elif path.is_file():
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not text in UTF-8 that can be read: {error}") from None
    else:
        raise UserError(
            f"no study {name_or_path!r}: neither a file nor one of the shipped {', '.join(shipped_studies())}"
        )
    try:
        raw = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise UserError(f"{name_or_path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{name_or_path}: a study is a mapping of sections, this is {type(raw).__name__}")
    return raw


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `a.b=value` in the raw mapping; the value is read as YAML."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {override!r}: write it as section.field=value")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override!r}: {parent!r} is not a section")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {override!r}: {value!r} is not valid YAML") from None


def _refuse_credentials(source: str, node: Any, field: str = "") -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_credentials(source, value, f"{field}.{key}" if field else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            _refuse_credentials(source, value, f"{field}.{number}")
    elif isinstance(node, str) and holds_credential(node):
        raise UserError(
            f"{source}: {field}: there is a credential in it, and a study is recorded in full; "
            "give it by the environment (HF_TOKEN, `hf auth login`, MLFLOW_TRACKING_URI) instead"
        )


def _explain(source: str, error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"]) or "study"
        given = f" (given {fault['input']!r})" if isinstance(fault["input"], str | int | float | bool) else ""
        message = "unknown key" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        lines.append(f"{source}: {field}: {message}{given}")
    return "\n".join(lines)
