"""The benchmark programs run, at a size that says nothing about speed; what they compare must agree there too.

Not here: `sweeping`, which trains for minutes, and the part of `training` that needs TRL.
"""

from __future__ import annotations

import importlib

import pytest

from processes import start
from stillroom.files import read_json
from synthetic import write_results

pytestmark = pytest.mark.slow

LITTLE = "quickstart --threads 1 --rounds 1 --examples 12 " + " ".join(
    f"--set corpus.tasks.{task}.examples=20" for task in ("sentiment", "quiz", "arithmetic")
)
PROGRAMS = {
    "capture": f"{LITTLE} --outline-examples 2 --outline-rounds 1",
    "writing": f"{LITTLE} --padded-examples 1",
    "reading": f"{LITTLE} --list-examples 2",
    "training": f"{LITTLE} --batches 1 --without-trl",
    "evaluating": f"{LITTLE} --prompts 3 --generation-rounds 1",
    "sparse_kl": "--threads 1 --rounds 1 --tokens 300 --vocabulary 500 --width 16 --top-k 32 --precision float32",
    "starting": "--rounds 1",
    "reporting": "{results} --rounds 1",
    "compiling": f"{LITTLE.replace(' --examples 12', '')} --tokens 16 --backend aot_eager",
}
SAME = {
    "compiling": {"relative difference of the loss": 0.0},
    "evaluating": {"share of choices that are the same": 1.0, "share of generated texts that are the same": 1.0},
    "sparse_kl": {
        "relative difference of the loss": 0.0,
        "relative difference of the hidden states' gradient": 0.0,
        "relative difference of the output head's gradient": 0.0,
    },
    "training": {"relative difference of Transformers' loss and ours": 0.0},
}


def run(name, arguments):
    """In a process of its own: a benchmark sets threads and turns gradients off."""
    importlib.import_module(name).main(arguments)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_runs_and_writes_its_figures(name, tmp_path):
    """A table and JSON with positive figures and the machine they are of."""
    output, results = tmp_path / "out.json", tmp_path / "results"
    if name == "reporting":
        write_results(results)
    arguments = PROGRAMS[name].format(results=results).split()
    running = start(tmp_path / "log", run, name, [*arguments, "--output", str(output)])
    assert running.end() == 0, running.output
    found = read_json(output, "rows", "hardware", "versions")
    figures = {row["what"]: row["median"] for row in found["rows"]}
    assert not any(row["min"] > row["median"] or row["median"] > row["max"] for row in found["rows"])
    measured = [row["min"] for row in found["rows"] if "difference" not in row["what"] and "memory" not in row["what"]]
    assert min(figure for figure in measured if figure == figure) > 0  # nan: cache that a file system keeps
    assert all(what in running.output for what in figures)
    for what, expected in SAME.get(name, {}).items():
        assert figures[what] == pytest.approx(expected, abs=1e-5)
