"""The files of a results folder, each read and checked in one place: what is not as it was written goes no further.

Every reader raises `UserError`, which names the file, what is wrong with it and the remedy. What is returned is the
file's own content, unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stillroom.analysis.escaping import control_free
from stillroom.config import BASELINE_LABELS, Analysis, Study
from stillroom.errors import UserError
from stillroom.evaluation.metrics import TASK_MEASURES, Key, Metric, by_key
from stillroom.files import read_json
from stillroom.folders import ResultsFolder, TrialFolder

_OUTDATED = "`stillroom run STUDY` brings it up to date"


class _Shape(BaseModel):
    """What a report reads of a file; other keys are let be."""

    model_config = ConfigDict(strict=True, extra="ignore")


_Plain = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]+$")]
"""Names that become parts of paths, and stand on pages."""


class _Trial(_Shape):
    name: _Plain
    group: str
    seed: int


class _Planned(_Shape):
    study: dict[str, Any]
    snapshot: str
    fingerprint: str
    corpus: str
    baselines: dict[str, str]
    trials: Annotated[list[_Trial], Field(min_length=1)]


class _Term(_Shape):
    weight: float


class _TrialConfig(_Shape):
    distill_type: _Plain
    seed: int
    objective: dict[str, _Term]


class _Metric(_Shape):
    split: Literal["train", "validation", "test"]
    task: str | None
    measure: str
    value: float


class _Epoch(_Shape):
    epoch: int
    step: int
    metrics: Annotated[list[_Metric], Field(min_length=1)]
    skipped_steps: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    data_wait_seconds: float = 0.0


class _Gradient(_Shape):
    step: int
    norms: dict[str, float]
    shares: dict[str, float]


class _Coverage(_Shape):
    tokens: int
    aligned: int
    predictions: int
    aligned_predictions: int
    same_position: int
    token_coverage: float
    prediction_coverage: float


class _Kind(_Shape):
    tokens: int
    aligned: int
    predictions: int
    aligned_predictions: int
    kd_loss: float | None = None


class _Result(_Epoch):
    trial: _Plain
    config: _TrialConfig
    epochs: Annotated[list[_Epoch], Field(min_length=1)]
    gradients: list[_Gradient]
    gradient_shares: dict[str, float]
    coverage: dict[str, _Coverage]
    kinds: dict[str, _Kind] = {}
    test_evaluation_seconds: float = 0.0


class _Baseline(_Shape):
    fingerprint: str
    metrics: list[_Metric]


class _Counts(_Shape):
    source_rows: int
    train: int
    validation: int
    duplicates: int
    too_long: int
    unusable: int
    mislabelled: int = 0


class _TestCounts(_Shape):
    used: int
    source_rows: int
    in_corpus: int


class _Harness(_Shape):
    task: str
    version: str | None
    lm_eval: str
    examples: int


class _Corpus(_Shape):
    fingerprint: str
    counts: dict[str, _Counts]
    test_counts: dict[str, _TestCounts]
    harness: dict[str, _Harness] = {}
    faults: dict[str, str] = {}
    test_faults: dict[str, str] = {}


class _Hardware(_Shape):
    platform: str
    cores: int | None
    gpus: list[str]


class _Stage(_Shape):
    finished: str
    commit: str | None
    versions: dict[str, str]
    hardware: _Hardware
    seconds: float = 0.0
    gpu_joules: float | None = None
    fingerprint: str = ""
    recomputed: dict[str, float] | str | None = None
    with_output_head: dict[str, float] | str | None = None


class _Run(_Shape):
    stages: Annotated[dict[str, _Stage], Field(min_length=1)]


class _Error(_Shape):
    error: str


def _checked(path: Path, shape: type[BaseModel], remedy: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = read_json(path)
        shape.model_validate(value)
    except ValidationError as error:
        raise _damaged(path, _first(error), remedy) from None
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    except (ValueError, RecursionError) as error:  # JSON with a number or a depth that no file of ours has
        raise _damaged(path, str(error), remedy) from None
    return value


def _first(error: ValidationError) -> str:
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"]))
    return f"{where}: {fault['msg']}" if where else fault["msg"]


def _damaged(path: Path, fault: str, remedy: str) -> UserError:
    return UserError(f"{path} is damaged, or of another version: {control_free(fault)}; {remedy}")


def read_planned(results: Path) -> dict[str, Any]:
    """`planned.json`: the study with every field it has, the trials, what teacher data, examples and baselines."""
    path = ResultsFolder(results).planned
    if not path.is_file():
        raise UserError(
            f"{results} has no {path.name}: either it is not a results folder, or you have yet to run `stillroom sweep`"
        )
    planned = _checked(path, _Planned, _OUTDATED)
    try:
        # contrasts apart: those that a study has by default may name groups that it lacks
        analysis = Analysis.model_validate(planned["study"].get("analysis", {}))
        study = Study.model_validate({**planned["study"], "analysis": {}}).model_copy(update={"analysis": analysis})
    except ValidationError as error:
        raise _damaged(path, f"study.{_first(error)}", _OUTDATED) from None
    groups = {group.name for group in study.groups}
    if strange := [trial["name"] for trial in planned["trials"] if trial["group"] not in groups]:
        raise _damaged(path, f"the trial {strange[0]} belongs to no group of the study", _OUTDATED)
    return {**planned, "study": study.model_dump(mode="json")}


def read_results(results: Path, planned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`result.json` of every planned trial that has one, in the plan's order."""
    folders = [(ResultsFolder(results).trial(trial["name"]), trial) for trial in planned["trials"]]
    tasks, harness = scored_tasks(planned["study"]), harness_splits(planned["study"])
    return [_read_result(folder.result, trial, tasks, harness) for folder, trial in folders if folder.result.exists()]


