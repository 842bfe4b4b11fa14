"""The shape of the project: imports go one way, modules stay small, slow things load late."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from own_time import LONGEST

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "stillroom"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
SLOW = """
import subprocess, sys, time
import pytest

BURN = "import time; end = time.process_time() + 0.8\\nwhile time.process_time() < end: pass"

@pytest.fixture(scope="module")
def shared():
    exec(BURN)

@pytest.fixture
def own():
    exec(BURN)

def test_shared(shared): pass
def test_waiting(): time.sleep(0.8)
@pytest.mark.slow
def test_marked(): exec(BURN)
def test_slow(): exec(BURN)
def test_slow_to_set_up(own): pass
def test_slow_child(): subprocess.run([sys.executable, "-c", BURN], check=True)
"""


def listed():
    """Packages in the order of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    block = re.search(r"```text\n(.*?)```", text, re.S).group(1)
    return [line.split()[0] for line in block.strip().splitlines()]


def top(path):
    """The module, or package, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "stillroom":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_the_documentation_lists_every_package():
    """The list cannot drift from the tree."""
    assert sorted(listed()) == sorted({top(p) for p in SOURCES} - {"__init__"})


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_up_the_list_only(path):
    """A module knows only those above it; the command line knows all."""
    order = listed()
    module = top(path)
    if module == "__init__":
        return
    allowed = set(order[: order.index(module) + 1])
    assert {m for m in imported(path) if m not in ("__version__",)} <= allowed


def test_modules_are_small():
    """A file of over 400 lines has, more often than not, two subjects: it is said, and left to who reads it."""
    for path in SOURCES:
        if (lines := len(path.read_text("utf-8").splitlines())) > 400:
            warnings.warn(f"{path.relative_to(PACKAGE)} has {lines} lines: does it have two subjects?", stacklevel=1)


def test_nothing_is_named_own():
    """A name says what it holds; this one says only that it is somebody's."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = (getattr(node, field, None) for field in ("id", "arg", "attr", "name"))
            if isinstance(node, ast.expr | ast.arg | ast.keyword | ast.stmt) and "own" in names:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.stem)
def test_no_test_file_imports_from_another(path):
    """What two of them need is a helper module's: a change of one file's tests breaks no other's."""
    tree = ast.parse(path.read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in names if name.startswith("test_")]


def test_a_test_file_says_what_it_protects():
    """It bears the name of a module or package, or is in the list of tests/README.md."""
    modules = {part.removesuffix(".py") for path in SOURCES for part in path.relative_to(PACKAGE).parts}
    files = {path.name for path in TESTS if path.stem.startswith("test_")}
    table = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "tests" / "README.md").read_text("utf-8").split("## ")[0]))
    assert {name for name in files if name.removeprefix("test_").removesuffix(".py") not in modules} == table


@pytest.mark.slow
def test_a_test_that_hides_its_slowness_fails(tmp_path):
    """Its own processor time counts, its children's too; not sleep, nor what other tests use as well."""
    (tmp_path / "test_it.py").write_text(SLOW)
    (tmp_path / "conftest.py").write_text("import own_time\n\nown_time.QUICK_SECONDS = 0.6\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "own_time", "-o", "addopts=", "-m", "not slow", "."]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "3 failed, 2 passed, 1 deselected" in done.stdout, done.stdout
    told = re.findall(r"^[\d.]+ s of processor time: make it quicker, or mark it slow$", done.stdout, re.M)
    assert len(told) == 3, done.stdout  # a summary, which a CI has in full, says it once more
    command[command.index("not slow")] = ""
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "6 passed" in done.stdout, done.stdout  # beside slow tests, time is no fault, but it is told
    assert len(re.findall(r"PytestWarning: [\d.]+ s of processor time", done.stdout)) == 3, done.stdout


def test_shapes_in_signatures_are_checked():
    """In every test, a call whose arrays have other shapes than the signature says fails."""
    from stillroom.terms.distances import mse

    mse(torch.ones(3, 4), torch.ones(3, 4))
    with pytest.raises(TypeCheckError, match="teacher"):
        mse(torch.ones(3, 4), torch.ones(1, 4))  # which PyTorch would broadcast


def test_ray_is_imported_in_three_modules():
    """Everything else runs without it."""
    users = [p for p in SOURCES if re.search(r"^\s*(import ray|from ray)\b", p.read_text("utf-8"), re.M)]
    assert sorted(p.name for p in users) == ["ray_processes.py", "ray_sharded.py", "ray_sweep.py"]


def test_help_loads_nothing_slow():
    """`stillroom --help` must not wait for torch, ray or pandas."""
    slow = ("torch", "ray", "pandas", "transformers", "mlflow", "pyarrow", "pydantic")
    code = f"import sys, stillroom.cli; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "more"),
    [
        (
            ["offline_teacher_data", "preflight.planning", "experiment.workspace", "afterwards.inspection"],
            ["matplotlib", "peft"],
        ),
        (["experiment.reporting", "analysis.report"], ["torch", "transformers"]),
    ],
)
def test_what_loads_no_model_imports_no_modelling_code(modules, more):
    """`plan`, `verify`, `archive` and `report` do not wait seconds for what only a model needs."""
    slow = ["transformers.modeling_utils", "torch._dynamo", "torch.distributed.tensor", "mlflow", "ray", *more]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module("stillroom." + module)
    assert not (found := [m for m in {slow} if m in sys.modules]), (module, found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_file_names_a_path_of_a_machine():
    """What is committed speaks of the project alone."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    pattern = re.compile(r"(?<![\w.])/(work|root|home|tmp)/\w")
    for name in done.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".yaml", ".yml"}
            and path.is_file()
            and path.name != "test_structure.py"
        ):
            assert not pattern.search(path.read_text("utf-8")), name


def test_unfinished_work_is_not_left_in_the_source():
    """Nothing pretends."""
    for path in SOURCES:
        assert not re.search(r"NotImplementedError|TO" + r"DO\b|FIX" + r"ME|XX" + r"X", path.read_text("utf-8")), path


def test_the_files_that_start_first_are_there():
    """One that was renamed would start last, and the others' processes would wait for it."""
    assert set(LONGEST) <= {path.name for path in TESTS}
