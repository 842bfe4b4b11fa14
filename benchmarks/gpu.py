"""What a GPU run of a study is worth knowing, in one program for a card that is at hand for minutes.

    python benchmarks/gpu.py --tiny                                     # every line of it, on a CPU, in a minute
    python benchmarks/gpu.py paper --set ... --data gpu --stages none   # writes what travels, and nothing else
    python benchmarks/gpu.py paper --data gpu --output gpu.json --budget 480     # on the GPU machine

Weights are random at the study's real shapes, made on the device; texts and tokenizers are real. The figures are
written after every stage; one that fails leaves its error there, and the next one runs. No stage begins after
`--budget` seconds. Each figure of `correct` has a bound, and that stage fails where one is missed.
docs/how-to/gpu-check.md says what to carry and how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gpu_correct
import gpu_speed
from gpu_inputs import Inputs, prepare
from stillroom.files import write_json
from stillroom.models.precision import allow_determinism, release_memory, resolve_precision
from stillroom.provenance import hardware, package_versions, utc_now
from stillroom.studies import load_study

STAGES: dict[str, Callable[[Inputs, dict[str, Any]], None]] = {
    "ceilings": gpu_speed.ceilings,
    "correct": gpu_correct.correct,
    "capture": gpu_speed.capture,
    "steps": gpu_speed.steps,
    "evaluation": gpu_speed.evaluation,
    "trial": gpu_speed.trial,
    "sharing": gpu_speed.sharing,
    "study": gpu_speed.study,
}
"""In the order they are run. From `steps` on they read the store that `capture` leaves."""

_TINY = (
    "training.precision=float32",
    "teacher.dtype=float32",
    "training.epochs=2",
    "training.warmup_steps=0",
    "training.batch_size=4",
    "signals.batch_tokens=1024",
    "signals.shard_examples=16",
    "evaluation.max_new_tokens=8",
)


class Figures(dict[str, Any]):
    """One stage's figures, printed as they come."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage, self.began = stage, time.perf_counter()

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        shown = json.dumps(value, default=str, ensure_ascii=False)
        print(f"[{time.perf_counter() - self.began:6.1f} s] {self.stage}: {name}: {shown}", flush=True)


def run(inputs: Inputs, stages: list[str], budget: float, output: Path | None) -> dict[str, Any]:
    """Every stage's figures, by name; `failed` has the names of those that broke off."""
    began = time.perf_counter()
    record: dict[str, Any] = {"hardware": hardware(), "versions": package_versions(), "began": utc_now()}
    record |= {"study": inputs.study.name, "tiny": inputs.tiny, "stages": inputs.found, "failed": [], "skipped": []}
    for stage in stages:
        if time.perf_counter() - began > budget:
            record["skipped"].append(stage)
            continue
        figures = inputs.found[stage] = Figures(stage)
        try:
            STAGES[stage](inputs, figures)
        except Exception as error:  # whatever it is, the card is at hand now and the next stage is worth having
            figures["error"] = f"{type(error).__name__}: {str(error)[:2000]}"
            figures["traceback"] = traceback.format_exc().splitlines()
            record["failed"].append(stage)
            torch.use_deterministic_algorithms(False)
        release_memory()
        figures["seconds"] = time.perf_counter() - figures.began
        if output is not None:
            write_json(output, record)
    return record


def options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="", help="default: paper, or quickstart with --tiny")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a field of the study")
    parser.add_argument(
        "--data", type=Path, help="corpus, configurations and tokenizers; made there if it is not there"
    )
    parser.add_argument("--work", type=Path, help="folder for models and stores, kept; default: a temporary one")
    parser.add_argument("--stages", default=",".join(STAGES), help="separated by commas; `none`: only make --data")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no stage begins")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--tiny", action="store_true", help="small models and few examples, to try every line")
    found = parser.parse_args(arguments)
    found.stages = [] if found.stages == "none" else found.stages.split(",")
    if unknown := [stage for stage in found.stages if stage not in STAGES]:
        parser.error(f"--stages: {unknown[0]!r} is none of {', '.join(STAGES)}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = options(arguments)
    allow_determinism()  # what `correct` asks for after much has been computed
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary) / "work"
        work.mkdir(parents=True, exist_ok=True)
        places = [f"paths.results={work / 'results'}", f"paths.store={work / 'store'}"]
        settings = [*asked.set, *(_TINY if asked.tiny else ()), *places]
        study = resolve_precision(load_study(asked.study or ("quickstart" if asked.tiny else "paper"), settings))
        data = asked.data or work / "data"
        if not (data / "corpus").is_dir():
            prepare(study, data)
        record = run(Inputs(study, data, work, asked.tiny), asked.stages, asked.budget, asked.output)
    print("failed:", ", ".join(record["failed"]) or "nothing", "· skipped:", ", ".join(record["skipped"]) or "nothing")
    sys.exit(bool(record["failed"]))


if __name__ == "__main__":
    main()
