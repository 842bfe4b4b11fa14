"""Where a signature says what shape and type an array has, every call is held to it.

To be imported before the package.
"""

from pathlib import Path

import jaxtyping

SOURCES = Path(__file__).resolve().parents[1] / "src"
SHAPED = [path for path in SOURCES.rglob("*.py") if "from jaxtyping import" in path.read_text("utf-8")]
MODULES = [".".join(path.relative_to(SOURCES).with_suffix("").parts) for path in SHAPED]

_jaxtyped = jaxtyping.jaxtyped


def _where_said(typechecker):
    """For a function or dataclass of these modules: its check, or nothing where it says no shape, as most do not."""

    def decorate(decorated):
        said = " ".join(map(str, getattr(decorated, "__annotations__", {}).values()))
        shaped = "[Tensor," in said or "[ndarray," in said
        return _jaxtyped(decorated, typechecker=typechecker) if shaped else decorated

    return decorate


jaxtyping.jaxtyped = _where_said
jaxtyping.install_import_hook(MODULES, "beartype.beartype")