def scored_tasks(study: Mapping[str, Any]) -> list[str]:
    """Tasks whose answers can be right or wrong: all but plain texts."""
    return [task for task, data in study["corpus"]["tasks"].items() if not data.get("text")]


def harness_splits(study: Mapping[str, Any]) -> list[str]:
    """Test splits that lm-evaluation-harness evaluates, in numbers of its own."""
    return [name for name, split in study["evaluation"]["test_splits"].items() if split.get("harness")]


def read_result(path: Path, harness: Sequence[str] | None = None) -> dict[str, Any]:
    """One trial's `result.json`, by itself; `harness`: its study's `harness_splits`, where they are known."""
    result = _checked(path, _Result, _again(path.parent))
    for epoch in (result, *result["epochs"]):
        _require_metrics(path, epoch["metrics"], [("validation", None, "accuracy")], _again(path.parent), harness)
    if wrong := [row["step"] for row in result["gradients"] if row["norms"].keys() != row["shares"].keys()]:
        raise _damaged(
            path, f"gradients at step {wrong[0]}: norms and shares name different terms", _again(path.parent)
        )
    return result


def _read_result(path: Path, trial: Mapping[str, Any], tasks: Sequence[str], harness: Sequence[str]) -> dict[str, Any]:
    result = read_result(path, harness)
    config = result["config"]
    if (result["trial"], config["distill_type"], config["seed"]) != (trial["name"], trial["group"], trial["seed"]):
        raise _damaged(path, f"it is the result of {result['trial']}", _again(path.parent))
    needed: list[Key] = [("validation", task, "accuracy") for task in tasks]
    for epoch in (result, *result["epochs"]):
        _require_metrics(path, epoch["metrics"], needed, _again(path.parent), harness)
        known = {None, *tasks, *harness}
        if strange := [row["task"] for row in epoch["metrics"] if row["task"] not in known]:
            raise _damaged(path, f"metrics: the task {strange[0]} is not in the study", _again(path.parent))
    _require_of_harness(path, result["metrics"], harness, _again(path.parent))
    return result


def _require_of_harness(path: Path, metrics: Sequence[Metric], harness: Sequence[str], remedy: str) -> None:
    if lacking := sorted({*harness} - {str(row["task"]) for row in metrics if row["split"] == "test"}):
        raise _damaged(path, f"metrics: there is no number of the test split {lacking[0]}", remedy)


def _require_metrics(
    path: Path,
    metrics: Sequence[Metric],
    needed: Sequence[Key],
    remedy: str,
    harness: Sequence[str] | None = (),
) -> None:
    """Raise `UserError` unless every number is there once, and those that a report cannot do without are there.

    Of the test splits in `harness` any measure may be there; None: of any test split.
    """
    found = Counter((row["split"], row["task"], row["measure"]) for row in metrics)
    if twice := [key for key, count in found.items() if count > 1]:
        raise _damaged(path, f"metrics: {_described(twice[0])} appears twice", remedy)
    if lacking := [key for key in needed if key not in found]:
        raise _damaged(path, f"metrics: {_described(lacking[0])} is missing", remedy)
    for split, task, measure in found:
        foreign = split == "test" and (harness is None or task in harness)
        if task is not None and measure not in TASK_MEASURES and not foreign:
            raise _damaged(path, f"metrics: {measure} is not a measure of a task", remedy)


def _described(key: Key) -> str:
    split, task, measure = key
    return f"{measure} on the {split} split" + ("" if task is None else f", task {task},")


def _again(trial: Path) -> str:
    return f"delete the folder {trial} and run the sweep again (`stillroom run STUDY`), which trains that trial again"


def read_error(trial: Path) -> str | None:
    """What stopped a trial, as it left it behind; None if it left nothing."""
    path = TrialFolder(trial).error
    if not path.exists():
        return None
    try:
        return str(_checked(path, _Error, "the sweep writes a new one if the trial fails again")["error"])
    except UserError as error:
        return str(error)


