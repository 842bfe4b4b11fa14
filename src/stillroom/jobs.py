"""Work that any process can do that sees the same files: one trial, or one share of a capture; and what it gets."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.config import (
    ERROR,
    RESULT,
    Evaluation,
    ModelRef,
    Objective,
    Precision,
    Retention,
    Signals,
    Sweep,
    Training,
    UserError,
)
from stillroom.corpus import Examples, examples_digest, load_corpus
from stillroom.credentials import redact
from stillroom.models import load_model, load_tokenizer
from stillroom.offline_teacher_data import capture_share
from stillroom.progress import Progress, silent
from stillroom.provenance import exclusive, package_digest, read_json, write_json
from stillroom.shares import Share, hold
from stillroom.signal_store import SignalStore
from stillroom.train_student import Trial, train


@contextmanager
def told_of_memory(concurrent: int) -> Iterator[None]:
    """Turn Tune's giving up, when a worker is killed for memory as it starts, into a `UserError` with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if "low on memory" not in str(error):
            raise
        raise UserError(
            f"this machine ran out of memory with {concurrent} trials at once: set sweep.max_concurrent lower, and the "
            "command goes on from each trial's last epoch; or training.micro_batch_size, and all trials begin anew"
        ) from None


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
    keep_checkpoints: Retention

    @property
    def folder(self) -> Path:
        """Where the trial writes."""
        return self.experiment / self.trial.name


@dataclass(frozen=True)
class CapturePlan:
    """All that a capturing process needs, by path."""

    teacher: ModelRef
    tokenizer: ModelRef
    precision: Precision
    signals: Signals
    corpus: Path
    store: Path
    origin: dict[str, Any]


def run_capture(plan: CapturePlan, share: Share, progress: Progress = silent) -> bool:
    """Capture one share of the store; returns whether the store is finished with it."""
    with hold(plan.store, share):  # refused now, not once a large teacher is loaded
        examples = _load_examples(plan.corpus, plan.origin["corpus"])
    teacher, tokenizer = load_model(plan.teacher, plan.precision, "auto"), load_tokenizer(plan.tokenizer)
    return capture_share(teacher, tokenizer, examples.all, plan.signals, plan.store, plan.origin, share, progress)


def run_trial(
    plan: TrialPlan,
    report: Callable[[dict[str, Any]], None] = lambda metrics: None,
    progress: Progress = silent,
    wait: float = 0,
) -> dict[str, Any]:
    """Train one trial to its end, or return its result if it has one; on failure leave `error.json` and raise.

    `wait`: seconds to wait for another process that has this trial, such as one whose sweep is being stopped.
    """
    with exclusive(plan.folder, "trial", wait=wait):
        if finished(plan):
            result: dict[str, Any] = read_json(plan.folder / RESULT)
            return result
        try:
            examples = _load_examples(plan.corpus, SignalStore.open(plan.store).manifest["made_from"]["corpus"])
            result = train(
                plan.trial,
                plan.student,
                plan.training,
                plan.objective,
                plan.evaluation,
                examples,
                plan.store,
                plan.folder,
                minimum_coverage=plan.minimum_coverage,
                keep_checkpoints=plan.keep_checkpoints,
                official=examples.official,
                report=report,
                progress=progress,
            )
        except Exception as error:
            said = {"error": redact(f"{type(error).__name__}: {error}"), "failures": failures(plan) + 1}
            write_json(plan.folder / ERROR, {**said, "traceback": redact(traceback.format_exc())})
            raise
        (plan.folder / ERROR).unlink(missing_ok=True)
        return result


def _load_examples(corpus: Path, digest: str) -> Examples:
    examples, _ = load_corpus(corpus)
    if examples_digest(examples.all) != digest:
        raise UserError(f"{corpus} was made anew, for another study, since this one started; run the command again")
    return examples


def finished(plan: TrialPlan) -> bool:
    """Whether the trial has its result. Its folder's name holds a fingerprint of all it was made from."""
    return (plan.folder / RESULT).is_file()


def failures(plan: TrialPlan) -> int:
    """How often the trial itself has failed since `error.json` was last cleared."""
    path = plan.folder / ERROR
    return int(read_json(path, "failures")["failures"]) if path.is_file() else 0


def error_of(plan: TrialPlan) -> str:
    """Why the trial has no result."""
    path = plan.folder / ERROR
    if path.is_file():
        return str(read_json(path, "error")["error"])
    return "no result and no error message: the process was stopped"


def trial_resources(settings: Sweep, nodes: Sequence[dict[str, float]]) -> tuple[dict[str, float], int]:
    """Resources of a trial, and how many run at once: as many as the GPUs found allow, else the cores.

    `nodes` are the resources of each node; a trial runs within one.
    """
    resources, fit = _fitting(settings.gpus_per_trial, settings.cpus_per_trial, nodes, "sweep.gpus_per_trial")
    return resources, min(fit, settings.max_concurrent or fit)


def worker_resources(workers: int, nodes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Resources of one of so many capturing workers: its part of the GPUs, one at least, and of the cores."""
    gpus, cores = (sum(node.get(name, 0.0) for node in nodes) / workers for name in ("GPU", "CPU"))
    within = max(node.get("GPU", 0.0) for node in nodes)
    return _fitting(min(max(1, int(gpus)), within), max(1, int(cores)), nodes, "--workers")[0]


def _fitting(
    gpus: float, cpus: float, nodes: Sequence[dict[str, float]], asked_by: str
) -> tuple[dict[str, float], int]:
    """What a job gets where there are GPUs, or else cores, and how many such jobs fit; fewer cores stop none."""
    with_gpus = [node for node in nodes if node.get("GPU", 0) > 0 and node.get("CPU", 0) >= 1] if gpus else []
    usable = [node for node in with_gpus or nodes if node.get("GPU", 0) >= gpus or not with_gpus]
    if not usable:
        found = max(node["GPU"] for node in with_gpus)
        raise UserError(f"{asked_by}: {gpus} asked for, {found:g} found on a node")
    if with_gpus:
        part = min(node.get("CPU", 1.0) * gpus / node["GPU"] for node in usable)
        return {"CPU": max(1.0, float(int(min(cpus, part)))), "GPU": gpus}, sum(int(n["GPU"] / gpus) for n in usable)
    cores = max((node.get("CPU", 0.0) for node in usable), default=0.0)
    if not cores:
        raise UserError("no node of the Ray cluster has a CPU to give")
    cpus = min(float(cpus), cores)
    return {"CPU": cpus}, sum(int(node.get("CPU", 0.0) / cpus) for node in usable)


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
