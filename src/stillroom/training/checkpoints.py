"""What a trial has done so far, on disk after each epoch, so that it can resume."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.config import Retention, Training, fingerprint
from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_key
from stillroom.files import atomic_path, file_sha256, read_json, remove_tree, write_json
from stillroom.folders import TrialFolder
from stillroom.models.precision import DTYPES
from stillroom.training.collation import Batch
from stillroom.training.distillation_student import PROJECTOR, DistillationStudent, save_student
from stillroom.training.sharding import Ranks, fill, gathered, part_of, spread
from stillroom.training.step import Finite

STATE = "trainer_state.pt"
PROGRESS = "trainer_progress.json"
RESUMING = (STATE, PROGRESS)
"""What a trial resumes from: weights and moments in float32, and what it has done and measured."""
DIGESTS = "digests.json"
"""SHA-256 of every file of a checkpoint, by name: what is read back is checked against it."""


@dataclass
class TrainingState:
    """What a trial has done so far."""

    epoch: int = 0
    skipped: int = 0
    consecutive: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    share_norms: list[dict[str, float]] = field(default_factory=list)
    """Of each term's gradient, in the first steps: what the weights of shares are found from."""

    def count_step(self, finite: Finite | bool, micro: Sequence[Batch], limit: int) -> None:
        """Count skipped steps; stop the trial, naming the examples, when too many follow each other."""
        self.consecutive = 0 if finite else self.consecutive + 1
        self.skipped += bool(self.consecutive)
        if self.consecutive > limit:
            ids = [example for batch in micro for example in batch.examples]
            raise UserError(f"{self.consecutive} steps in a row had non-finite gradients; the last on examples {ids}")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a trial, oldest first."""
    found = [p for p in folder.glob("checkpoint_*") if p.is_dir() and p.name.split("_")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("_")[1]))


def drop_unusable(folder: Path, last: Path | None) -> None:
    """Drop what an earlier training left that this one, which resumes from `last` or starts, would take for newer."""
    whole = checkpoints(folder)
    for old in whole[whole.index(last) + 1 :] if last else whole:
        remove_tree(old)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that a trial can go on from."""
    whole = [p for p in checkpoints(folder) if all((p / name).is_file() for name in RESUMING)]
    return whole[-1] if whole else None


@contextmanager
def saving_checkpoint(
    student: DistillationStudent,
    whole: DistillationStudent,
    ranks: Ranks,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
    folder: Path,
    training: Training,
) -> Iterator[None]:
    """Write the next epoch's `checkpoint_<epoch>` while the student is evaluated inside; at the end it is there, whole.

    The weights lie there in the training precision; `trainer_state.pt` holds them in float32 until the trial is
    finished, with the optimizer while there is an epoch to come. A thread writes that, by far the most of it, so the
    block must leave weights and moments as they are. It must bring `state` to the epoch's end.

    `whole`, from `shard`, has the student's weights from here on. Of several processes the leading one writes.
    """
    epoch, going_on = state.epoch + 1, state.epoch + 1 < training.epochs
    fill(whole, student)
    moments = gathered(optimizer.state_dict(), here=ranks.leads) if going_on else {}
    if not ranks.leads:
        yield
        return
    with atomic_path(TrialFolder(folder).checkpoint(epoch)) as building, ThreadPoolExecutor(1, "checkpoint") as thread:
        building.mkdir()
        save_student(whole, tokenizer, building, DTYPES[training.precision])
        kept = {"student": whole.state_dict()}
        if going_on:
            kept |= {"optimizer": moments, "scaler": scaler.state_dict()}
        written = thread.submit(_write_state, kept, building, whole.model.device)
        yield
        digests = written.result()
        weights = sorted(item for item in digests.items() if item[0].endswith(".safetensors") and item[0] != PROJECTOR)
        state.epochs[-1]["weights"] = fingerprint(weights)
        write_json(building / PROGRESS, vars(state))
        write_json(building / DIGESTS, {**digests, PROGRESS: file_sha256(building / PROGRESS)})


def _write_state(whole: dict[str, Any], folder: Path, device: torch.device) -> dict[str, str]:
    """Put the state on the disk; the digests of all that is in the folder then."""
    beside: Any = nullcontext()
    if device.type == "cuda":  # copies must not wait behind the kernels of the evaluation
        copies = torch.cuda.Stream(device)
        copies.wait_stream(torch.cuda.default_stream(device))
        beside = torch.cuda.stream(copies)
    with beside, (folder / STATE).open("wb") as handle:  # a full disk is an OSError only through a handle of ours
        torch.save(whole, handle)
        handle.flush()
        os.fsync(handle.fileno())
    return _digests(folder)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def require_whole(checkpoint: Path) -> None:
    """Raise `UserError` unless every file of a checkpoint has the bytes that were written.

    What resuming alone needs may be gone: a finished trial has dropped it.
    """
    digests = read_json(checkpoint / DIGESTS)
    for name, digest in digests.items() if isinstance(digests, dict) else ():
        path = checkpoint / name
        if name in RESUMING and not path.exists():
            continue
        if not path.is_file():
            raise UserError(f"{path} is missing; {_REMEDY.format(checkpoint)}")
        if file_sha256(path) != digest:
            raise UserError(
                f"{path} is damaged: its bytes are not those that were written; {_REMEDY.format(checkpoint)}"
            )


_REMEDY = "delete {} and run the same command: the trial resumes from the checkpoint before it, or from the start"


def drop_superseded(folder: Path, keep: Retention, epochs: Sequence[dict[str, Any]], finished: bool) -> None:
    """Drop the checkpoints that `keep` does not ask for, and the state in those that nothing resumes from.

    A trial resumes from its newest checkpoint until its result is on disk.
    """
    *older, newest = checkpoints(folder)
    best = TrialFolder(folder).checkpoint(best_epoch(epochs))
    for old in older:
        if keep == "all" or (keep == "best" and old == best):
            _finish(old)
        else:
            remove_tree(old)
    if finished:
        _finish(newest)
        if keep == "best" and newest != best:
            remove_tree(newest)


def _finish(checkpoint: Path) -> None:
    for name in RESUMING:
        (checkpoint / name).unlink(missing_ok=True)


def best_epoch(epochs: Sequence[dict[str, Any]]) -> int:
    """The epoch of highest validation accuracy; the earliest of several."""
    accuracies = {record["epoch"]: by_key(record["metrics"])["validation", None, "accuracy"] for record in epochs}
    return int(max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch)))


def restore_checkpoint(
    checkpoint: Path,
    student: DistillationStudent,
    whole: DistillationStudent,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> TrainingState:
    """Load weights, optimizer and scaler in place; returns what the trial had done."""
    require_whole(checkpoint)
    saved = torch.load(checkpoint / STATE, map_location=whole.model.device, weights_only=True)
    whole.load_state_dict(saved["student"])
    spread(whole, student)
    if "optimizer" in saved:
        optimizer.load_state_dict(_moments_of_part(saved["optimizer"], optimizer))
        scaler.load_state_dict(saved["scaler"])
    return TrainingState(**read_json(checkpoint / PROGRESS))


def _moments_of_part(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with this process's part of each moment; a count of steps is no moment."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def part(number: int, value: Any) -> Any:
        parameter = parameters[number]
        return part_of(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value

    moments = {number: {name: part(number, v) for name, v in state.items()} for number, state in saved["state"].items()}
    return {**saved, "state": moments}
