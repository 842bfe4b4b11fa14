"""Work for any process that sees the same files: one trial, or one slice of a capture."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.config import (
    Evaluation,
    Lora,
    ModelRef,
    Objective,
    Precision,
    Quantization,
    Retention,
    Signals,
    Training,
)
from stillroom.credentials import redact
from stillroom.data.corpus import Examples, examples_digest, load_corpus
from stillroom.data.tasks import Example
from stillroom.errors import UserError
from stillroom.evaluation.generation import teacher_answers
from stillroom.evaluation.harness_tasks import Harness
from stillroom.files import exclusive, read_json, write_json
from stillroom.folders import TrialFolder
from stillroom.models.adapters import lora_adapter
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.offline_teacher_data.capturing import capture_slice
from stillroom.offline_teacher_data.shards import Slice, hold
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.progress import Progress, silent
from stillroom.provenance import package_digest
from stillroom.training.sharding import ALONE, Ranks
from stillroom.training.train_student import Report, Trial, train


@dataclass(frozen=True)
class TrialPlan:
    """All that one trial needs, by path."""

    trial: Trial
    student: ModelRef
    training: Training
    objective: Objective
    evaluation: Evaluation
    corpus: Path
    store: Path
    experiment: Path
    minimum_coverage: float
    max_length: int
    keep_checkpoints: Retention
    lora: Lora | None

    @property
    def folder(self) -> Path:
        """Where the trial writes."""
        return self.experiment / self.trial.name

    @property
    def files(self) -> TrialFolder:
        """What lies there, by name."""
        return TrialFolder(self.folder)


@dataclass(frozen=True)
class CapturePlan:
    """All that a capturing process needs, by path."""

    teacher: ModelRef
    tokenizer: ModelRef
    precision: Precision
    signals: Signals
    evaluation: Evaluation
    corpus: Path
    store: Path
    origin: dict[str, Any]
    quantization: Quantization | None = None


def run_capture(plan: CapturePlan, slice_: Slice, progress: Progress = silent) -> bool:
    """Capture one slice of the store; returns whether the store is finished with it."""
    with hold(plan.store, slice_):  # refused now, not once a large teacher is loaded
        examples = _load_examples(plan.corpus, plan.origin["corpus"])
    teacher = load_model(plan.teacher, plan.precision, "auto", plan.quantization)
    tokenizer = load_tokenizer(plan.tokenizer)

    def answer(asked: Sequence[Example]) -> list[str | None]:
        return teacher_answers(teacher, tokenizer, asked, plan.evaluation)

    kept = answer if plan.signals.teacher_answers else None
    return capture_slice(
        teacher, tokenizer, examples.all, plan.signals, plan.store, plan.origin, slice_, progress, kept
    )


def run_trial(
    plan: TrialPlan,
    report: Report = lambda metrics: None,
    progress: Progress = silent,
    wait: float = 0,
    by: Callable[[TrialPlan, Report, Progress], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train one trial to its end, or return its result if it has one; on failure leave `error.json` and raise.

    `wait`: seconds to wait for another process that has this trial, such as one whose sweep is being stopped. `by`:
    what trains it, if not this process.
    """
    with exclusive(plan.folder, "trial", wait=wait):
        if finished(plan):
            result: dict[str, Any] = read_json(plan.files.result)
            return result
        try:
            result = (by or train_plan)(plan, report, progress)
        except Exception as error:
            said = {"error": redact(f"{type(error).__name__}: {error}"), "failures": failures(plan) + 1}
            write_json(plan.files.error, {**said, "traceback": redact(traceback.format_exc())})
            raise
        plan.files.error.unlink(missing_ok=True)
        return result


def train_plan(
    plan: TrialPlan, report: Report = lambda metrics: None, progress: Progress = silent, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Train a trial in this process, which is one of `ranks`; returns its result."""
    examples = _load_examples(plan.corpus, SignalStore.open(plan.store).manifest["made_from"]["corpus"])
    splits = plan.evaluation.harness_splits
    return train(
        plan.trial,
        plan.student,
        plan.training,
        plan.objective,
        plan.evaluation,
        examples,
        plan.store,
        plan.folder,
        minimum_coverage=plan.minimum_coverage,
        max_length=plan.max_length,
        keep_checkpoints=plan.keep_checkpoints,
        adapter=lora_adapter(plan.lora) if plan.lora else None,
        test=examples.test,
        harness=Harness.load(splits, examples.harness) if splits else None,
        report=report,
        progress=progress,
        ranks=ranks,
    )


def _load_examples(corpus: Path, digest: str) -> Examples:
    examples, _ = load_corpus(corpus)
    if examples_digest(examples.all) != digest:
        raise UserError(f"{corpus} was rebuilt for another study after this one started; run the command again")
    return examples


def finished(plan: TrialPlan) -> bool:
    """Whether the trial has its result. Its folder's name holds a fingerprint of all it was made from."""
    return plan.files.result.is_file()


def failures(plan: TrialPlan) -> int:
    """How often the trial itself has failed since `error.json` was last cleared."""
    path = plan.files.error
    return int(read_json(path, "failures")["failures"]) if path.is_file() else 0


def error_of(plan: TrialPlan) -> str:
    """Why the trial has no result."""
    path = plan.files.error
    if path.is_file():
        return str(read_json(path, "error")["error"])
    return "no result and no error message: the process was stopped"


def unseen(digest: str, paths: list[Path], probes: list[Path]) -> list[str]:
    """What this process sees otherwise than the one that asks; empty where the work can be done here.

    `digest` is that one's `package_digest`, `paths` must be there, and `probes` are files it has just written into
    folders that both must be able to write: each is removed.
    """
    faults = []
    if package_digest() != digest:
        faults.append(f"its stillroom ({Path(__file__).parent}) is not the one used here; install the same version")
    faults += [f"{path} is not there" for path in paths if not path.exists()]
    for probe in probes:
        try:
            probe.unlink()
        except FileNotFoundError:
            faults.append(f"{probe.parent} is not the folder of that name here")
        except OSError as error:
            faults.append(f"{probe.parent} cannot be written: {error.strerror}")
    return faults