def read_baselines(results: Path, suffix: str = "") -> dict[str, dict[str, Any]]:
    """`fingerprint`, `identity`, `metrics`, `answer_nll` by role, of this study alone: an earlier one's are left out.

    `suffix`: "" for the validation split, `_test` for the test splits.
    """
    planned = read_planned(results)
    harness = harness_splits(planned["study"]) if suffix else []
    needed: list[Key] = [("validation", task, "accuracy") for task in (None, *scored_tasks(planned["study"]))]
    if suffix:  # without a task's own test split there is no accuracy over all of them
        needed = (
            [("test", None, "accuracy")] if len(harness) < len(planned["study"]["evaluation"]["test_splits"]) else []
        )
    found = {}
    for role in BASELINE_LABELS:
        path = ResultsFolder(results).baseline(role, suffix)
        if not path.exists():
            continue
        baseline = _checked(path, _Baseline, _measure_again(path))
        if baseline["fingerprint"] != planned["baselines"].get(f"{role}{suffix}"):
            continue
        _require_metrics(path, baseline["metrics"], needed, _measure_again(path), harness)
        _require_of_harness(path, baseline["metrics"], harness, _measure_again(path))
        found[role] = baseline
    return found


def _measure_again(path: Path) -> str:
    return f"delete {path.with_suffix('.json')}, and `stillroom evaluate STUDY` measures the {path.stem} again"


def read_run(results: Path) -> dict[str, Any]:
    """`run.json`: each stage's commit, versions and hardware."""
    return _checked(ResultsFolder(results).run_record, _Run, "delete it, and `stillroom run STUDY` writes it again")


def read_corpus(results: Path) -> dict[str, Any]:
    """`corpus.json`: what the examples are, and what was dropped on the way."""
    return _checked(ResultsFolder(results).corpus_facts, _Corpus, _draw_again(results))


def _draw_again(results: Path) -> str:
    return f"delete {ResultsFolder(results).corpus}, and `stillroom run STUDY` makes it again"


def read_examples(results: Path, counts: Mapping[str, Mapping[str, int]]) -> pd.DataFrame:
    """Every example of the study: example_id, task, split (train, validation, test), prompt, answer, …

    `counts`: those of `corpus.json`, which the rows must bear out.
    """
    path, remedy = ResultsFolder(results).corpus_rows, _draw_again(results)
    rows = _read_table(path, dict.fromkeys(("example_id", "task", "split", "prompt", "answer"), "text"), remedy)
    there = rows.groupby(["task", "split"]).size()
    for task, split_counts in counts.items():
        for split in ("train", "validation"):
            if split_counts[split] != (found := int(there.get((task, split), 0))):
                raise _damaged(path, f"{found} {split} examples of {task}, not {split_counts[split]}", remedy)
    return rows


def _read_predictions(path: Path, metrics: Sequence[Metric], remedy: str) -> pd.DataFrame:
    """Predictions on the validation split, sorted by example; `metrics` are those that were measured on them."""
    if not path.exists():
        raise UserError(f"{path} is missing: the report needs every finished trial's predictions; {remedy}")
    columns = {"example_id": "text", "task": "text", "prediction": "answer", "gold": "text", "correct": "truth"}
    rows = _read_table(path, {**columns, "scores": "numbers"}, remedy)
    measured = by_key(metrics)
    for task, task_rows in [(None, rows), *rows.groupby("task")]:
        key, value = ("validation", task, "accuracy"), task_rows["correct"].mean()
        if not abs(value - measured.get(key, float("nan"))) < 1e-9:
            raise _damaged(
                path, f"{_described(key)} is {value:.4f} by its rows, which are not the ones that were measured", remedy
            )
    return rows.sort_values("example_id", ignore_index=True)


def read_trial_predictions(trial: Path, result: Mapping[str, Any]) -> pd.DataFrame:
    """A finished trial's predictions on the validation split."""
    return _read_predictions(TrialFolder(trial).predictions, result["metrics"], _again(trial))


def read_baseline_predictions(results: Path, role: str, metrics: Sequence[Metric]) -> pd.DataFrame:
    """A baseline's predictions on the validation split."""
    path = ResultsFolder(results).baseline_predictions(role)
    return _read_predictions(path, metrics, _measure_again(path))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_numbers(kind: pa.DataType) -> bool:
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_floating(kind.value_type))


_KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "text": _is_text,
    "truth": pa.types.is_boolean,
    "answer": lambda kind: _is_text(kind) or pa.types.is_null(kind),
    "numbers": lambda kind: _is_numbers(kind) or pa.types.is_null(kind),
}
_MAY_LACK_VALUES = {"answer", "numbers"}


def _read_table(path: Path, columns: Mapping[str, str], remedy: str) -> pd.DataFrame:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        for name, kind in columns.items():
            if table.column_names.count(name) != 1:
                raise ValueError(f"it has no column {name}")
            whole = kind in _MAY_LACK_VALUES or not table[name].null_count
            if not (whole and _KINDS[kind](table.schema.field(name).type)):
                raise ValueError(f"the column {name} has values that are not {kind}")
        frame: pd.DataFrame = table.to_pandas()
    # a torn file shows itself in many ways: as bytes that are no Parquet, no UTF-8, or a size beyond all memory
    except (OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise _damaged(path, next(iter(str(error).splitlines()), type(error).__name__), remedy) from None
    return frame
