"""Where a signature says what shape and type an array has, every call is held to it.

To be imported before the package.
"""

from pathlib import Path

from jaxtyping import install_import_hook

SOURCES = Path(__file__).resolve().parents[1] / "src"
SHAPED = [path for path in SOURCES.rglob("*.py") if "from jaxtyping import" in path.read_text("utf-8")]
MODULES = [".".join(path.relative_to(SOURCES).with_suffix("").parts) for path in SHAPED]

install_import_hook(MODULES, "beartype.beartype")
